"""The training of the embedded language model: rows of text, one loop, checkpoints.

A row has 128 tokens: it starts with ``<|bos|>`` and the beginning of a document, further documents follow, each after
its own ``<|bos|>``, and the last is cut. So position 0 is always ``<|bos|>``, as in use, where each record is fed
alone. All documents of a row are of one group: generated (fresh ones, never repeated), prose (records of the train
split, again and again) or spelling.

The rows of block ``b`` depend on the seed and ``b`` alone, so a run that was stopped goes on with the rows that it
would have had. A second process prepares the next block. Chapter: ``pocket``.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Thread

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, Integer
from safetensors.torch import load_file, safe_open, save
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_lib.data import Record
from sae_lib.pocket import grammar, spelling
from sae_lib.pocket.dice import Dice
from sae_lib.pocket.marks import length, plain
from sae_lib.pocket.provenance import commit, write_bytes
from sae_lib.pocket.tokenizer import CONTEXT, VOCABULARY

ROWS = 16  # in a batch
STEPS = 64  # batches in a block
LEARNING_RATE = 3e-3
WARM_UP = 300_000  # tokens
START = 3_000_000  # tokens with half of the rows spelling, at most a tenth of all
SHARES = {"generated": 0.54, "prose": 0.24, "spelling": 0.22}
SHARES_AT_START = {"generated": 0.30, "prose": 0.20, "spelling": 0.50}
CHECKPOINT_SECONDS = 120
EVALUATION_TOKENS = 1_000_000


def new_model(seed: int) -> GPT2LMHeadModel:
    """GPT-2 in small: 4 layers, d_model 128, 4 heads, d_mlp 512, context 128, tied embeddings, 1.60 M parameters."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_embd=128,
            n_layer=4,
            n_head=4,
            n_inner=512,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
            attn_implementation="eager",
        )
    )


class Rows:
    """Makes blocks of training rows.

    Args:
        tokenizer: folder of the tokenizer.
        words: spelling words that are taught.
        prose: texts of the prose.
        seed: of the whole run.
    """

    def __init__(self, tokenizer: Path, words: list[str], prose: list[str], seed: int) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tokenizer)
        self.words, self.seed = words, seed
        self.prose = [encoding.ids for encoding in self.tokenizer.backend_tokenizer.encode_batch(prose)]

    def block(self, place: int, shares: dict[str, float]) -> Integer[np.ndarray, "steps rows context"]:
        """Token ids of block ``place``, as uint16; ``shares`` of the rows belong to each group."""
        dice = Dice(f"{self.seed} block {place}")
        rows: list[list[int]] = [[] for _ in range(STEPS * ROWS)]
        waiting: list[tuple[int, str]] = []  # row and text, to be encoded together
        for number, row in enumerate(rows):
            group = dice.weighted(shares)
            room = CONTEXT
            while room > 0:
                if group == "prose":
                    row += (ids := dice.pick(self.prose))
                    room -= len(ids)
                else:
                    document = spelling.document(dice, self.words) if group == "spelling" else grammar.document(dice)
                    waiting.append((number, plain(document["marked"])))
                    room -= length(document["marked"]) + 1
        encodings = self.tokenizer.backend_tokenizer.encode_batch([text for _, text in waiting])
        for (number, _), encoding in zip(waiting, encodings, strict=True):
            rows[number] += encoding.ids
        return np.array([row[:CONTEXT] for row in rows], dtype=np.uint16).reshape(STEPS, ROWS, CONTEXT)


_rows: Rows  # of the second process


def _prepare(*arguments) -> None:
    """Set the second process up; it ends with the first, however that ends."""
    global _rows
    _rows = Rows(*arguments)
    Thread(target=lambda: os._exit(multiprocessing.parent_process().join() or 1), daemon=True).start()


def _block(place: int, shares: dict[str, float]) -> np.ndarray:
    return _rows.block(place, shares)


def blocks(first: int, last: int, start: int, rows: tuple) -> Iterator[Integer[np.ndarray, "steps rows context"]]:
    """Blocks ``first`` to ``last``, more spelling in those before ``start``; a second process prepares the next."""

    def ask(place: int):
        return pool.submit(_block, place, SHARES_AT_START if place < start else SHARES)

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_prepare, initargs=rows) as pool:
        coming = ask(first)
        for place in range(first, last):
            block = coming.result()
            if place + 1 < last:
                coming = ask(place + 1)
            yield block


def learning_rate(done: float) -> float:
    """A straight line down to zero; ``done`` is the number of steps over all steps, in [0, 1]."""
    return LEARNING_RATE * (1 - done)


@torch.no_grad()
def losses(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, records: list[Record]) -> dict[str, float]:
    """Mean loss in nats over the tokens of each register; each record alone after ``<|bos|>``."""
    total: dict[str, float] = {}
    count: dict[str, int] = {}
    model.eval()
    for start in range(0, len(records), 64):
        batch = records[start : start + 64]
        inputs = tokenizer([record.text for record in batch], padding=True, return_tensors="pt")
        logits, asked = model(**inputs).logits[:, :-1], inputs.input_ids[:, 1:]
        nats = F.cross_entropy(logits.flatten(0, 1), asked.flatten(), reduction="none").view_as(asked)
        real = inputs.attention_mask[:, 1:]
        for record, loss, tokens in zip(batch, (nats * real).sum(1).tolist(), real.sum(1).tolist(), strict=True):
            total[record.register] = total.get(record.register, 0.0) + loss
            count[record.register] = count.get(record.register, 0) + tokens
    return {register: total[register] / count[register] for register in sorted(total)}


def _save(path: Path, model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """One file: weights, moments of the optimizer, and where the run is."""
    names = [name for name, _ in model.named_parameters()]
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, moments in zip(names, optimizer.state.values(), strict=True):
        tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    write_bytes(path, save(tensors, {"state": json.dumps(state)}))


def _resume(path: Path, model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer) -> dict:
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"model.{name}"])
        prefix = f"optimizer.{name}."
        optimizer.state[parameter] = {key[len(prefix) :]: tensors[key] for key in tensors if key.startswith(prefix)}
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["state"])


def train(
    checkpoint: Path,
    tokenizer: Path,
    words: list[str],
    prose: list[str],
    held_out: list[Record],
    tokens: int,
    seed: int,
) -> tuple[GPT2LMHeadModel, dict]:
    """Train, or go on from the checkpoint.

    Args:
        checkpoint: file that holds the state of the run; a run that is done leaves it there.
        tokenizer: folder of the tokenizer.
        words: spelling words to teach.
        prose: texts of the prose to learn from.
        held_out: records on which losses are reported.
        tokens: length of the run; rounded up to whole batches of 2,048.
        seed: decides initial weights and data.

    Returns:
        the model and ``{"step", "tokens", "seconds", "history", "commits"}``, a commit for each start.

    Raises:
        ValueError: the checkpoint is of a run with another seed or length.
    """
    torch.set_num_threads(1)  # two are slower than one on a model this small
    model = new_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    encode = AutoTokenizer.from_pretrained(tokenizer)
    steps = math.ceil(tokens / (ROWS * CONTEXT))
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "history": [], "commits": [], "of": [tokens, seed]}
    if checkpoint.exists():
        state = _resume(checkpoint, model, optimizer)
        if state["of"] != [tokens, seed]:
            raise ValueError(
                f"{checkpoint} is of a run with tokens, seed = {state['of']}, got {[tokens, seed]}; remove it first"
            )
    state["commits"].append(commit())
    first, last = state["step"] // STEPS, math.ceil(steps / STEPS)
    begun, saved = time.monotonic() - state["seconds"], time.monotonic()
    start_blocks = math.ceil(min(START, tokens / 10) / (STEPS * ROWS * CONTEXT))
    bar = tqdm(total=steps, initial=state["step"], unit="step", desc="pocket", mininterval=5)
    for place, block in enumerate(blocks(first, last, start_blocks, (tokenizer, words, prose, seed)), first):
        for batch in block[max(0, state["step"] - place * STEPS) : steps - place * STEPS]:
            warm = min(1.0, (state["tokens"] + 1) / WARM_UP)
            optimizer.param_groups[0]["lr"] = warm * learning_rate(state["step"] / steps)
            loss = _step(model, optimizer, torch.from_numpy(batch.astype(np.int64)))
            state["step"] += 1
            state["tokens"] += batch.size
            state["seconds"] = time.monotonic() - begun
            bar.update()
            if state["step"] % 20 == 0:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if (
                state["step"] == steps
                or state["tokens"] // EVALUATION_TOKENS > (state["tokens"] - batch.size) // EVALUATION_TOKENS
            ):
                report = losses(model, encode, held_out)
                state["history"].append(
                    {"tokens": state["tokens"], **{key: round(value, 4) for key, value in report.items()}}
                )
                bar.write(
                    " ".join(f"{key} {value:.3f}" for key, value in report.items())
                    + f" after {state['tokens']:,} tokens"
                )
            if state["step"] == steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
                _save(checkpoint, model, optimizer, state)
                saved = time.monotonic()
    bar.close()
    return model.eval(), state


def _step(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, ids: Int[Tensor, "rows context"]) -> float:
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
