"""A model and a site -> a stream of shuffled batches of activations, for training and for evaluation.

Texts go through a language model, each alone after one BOS; tensors go through any `torch.nn.Module`. Either way the
forward pass ends at the site. The activations go through a buffer that is allocated once, filled, shuffled by permuting
the *numbers* of its rows, and served down to half before it is filled again: a token is copied once in and once out.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lib.cache import cache, source_of
from sae_lib.cached import CachedActivations
from sae_lib.data import Batch
from sae_lib.distributed import divided
from sae_lib.groups import Group
from sae_lib.models import LanguageModel, Tokens, empty_text, nearest
from sae_lib.modules import orbits_at, rows_at

TEXTS_AT_ONCE = 64
"""Texts that are tokenized in one call."""
FORWARDS_AT_ONCE = 16
"""Forward passes whose windows are sorted by length together, so that little is spent on padding."""
FINGERPRINT_TEXTS, FINGERPRINT_INPUTS = 1000, 16
INPUTS_AT_ONCE = 256
"""Rows in a batch of inputs, where the inputs are one tensor."""


class Activations:
    """Shuffled batches of a model's activations at a site. Chapter `pocket`.

    Each `iter(stream)` starts anew and gives the same bits. The stream ends with what it reads; its last batch may be
    short, so that no token is lost. Batches are float32, on the model's device. Several processes
    (`sae_lib.distributed`) share the forward passes, so they must iterate together; each gets all batches.

    Of **texts**, read by a `LanguageModel`, every token is taken but BOS and padding. A text longer than the context is
    cut into windows of context - 1 tokens, each after a BOS of its own. Texts that can be indexed are read in an order
    drawn from the seed, others in their own. With `grad=True` a window's last token is left out too: it has no next
    token, so its gradient is zero.

    Of **inputs**, read by any other module, the output of the submodule `site` is taken, when it is first called (of a
    tuple, the first item): rows of the last dimension where it is (n, d) or (n, pos, d), and a row of d_in = channels
    for each place where it is (n, channels, height, width). The module is run in evaluation mode and left as it was.

    Args:
        model: a `LanguageModel`, or any `torch.nn.Module`.
        site: one of `model.sites()`, or a name in `model.named_modules()`.
        texts: strings, records (anything with `.text`) or mappings with `"text"`; read lazily, more than once.
        inputs: batches that the module takes (of a tuple, the first item), read lazily, more than once; or one tensor,
            which is split into batches of 256.
        batch_size: tokens in a batch, at least 1.
        seed: decides the order of texts and the shuffling; the global generator is neither read nor moved.
        grad: whether batches carry the gradient of the language model's summed next-token loss at the site.
        buffer_size: tokens that are shuffled together, at least 2 * batch_size; by default 65,536, or 8 * batch_size if
            that is more. The first batch comes when the buffer is full or all is read. It takes buffer_size * d_in *
            itemsize bytes on the model's device, twice that with grad. One that holds only a few forward passes mixes
            texts of a few lengths only: lower forward_tokens with it.
        forward_tokens: most tokens, BOS and padding included, in one forward pass over texts (a window that is longer
            has one to itself); lower it where memory is short.
        context: most tokens in a window, BOS included; by default, and at most, the model's.
        orbit: the group that acts on the inputs, for SAEs that need orbits.

    Attributes:
        d_in: width of the activations.

    Raises:
        ValueError: for an argument out of range, an unknown site, nothing to read; and, when they are read, for empty
            texts, and activations that are not floating or not finite.
    """

    def __init__(
        self,
        model: LanguageModel | nn.Module,
        site: str,
        texts: Iterable | None = None,
        inputs: Iterable | None = None,
        batch_size: int = 2048,
        seed: int = 0,
        grad: bool = False,
        buffer_size: int | None = None,
        forward_tokens: int = 4096,
        context: int | None = None,
        orbit: Group | None = None,
    ):
        self.model, self.site, self.batch_size, self.seed, self.grad = model, site, batch_size, seed, grad
        self.buffer_size = max(65_536, 8 * batch_size) if buffer_size is None else buffer_size
        self.forward_tokens, self.orbit = forward_tokens, orbit
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if self.buffer_size < 2 * batch_size:
            raise ValueError(f"buffer_size must be at least 2 * batch_size = {2 * batch_size}, got {buffer_size}")
        if isinstance(model, LanguageModel):
            if texts is None or inputs is not None or orbit is not None:
                raise ValueError("a LanguageModel reads texts, got none or got inputs or orbit: pass texts= alone")
            self.d_in = model.width(site)
            self.context = model.context if context is None else context
            if not 2 <= self.context <= model.context:
                raise ValueError(f"context must be in [2, {model.context}], the model's, got {context}")
            self.source = _readable("texts", texts)
        elif isinstance(model, nn.Module):
            if inputs is None or texts is not None or grad:
                raise ValueError("a module reads inputs and has no loss of its own: pass inputs= alone, without grad")
            modules = [name for name, _ in model.named_modules()]
            if site not in modules:
                raise ValueError(
                    f"site must be one of the {len(modules)} names in model.named_modules(), got {site!r}: "
                    f"the nearest are {nearest(site, modules)}"
                )
            self.source = inputs.split(INPUTS_AT_ONCE) if isinstance(inputs, Tensor) else _readable("inputs", inputs)
            first = next(self.sequences(), None)
            if first is None:
                raise ValueError("inputs must hold at least one tensor, got none")
            self.d_in = self.read(first)[0].shape[-1]
        else:
            raise ValueError(f"model must be a LanguageModel or a torch.nn.Module, got {type(model).__name__}")
        self._iteration: weakref.ref[_Iteration] | None = None
        self._resume: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        model = self.model if isinstance(self.model, LanguageModel) else type(self.model).__name__
        sizes = f"d_in={self.d_in}, batch_size={self.batch_size}, seed={self.seed}, grad={self.grad}"
        return f"Activations({model}, site={self.site!r}, {sizes})"

    def __iter__(self) -> Iterator[Batch]:
        iteration, self._resume = _Iteration(self, self._resume), None
        self._iteration = weakref.ref(iteration)
        return iteration

    @property
    def device(self) -> torch.device:
        """Where the model runs, and the batches are."""
        if isinstance(self.model, LanguageModel):
            return self.model.device
        tensors = (*self.model.parameters(), *self.model.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the first 1,000 texts, in their own order, or of the first 16 inputs.

        Two streams have the same fingerprint if they begin with the same texts, whatever their model, site, seed and
        length. It does not see texts that they share further on.
        """
        digest = hashlib.sha256()
        if isinstance(self.model, LanguageModel):
            for number, record in enumerate(islice(self.source, FINGERPRINT_TEXTS)):
                digest.update(hashlib.sha256(_text(record, number).encode()).digest())
        else:
            for x in islice(self.sequences(), FINGERPRINT_INPUTS):
                digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
                digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def sequences(self, by_length: bool = True) -> Iterator[Tokens] | Iterator[Tensor]:
        """What the model is given, a forward pass at a time, in the order of reading: Tokens, or inputs.

        With this an evaluation can run the model itself, patched, on what the stream reads.

        Args:
            by_length: put windows of like length together, which wastes little on padding. Without it they come as they
                are read, so that the first forward passes are a fair sample of the texts.
        """
        if not isinstance(self.model, LanguageModel):
            yield from (item[0] if isinstance(item, tuple | list) else item for item in self.source)
            return
        generator = torch.Generator().manual_seed(self.seed)
        for windows in self._chunks():
            groups, longest = [[]], 0
            for window in sorted(windows, key=len) if by_length else windows:
                longest = max(longest, len(window) + 1)
                if groups[-1] and (len(groups[-1]) + 1) * longest > self.forward_tokens:
                    groups.append([])
                    longest = len(window) + 1
                groups[-1].append(window)
            for number in torch.randperm(len(groups), generator=generator).tolist():
                yield self.model.pad(groups[number])

    def _chunks(self) -> Iterator[list[list[int]]]:
        """Windows of token ids, for about `FORWARDS_AT_ONCE` forward passes at a time."""
        chunk, size = [], 0
        for row in self._token_rows():
            for start in range(0, len(row), self.context - 1):
                chunk.append(row[start : start + self.context - 1])
                size += len(chunk[-1])
                if size >= FORWARDS_AT_ONCE * self.forward_tokens:
                    yield chunk
                    chunk, size = [], 0
        if chunk:
            yield chunk

    def _token_rows(self) -> Iterator[list[int]]:
        """Token ids of one text after the other, in the order of reading."""
        if hasattr(self.source, "__len__") and hasattr(self.source, "__getitem__"):
            order = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(self.seed))
            records = ((number, self.source[number]) for number in map(int, order))
        else:
            records = enumerate(self.source)
        texts = ((number, _text(record, number)) for number, record in records)
        while group := list(islice(texts, TEXTS_AT_ONCE)):
            for (number, text), row in zip(group, self.model.encode([text for _, text in group]), strict=True):
                if not row:
                    raise empty_text(text, number)
                yield row

    def read(
        self, sequence: Tokens | Tensor
    ) -> tuple[Float[Tensor, "tokens *group d_in"], Float[Tensor, "tokens d_in"] | None]:
        """Activations (of all poses, with `orbit`), and gradients if the stream has them, of what counts in one item of
        `sequences()`, in order."""
        if not isinstance(self.model, LanguageModel):
            read = self.model, self.site, sequence.to(self.device)
            return (rows_at(*read) if self.orbit is None else orbits_at(*read, self.orbit)), None
        counted = self.model.content(sequence)
        if not self.grad:
            return self.model.activations(sequence, self.site)[counted], None
        has_next = torch.zeros_like(counted)
        has_next[:, :-1] = sequence.mask[:, 1:]
        x, gradient = self.model.gradients(sequence, self.site)
        return x[counted & has_next], gradient[counted & has_next]

    def cache(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, tokens: int | None = None
    ) -> CachedActivations:
        """Write the activations to `folder`, or open them if they are there; see `sae_lib.cache.cache`.

        Raises:
            ValueError: also if the stream has orbits: a cache holds rows.
        """
        if self.orbit is not None:
            raise ValueError("a cache holds rows, got a stream of orbits: read it from the model, or leave out orbit")
        return cache(self, folder, dtype, tokens)

    @property
    def identity(self) -> dict[str, Any]:
        """What is read: the texts' or inputs' fingerprint and number, the model by a hash of its weights, the site."""
        return source_of(self)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the iteration under way stands (the latest one; else, the start), as tensors.

        An equal stream that loads it goes on, at its next `iter()`, with the same bits.
        """
        if self._resume is not None:
            return dict(self._resume)
        iteration = self._iteration() if self._iteration is not None else None
        return (iteration or _Iteration(self, None)).state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Let the next `iter()` go on where `state` was taken. Texts before it are tokenized again, but not run.

        Raises:
            ValueError: if the state comes from a stream over other texts or inputs.
        """
        if bytes(state["fingerprint"].tolist()).hex() != self.fingerprint:
            raise ValueError("state must be that of a stream over the same texts or inputs, got another: pass the same")
        self._resume = dict(state)


class _Iteration:
    """One pass over a stream: reads forward pass by forward pass into the buffer, and serves batches out of it.

    `slots` is a permutation of the buffer's rows: the first `filled` hold tokens, the others are free. Of the filled
    ones the last `ready` may be served; the others stay, to be mixed with what comes next.
    """

    def __init__(self, stream: Activations, state: Mapping[str, Tensor] | None):
        self.stream = stream
        self.generator = torch.Generator().manual_seed(stream.seed)
        self.slots = torch.arange(stream.buffer_size)
        self.buffers: list[Tensor] = []
        self.rows: list[Tensor] | None = None  # of the forward pass that is being written
        self.forwards = self.offset = 0  # forward passes that are wholly written, and rows of the one that is not
        self.filled = self.ready = self.exhausted = 0
        if state is not None:
            self.forwards, self.offset, self.filled, self.ready, self.exhausted = state["position"].tolist()
            self.generator.set_state(state["generator"])
            stored = [state[name].to(stream.device) for name in ("x", "grad") if name in state]
            self._write(stored, self.slots[: self.filled])
        self.read = divided(islice(stream.sequences(), self.forwards, None), stream.read)

    def __iter__(self) -> _Iteration:
        return self

    def __next__(self) -> Batch:
        while self.ready < self.stream.batch_size and not self.exhausted:
            self._refill()
        if not self.ready:
            raise StopIteration
        count = min(self.stream.batch_size, self.ready)
        self.filled -= count
        self.ready -= count
        slots = self.slots[self.filled : self.filled + count]
        rows = [buffer.index_select(0, slots.to(buffer.device)).float() for buffer in self.buffers]
        return Batch(*rows) if self.stream.orbit is None else Batch(rows[0][:, 0], orbit=rows[0])

    def _refill(self) -> None:
        """Fill the buffer, as far as there is something to read, and shuffle it."""
        size = len(self.slots)
        while self.filled < size:
            if self.rows is None:
                read = next(self.read, None)
                if read is None:
                    self.exhausted = 1
                    break
                self.rows = [rows for rows in read if rows is not None]
                self._check_finite()
            count = min(size - self.filled, len(self.rows[0]) - self.offset)
            part = [rows[self.offset : self.offset + count] for rows in self.rows]
            self._write(part, self.slots[self.filled : self.filled + count])
            self.filled += count
            self.offset += count
            if self.offset == len(self.rows[0]):
                self.rows, self.offset, self.forwards = None, 0, self.forwards + 1
        order = torch.randperm(self.filled, generator=self.generator)
        self.slots[: self.filled] = self.slots[: self.filled][order]
        self.ready = self.filled if self.exhausted else size - size // 2

    def _write(self, part: list[Tensor], slots: Tensor) -> None:
        """Copy rows to their slots; the first time, allocate the buffers."""
        if not self.buffers:
            self.buffers = [rows.new_empty(len(self.slots), *rows.shape[1:]) for rows in part]
        for buffer, rows in zip(self.buffers, part, strict=True):
            buffer[slots.to(buffer.device)] = rows

    def _check_finite(self) -> None:
        for name, rows in zip(("activations", "gradients"), self.rows, strict=False):
            finite = rows.isfinite()
            if not finite.all():
                share = 1 - finite.float().mean().item()
                raise ValueError(
                    f"{name} must be finite, got {share:.2%} NaN or infinite entries at {self.stream.site!r}, forward "
                    f"pass {self.forwards} of the stream: open the model in another dtype, or drop those inputs"
                )

    def state_dict(self) -> dict[str, Tensor]:
        """See `Activations.state_dict`. Which row stands in which slot does not matter, only the order of the slots."""
        filled = self.slots[: self.filled]
        rows = {
            name: buffer[filled.to(buffer.device)] for name, buffer in zip(("x", "grad"), self.buffers, strict=False)
        }
        return rows | {
            "position": torch.tensor([self.forwards, self.offset, self.filled, self.ready, self.exhausted]),
            "generator": self.generator.get_state(),
            "fingerprint": torch.tensor(list(bytes.fromhex(self.stream.fingerprint)), dtype=torch.uint8),
        }


def _readable(name: str, source: Iterable) -> Iterable:
    """Something to read more than once, which is not a single text."""
    if isinstance(source, str | Mapping) or not isinstance(source, Iterable):
        raise ValueError(
            f"{name} must be a sequence or another iterable, got one {type(source).__name__}: put it in a list"
        )
    if iter(source) is source:
        raise ValueError(
            f"{name} must be readable more than once, got a {type(source).__name__}: pass a list, or an object whose "
            "__iter__ begins anew"
        )
    if hasattr(source, "__len__") and not len(source):
        raise ValueError(f"{name} must hold at least one item, got none")
    return source


def _text(record: Any, number: int) -> str:
    """The text of a record."""
    text = record.get("text") if isinstance(record, Mapping) else getattr(record, "text", record)
    if not isinstance(text, str):
        raise ValueError(f'a text must be a string, .text or ["text"], got {type(record).__name__} at index {number}')
    return text
