"""Several processes, one run: each takes its slice of every batch, and all make the same step.

Every process holds all weights, and its stream yields every batch. Three rules make the step that of one process:

1. Losses are functions of sums over tokens. `total` adds up the sums of all processes on the way forward, so that each
   has the value of the whole batch; on the way back the gradient stays where it is, so that each has the share of its
   own tokens. `add_gradients` adds up the shares. A mean is one total over another: `per_token`.
2. What concerns the whole batch, who lives (`largest`) or which latents fired (`anywhere`), is decided from the values
   of all processes, and alike on all of them.
3. Random numbers are drawn alike by all processes, from generators of the same seed: what is drawn for each token is
   drawn for the whole batch, and each process takes its slice.

A loss written with `total` and `per_token` need not know how many processes there are: in one process, where
torch.distributed is not initialised, these functions give back what they get. Where it is initialised, they are
collective: every process must call them, in the same order. The group needs a backend for the processor too, as
``init_process_group()`` gives it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice, repeat
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lib.data import Batch

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others, e.g. while a checkpoint is written, before it takes them for dead."""


def processes() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0. Process 0 writes and reports."""
    return dist.get_rank() if processes() > 1 else 0


@contextmanager
def launched() -> Iterator[None]:
    """A context that joins the processes that torchrun started; without torchrun, nothing happens."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=TIMEOUT)  # gloo for the processor, nccl for GPUs
    try:
        yield
    finally:
        dist.destroy_process_group()


# Sums over the batch, with gradients ----------------------------------------------------------------------------------


def total(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Sum over all processes; its gradient is passed on as it is."""
    return x if processes() == 1 else Total.apply(x)


class Total(torch.autograd.Function):
    """The whole's value, of which each process differentiates its own part."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def per_token(amount: Float[Tensor, "*shape"], tokens: int) -> Float[Tensor, "*shape"]:
    """An amount that this process found on `tokens` tokens, of the whole batch and divided by all its tokens."""
    if processes() == 1:
        return amount / tokens
    both = total(torch.cat([amount.flatten(), amount.new_tensor([tokens])]))
    return (both[:-1] / both[-1]).view_as(amount)


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """After backward: each gradient becomes the sum of all processes' shares, the same bits on all of them."""
    if processes() == 1:
        return
    messages = []
    for parameter in parameters:
        if (grad := parameter.grad) is not None:  # it is laid out like its parameter: also column by column
            messages.append(dist.all_reduce(grad if grad.is_contiguous() else grad.T, async_op=True))
    for message in messages:
        message.wait()


# What concerns the whole batch ----------------------------------------------------------------------------------------


def mine(batch: Batch) -> Batch:
    """This process's slice of a batch; slices differ by at most one token, and may be empty."""
    if processes() == 1:
        return batch
    return Batch(*(part if part is None else part.tensor_split(processes())[rank()] for part in batch))


def count(here: int) -> int:
    """Sum over all processes."""
    return here if processes() == 1 else int(reduced(torch.tensor(here), dist.ReduceOp.SUM))


def greatest(here: int) -> int:
    """Largest over all processes."""
    return here if processes() == 1 else int(reduced(torch.tensor(here), dist.ReduceOp.MAX))


def anywhere(here: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """What holds in at least one process."""
    return here if processes() == 1 else reduced(here.int(), dist.ReduceOp.MAX) > 0


def least(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Smallest over all processes, entry by entry."""
    return x if processes() == 1 else reduced(x.clone(), dist.ReduceOp.MIN)


def reduced(x: Tensor, operation: Any) -> Tensor:
    """`x`, overwritten with the result over all processes."""
    dist.all_reduce(x, operation)
    return x


def largest(values: Float[Tensor, " n"], most: int) -> Int[Tensor, " some"]:
    """Places, in no order, of those values that belong to the `most` largest of all processes.

    Over all processes they are `most`, or all that there are; which of equal values belong is not said.
    """
    places = values.topk(min(most, len(values)), sorted=False).indices
    if processes() == 1:
        return places
    parts = gathered(values[places])
    everywhere = torch.cat(parts)
    chosen = everywhere.topk(min(most, len(everywhere))).indices  # the same on all processes
    chosen = chosen - sum(len(part) for part in parts[: rank()])
    return places[chosen[(chosen >= 0) & (chosen < len(places))]]


def gathered(rows: Tensor) -> list[Tensor]:
    """The rows of every process, in their order; their number may differ."""
    sizes = [torch.tensor(0) for _ in range(processes())]
    dist.all_gather(sizes, torch.tensor(len(rows)))
    longest = int(max(sizes))
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def divided(
    items: Iterator[Any], work: Callable[[Any], tuple[Tensor | None, ...]]
) -> Iterator[tuple[Tensor | None, ...]]:
    """``work(item)`` of one item after the other. Several processes work on one each, and give what they make to all.

    Args:
        work: returns tensors of any number of rows, or None in the place of one, for all items alike.
    """
    while together := list(islice(items, processes())):
        made = work(together[min(rank(), len(together) - 1)])
        if len(together) == 1:
            yield made
        else:
            parts = [repeat(None) if rows is None else gathered(rows) for rows in made]
            yield from islice(zip(*parts, strict=False), len(together))


# Agreement ------------------------------------------------------------------------------------------------------------


def first_alone(work: Callable[..., None], *arguments: Any, **settings: Any) -> None:
    """Process 0 works while the others wait; if it fails, all do."""
    failure = None
    if rank() == 0:
        try:
            work(*arguments, **settings)
        except Exception as error:
            failure = error
    failed = greatest(int(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError("process 0 failed: its error says why")


def agree(tensors: Iterable[Tensor]) -> bool:
    """Whether the processes hold the same bits, told by their hash."""
    if processes() == 1:
        return True
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    number = int.from_bytes(digest.digest()[:7], "big")
    return greatest(number) == -greatest(-number)
