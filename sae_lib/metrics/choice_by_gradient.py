"""What the gradient adds to the choice of latents, and how much of that is knowing the next token. Chapter `gradient`.

A g-SAE that is evaluated with the gradient of the model's loss chooses latents by a number that is computed from the
true next tokens, and is then judged by how well those are predicted. Three choices of the same SAE tell that apart:

    by activation         no gradient, no labels (`sae_lib.evaluate` reports this one)
    with the gradient     of the loss on the true next tokens
    with one sampled      of the loss on tokens that the model itself draws, which know nothing of the true ones

and one of another SAE: TopK, trained without any gradient, choosing with it. No source: the controls are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lib.metrics.patched import PatchedLoss
from sae_lib.metrics.reconstruction import alive, explained_variance, l0
from sae_lib.sae import SAE, whole
from sae_lib.saes.gradient import GradientSAE
from sae_lib.saes.topk import TopKSAE


class ChoiceByGradient:
    """SAEs that choose with gradients in view. A task: built once, called on SAEs.

    Blind to: how much of the loss any other choice of k latents would recover; this one is not the best of them. A
    text's last token has no next one and a gradient of zero, so there the choice is that of activation alone.

    Args:
        patched: held-out texts and the model's loss on them.
        rows: activations for what needs no model, at least 1: the first of `patched`.
        seed: draws the tokens of the sampled gradient.

    Attributes:
        gradients: of the loss on the true next tokens, ``gradient``, and on drawn ones, ``sampled``; a row for each of
            ``patched.x``.
    """

    def __init__(self, patched: PatchedLoss, rows: int, seed: int = 0):
        self.patched, self.rows, model = patched, whole("rows", rows), patched.model
        generator = torch.Generator().manual_seed(whole("seed", seed, least=0))
        found: dict[str, list[Tensor]] = {"gradient": [], "sampled": []}
        for sequence, _ in patched.parts():
            for name, labels in {"gradient": None, "sampled": model.sample(sequence, generator)}.items():
                gradient = model.gradients(sequence, patched.site, labels)[1]
                found[name].append(gradient[model.content(sequence)].float())
        self.gradients = {name: torch.cat(parts) for name, parts in found.items()}

    @torch.no_grad()
    def __call__(self, saes: Sequence[SAE]) -> list[dict[str, float]]:
        """Of each SAE, by names that say which gradient it chose with:

        Returns:
            ``loss_recovered_gradient`` and ``loss_recovered_sampled``, ``kl_gradient`` and ``kl_sampled`` in nats, as
            `PatchedLoss` defines them; with the true gradient also ``explained_variance_gradient``, ``l0_gradient``,
            ``alive_gradient``, and ``moved_gradient``, the share of living pairs that activation alone would not have
            chosen.

        Raises:
            ValueError: if an SAE is neither a g-SAE nor TopK.
        """
        choosers = [choosing_by(self.gradients["gradient"], sae) for sae in saes]
        reconstructions = [
            lambda x, rows, sae=sae, gradients=gradients: sae.decode(sae.encode(x, gradients[rows]))
            for sae in choosers
            for gradients in self.gradients.values()
        ]
        losses = iter(self.patched(reconstructions))
        x, gradient = self.patched.x[: self.rows], self.gradients["gradient"][: self.rows]
        reports = []
        for sae in choosers:
            report = {}
            for name, loss in zip(self.gradients, losses, strict=False):
                report |= {f"{metric}_{name}": loss[metric] for metric in ("loss_recovered", "kl")}
            z, by_activation = sae.encode(x, gradient), sae.encode(x)
            x_hat = sae.decode(z)
            reports.append(
                report
                | {
                    "explained_variance_gradient": explained_variance(x, x_hat),
                    "l0_gradient": l0(z),
                    "alive_gradient": alive(z),
                    "moved_gradient": ((z > 0) & (by_activation == 0)).sum().item() / max(1, int((z > 0).sum())),
                }
            )
        return reports


@torch.no_grad()
def choosing_by(gradient: Float[Tensor, "tokens d_in"], sae: SAE) -> GradientSAE:
    """The SAE as one that chooses with the gradient: a g-SAE as it is; TopK's weights, with a g-SAE's usual beta.

    Args:
        gradient: by whose mean attribution TopK's are measured; rows of zeros do not count.
        sae: a trained g-SAE or TopK.

    Raises:
        ValueError: if `sae` is neither.
    """
    if isinstance(sae, GradientSAE):
        return sae.eval()
    if not isinstance(sae, TopKSAE):
        raise ValueError(f"who chooses with the gradient must be a g-SAE or TopK, got {type(sae).__name__}")
    size = (gradient[gradient.any(1)] @ sae.W_dec.T).abs().mean()
    chooser = GradientSAE(sae.d_in, sae.d_sae, sae.k).to(sae.W_dec)
    chooser.load_state_dict(sae.state_dict() | {"mean_size": size})
    return chooser.eval()
