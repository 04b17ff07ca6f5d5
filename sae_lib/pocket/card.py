"""The model card: what the embedded model is, written from its provenance, so that no number in it is typed by hand.

Chapter: ``pocket``.
"""

from __future__ import annotations

TEMPLATE = """---
license: mit
language: [en, fr, de, es]
pipeline_tag: text-generation
---

# pocket

A language model small enough to ship: GPT-2's architecture with 4 layers, d_model 128, 4 heads, d_mlp 512, context
128, tied embeddings, {vocabulary} words, 1.60 M parameters, stored in half precision. It is made by one command of
*Sparse Autoencoders, Put to the Test*, `python -m sae_lib pocket`, and is meant for one thing: to have a real
network whose texts are known, with which sparse autoencoders can be studied in seconds on a laptop. It is not
useful for anything else.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
```

The tokenizer puts `<|bos|>` in front; the model has always seen it at position 0. Each of its words is one token.

## Texts

Stories, facts, sentences in three foreign languages and small programs come from the project's generator, which
knows its own latent variables; spelling lines teach the first letters of words; prose is taken from the
documentation, docstrings and comments of CPython (PSF licence, `../texts/PSF-LICENSE.txt`). The generated texts of
the training are fresh; the prose was repeated.

## Training

{tokens:,} tokens in {minutes:.0f} minutes; seed {seed}; {versions}.
Device: {device}. The larger variant that an accelerator would allow was not tried: none was at hand.

## What it can do

Measured on the weights as stored. The choice was made on validation; test was looked at once.

| | validation | test | required |
|---|---|---|---|
{gates}

`untaught_probe` is the control of `probe`: words whose letters were never taught. So the probe finds what was taught,
and that is no discovery.

Loss in nats a token on validation records during the training:

{history}

## What it cannot do

Its prose is not coherent, its stories have no plot, and it knows no more of the world than two dozen topics of a
word list. Weights of a second run need not have equal bits on another processor; `provenance.json` has the hashes
of these.
"""


def card(made: dict) -> str:
    """The text of the card, from the content of ``provenance.json``."""
    registers = [name for name in made["history"][0] if name != "tokens"]
    history = [["tokens", *registers], ["---"] * (len(registers) + 1)]
    history += [[f"{row['tokens']:,}", *(f"{row[name]:.2f}" for name in registers)] for row in made["history"]]
    validation, test = made["gates"]["validation"], made["gates"]["test"]
    return TEMPLATE.format(
        vocabulary="6,144",
        tokens=made["tokens"],
        minutes=made["seconds"] / 60,
        device=made["device"],
        seed=made["seed"],
        versions=", ".join(f"{name} {number}" for name, number in made["versions"].items()),
        gates="\n".join(_row(name, gate, test[name]) for name, gate in validation.items()),
        history="\n".join("| " + " | ".join(cells) + " |" for cells in history),
    )


def _row(name: str, validation: dict, test: dict) -> str:
    required = "none" if validation["most"] is None else f"at most {validation['most']}"
    if validation["least"] is not None:
        required = f"at least {validation['least']}"
    return f"| {name} | {validation['value']:.3f} | {test['value']:.3f} | {required} |"
