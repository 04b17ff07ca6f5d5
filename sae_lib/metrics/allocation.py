"""How an SAE allots its latents to tokens, and what another choice of them costs the model. Chapter `choice`.

An SAE with one budget for many tokens may give hard tokens more: whether it does, on which, and how much it loses where
the budget is another batch's (few tokens, one text), or where each token keeps only its largest values.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import median

import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from sae_lib.data import Batch
from sae_lib.metrics.patched import PatchedLoss
from sae_lib.sae import SAE
from sae_lib.selection import top_of_rows
from sae_lib.train import adam, one_step

BATCH, SMALL = 4096, 64
"""Tokens of a batch in `BatchChoice`, and of a small one."""


class Allocation:
    """Which tokens get many latents, and what is left when each keeps its largest only. Chapter `choice`.

    Args:
        patched: held-out texts, with the model's loss on them.

    >>> import sae_lib
    >>> texts = sae_lib.load_texts("pocket", "test", limit=8)
    >>> stream = sae_lib.Activations(sae_lib.load_model("pocket"), "blocks.1.hook_resid_post", texts=texts)
    >>> task = Allocation(PatchedLoss(stream, tokens=100))
    >>> found = task(sae_lib.TopKSAE(stream.d_in, 64, k=4))
    >>> found["l0_first"], found["l0_rest"]
    (4.0, 4.0)
    """

    def __init__(self, patched: PatchedLoss):
        self.patched = patched
        self.first = torch.ones_like(patched.text, dtype=torch.bool)
        self.first[1:] = patched.text[1:] != patched.text[:-1]

    @torch.no_grad()
    def __call__(self, sae: SAE) -> dict[str, float]:
        """Of one SAE.

        Returns:
            ``l0_first``, mean L0 of the first token of each text (BOS is none), and ``l0_rest``, of the others;
            ``l0_skewness`` of the others, 0 if their distribution is symmetric, above if its right tail is the longer;
            ``l0_loss_correlation``, Spearman's of a token's L0 with the model's own loss on it, over all tokens; both
            NaN if L0 is the same everywhere. ``loss_recovered_half`` and ``loss_recovered_quarter``: loss recovered
            where each token keeps only its largest values, half or a quarter as many as the SAE's k (of an SAE without
            k, its mean L0).
        """
        z = torch.cat([sae.encode(x) for x in self.patched.x.split(BATCH)])
        l0 = (z != 0).sum(1).double().cpu()
        first, rest = l0[self.first.cpu()], l0[~self.first.cpu()]
        k = getattr(sae, "k", None) or round(l0.mean().item())
        kept = [top_of_rows(z, max(1, k // share)) for share in (2, 4)]
        decoded = [sae.decode(code) for code in kept]
        half, quarter = self.patched([lambda x, rows, x_hat=x_hat: x_hat[rows] for x_hat in decoded])
        varied = bool(rest.max() > rest.min())
        loss = self.patched.loss.double().cpu()
        return {
            "l0_first": first.mean().item(),
            "l0_rest": rest.mean().item(),
            "l0_skewness": float(stats.skew(rest.numpy())) if varied else float("nan"),
            "l0_loss_correlation": float(stats.spearmanr(l0, loss).statistic) if varied else float("nan"),
            "loss_recovered_half": half["loss_recovered"],
            "loss_recovered_quarter": quarter["loss_recovered"],
        }


class BatchChoice:
    """What an SAE's choice over a batch, which it trains with, makes of held-out tokens. Chapter `choice`.

    The tokens are the same each time, but in other batches: 4,096 that stand in no order, 64 of them, or one text. An
    SAE that lets a text's tokens compete lets later ones decide over earlier ones, which the model itself cannot do.

    Args:
        patched: held-out texts, with the model's loss on them.
        seed: of the order of the tokens, and of what the SAE draws.
    """

    def __init__(self, patched: PatchedLoss, seed: int = 0):
        self.patched, self.seed = patched, seed
        order = torch.randperm(len(patched.x), generator=torch.Generator().manual_seed(seed))
        self.batches = {
            "batch": order.split(BATCH),
            "batch_small": order.split(SMALL),
            "batch_sequence": torch.arange(len(order)).split(patched.text.bincount().tolist()),
        }

    @torch.no_grad()
    def __call__(self, sae: SAE) -> dict[str, float]:
        """Of one SAE.

        Returns:
            ``loss_recovered_batch``, ``_batch_small`` and ``_batch_sequence``, with the choice over each kind of batch;
            ``l0_batch``, and ``alive_batch``, the share of latents that live on any token, both with large batches.
        """
        found, reconstructions = {}, []
        for name, batches in self.batches.items():
            x_hat, fired, pairs = self.chosen(sae, batches)
            reconstructions.append(lambda x, rows, x_hat=x_hat: x_hat[rows])
            if name == "batch":
                found = {"alive_batch": fired.float().mean().item(), "l0_batch": pairs / len(x_hat)}
        losses = self.patched(reconstructions)
        return found | {
            f"loss_recovered_{name}": loss["loss_recovered"] for name, loss in zip(self.batches, losses, strict=True)
        }

    def chosen(
        self, sae: SAE, batches: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "tokens d_in"], Bool[Tensor, " d_sae"], int]:
        """The reconstruction of all tokens, which latents lived, and how many pairs; the SAE is left as it is.

        Args:
            batches: the numbers of the tokens in each.
        """
        sae = copy.deepcopy(sae).train()
        sae.generator.manual_seed(self.seed)
        x_hat, fired, pairs = torch.empty_like(self.patched.x), torch.zeros_like(sae.b_enc, dtype=torch.bool), 0
        for rows in batches:
            batch = Batch(self.patched.x[rows])
            sae.before_step(1.0)
            code = sae.select(sae.scores(batch.x), batch)
            x_hat[rows], pairs = sae.decode(code), pairs + len(code.values)
            fired |= code.fired()
        return x_hat, fired, pairs


def step_seconds(saes: Sequence[SAE], x: Float[Tensor, "batch d_in"], rounds: int = 200) -> list[float]:
    """Seconds of a training step on a batch, median over `rounds`, of SAEs that take their steps in turn.

    Units: seconds, on this machine at this moment: compare only what one call returns. Blind to: what a step costs on a
    machine that is busy with others. Each SAE is in the state of its training's end; copies take the steps. Chapter
    `choice`.
    """
    copies = [copy.deepcopy(sae).train() for sae in saes]
    optimisers, spent = [adam(sae, rounds) for sae in copies], [[] for _ in saes]
    for _ in range(rounds):
        for sae, optimiser, own in zip(copies, optimisers, spent, strict=True):
            began = time.perf_counter()
            one_step(sae, optimiser, Batch(x), 0.0, 1.0)
            if x.is_cuda:
                torch.cuda.synchronize()
            own.append(time.perf_counter() - began)
    return [median(own) for own in spent]
