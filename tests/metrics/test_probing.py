"""A probe finds what is there, in any units, and nothing in noise."""

import pytest
import torch

from sae_lib.metrics.probing import linear_probe


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(n, seed, classes=3):
    """Noise with a class mean along one of the first axes."""
    labels = torch.arange(n) % classes
    return draw(n, 8, seed=seed) + 6 * torch.nn.functional.one_hot(labels, 8), labels


def test_a_planted_property_is_read_on_new_examples():
    probe = linear_probe(*planted(300, seed=0))
    x, labels = planted(300, seed=1)
    assert probe.accuracy(x, labels) > 0.97
    assert probe.accuracy(x, labels.roll(1)) < 0.03


def test_labels_keep_their_names():
    x, labels = planted(60, seed=0)
    names = torch.tensor([11, -4, 90])
    assert set(linear_probe(x, names[labels])(x).tolist()) == {11, -4, 90}


def test_labels_that_are_not_in_the_activations_are_guessed():
    noise, labels = draw(600, 8), torch.arange(600) % 3
    assert linear_probe(noise, labels).accuracy(draw(600, 8, seed=1), labels) == pytest.approx(1 / 3, abs=0.08)


def test_units_and_constant_dimensions_do_not_matter():
    x, labels = planted(120, seed=0)
    scaled = x * torch.linspace(0.01, 100, 8) + 5
    scaled = torch.cat([scaled, torch.full((120, 1), 3.0)], 1)
    probe = linear_probe(scaled, labels)
    assert torch.equal(probe(scaled), linear_probe(x, labels)(x))
    torch.testing.assert_close(probe.W[:8], linear_probe(x, labels).W, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_frequent_class_does_not_swallow_the_rare_ones(classes):
    """Its mean is near the mean of all, so that the constants decide."""
    labels = torch.cat([torch.zeros(900, dtype=torch.long), torch.arange(100) % (classes - 1) + 1])
    x = 0.1 * draw(1000, 3) + torch.nn.functional.one_hot(labels, 3)
    assert linear_probe(x, labels).accuracy(x, labels) > 0.99


def test_two_classes_give_two_columns_that_decide_alike():
    x, labels = planted(100, seed=0, classes=2)
    probe = linear_probe(x, labels)
    assert probe.W.shape == (8, 2)
    torch.testing.assert_close(probe.W[:, 0], -probe.W[:, 1])
    assert probe.accuracy(x, labels) > 0.97


def test_a_larger_penalty_makes_smaller_weights():
    x, labels = planted(100, seed=0)
    assert linear_probe(x, labels, penalty=100).W.norm() < linear_probe(x, labels, penalty=1).W.norm() / 2


@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_refused():
    x, labels = planted(9, seed=0)
    with pytest.raises(ValueError, match="class of each of the 9 rows, got 8"):
        linear_probe(x, labels[:8])
    with pytest.raises(ValueError, match=r"at least two classes, got \[1\]"):
        linear_probe(x, torch.ones(9, dtype=torch.long))
    with pytest.raises(ValueError, match="penalty must be above 0, got 0"):
        linear_probe(x, labels, penalty=0)
    with pytest.raises(ValueError, match="x must be finite"):
        linear_probe(x * torch.nan, labels)
