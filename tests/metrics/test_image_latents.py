"""What is measured of SAEs on a classifier of images: numbers by hand."""

import math

import pytest
import torch

from sae_lib import ReLUSAE
from sae_lib.metrics.image_latents import EXAMPLES, example_distances, image_latents
from sae_lib.vision import Classifier, Images

H = torch.tensor([[3.0, 4.0], [4.0, 3.0], [1.0, 0.0], [0.0, 2.0]])


def code(*latents):
    """A code whose latents live on the given inputs."""
    z = torch.zeros(len(H), len(latents))
    for latent, places in enumerate(latents):
        z[list(places), latent] = 1.0
    return z


def test_distances_are_between_the_inputs_weighted_by_the_row():
    found = example_distances(H, code([0, 1]), torch.tensor([[2.0, 1.0]]))  # (6, 4) and (8, 3)
    expected = 1 - 60 / math.sqrt(52 * 73)
    assert found["mean_distance"] == found["max_distance"] == pytest.approx(expected)
    assert found["mean_distance_raw"] == pytest.approx(1 - 24 / 25)
    assert found["row_dimensions"] == pytest.approx(25 / 17)
    assert (found["size"], found["latents_measured"]) == (2, 1)


def test_mean_and_largest_distance_of_three():
    found = example_distances(H, code([0, 2, 3]), torch.tensor([[1.0, 1.0]]))
    assert found["mean_distance"] == pytest.approx((0.4 + 0.2 + 1) / 3)
    assert found["max_distance"] == pytest.approx(1)
    assert found["row_dimensions"] == pytest.approx(2)


def test_numbers_are_medians_over_latents_with_two_examples():
    weights = torch.ones(5, 2)
    found = example_distances(H, code([0, 1], [2, 3], [0, 2, 3], [1], []), weights)
    assert found["latents_measured"] == 3
    assert found["mean_distance"] == pytest.approx((0.4 + 0.2 + 1) / 3)  # between 0.04 and 1
    assert found["size"] == 2


def test_the_ratio_is_to_as_many_random_inputs_under_the_same_weights():
    weights = torch.tensor([[2.0, 1.0]])
    everything = example_distances(H, code([0, 1, 2, 3]), weights)  # four random ones of four are all
    assert everything["distance_ratio"] == pytest.approx(1)
    close = [example_distances(H, code([0, 1]), weights, seed)["distance_ratio"] for seed in range(20)]
    assert min(close) == pytest.approx(1 - 60 / math.sqrt(52 * 73))  # against (1, 0) and (0, 2), whose distance is 1
    assert max(close) >= 1
    assert example_distances(H, code([0, 1]), weights, 5) == example_distances(H, code([0, 1]), weights, 5)


def test_a_row_with_one_weight_has_no_distances_and_no_ratio():
    inputs = torch.rand(20, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    found = example_distances(inputs, torch.ones(20, 1), torch.tensor([[0.0, 0.0, 3.0, 0.0, 0.0]]))
    assert found["max_distance"] == pytest.approx(0, abs=1e-12)
    assert found["row_dimensions"] == 1
    assert math.isnan(found["distance_ratio"])
    assert found["mean_distance_raw"] > 0.01


def test_only_the_first_examples_count():
    inputs = torch.rand(EXAMPLES + 50, 3, generator=torch.Generator().manual_seed(0))
    inputs[EXAMPLES:] *= -1
    found = example_distances(inputs, torch.ones(len(inputs), 1), torch.ones(1, 3))
    assert found["size"] == EXAMPLES
    assert found["max_distance"] < 1


def test_latents_without_two_examples_have_no_distances():
    with pytest.raises(ValueError, match="distances need a latent that two inputs activate, got none"):
        example_distances(H, code([0], []), torch.ones(2, 2))


def test_what_the_classifier_loses_and_which_latents_are_dead():
    classifier = Classifier(2, 2, 2)
    sae = ReLUSAE(2, 3, l1_coeff=1.0)
    with torch.no_grad():
        for weights in (classifier.W_in, classifier.W_out):
            weights.copy_(torch.eye(2))
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))  # reads the first hidden unit alone
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, -5.0, 0.0]))
    images = Images(torch.tensor([[3.0, 1.0], [2.0, 0.0], [1.0, 4.0], [1.0, -3.0]]), torch.tensor([0, 0, 1, 1]))
    found = image_latents(sae, classifier, images, images)
    assert (found["accuracy"], found["accuracy_lost"]) == (0.75, 0.25)  # the third image is no longer a 1
    assert found["l1"] == pytest.approx(7 / 4)
    assert (found["l0"], found["mse"]) == (1, pytest.approx((1 + 0 + 16 + 0) / 4))
    assert (found["dead"], found["alive"]) == pytest.approx((2 / 3, 1 / 3))
    assert found["latents_measured"] == 1
    with torch.no_grad():
        sae.b_enc[1] = 1.0
    only = Images(images.pixels[:1], images.labels[:1])
    assert image_latents(sae, classifier, only, images)["alive"] == pytest.approx(2 / 3)
