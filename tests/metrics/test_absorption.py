"""Numbers by hand are in the doctests; here is what the definitions promise, at each of their thresholds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lib.data import PlantedDictionary
from sae_lib.metrics import (
    absorption_by_ablation,
    absorption_fraction,
    absorption_older,
    full_absorption,
    planted_absorption,
)

PROBE, MAIN = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0])
PARTS = torch.tensor([1.0, 0.5, 0.25, 0.2, 0.11, 0.09, -0.5])
"""The cosines of seven latents with the probe; latent 0 is the main one."""
W_DEC = torch.stack([PARTS, (1 - PARTS**2).sqrt(), torch.zeros(7)], 1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def word(A, **written):
    """A word with A of the property, of which latent n writes ``_n``."""
    z = torch.zeros(1, 7)
    for name, part in written.items():
        z[0, int(name[1:])] = part / PARTS[int(name[1:])]
    return torch.tensor([[A, 5.0, -5.0]]), z, W_DEC, PROBE, MAIN


@pytest.mark.parametrize(
    ("A", "written", "expected"),
    [
        (10, {"_0": 10}, 0),  # nothing is missing
        (10, {"_0": 11, "_1": 9}, 0),
        (10, {"_1": 3.9}, 0),  # nobody steps in: less than 40%
        (10, {"_1": 4.1}, 1),  # the main latent writes nothing
        (10, {"_0": 2, "_1": 6}, 6 / 8),
        (10, {"_0": 6, "_1": 9}, 4 / 10),  # others make up for no more than what is missing
        (10, {"_1": 1.4, "_2": 1.4, "_3": 1.4}, 1),  # three together
        (10, {"_1": 1.2, "_2": 1.2, "_3": 1.2, "_4": 1.2}, 0),  # not four
        (10, {"_5": 9}, 0),  # a cosine of less than 0.1
        (10, {"_4": 9}, 1),
        (10, {"_1": 4.5, "_6": -4.5}, 1),  # what another takes away does not count
        (0, {"_1": 4}, 0),
        (-10, {"_1": 4}, 0),
    ],
)
def test_the_fraction_is_what_others_write_instead_of_the_main_latents(A, written, expected):
    assert absorption_fraction(*word(A, **written)).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("A", "written", "expected"),
    [
        (10, {"_1": 4.1}, True),
        (10, {"_1": 3.9}, False),
        (10, {"_1": 9, "_0": 1e-7}, False),  # the main latent is not silent
        (10, {"_1": 9, "_0": 1e-9}, True),
        (10, {"_5": 9}, True),  # a smaller cosine is enough here
        (10, {"_1": 3, "_2": 3, "_3": 3}, False),  # one must do it alone
        (10, {"_6": -9}, False),
        (0, {"_1": 4}, False),
        (-10, {"_1": 4}, False),
    ],
)
def test_full_absorption_is_one_latent_in_the_place_of_silent_ones(A, written, expected):
    assert full_absorption(*word(A, **written)).item() == expected


def test_the_least_cosine_of_full_absorption():
    W_dec = torch.tensor([[1.0, 0.0], [0.024, 1.0], [0.026, 1.0]])
    for latent, absorbs in ((1, False), (2, True)):
        z = torch.zeros(1, 3).index_fill(1, torch.tensor([latent]), 300)
        given = torch.tensor([[5.0, 0.0]]), z, W_dec, torch.tensor([1.0, 0.0]), MAIN
        assert full_absorption(*given).item() == absorbs
        assert absorption_by_ablation(z, *given[1:]).item() == absorbs


def test_all_main_latents_count():
    x, z, W_dec, probe, _ = word(10, _0=2, _1=5, _2=5)
    both = torch.tensor([0, 1])
    assert absorption_fraction(x, z, W_dec, probe, both).item() == pytest.approx(3 / 10)
    assert not full_absorption(x, z, W_dec, probe, both)
    assert not full_absorption(*word(10, _1=9)[:4], both)
    assert not full_absorption(*word(10, _0=9)[:4], both)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_units_of_the_decoder_and_of_the_probe_do_not_matter(seed):
    x, z, W_dec, probe = draw(9, 4, seed=seed), draw(9, 6, seed=seed + 1).relu(), draw(6, 4, seed=seed + 2), draw(4)
    norms = draw(6, seed=seed + 3).exp()
    for metric in (absorption_fraction, full_absorption):
        expected = metric(x, z, W_dec, probe, MAIN)
        torch.testing.assert_close(metric(x, z / norms, W_dec * norms[:, None], 7 * probe, MAIN), expected)
        torch.testing.assert_close(metric(100 * x, 100 * z, W_dec, probe, MAIN), expected)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_the_older_rate_is_never_above_the_newer_one(seed):
    generator = torch.Generator().manual_seed(seed)
    x, z = torch.randn(30, 3, generator=generator), torch.randn(30, 7, generator=generator).relu()
    z[:, 0] *= torch.rand(30, generator=generator) > 0.5
    given = 3 * x, z, W_DEC, PROBE, MAIN
    scores = torch.randn(30, generator=generator)
    older = absorption_older(*given, scores)
    assert torch.equal(older, full_absorption(*given) & (scores <= 0))


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        ([0, 3.0, 2.0, 0, 0, 0, 0], True),
        ([0, 3.0, 2.1, 0, 0, 0, 0], False),  # not by 1
        ([0, 3.0, -2.1, 0, 0, 0, 0], False),  # magnitudes are compared
        ([0, -3.0, 0, 0, 0, 0, 0], False),  # it hinders the answer
        ([0, 0, 0, 0, 0, 0, 3.0], False),  # it points away from the probe
    ],
)
def test_by_ablation_one_latent_must_carry_the_answer(effects, expected):
    _, z, W_dec, probe, main = word(10, _1=5)
    assert absorption_by_ablation(torch.tensor([effects]), z, W_dec, probe, main).item() == expected
    speaks = z.index_fill(1, main, 1.0)
    assert not absorption_by_ablation(torch.tensor([effects]), speaks, W_dec, probe, main)


# Planted hierarchies -------------------------------------------------------------------------------------------------


def planted(n_features=12, d_in=16, hierarchy=(2,)):
    dictionary = PlantedDictionary(n_features, d_in, active=2.0, hierarchy=hierarchy)
    return dictionary, *dictionary.sample(2000)


def absorbing(dictionary, truth):
    """Latents of an SAE that absorbs: a child's latent writes its parent too, and the parent's is silent beside it."""
    child = dictionary.parents >= 0
    z = truth.clone()
    W_dec = dictionary.directions.clone()
    for feature in child.nonzero()[:, 0].tolist():
        parent = int(dictionary.parents[feature])
        z[truth[:, feature] != 0, parent] = 0
        W_dec[feature] += dictionary.directions[parent]
    return z, W_dec


@pytest.mark.parametrize("d_in", [16, 12])
def test_a_latent_for_each_feature_absorbs_nothing(d_in):
    dictionary, x, truth = planted(d_in=d_in)
    report = planted_absorption(x, truth, dictionary.directions, dictionary.directions, truth, dictionary.parents)
    assert report == {"absorption_fraction": 0, "absorption_full": 0, "parents": 4}


def test_a_dictionary_that_absorbs_everything_is_found_out():
    """Words with a child are absorbed, so the rate is their share among the parent's words."""
    dictionary, x, truth = planted()
    z, W_dec = absorbing(dictionary, truth)
    shares = []
    for parent in range(4):
        children = (dictionary.parents == parent).nonzero()[:, 0]
        on = truth[:, parent] != 0
        shares.append((truth[on][:, children] != 0).any(1).float().mean())
    report = planted_absorption(x, z, W_dec, dictionary.directions, truth, dictionary.parents)
    assert report["absorption_full"] == pytest.approx(torch.stack(shares).mean().item(), abs=0.03)
    assert report["absorption_full"] <= report["absorption_fraction"] > 0.6
    assert report["parents"] == 4


def test_dual_directions_do_not_take_similar_features_for_absorption():
    """The child's direction has a cosine of 0.8 with its parent's, yet its latent writes nothing of the parent."""
    directions = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    truth = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    z = truth.clone()
    z[2, 0] = 0  # silent, and nobody steps in
    report = planted_absorption(truth @ directions, z, directions, directions, truth, torch.tensor([-1, 0]))
    assert report["absorption_fraction"] == report["absorption_full"] == 0
    z[1] = torch.tensor([0.0, 3.0])  # silent, and the child's latent is loud, along its own direction
    report = planted_absorption(truth @ directions, z, directions, directions, truth, torch.tensor([-1, 0]))
    assert report["absorption_fraction"] == report["absorption_full"] == 0


def test_parents_that_no_latent_follows_are_left_out_and_said_so():
    dictionary, x, truth = planted()
    z = truth.clone()
    z[:, [1, 3]] = 0
    z[:, 4:] = 0
    given = dictionary.directions, dictionary.directions, truth, dictionary.parents
    z[:, dictionary.parents == 1] = 0
    assert planted_absorption(x, z, *given)["parents"] <= 4
    nothing = torch.zeros_like(z)
    with pytest.raises(ValueError, match="at least one of the 4 parents, got none"):
        planted_absorption(x, nothing, *given)


@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_refused():
    x, z, W_dec, probe, main = word(10, _1=5)
    with pytest.raises(ValueError, match=r"main must be one or more latents in \[0, d_sae=7\), got \[7\]"):
        absorption_fraction(x, z, W_dec, probe, torch.tensor([7]))
    with pytest.raises(ValueError, match="main must be one or more latents"):
        full_absorption(x, z, W_dec, probe, torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="probe must be a finite direction of width d_in=3 and not zero"):
        full_absorption(x, z, W_dec, 0 * probe, main)
    with pytest.raises(ValueError, match="z must be finite, got NaN"):
        absorption_fraction(x, z * torch.nan, W_dec, probe, main)
    with pytest.raises(ValueError, match=r"of the same words, got \(1, 3\) and \(2, 7\)"):
        absorption_fraction(x, z.repeat(2, 1), W_dec, probe, main)
    with pytest.raises(ValueError, match=r"scores must be a finite number for each of the 1 words, got \(2,\)"):
        absorption_older(x, z, W_dec, probe, main, torch.zeros(2))
    with pytest.raises(ValueError, match="effects must have the shape of z"):
        absorption_by_ablation(z[:, :3], z, W_dec, probe, main)
    flat = PlantedDictionary(4, 4)
    x, truth = flat.sample(9)
    with pytest.raises(ValueError, match="parents must name at least one parent, got none"):
        planted_absorption(x, truth, flat.directions, flat.directions, truth, flat.parents)
