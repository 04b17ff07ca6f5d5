"""Whether a latent's direction moves the model where the latent has no part. Chapter `evaluation`.

Olmo et al. 2024, "Features that make a difference", arXiv 2411.10397 (g-SAE), claim that latents chosen by gradients
steer better "in arbitrary contexts". Of the paper only the abstract and a figure were available: this procedure is
inferred from the claim, and its numbers are not theirs.

    steered   x + size * W_dec,i / |W_dec,i|, at every token of texts drawn without regard to the latent
    kl        KL(model as it is || steered) of the next token, mean over tokens: how far the model moves
    target    the token whose probability falls most when the latent is zeroed where it fires, in other texts
    rise      of the target's logit in the steered texts: whether the model moves where the latent says

The size is one number for all latents and all SAEs, a share of the mean norm of x: directions are compared, not how
large an SAE's activations are. Logits are taken less their mean over the vocabulary, which a prediction does not see.

Two controls: random directions of the same size, which have no targets of their own and are asked for the latent's; and
the untrained SAE, whose directions are random and have targets. The second is the harder one: with tied or nearly tied
embeddings any direction raises the tokens that it points at. For this reason the target is chosen by probability; by
logit, every direction finds a rare token, and random ones rise as high as trained ones. That was seen first, on one
trained and one untrained SAE of the embedded model; the definition was chosen because it tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from sae_lib.metrics.attribution import evaluating, windows
from sae_lib.metrics.matched import matched_mean
from sae_lib.metrics.reconstruction import kl
from sae_lib.models import LanguageModel, Tokens
from sae_lib.sae import SAE, positive, whole

CONTEXTS, CONTEXT_TOKENS, RANDOM = 16, 16, 64
"""Texts that are steered, tokens of each (BOS included), random directions."""
OWN_TEXTS, OWN_TOKENS = 500, 32
"""Texts in which targets are chosen, tokens of each (BOS included)."""
EXAMPLES = 4
"""Firings on which a target is chosen: the strongest, each in a text of its own. Who fires in fewer is left out."""
AT_ONCE = 4096
"""Most tokens in one forward pass."""


class Steered(NamedTuple):
    """What each sampled latent did.

    Attributes:
        latents: their numbers.
        targets: the token that each makes more likely, most of all, in its own contexts.
        kl: divergence of the steered prediction, nats.
        rise: of the target's logit, by the latent's direction.
        random_rise: of the same target's logit, by random directions: their mean.
        success: share of the random directions that raise the target less.
        frequencies: share of the tokens on which each fires, in the texts in which targets are chosen.
    """

    latents: Int[Tensor, " n"]
    targets: Int[Tensor, " n"]
    kl: Float[Tensor, " n"]
    rise: Float[Tensor, " n"]
    random_rise: Float[Tensor, " n"]
    success: Float[Tensor, " n"]
    frequencies: Float[Tensor, " n"]


class Steering:
    """Directions of latents, added to texts that they have nothing to do with. A task: built once, called on each SAE.

    Blind to: how the latent is activated, as only its direction is used; whether the text stays sensible; and, since a
    target is a single token, latents that promote many tokens a little. KL alone rewards any violent direction, and
    depends most on which texts are steered: compare SAEs at the same seed, or by ``steering_kl_ratio``.

    Args:
        model: is run, patched at `site`.
        site: where the SAEs read.
        texts: strings, or records with ``.text``; the steered ones and those in which targets are chosen are drawn from
            them without overlap, each cut to its first tokens.
        seed: draws texts, random directions and the sample of latents; another one shows the measure's own noise.
        size: norm of what is added, as a share of the mean norm of x; above 0.
        latents: how many living latents are sampled, at least 1; fewer if fewer live, which the result says.

    Raises:
        ValueError: if an argument is out of range, the site cannot be replaced, or there are too few texts.
    """

    def __init__(
        self,
        model: LanguageModel,
        site: str,
        texts: Sequence[Any],
        seed: int = 0,
        size: float = 0.25,
        latents: int = 64,
    ):
        self.model, self.site, self.seed, self.latents = model, site, seed, whole("latents", latents)
        self.contexts, self.own = windows(model, texts, [(CONTEXTS, CONTEXT_TOKENS), (OWN_TEXTS, OWN_TOKENS)], seed)
        self.x = torch.cat([model.activations(part, site).float() for part in _parts(self.own)])
        self.content = model.content(self.contexts)
        x = model.activations(self.contexts, site)[self.content].float()
        self.size = positive("size", size) * x.norm(dim=1).mean().item()
        with torch.no_grad():
            self.clean = model.logits(self.contexts)[self.content].float()
        directions = torch.randn(RANDOM, x.shape[1], generator=torch.Generator().manual_seed(seed))
        self.random_kl, self.random_rises = self._steer(directions.to(x.device))

    def __call__(self, sae: SAE) -> dict[str, float]:
        """Means over the latents of `of_latents`, and over the random directions.

        Returns:
            ``steering_kl``, ``steering_random_kl`` in nats and their quotient ``steering_kl_ratio``, 1 if latents move
            the model as random directions do; ``steering_rise``, ``steering_random_rise`` of the same targets, in
            logits; ``steering_success``, the share of latents whose target rises more by the latent's direction than
            by a random one, over all random ones, 1/2 by chance; ``steering_latents``, how many latents there were;
            ``steering_kl_matched`` and ``steering_rise_matched``, by `matched_mean`, for SAEs whose latents fire more
            or less often than another's.
        """
        found = self.of_latents(sae)
        moved, moved_by_chance = found.kl.mean().item(), self.random_kl.mean().item()
        return {
            "steering_kl": moved,
            "steering_kl_ratio": moved / moved_by_chance,
            "steering_rise": found.rise.mean().item(),
            "steering_success": found.success.mean().item(),
            "steering_random_kl": moved_by_chance,
            "steering_random_rise": found.random_rise.mean().item(),
            "steering_latents": len(found.latents),
            "steering_kl_matched": matched_mean(found.kl, found.frequencies),
            "steering_rise_matched": matched_mean(found.rise, found.frequencies),
        }

    @torch.no_grad()
    def of_latents(self, sae: SAE) -> Steered:
        """What each sampled latent does, for a look at more than the mean.

        Raises:
            ValueError: if no latent fires in at least four of the texts.
        """
        latents, frequencies, examples = self._sample(sae)
        targets = self._targets(sae, latents, *examples)
        divergence, rises = self._steer(sae.W_dec[latents])
        rise, by_chance = rises.gather(1, targets[:, None]).squeeze(1), self.random_rises[:, targets]
        success = (by_chance < rise).float().mean(0)
        return Steered(latents, targets, divergence, rise, by_chance.mean(0), success, frequencies)

    def _sample(self, sae: SAE) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Living latents, in an order drawn from the seed, how often they fire; examples: text, place and value."""
        content = self.model.content(self.own)
        strongest = []  # of each text and latent: value and place
        fired = torch.zeros(sae.d_sae, device=self.x.device)
        with evaluating(sae):
            for x, counted in zip(self.x.split(32), content.split(32), strict=True):
                z = sae.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]) * counted[..., None]
                strongest.append(z.max(1))
                fired += (z > 0).sum((0, 1))
        best, places = (torch.cat(parts) for parts in zip(*strongest, strict=True))
        order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(self.seed)).to(best.device)
        latents = order[((best > 0).sum(0) >= EXAMPLES)[order]][: self.latents]
        if not len(latents):
            raise ValueError(
                f"a latent must fire in at least {EXAMPLES} of the {len(best)} texts to have a target, got none of "
                f"{sae.d_sae} that does; is the SAE trained for {self.site!r}?"
            )
        values, rows = best[:, latents].topk(EXAMPLES, dim=0)
        return latents, fired[latents] / content.sum(), (rows.T, places[rows, latents].T, values.T)

    def _targets(self, sae: SAE, latents: Tensor, rows: Tensor, places: Tensor, values: Tensor) -> Int[Tensor, " n"]:
        """Of each latent the token whose probability falls most when it is zeroed where it fires; examples' mean."""
        targets = []
        at_once = max(1, AT_ONCE // (EXAMPLES * self.own.ids.shape[1]))
        for latent, row, place, value in zip(
            *(part.split(at_once) for part in (latents, rows, places, values)), strict=True
        ):
            row, place = row.flatten(), place.flatten()
            longest = int(place.max()) + 1  # what follows has no part in it
            tokens = Tokens(self.own.ids[row, :longest], self.own.mask[row, :longest])
            here = torch.arange(len(row), device=row.device), place
            removed = value.flatten()[:, None] * sae.W_dec[latent.repeat_interleave(EXAMPLES)]

            def zeroed(x: Tensor, here=here, removed=removed) -> Tensor:
                return x.index_put(here, -removed.to(x.dtype), accumulate=True)

            likely = self.model.logits(tokens)[here].float().softmax(1)
            without = self.model.logits(tokens, self.site, zeroed)[here].float().softmax(1)
            targets.append((likely - without).unflatten(0, (-1, EXAMPLES)).mean(1).argmax(1))
        return torch.cat(targets)

    @torch.no_grad()
    def _steer(self, directions: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n vocab"]]:
        """KL, and rise of every logit, when each direction is added to the contexts; means over their tokens."""
        added = self.size * normalize(directions, dim=1)
        divergence, rises = [], []
        for direction in tqdm(added, desc="steering", leave=False, delay=2):
            shift = direction * self.content[..., None]
            steered = self.model.logits(self.contexts, self.site, lambda x, shift=shift: x + shift.to(x.dtype))
            steered = steered[self.content].float()
            divergence.append(kl(self.clean, steered).mean())
            rises.append(_relative(steered.mean(0) - self.clean.mean(0)))
        return torch.stack(divergence), torch.stack(rises)


def _relative(logits: Float[Tensor, "*any vocab"]) -> Float[Tensor, "*any vocab"]:
    """Logits less their mean over the vocabulary."""
    logits = logits.float()
    return logits - logits.mean(-1, keepdim=True)


def _parts(tokens: Tokens) -> list[Tokens]:
    """Rows of tokens, a forward pass at a time."""
    rows = max(1, AT_ONCE // tokens.ids.shape[1])
    return [Tokens(*part) for part in zip(tokens.ids.split(rows), tokens.mask.split(rows), strict=True)]
