"""Our metrics give what sae-bench's own functions gave on the same inputs, which `peers.sae_bench` recorded.

Where they are meant to differ, the difference is here as well: by how much, and by what.
"""

import pytest
import torch
import torch.nn.functional as F
from peers.parity import TOLERANCE, TRAINED, recorded
from peers.stand_ins import batches

from sae_lib.metrics import (
    absorption_fraction,
    cosine,
    density,
    explained_variance,
    feature_splits,
    full_absorption,
    k_sparse_probe,
    kl,
    l0,
    l2_ratio,
    loss_recovered,
    mse,
    one_vs_rest,
    pooled,
    relative_reconstruction_bias,
    sparse_probe_accuracy,
    strongest_latents,
)

FOUND, VERSIONS = recorded("sae_bench")


def same(number):
    return pytest.approx(number, abs=TOLERANCE, rel=TOLERANCE)


def test_the_record_says_where_it_comes_from():
    assert VERSIONS.keys() == {"sae-bench", "scikit-learn", "torch", "numpy", "sources"}


# Absorption ----------------------------------------------------------------------------------------------------------

LETTERS = {letter: i for i, letter in enumerate("abc")}


def words(letter):
    """Of a letter, the arguments of both kinds of absorption, and what sae-bench made of each word."""
    its = torch.arange(len(FOUND["absorption.x"])).chunk(len(LETTERS))[LETTERS[letter]]
    x, z, fraction, full = (
        FOUND[f"absorption.{name}"][its] for name in ("x", "z", "absorption_fraction", "is_full_absorption")
    )
    main = FOUND[f"absorption.main.{letter}"]
    return (x, z, FOUND["absorption.W_dec"], FOUND["absorption.probes"][LETTERS[letter]], main), fraction, full


@pytest.mark.parametrize("letter", LETTERS)
def test_words_are_absorbed_to_the_same_fraction(letter):
    given, fraction, _ = words(letter)
    assert absorption_fraction(*given).tolist() == same(fraction.tolist())
    assert absorption_fraction(*given).mean().item() == same(
        FOUND["absorption.mean_absorption_fraction"][LETTERS[letter]].item()
    )
    assert {0.0, 1.0} < set(fraction.tolist())  # all branches of the definition were taken


@pytest.mark.parametrize("letter", LETTERS)
def test_the_same_words_are_absorbed_fully(letter):
    given, _, full = words(letter)
    assert full_absorption(*given).tolist() == full.tolist()
    assert full_absorption(*given).float().mean().item() == same(
        FOUND["absorption.full_absorption_rate"][LETTERS[letter]].item()
    )
    assert 0 < full.sum() < len(full)


K_SPARSE = {name.removeprefix("k_sparse."): value for name, value in FOUND.items() if name.startswith("k_sparse.")}


def k_sparse(letter, k):
    """Our probe of a letter on k latents."""
    truth, truth_test = (K_SPARSE[f"labels_{part}"] == letter for part in ("train", "test"))
    return k_sparse_probe(K_SPARSE["z_train"], truth, K_SPARSE["z_test"], truth_test, K_SPARSE["weights"][letter], k)


def test_probes_of_all_classes_are_trained_alike():
    truth = F.one_hot(K_SPARSE["labels_train"]).bool()
    probe = one_vs_rest(K_SPARSE["z_train"], truth, batch_size=4096, weight_decay=1e-6, l1=0.01, seed=0)
    assert torch.allclose(probe.W.T, K_SPARSE["trained.weights"], atol=TRAINED)
    assert torch.allclose(probe.b, K_SPARSE["trained.biases"], atol=TRAINED)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_k_sparse_probes_read_the_same_latents_and_are_as_right(k):
    for letter, (latents, f1) in enumerate(zip(K_SPARSE[f"feats.{k}"], K_SPARSE["f1"][:, k - 1], strict=True)):
        probe = k_sparse(letter, k)
        assert probe.latents.tolist() == latents.tolist()
        assert probe.f1 == same(f1.item())


@pytest.mark.parametrize("part", ["k_sparse", "feature_splits"])  # of those probes, and F1 that was made up
def test_as_many_latents_split_a_feature(part):
    splits = [feature_splits(f1.tolist()) for f1 in FOUND[f"{part}.f1"]]
    assert splits == FOUND[f"{part}.split_feats"].tolist()
    assert set(splits) > {1, 2}


# Sparse probing ------------------------------------------------------------------------------------------------------

PROBING = {name.removeprefix("probing."): value for name, value in FOUND.items() if name.startswith("probing.")}


@pytest.mark.parametrize("part", ["train", "test"])
def test_codes_of_texts_are_pooled_alike(part):
    ours = pooled(PROBING[f"z_{part}"], PROBING[f"keep_{part}"])
    assert torch.allclose(ours, PROBING[f"pooled_{part}"], atol=TOLERANCE)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_same_latents_are_probed_with_the_same_accuracy(k):
    z, z_test = PROBING["pooled_train"], PROBING["pooled_test"]
    y, y_test = PROBING["y_train"].bool(), PROBING["y_test"].bool()
    assert set(strongest_latents(z, y, k).tolist()) == set(PROBING[f"top.{k}"].tolist())
    assert sparse_probe_accuracy(z, y, z_test, y_test, k) == same(PROBING[f"accuracy.{k}"].item())


# Core ----------------------------------------------------------------------------------------------------------------

UNITS = ["core", "core_small"]  # the same texts, the second time in a unit ten times as large


def of(unit, name):
    """What sae-bench computed."""
    return FOUND[f"{unit}.{name}"].item()


def all_tokens(unit):
    """x, x_hat and z of both batches."""
    return [torch.cat(parts) for parts in zip(*batches(FOUND, unit), strict=True)]


@pytest.mark.parametrize("unit", UNITS)
def test_cosine_length_and_sparsity_agree(unit):
    x, x_hat, z = all_tokens(unit)
    assert cosine(x, x_hat) == same(of(unit, "cossim"))
    assert l2_ratio(x, x_hat) == same(of(unit, "l2_ratio"))
    assert l0(z) == same(of(unit, "l0"))
    assert density(z).tolist() == same(FOUND[f"{unit}.feature_density"].tolist())
    assert (density(z) == 0).any()


@pytest.mark.parametrize("unit", UNITS)
def test_the_bias_agrees_batch_by_batch_there_batches_are_averaged(unit):
    biases = [relative_reconstruction_bias(x, x_hat) for x, x_hat, _ in batches(FOUND, unit)]
    assert sum(biases) / len(biases) == same(of(unit, "relative_reconstruction_bias"))


@pytest.mark.parametrize("unit", UNITS)
def test_the_squared_error_is_divided_by_the_size_of_the_batch_once_more_there(unit):
    of_batches = [mse(x, x_hat) for x, x_hat, _ in batches(FOUND, unit)]  # a batch's mean over its tokens
    assert sum(of_batches) / len(all_tokens(unit)[0]) == same(of(unit, "mse"))


def test_explained_variance_depends_on_the_unit_there_and_not_here():
    theirs = [of(unit, "explained_variance") for unit in UNITS]
    ours = [explained_variance(*all_tokens(unit)[:2]) for unit in UNITS]
    assert theirs == pytest.approx([0.4809, 0.6503], abs=1e-4)
    assert ours == pytest.approx([0.3174, 0.3174], abs=1e-4)


@pytest.mark.parametrize("unit", UNITS)
def test_explained_variance_has_the_square_of_the_mean_square_for_the_squared_mean_there(unit):
    of_batches = [
        (mse(x, x_hat), mse(x, torch.zeros_like(x)), x.square().mean().item()) for x, x_hat, _ in batches(FOUND, unit)
    ]
    residual, squared_norm, square = (sum(numbers) / len(numbers) for numbers in zip(*of_batches, strict=True))
    assert 1 - residual / (squared_norm - square**2) == same(of(unit, "explained_variance"))


@pytest.mark.parametrize("unit", UNITS)
def test_the_legacy_explained_variance_is_a_mean_of_ratios_over_tokens(unit):
    ratios = [(x - x_hat).square().sum(1) / (x - x.mean(0)).square().sum(1) for x, x_hat, _ in batches(FOUND, unit)]
    assert 1 - torch.cat(ratios).mean().item() == same(of(unit, "explained_variance_legacy"))
    assert of(unit, "explained_variance_legacy") == pytest.approx(0.2266, abs=1e-4)


@pytest.mark.parametrize("unit", UNITS)
def test_what_the_model_loses_agrees(unit):
    losses = [of(unit, f"ce_loss_{which}") for which in ("without_sae", "with_sae", "with_ablation")]
    assert loss_recovered(*losses) == same(of(unit, "ce_loss_score"))
    tokens, unembedding = FOUND[f"{unit}.tokens"].flatten(0, 1), FOUND[f"{unit}.unembedding"]
    x, x_hat = FOUND[f"{unit}.x"][tokens], FOUND[f"{unit}.x_hat"][tokens]
    counts = tokens != 0
    patched = torch.where(counts[..., None], x_hat, x) @ unembedding
    assert kl(x @ unembedding, patched)[counts].mean().item() == same(of(unit, "kl_div_with_sae"))
    of_tokens = F.cross_entropy(patched[:, :-1].mT, tokens[:, 1:], reduction="none")
    assert of_tokens[counts[:, :-1]].mean().item() == same(losses[1])
