"""Our metrics give what SAELens's own functions gave on the same inputs, which `peers.sae_lens_evals` recorded."""

import pytest
import torch
from peers.parity import TOLERANCE, recorded
from peers.stand_ins import batches

from sae_lib.metrics import (
    Reconstruction,
    density,
    explained_variance,
    latent_f1,
    loss_recovered,
    mcc,
    relative_reconstruction_bias,
    uniqueness,
)

FOUND, VERSIONS = recorded("sae_lens_evals")


def same(number):
    return pytest.approx(number, abs=TOLERANCE, rel=TOLERANCE)


def of(name):
    """What SAELens computed."""
    return FOUND[name].item()


def test_the_record_says_where_it_comes_from():
    assert VERSIONS.keys() == {"sae-lens", "torch", "numpy", "sources"}


def test_a_stream_of_batches_has_the_numbers_that_it_has_there():
    stream = Reconstruction()
    for x, x_hat, z in batches(FOUND):
        stream.update(x, x_hat, z)
    ours = stream.compute()
    names = {"mse": "mse", "explained_variance": "explained_variance", "cosine": "cossim", "l2_ratio": "l2_ratio"}
    for name, theirs in (names | {"l0": "l0"}).items():
        assert ours[name] == same(of(f"core.{theirs}")), name
    assert stream.density.tolist() == same(FOUND["core.feature_density"].tolist())


def test_explained_variance_is_that_of_all_tokens_and_not_the_mean_over_batches():
    x, x_hat, z = (torch.cat(parts) for parts in zip(*batches(FOUND), strict=True))
    of_batches = [explained_variance(x, x_hat) for x, x_hat, _ in batches(FOUND)]
    assert explained_variance(x, x_hat) == same(of("core.explained_variance"))
    assert abs(sum(of_batches) / len(of_batches) - of("core.explained_variance")) > 1e-4
    assert density(z).tolist() == same(FOUND["core.feature_density"].tolist())


def test_the_bias_agrees_batch_by_batch_there_batches_are_averaged():
    biases = [relative_reconstruction_bias(x, x_hat) for x, x_hat, _ in batches(FOUND)]
    assert sum(biases) / len(biases) == same(of("core.relative_reconstruction_bias"))


def test_what_the_model_loses_agrees():
    losses = [of(f"core.ce_loss_{which}") for which in ("without_sae", "with_sae", "with_ablation")]
    assert loss_recovered(*losses) == same(of("core.ce_loss_score"))


def test_known_features_are_recovered_alike():
    W_dec, directions, z, truth = (FOUND[f"recovery.{name}"] for name in ("W_dec", "directions", "z", "truth"))
    assert mcc(W_dec, directions) == same(of("recovery.mcc"))
    assert uniqueness(W_dec, directions) == same(of("recovery.uniqueness"))
    theirs = {name: of(f"recovery.{name}") for name in ("precision", "recall")} | {"f1": of("recovery.f1_score")}
    assert latent_f1(W_dec, directions, z, truth) == same(theirs)
    assert not z[:, 11].any()  # a dead latent counts
