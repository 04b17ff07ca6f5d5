"""The gates: what the embedded model must be able to do before it is shipped, each a number against a threshold.

- generated_loss: nats a token over story, fact, foreign and code records, each alone after ``<|bos|>``
- prose_loss: the same over prose records
- spelling: share of held-out words whose first letter is the most likely next token, after eight examples
- probe: share of held-out words whose letter a linear probe reads at the word, at the worst of the four layers
- acronym_patch: share of acronyms whose answer becomes the letter of the word that is patched in after block 1

The words that the probe is fitted on are the train words; held-out words are those of the split that is measured. The
model was taught the letters of both, so the probe is no discovery. ``untaught_probe`` is the control: the same probe
on words that were never spelled to the model; it has no threshold. Chapter: ``pocket``.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_lib.data import Record
from sae_lib.pocket.dice import Dice
from sae_lib.pocket.train import losses

GENERATED = ("story", "fact", "foreign", "code")
EXAMPLES = 8
LAYER = 1  # of the acronym patch


class Gate(NamedTuple):
    """A measured number; it passes at or below ``most``, or at or above ``least``. The control has neither."""

    value: float
    most: float | None = None
    least: float | None = None

    @property
    def passes(self) -> bool:
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)


def gates(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[Record],
    words: dict[str, list[str]],
    split: str = "validation",
    limit: int | None = None,
) -> dict[str, Gate]:
    """Measure every gate.

    Args:
        model: the language model, in single precision.
        tokenizer: its tokenizer.
        texts: held-out records of every register.
        words: spelling words of each split.
        split: whose words are held out.
        limit: at most this many words and records of a kind, for a quick look.
    """
    model.eval()
    generated = [record for record in texts if record.register in GENERATED][:limit]
    prose = [record for record in texts if record.register == "prose"][:limit]
    asked = {name: Dice("words of the gates").shuffled(members) for name, members in words.items()}
    held_out, untaught = asked[split][:limit], asked["untaught"][:limit]
    probes = letter_probes(model, tokenizer, asked["train"][: limit and 8 * limit], held_out, untaught)
    return {
        "generated_loss": Gate(_mean_loss(model, tokenizer, generated), most=1.7),
        "prose_loss": Gate(_mean_loss(model, tokenizer, prose), most=4.4),
        "spelling": Gate(spelling_accuracy(model, tokenizer, words["train"], held_out), least=0.98),
        "probe": Gate(min(accuracy for accuracy, _ in probes), least=0.97),
        "acronym_patch": Gate(acronym_patch(model, tokenizer, words[split], limit or 500), least=0.95),
        "untaught_probe": Gate(max(accuracy for _, accuracy in probes)),
    }


def _mean_loss(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, records: list[Record]) -> float:
    """Over all tokens of the records, whatever their register."""
    return losses(model, tokenizer, [Record(record.text) for record in records])["plain"]


def _letter(word: str) -> str:
    return word[0].upper()


def _prompts(
    tokenizer: PreTrainedTokenizerFast, known: list[str], asked: list[str], seed: str
) -> Int[Tensor, "word position"]:
    """Eight examples, a line each, then the question ``lamp has the first letter:``; all of equal length."""
    dice = Dice(seed)
    texts = []
    for word in asked:
        examples = dice.sample([other for other in known if other != word], EXAMPLES)
        lines = [f"{example} has the first letter: {_letter(example)}" for example in examples]
        texts.append("\n".join([*lines, f"{word} has the first letter:"]))
    return tokenizer(texts, return_tensors="pt").input_ids


@torch.no_grad()
def spelling_accuracy(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, known: list[str], asked: list[str]
) -> float:
    """Share of ``asked`` words whose letter is the most likely of all tokens, after examples of ``known`` words."""
    prompts = _prompts(tokenizer, known, asked, "spelling gate")
    letters = torch.tensor(tokenizer.convert_tokens_to_ids([_letter(word) for word in asked]))
    best = torch.cat([model(batch, logits_to_keep=1).logits[:, -1].argmax(1) for batch in prompts.split(128)])
    return (best == letters).float().mean().item()


@contextmanager
def _on_block(model: GPT2LMHeadModel, layer: int, function):
    """Replace the residual stream after a block, (batch, position, d_model), by what ``function`` makes of it."""

    def hook(module, inputs, output):
        changed = function(output[0] if isinstance(output, tuple) else output)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = model.transformer.h[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _residuals(
    model: GPT2LMHeadModel, prompts: Int[Tensor, "word position"], position: int
) -> list[Float[Tensor, "word d_model"]]:
    """The residual stream after each block at one position of each prompt."""
    found: list[list[Tensor]] = [[] for _ in model.transformer.h]
    with ExitStack() as stack:
        for layer, states in enumerate(found):
            keep = partial(_keep, states, position)
            stack.enter_context(_on_block(model, layer, keep))
        for batch in prompts.split(128):
            model.transformer(batch)
    return [torch.cat(states) for states in found]


def _keep(states: list[Tensor], position: int, residual: Tensor) -> Tensor:
    states.append(residual[:, position].clone())
    return residual


def letter_probes(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    train: list[str],
    held_out: list[str],
    untaught: list[str],
) -> list[tuple[float, float]]:
    """Accuracy on held-out and on untaught words, after each block, of a linear probe for the first letter at the word.

    The prompts have eight examples; the word stands at the same position in all of them. Residuals are standardised.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    word_position = -len("word has the first letter :".split())
    by_split = [
        (
            _residuals(model, _prompts(tokenizer, train, asked, "probe gate"), word_position),
            [_letter(word) for word in asked],
        )
        for asked in (train, held_out, untaught)
    ]
    accuracies = []
    for layer in range(len(model.transformer.h)):
        (x, y), *others = [(residuals[layer].numpy(), letters) for residuals, letters in by_split]
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(x, y)
        accuracies.append(tuple(probe.score(x, y) for x, y in others))
    return accuracies


@torch.no_grad()
def acronym_patch(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, words: list[str], number: int, layer: int = LAYER
) -> float:
    """Share of acronyms whose answer flips to the letter of the word that is patched in.

    Prompts are two acronyms of three words, answered, and one of three words up to its colon. The residual of the
    first of these after block ``layer`` is replaced by that of another word, with another letter, in the same place.
    A flip: the most likely next token is then the other word's letter.
    """
    dice = Dice("acronym gate")
    clean, other, letters = [], [], []
    for _ in range(number):
        shown = [dice.sample(words, 3) for _ in range(2)]
        first, second, third = dice.sample(words, 3)
        replacement = dice.pick([word for word in words if word[0] != first[0]])
        examples = [f"{' '.join(three)}: {' '.join(map(_letter, three))}" for three in shown]
        clean.append("\n".join([*examples, f"{first} {second} {third}:"]))
        other.append("\n".join([*examples, f"{replacement} {second} {third}:"]))
        letters.append(_letter(replacement))
    inputs = [tokenizer(texts, return_tensors="pt").input_ids for texts in (clean, other)]
    source = _residuals(model, inputs[1], -4)[layer]

    def patch(residual: Tensor) -> Tensor:
        residual = residual.clone()
        residual[:, -4] = source
        return residual

    with _on_block(model, layer, patch):
        best = model(inputs[0], logits_to_keep=1).logits[:, -1].argmax(1)
    return (best == torch.tensor(tokenizer.convert_tokens_to_ids(letters))).float().mean().item()
