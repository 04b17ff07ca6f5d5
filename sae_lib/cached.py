"""Activations read from disk: batches of rows that a random permutation picks from all shards of a cache.

One permutation of all rows is an epoch; row numbers take 8 bytes each. Before the first byte of a random row comes, the
processor walks its page table and waits for memory; the reader lets it do both for many rows at once, by touching the
first word of each row of the next MiB before it copies them. Threads gather the next batches meanwhile, into memory
that is used again when a batch is gone: fresh memory would cost more than the copy. A cache that is larger than the
memory is read as fast as the disk serves single rows.

Opening checks the manifest, and sizes and headers of the shards. The first iteration hashes all shards before its first
batch (about 1.5 GB/s and core), so that nothing is trained on bytes that changed after they were written.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lib.data import Batch
from sae_lib.shards import Manifest, check_hash, dtype_of, fault, mapped, progress, read_manifest

TOUCHED_BYTES = 2**20
"""Rows whose first words are touched together: what a second-level cache holds."""
READERS, AHEAD = 2, 2
"""Threads that gather batches, and batches that are gathered ahead of the one that is asked for."""


class CachedActivations:
    """Shuffled batches of activations that `cache` has written. Chapter `speed`.

    Each `iter(stream)` is an epoch: every row once, in an order that the seed draws from all orders of all rows, the
    same each time; its last batch may be short. Batches are float32. There is no model behind it: `evaluate` reports
    reconstruction and sparsity, but for the model's loss it needs `Activations`.

    Args:
        folder: where `cache` wrote.
        batch_size: rows in a batch, at least 1.
        seed: decides the order.
        device: where the batches go.

    Attributes:
        d_in: width of the activations.
        tokens: number of rows; `len` is the number of batches.
        dtype: in which they are stored.
        grad: whether batches carry gradients.
        fingerprint: that of the stream that was cached, so that `evaluate` knows what was trained on.

    Raises:
        ValueError: for an argument out of range, a folder without a whole cache, a manifest that was edited or is of
            another version, a shard that is missing or has another size or header; and, when it is first iterated over,
            a shard whose bytes have changed. The message names the file and says what to do.
    """

    def __init__(self, folder: str | Path, batch_size: int = 2048, seed: int = 0, device: str | torch.device = "cpu"):
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        self.folder, self.batch_size, self.seed, self.device = Path(folder), batch_size, seed, torch.device(device)
        self.manifest = read_manifest(self.folder)
        shards = self.manifest["shards"]
        if not self.manifest["complete"]:
            raise ValueError(
                f"{self.folder} must hold a whole cache, but its writing was cut off after {len(shards)} shards; call "
                "stream.cache with the same folder, which goes on from there"
            )
        for shard in shards:
            if message := fault(self.folder, self.manifest, shard):
                raise ValueError(message)
        self.d_in, self.grad, self.dtype = self.manifest["d_in"], self.manifest["grad"], dtype_of(self.manifest)
        self.tokens = sum(shard["rows"] for shard in shards)
        self.fingerprint: str = self.manifest["source"]["fingerprint"]
        self._free: list[np.ndarray] = []  # memory of batches that are gone
        self._rows: np.ndarray | None = None  # mapped when they have been verified
        self._iteration: weakref.ref[_Epoch] | None = None
        self._resume: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        sizes = f"d_in={self.d_in}, tokens={self.tokens}, dtype={self.dtype}, batch_size={self.batch_size}"
        return f"CachedActivations({str(self.folder)!r}, {sizes}, seed={self.seed}, grad={self.grad})"

    def __len__(self) -> int:
        return math.ceil(self.tokens / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._rows is None:
            self.verify()
        iteration, self._resume = _Epoch(self, self._resume), None
        self._iteration = weakref.ref(iteration)
        return iteration

    def verify(self) -> None:
        """Hash every shard, as the first iteration does by itself.

        Raises:
            ValueError: if the bytes of a shard have changed; the message names it.
        """
        shards = self.manifest["shards"]
        total = sum(shard["bytes"] for shard in shards)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, progress(total, "B", "verify") as bar:
            try:
                checks = pool.map(lambda shard: check_hash(self.folder, shard), shards)
                for shard, _ in zip(shards, checks, strict=True):
                    bar.update(shard["bytes"])
            finally:
                pool.shutdown(cancel_futures=True)
        bits = np.int32 if self.dtype == torch.float32 else np.int16
        self._rows = mapped([self.folder / shard["file"] for shard in shards]).view(bits).reshape(-1, self.d_in)

    @property
    def identity(self) -> dict[str, str]:
        """What is read: the hash of the manifest, which has those of all shards."""
        return {"cache": self.manifest["sha256"]}

    def state_dict(self) -> dict[str, Tensor]:
        """Where the iteration under way stands (the latest one; else, the start), as tensors.

        A stream over the same cache that loads it goes on, at its next `iter()`, with the same bits.
        """
        if self._resume is not None:
            return dict(self._resume)
        iteration = self._iteration() if self._iteration is not None else None
        return iteration.state_dict() if iteration else state(self.manifest, 0, self.seed)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Let the next `iter()` go on where `state` was taken.

        Raises:
            ValueError: if the state comes from another stream.
        """
        if "cache" not in state or bytes(state["cache"].tolist()).hex() != self.manifest["sha256"]:
            raise ValueError(f"state must be that of the cache in {self.folder}, got another stream's: open that one")
        self._resume = dict(state)

    def _gather(self, numbers: np.ndarray) -> Batch:
        """The batch of these rows; with gradients, each activation is followed by its gradient."""
        if not self.grad:
            return Batch(self._gather_rows(numbers))
        gradients = self._gather_rows(2 * numbers + 1).div_(self.manifest["grad_scale"])
        return Batch(self._gather_rows(2 * numbers), gradients)

    def _gather_rows(self, numbers: np.ndarray) -> Float[Tensor, "batch d_in"]:
        """A copy of these rows, in memory that is free again when nobody holds the tensor any more."""
        memory = self._memory(len(numbers))
        lent = memory[: len(numbers)]
        lost = weakref.finalize(lent, self._keep, memory)  # the tensor, and every view of it, holds `lent`
        lost.atexit = False
        rows, words, first_words = torch.from_numpy(lent), self._rows.reshape(-1), numbers * self.d_in
        count = max(1, TOUCHED_BYTES // self._rows[0].nbytes)
        scratch = None if self.dtype == torch.float32 else self._memory(len(numbers))
        for start in range(0, len(numbers), count):
            some = numbers[start : start + count]
            np.take(words, first_words[start : start + count], mode="clip")
            if scratch is None:
                np.take(self._rows, some, axis=0, out=lent[start : start + count].view(np.int32), mode="clip")
            else:
                bits = scratch.view(np.int16).reshape(-1, self.d_in)[: len(some)]
                np.take(self._rows, some, axis=0, out=bits, mode="clip")
                rows[start : start + count] = torch.from_numpy(bits).view(self.dtype)
        if scratch is not None:
            self._keep(scratch)
        return rows

    def _keep(self, memory: np.ndarray) -> None:
        """Keep memory for the batches to come, but not more than they need at once."""
        if len(self._free) <= 2 * (AHEAD + READERS):
            self._free.append(memory)

    def _memory(self, rows: int) -> np.ndarray:
        """Room for a batch, at an address that is a multiple of 64, without which copies are slower."""
        with suppress(IndexError):
            if len(memory := self._free.pop()) >= rows:
                return memory
        return torch.empty(max(rows, self.batch_size), self.d_in).numpy()


def state(manifest: Manifest, position: int, seed: int) -> dict[str, Tensor]:
    """Position in an epoch of a cache, as tensors."""
    cache = torch.tensor(list(bytes.fromhex(manifest["sha256"])), dtype=torch.uint8)
    return {"position": torch.tensor([position, seed]), "cache": cache}


class _Epoch:
    """One pass over a cache. Its readers do not hold it, so that they end when it is dropped."""

    def __init__(self, stream: CachedActivations, state: Mapping[str, Tensor] | None):
        self.device, self.manifest = stream.device, stream.manifest
        self.position, self.seed = (0, stream.seed) if state is None else state["position"].tolist()
        order = torch.randperm(stream.tokens, generator=torch.Generator().manual_seed(self.seed)).numpy()
        self.readers = readers = ThreadPoolExecutor(READERS, thread_name_prefix="sae_lib.cache")
        size, gather = stream.batch_size, stream._gather
        starts = range(self.position, stream.tokens, size)
        self.coming = (readers.submit(gather, order[start : start + size]) for start in starts)
        self.pending = deque(islice(self.coming, AHEAD))

    def __iter__(self) -> _Epoch:
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """See `CachedActivations.state_dict`."""
        return state(self.manifest, self.position, self.seed)

    def __next__(self) -> Batch:
        if not self.pending:
            self.readers.shutdown(wait=False)
            raise StopIteration
        batch = self.pending.popleft().result()
        self.pending.extend(islice(self.coming, 1))
        self.position += len(batch.x)
        return Batch(*(part if part is None else part.to(self.device) for part in batch))
