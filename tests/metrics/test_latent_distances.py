"""Distances over the latents of an SAE, against one latent at a time; partial correlation and entropy, by hand."""

import math

import numpy as np
import pytest
import torch

from sae_lib import ReLUSAE, load_texts
from sae_lib.metrics.latent_distances import LatentDistances, partial_rank_correlation, token_entropy
from sae_lib.models import load_model
from sae_lib.neuron_embeddings import collect, cosine_distances, cut, embeddings, latents, proxies, tree

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return load_model("pocket", device="cpu")


@pytest.fixture(scope="module")
def measure(model):
    return LatentDistances(model, SITE, load_texts("pocket", split="test", limit=200), tokens=3000, latents=40)


@pytest.fixture(scope="module")
def sae():
    sae = ReLUSAE(d_in=128, d_sae=48, l1_coeff=1.0, seed=1)
    sae.b_enc.data.fill_(-0.5)
    return sae


def test_distances_are_medians_over_latents_with_two_examples(model, measure, sae):
    found = measure(sae)
    examples, each = collect(latents(model, SITE, sae), measure.records), []
    for latent in range(48):
        h = examples.of(latent)[3]
        if len(h) > 1:
            d = cosine_distances(embeddings(h, sae.W_enc.detach()[:, latent]))
            e = torch.nn.functional.normalize(measure.random * sae.W_enc.detach()[:, latent], dim=1).double()
            at_random = (1 - e @ e.T)[~torch.eye(len(e), dtype=torch.bool)].mean().item()
            each.append((proxies(d, cut(tree(d))), cut(tree(d), 0.05).max() + 1, at_random))
    assert found["latents_measured"] == len(each) > 20
    for name in ("max_distance", "mean_distance", "intra_distance", "clusters", "size"):
        assert found[name] == pytest.approx(np.nanmedian([float(one[name]) for one, *_ in each]))
    assert found["clusters_near"] == np.median([near for _, near, _ in each])
    ratios = [one["mean_distance"] / at_random for one, _, at_random in each]
    assert found["distance_ratio"] == pytest.approx(np.median(ratios), rel=1e-5)
    assert found["l0"] == pytest.approx(examples.frequency.sum().item())
    assert found["autointerp_latents"] > 10
    assert -1 <= found["distance_autointerp_partial"] <= 1
    assert found["distance_autointerp_partial"] != found["distance_autointerp"]


def test_the_correlation_is_over_the_latents_that_are_explained(measure, sae):
    explained = measure.autointerp.explained(sae)
    of = {one.latent: {"mean_distance": -one.score, "frequency": 1.0 + one.latent, "token_entropy": 0.5 * one.latent**2}
          for one in explained}  # fmt: skip
    assert measure.with_scores(explained, of)["distance_autointerp"] == pytest.approx(-1)
    for other in ("frequency", "token_entropy"):  # if one of them is the distance, nothing is left of it
        same = {latent: one | {other: one["mean_distance"]} for latent, one in of.items()}
        assert math.isnan(measure.with_scores(explained, same)["distance_autointerp_partial"])
    few = dict(list(of.items())[:5])
    assert math.isnan(measure.with_scores(explained, few)["distance_autointerp"])


def test_weights_of_one_input_have_no_distances_at_all(measure):
    sae = ReLUSAE(d_in=128, d_sae=4, l1_coeff=1.0)
    sae.W_enc.data.zero_()
    for latent in range(4):
        sae.W_enc.data[latent, latent] = 1.0
    found = measure(sae)
    assert found["row_dimensions"] == pytest.approx(1)
    assert found["mean_distance"] == pytest.approx(0, abs=1e-9), "one sign only where the latent is active"


def test_what_others_explain_is_taken_away():
    generator = np.random.default_rng(0)
    frequency, own = generator.normal(size=400), generator.normal(size=400)
    a, b = frequency + 0.2 * own, frequency + 0.2 * generator.normal(size=400)
    assert partial_rank_correlation(a, b) > 0.9
    assert abs(partial_rank_correlation(a, b, frequency)) < 0.15
    c = frequency - 0.2 * own
    assert partial_rank_correlation(a, c) > 0.8
    assert partial_rank_correlation(a, c, frequency) < -0.8
    assert math.isnan(partial_rank_correlation(a, frequency, frequency))
    assert math.isnan(partial_rank_correlation(a[:9], b[:9]))


def test_entropy_of_tokens():
    assert token_entropy(np.array([3, 3, 3])) == 0
    assert token_entropy(np.arange(8)) == pytest.approx(math.log(8))
    assert token_entropy(np.array([1, 1, 1, 2])) == pytest.approx(math.log(4) - 0.75 * math.log(3))
