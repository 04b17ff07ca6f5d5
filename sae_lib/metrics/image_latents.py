"""SAEs on the hidden units of an image classifier: what Foote 2024 measures of them, and what that leaves open.

Tables 2 and 3 of arXiv 2411.08166, by which its loss (`sae_lib.embedding_loss`) is judged. Chapter `neuron_embeddings`.
Smaller distances between a latent's examples need not mean a purer latent, so beside them stand

    distance_ratio       distances of random images under the same weights: what the row alone does
    row_dimensions       how many inputs the row reads: with one left, every distance is 0
    mean_distance_raw    distances of the same examples without the weights: what the loss did not see
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.metrics.evaluation import evaluate
from sae_lib.metrics.polysemanticity import effective_features
from sae_lib.neuron_embeddings import cosine_distances, embeddings, proxies
from sae_lib.sae import SAE
from sae_lib.vision import Classifier, Images, accuracy

EXAMPLES = 100
"""Most examples of a latent; the first are taken."""
NOTHING = 1e-12
"""Smaller distances are made by rounding."""


@torch.no_grad()
def image_latents(sae: SAE, classifier: Classifier, train: Images, test: Images, seed: int = 0) -> dict[str, float]:
    """What a classifier loses by an SAE in place of its hidden units, and how far the examples of latents lie apart.

    Args:
        sae: trained on the classifier's hidden units.
        classifier: reads the images.
        train: images that the SAE was trained on, on which latents count as dead.
        test: images to measure on.
        seed: of the random images.

    Returns:
        all of `evaluate` on the test images, such as ``mse`` and ``l0``, but for ``alive``; ``dead``, the share of
        latents that no training image activates, and ``alive``, that of the others; ``accuracy`` of the classifier
        and ``accuracy_lost``, shares of the test images; ``l1``, the mean sum of an image's latents; and all of
        `example_distances`.

    Raises:
        ValueError: if no latent has two examples.
    """
    h, seen = classifier.activations(test.pixels), classifier.activations(train.pixels)
    z = sae.encode(h)
    alive = (sae.encode(seen) > 0).any(0).double().mean().item()
    clean = accuracy(classifier.logits(h), test.labels)
    own = {
        "dead": 1 - alive,
        "alive": alive,
        "accuracy": clean,
        "accuracy_lost": clean - accuracy(classifier.logits(sae(h)), test.labels),
        "l1": z.sum(1).mean().item(),
    }
    return evaluate(sae, [h], tokens=len(h)) | own | example_distances(h, z, sae.W_enc.detach().T, seed)


def example_distances(
    h: Float[Tensor, "images d_in"],
    z: Float[Tensor, "images d_sae"],
    weights: Float[Tensor, "d_sae d_in"],
    seed: int = 0,
) -> dict[str, float]:
    """Cosine distances between the inputs that activate a latent, medians over the latents with two or more.

    Units: distances from 0 to 2. Blind to: what the head of this file says, and so measured beside them.

    Args:
        h: inputs.
        z: code; the first 100 inputs that activate a latent are its examples.
        weights: encoder rows.
        seed: of the random inputs, as many for each latent as it has examples.

    Returns:
        ``max_distance``, ``mean_distance`` and ``size`` by `sae_lib.neuron_embeddings.proxies`; ``mean_distance_raw``,
        without weights; ``distance_ratio``, the mean distance over that of random inputs under the same weights (of
        latents where that is not 0; NaN if there is none); ``row_dimensions``, the participation ratio of the squared
        weights; ``latents_measured``, how many latents these are medians of.

    Raises:
        ValueError: if no latent has two examples.
    """
    generator = np.random.default_rng(seed)
    rows = effective_features(weights).tolist()
    found = []
    for latent in tqdm(range(z.shape[1]), desc="examples of latents", unit="latent", leave=False, delay=2):
        places = (z[:, latent] > 0).nonzero().squeeze(1)[:EXAMPLES]
        if len(places) < 2:
            continue
        random = torch.from_numpy(generator.permutation(len(h))[: len(places)])
        own = distances(embeddings(h[places], weights[latent]))
        at_random = distances(embeddings(h[random], weights[latent]))["mean_distance"]
        found.append(
            {name: own[name] for name in ("max_distance", "mean_distance", "size")}
            | {"mean_distance_raw": distances(h[places])["mean_distance"], "row_dimensions": rows[latent]}
            | {"distance_ratio": own["mean_distance"] / at_random if at_random > NOTHING else math.nan}
        )
    if not found:
        raise ValueError("distances need a latent that two inputs activate, got none: train longer, or penalise less")
    medians = {name: median([one[name] for one in found]) for name in found[0]}
    return medians | {"latents_measured": len(found)}


def distances(embedded: Float[Tensor, "K d_in"]) -> dict[str, float]:
    """The proxies of examples that are all of one cluster."""
    return proxies(cosine_distances(embedded), np.zeros(len(embedded), dtype=int))


def median(values: list[float]) -> float:
    """Of the values that are defined; NaN if none is."""
    defined = [value for value in values if math.isfinite(value)]
    return float(np.median(defined)) if defined else math.nan
