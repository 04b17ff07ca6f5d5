"""From nothing to the shipped folder: texts, tokenizer, training, export, gates. What is there already is kept.

Chapter: ``pocket``.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from sae_lib.data import read_records
from sae_lib.pocket import texts, tokenizer
from sae_lib.pocket.card import card
from sae_lib.pocket.gates import gates
from sae_lib.pocket.provenance import sha256, write_bytes, write_json
from sae_lib.pocket.train import new_model, train

HELD_OUT = 400  # validation records on which losses are reported during the training
FAST_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
    "THP_MEM_ALLOC_ENABLE": "1",
    "OMP_NUM_THREADS": "1",
}


def restart_with_fast_memory() -> None:
    """Start this command again, once, with an allocator that keeps its pages: training is five times faster so.

    The GNU C library reads these settings only when a process starts.
    """
    if any(os.environ.get(name) != value for name, value in FAST_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, "-m", "sae_lib", *sys.argv[1:]], os.environ | FAST_MEMORY)


def build(out: Path, tokens: int, seed: int) -> None:
    """Make ``out/texts`` and ``out/pocket``; while it trains, its checkpoint is in ``out/runs``.

    Args:
        out: folder; texts and tokenizer that are in it are used.
        tokens: training tokens.
        seed: of texts, weights and data.
    """
    folder, text_folder, checkpoint = out / "pocket", out / "texts", out / "runs" / "pocket.safetensors"
    if (folder / "provenance.json").exists():
        print(f"{folder} is complete; to make another model, name another folder with --out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.parent.mkdir(exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        tokenizer.save(texts.make_tokenizer(seed), folder)
    if not (text_folder / "provenance.json").exists():
        texts.make_texts(text_folder, AutoTokenizer.from_pretrained(folder), seed)
    words = json.loads((text_folder / "words.json").read_text(encoding="utf-8"))
    taught = sorted(words["train"] + words["validation"] + words["test"])
    prose = [record.text for record in read_records(text_folder / "train.jsonl.xz") if record.register == "prose"]
    held_out = read_records(text_folder / "validation.jsonl.xz")[:HELD_OUT]
    model, state = train(checkpoint, folder, taught, prose, held_out, tokens, seed)
    export(model, folder)
    made = provenance(folder, text_folder, state, seed)
    write_bytes(folder / "README.md", card(made).encode())
    write_json(folder / "provenance.json", made)
    checkpoint.unlink()
    checkpoint.parent.rmdir()


def export(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write the model in half precision as an ordinary Hugging Face folder."""
    half = new_model(0)
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(folder)


def provenance(folder: Path, text_folder: Path, state: dict, seed: int) -> dict:
    """Where the model in a folder comes from and what it can do, on validation and on test."""
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    encode = AutoTokenizer.from_pretrained(folder)
    words = json.loads((text_folder / "words.json").read_text(encoding="utf-8"))
    measured = {}
    for split in ("validation", "test"):
        found = gates(model, encode, read_records(text_folder / f"{split}.jsonl.xz"), words, split)
        measured[split] = {name: gate._asdict() | {"passes": gate.passes} for name, gate in found.items()}
        print(split, {name: round(gate.value, 4) for name, gate in found.items()})
    return {
        "commits": state["commits"],
        "seed": seed,
        "tokens": state["tokens"],
        "seconds": round(state["seconds"]),
        "device": f"CPU, one thread of {platform.machine()}, bfloat16 autocast",
        "versions": {"python": platform.python_version()} | packages,
        "gates": measured,
        "history": state["history"],
        "sha256": {
            "model.safetensors": sha256(folder / "model.safetensors"),
            "tokenizer.json": sha256(folder / "tokenizer.json"),
            **{f"texts/{path.name}": sha256(path) for path in sorted(text_folder.glob("*.xz"))},
        },
        "licence": "MIT; trained on this project's texts and, under PSF-2.0 (texts/PSF-LICENSE.txt), prose of CPython",
    }
