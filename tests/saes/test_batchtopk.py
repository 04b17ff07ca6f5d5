"""BatchTopK: numbers by hand."""

import pytest
import torch

from sae_lib import Batch, BatchTopKSAE, PlantedDictionary, train
from sae_lib.saes.batchtopk import MEMORY


def by_hand(k=1):
    sae = BatchTopKSAE(3, 3, k)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    return sae


X = torch.tensor([[3.0, 1.0, 2.0], [-1.0, -2.0, 0.5]])


def test_the_batch_shares_its_k_times_batch_pairs():
    assert by_hand().train().encode(X).tolist() == [[3, 0, 2], [0, 0, 0]]
    assert by_hand(2).train().encode(X).tolist() == [[3, 1, 2], [0, 0, 0.5]]


def test_evaluation_compares_with_the_threshold_and_ignores_the_batch():
    sae = by_hand().eval()
    sae.threshold.fill_(0.9)
    assert sae.encode(X).tolist() == [[3, 1, 2], [0, 0, 0]]
    assert sae.encode(X[1:]).tolist() == [[0, 0, 0]]


def test_the_threshold_is_the_bias_corrected_mean_of_the_smallest_living_values():
    sae = by_hand().train()
    smallest = [2.0, 0.7, 1.1]
    expected, weight = 0.0, 0.0
    for value in smallest:
        batch = Batch(torch.tensor([[value, 9.0, 0.0], [0.0, 0.0, 0.0]]))
        sae.after_step(batch, sae.loss(batch).code)
        expected, weight = MEMORY * expected + (1 - MEMORY) * value, MEMORY * weight + (1 - MEMORY)
    assert sae.threshold.item() == pytest.approx(expected / weight, rel=1e-5)
    assert min(smallest) < sae.threshold < max(smallest)


def test_a_batch_with_nothing_alive_leaves_the_threshold():
    sae, batch = by_hand().train(), Batch(-torch.ones(2, 3))
    sae.threshold.fill_(0.5)
    sae.after_step(batch, sae.loss(batch).code)
    assert sae.threshold == 0.5


def test_after_a_short_run_evaluation_keeps_about_k_latents_a_token():
    planted = PlantedDictionary(16, 8, active=2)
    sae = BatchTopKSAE(8, 16, 2)
    train(sae, planted.batches(256, seed=0), tokens=30_000)
    counts = (sae.encode(planted.sample(4000, seed=1)[0]) > 0).sum(1).float()
    assert 1.8 < counts.mean() < 2.2
    assert counts.std() > 0.3  # tokens differ in how many they use
