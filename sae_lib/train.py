"""One loop: any number of sparse autoencoders on one stream.

    for each batch of the stream, divided by one global scale:
        for each SAE:  before_step, loss, backward, after_backward, clip, Adam, after_step

Each SAE has its own optimiser, so that training it beside others gives the same bits as training it alone.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from sae_lib.checkpoint import Checkpoints
from sae_lib.data import Batch
from sae_lib.distributed import add_gradients, agree, first_alone, mine, per_token, rank, total
from sae_lib.sae import SAE, Loss, as_batch, spread, whole
from sae_lib.state import by_rows

SCALE_BATCHES = 4
"""Batches on which the global scale is estimated; they are trained on too."""
WARM_UP_STEPS, WARM_UP, DECAY = 1000, 0.05, 0.2
"""The learning rate rises over 5% of the steps, at most 1,000, and falls to zero over the last 20%."""
REPORT_EVERY = 20
"""Steps between two transfers of the measurements to the history (each waits for the device)."""


@dataclass
class Run:
    """What `train` returns.

    Attributes:
        saes: the trained SAEs, in the order given.
        history: a row a step and SAE: step, tokens, sae (its place in `saes`), variant, loss, its terms, l0, fvu (of
            the batch), dead (share of latents), learning_rate, tokens_per_second.
        tokens: tokens trained on; fewer than asked if the stream ended.
        scale: root mean squared norm of the activations, by which they were divided.
        steps: as planned from the size of the first batches; the default learning rate follows them.
        seconds: wall time, of all parts of a run that was stopped and went on.
    """

    saes: list[SAE]
    history: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    scale: float = 1.0
    steps: int = 0
    seconds: float = 0.0

    @property
    def next_step(self) -> int:
        """Number of the step that comes next."""
        return self.history[-1]["step"] + 1 if self.history else 0

    def counters(self) -> dict[str, Any]:
        """All but the SAEs, as a checkpoint keeps it."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "saes"}


def train(
    saes: SAE | Sequence[SAE],
    stream: Iterable[Batch | Tensor],
    tokens: int = 1_000_000,
    seed: int | None = None,
    watch: Callable[[list[dict[str, Any]]], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
) -> Run:
    """Train one SAE, or several on the same batches. Chapter `relu`.

    The stream is divided by one number, the root mean squared norm of its first batches, and that number is folded
    into the weights at the end: a trained SAE takes raw activations. A stream that ends early trains on what it had,
    and `Run.tokens` says how many.

    With `checkpoint`, nothing is lost: the run writes itself to that folder as it goes, and at Ctrl-C or SIGTERM after
    the step under way. The same call goes on from there, whatever the SAEs' weights are by then, and ends with the same
    bits (on the same kind of device) as if it had never stopped; a run that is finished returns at once what it made.

    Where torch.distributed is initialised (`sae_lib.distributed`), all its processes call this with equal arguments and
    make the steps that one would make: each computes its slice of every batch. The first of them writes and reports.

    Args:
        saes: one SAE or a list; they are trained in place, on the stream's device, in 32 bits.
        stream: anything that yields `Batch` or floating tensors of shape (batch, d_in).
        tokens: rows to train on, at least 1; the last batch may be cut.
        seed: order of the data: becomes the stream's `seed`, where it has one; None leaves the stream's own.
        watch: called with the history every few steps, e.g. ``figures.LossCurve()`` in a notebook, or what
            `sae_lib.loggers` has for a file or a service.
        checkpoint: folder of this run's checkpoints, new or its own; None writes none. The stream must be one that can
            go on where it stood, like `Activations`.
        checkpoint_every: tokens between two checkpoints, at least 1; None for a tenth of the run, at most 10 million.

    Raises:
        ValueError: for an empty list or stream, a batch of the wrong width or type, values that are not finite, a
            variant that needs what the stream does not yield, or a stream that cannot go on where it stood.
        sae_lib.checkpoint.CheckpointError: a ValueError: the checkpoint cannot be written, is damaged, or is another
            run's; the message says what is still safe.
    """
    saes = [saes] if isinstance(saes, SAE) else list(saes)
    if not saes or not all(isinstance(sae, SAE) for sae in saes):
        raise ValueError(f"saes must be an SAE or a list of at least one, got {[type(sae).__name__ for sae in saes]}")
    whole("tokens", tokens)
    if seed is not None and hasattr(stream, "seed"):
        stream.seed = whole("seed", seed, least=0)
    checkpoints = None if checkpoint is None else Checkpoints(checkpoint, saes, stream, tokens, checkpoint_every)
    saved = None if checkpoints is None else checkpoints.newest()

    began = time.perf_counter()
    if saved is not None and not saved.finished:
        stream.load_state_dict(saved.stream)
    source = stream if isinstance(stream, Tensor) or (saved and saved.finished) else iter(stream)
    if checkpoints is not None and hasattr(source, "state_dict"):
        checkpoints.source = source  # others may iterate over the stream while it is trained on
    if saved is None:
        batches = checked_batches(source, saes, tokens)
        first = list(islice(batches, SCALE_BATCHES))
        if not first:
            raise ValueError("the stream must yield at least one batch, got none; is it an iterator that was used up?")
        run = Run(saes, scale=rms_norm(first))
        run.steps = max(1, round(tokens * len(first) / sum(len(batch.x) for batch in first)))
    else:
        run = Run(saes, **saved.counters)
        began -= run.seconds
        batches = iter(())
        if not saved.finished:
            batches = checked_batches(source, saes, tokens, run.tokens, run.next_step)
        first = list(islice(batches, 1))
    optimisers = []
    for sae in saes:
        sae.to(device=first[0].x.device if first else None).train()
        if saved is None:
            begin(sae, scaled(first[0], run.scale), run.scale, tokens)
        optimisers.append(adam(sae, run.steps))
    if saved is not None:
        saved.restore(saes, optimisers)
    check_agreement(run)

    waiting: list[dict[str, Any]] = []
    read = run.next_step + len(first)  # before that step, the stream is ahead of the training
    try:
        with progress_bar(tokens, run.tokens) as bar, checkpoints or nullcontext():
            for step, batch in enumerate(chain(first, batches), run.next_step):
                size = len(batch.x)
                batch = scaled(mine(batch), run.scale)
                rate, progress = schedule(run.tokens, size, tokens), run.tokens / tokens
                run.tokens += size
                whole_spread = spread(batch.x)
                for place, (sae, optimiser) in enumerate(zip(saes, optimisers, strict=True)):
                    loss = one_step(sae, optimiser, batch, rate, progress)
                    waiting.append(
                        {"step": step, "tokens": run.tokens, "sae": place, "variant": sae.name}
                        | measured(sae, batch, loss, whole_spread)
                        | {"learning_rate": optimiser.param_groups[0]["lr"]}
                    )
                bar.update(size)
                due = checkpoints is not None and step + 1 >= read and checkpoints.due(run.tokens)
                if due or (step + 1) % REPORT_EVERY == 0:
                    report(run, waiting, began, bar, watch)
                if due:
                    write(checkpoints, run, optimisers)
                    checkpoints.stop()
            report(run, waiting, began, bar, watch)
            if checkpoints is not None and not (saved and saved.finished):
                write(checkpoints, run, optimisers, finished=True)
                checkpoints.stop()
    finally:  # also when the run is interrupted: what was trained can be used, in the units of x
        for sae in saes:
            sae.fold(run.scale)
            sae.eval()
            if fingerprint := getattr(stream, "fingerprint", None):
                sae.trained_on = sorted({*sae.trained_on, fingerprint})
    if run.tokens < tokens and not rank():
        tqdm.write(f"the stream ended: trained on {run.tokens:,} of {tokens:,} tokens", file=sys.stderr)
    return run


def begin(sae: SAE, batch: Batch, scale: float, tokens: int) -> None:
    """Once a run, before its first step: an SAE that was trained before returns to the training's units."""
    if sae.tokens_trained:
        sae.fold(float(sae.scale) / scale)
        sae.scale.fill_(1.0)
    sae.start(batch, tokens)


def one_step(sae: SAE, optimiser: torch.optim.Optimizer, batch: Batch, rate: float, progress: float) -> Loss:
    """One step of one SAE; `rate` multiplies its learning rate."""
    sae.before_step(progress)
    loss = sae.loss(batch)
    optimiser.zero_grad()
    loss.total.backward()
    add_gradients(sae.parameters())
    sae.after_backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), sae.clip)
    for group in optimiser.param_groups:
        group["lr"] = rate * group["initial_lr"]
    optimiser.step()
    sae.after_step(batch, loss.code)
    return loss


class Adam(torch.optim.Adam):
    """Adam in one pass over the weights. The fused kernel copies what is not contiguous, four times, so this one is
    given a column-major weight as its transpose: the same memory."""

    def __init__(self, parameters: list[nn.Parameter], **settings: Any):
        self.parameters = parameters
        super().__init__([by_rows(p.detach()) for p in parameters], fused=True, **settings)

    def step(self) -> None:
        for same, p in zip(self.param_groups[0]["params"], self.parameters, strict=True):
            alike = p.is_contiguous() or p.grad is None
            same.grad = p.grad if alike else p.grad.T.contiguous()
        super().step()

    def zero_grad(self) -> None:
        for same, p in zip(self.param_groups[0]["params"], self.parameters, strict=True):
            same.grad = p.grad = None


def adam(sae: SAE, steps: int) -> Adam:
    """The optimiser of a variant, by its class attributes."""
    learning_rate = default_learning_rate(sae.d_sae, steps) if sae.learning_rate is None else sae.learning_rate
    parameters = [p for p in sae.parameters() if p.requires_grad]
    optimiser = Adam(parameters, lr=learning_rate, betas=sae.betas)
    for group in optimiser.param_groups:
        group["initial_lr"] = learning_rate
    return optimiser


def default_learning_rate(d_sae: int, steps: int) -> float:
    """``2e-4 sqrt(2^14 / d_sae)``, the rule of the TopK paper's reference implementations, whose runs are long.

    A run of fewer than 10,000 steps takes larger ones, ``sqrt(10,000 / steps)`` times, up to 0.005 (measured here, not
    from a paper).
    """
    return min(2e-4 * (2**14 / d_sae) ** 0.5 * max(1.0, (10_000 / steps) ** 0.5), 5e-3)


def schedule(seen: int, size: int, tokens: int) -> float:
    """Multiplier of the learning rate for a batch of `size` tokens, after `seen` of `tokens`.

    Linear warm-up, constant, linear decay towards zero at the end.
    """
    warm_up = min(WARM_UP * tokens, WARM_UP_STEPS * size)
    return min(1.0, (seen + size) / warm_up, (tokens - seen) / (DECAY * tokens))


def rms_norm(batches: Sequence[Batch]) -> float:
    """Root mean squared norm of the rows: dividing by it makes the mean squared norm 1."""
    total = sum(float(batch.x.double().square().sum()) for batch in batches)
    return (total / sum(len(batch.x) for batch in batches)) ** 0.5 or 1.0


def scaled(batch: Batch, scale: float) -> Batch:
    """The batch in the training's units, 32 bits; a gradient towards x grows by what x shrinks."""
    return batch._replace(
        x=batch.x.float() / scale,
        grad=None if batch.grad is None else batch.grad.float() * scale,
        orbit=None if batch.orbit is None else batch.orbit.float() / scale,
    )


def checked_batches(
    stream: Iterable[Batch | Tensor], saes: Sequence[SAE], tokens: int, seen: int = 0, steps: int = 0
) -> Iterator[Batch]:
    """The stream's batches, each checked, from `seen` rows until `tokens` have passed; the last batch is cut to fit."""
    if isinstance(stream, Tensor):
        raise ValueError(
            f"stream must yield batches, got one tensor of shape {tuple(stream.shape)}; pass x.split(2048) instead"
        )
    needs = frozenset().union(*(sae.needs for sae in saes))
    for step, item in enumerate(stream, steps):
        batch = as_batch(item)
        for sae in saes:
            sae.checked(batch.x)
        if not len(batch.x):
            continue
        finite = torch.isfinite(batch.x)
        if not finite.all():
            share = 1 - finite.float().mean().item()
            raise ValueError(
                f"activations must be finite, got {share:.2%} NaN or infinite entries at step {step}; "
                "look for overflow in a 16-bit model, or drop those rows"
            )
        for name in needs:
            if getattr(batch, name) is None:
                remedy = (
                    "Activations(..., grad=True)" if name == "grad" else f"a stream that yields Batch(x, {name}=...)"
                )
                raise ValueError(
                    f"{', '.join(s.name for s in saes if name in s.needs)} needs {name} from the stream; use {remedy}"
                )
        keep = min(len(batch.x), tokens - seen)
        yield Batch(*(part if part is None else part[:keep] for part in batch))
        seen += keep
        if seen >= tokens:
            return


@torch.no_grad()
def measured(sae: SAE, batch: Batch, loss: Loss, whole_spread: Float[Tensor, ""]) -> dict[str, Tensor]:
    """One row of the history, still on the device; `whole_spread` is that of the batch, the same for all SAEs."""
    alive = loss.code.map(lambda values: (values > 0).to(values.dtype)).sum()
    return {
        "loss": loss.total.detach(),
        **{name: term.detach() for name, term in loss.terms.items()},
        "l0": per_token(alive, loss.code.shape[0]),
        "fvu": total((batch.x - loss.x_hat.detach()).square().sum()) / whole_spread,
        "dead": sae.dead.float().mean(),
    }


def report(run: Run, waiting: list[dict], began: float, bar: tqdm, watch: Callable | None) -> None:
    """Move the waiting rows to the history, show the last one, and stop if the loss is no longer a number."""
    run.seconds = time.perf_counter() - began
    rate = run.tokens / run.seconds
    for row in waiting:
        row = {key: value.item() if isinstance(value, Tensor) else value for key, value in row.items()}
        run.history.append(row | {"tokens_per_second": rate})
        if not math.isfinite(row["loss"]):
            raise ValueError(
                f"the loss must stay finite, got {row['loss']} for sae {row['sae']} ({row['variant']}) at step "
                f"{row['step']}; set sae.learning_rate below {row['learning_rate']:g}"
            )
    if waiting:
        last = run.history[-1]
        bar.set_postfix(loss=f"{last['loss']:.3f}", fvu=f"{last['fvu']:.3f}", l0=f"{last['l0']:.1f}")
    waiting.clear()
    if watch is not None and not rank():
        watch(run.history)


def write(checkpoints: Checkpoints, run: Run, optimisers: Sequence[Adam], finished: bool = False) -> None:
    """A checkpoint of what all processes hold, written by the first of them."""
    check_agreement(run)
    first_alone(checkpoints.write, run.counters(), optimisers, finished)
    checkpoints.tokens = run.tokens


def check_agreement(run: Run) -> None:
    """Several processes make the same steps only if they have the same weights and see the same data."""
    held = [value for sae in run.saes for value in (*sae.state_dict().values(), sae.generator.get_state())]
    if not agree([torch.tensor(run.scale), *held]):
        raise ValueError(
            f"all processes must train the same SAEs on the same stream, got other weights or data than theirs after "
            f"{run.tokens:,} tokens; give all the same arguments and seeds"
        )


def progress_bar(total: int, done: int) -> tqdm:
    """A bar that redraws often on a screen, rarely in a log, and leaves nothing behind in a notebook."""
    terminal = sys.stderr.isatty()
    notebook = tqdm.__module__.endswith("notebook") if hasattr(tqdm, "__module__") else False
    return tqdm(
        total=total,
        initial=done,
        unit="token",
        unit_scale=True,
        mininterval=0.2 if terminal or notebook else 10,
        leave=not notebook,
        **({"disable": True} if rank() else {}),  # else the environment's TQDM_DISABLE counts
    )
