"""Our metrics give what dictionary_learning's own evaluation gave on the same inputs.

`peers.dictionary_learning_evaluation` recorded it. It averages the numbers of batches; so does this file.
"""

import pytest
import torch
from peers.parity import TOLERANCE, recorded
from peers.stand_ins import batches

from sae_lib.metrics import alive, cosine, explained_variance, l0, l2_ratio, relative_reconstruction_bias

FOUND, VERSIONS = recorded("dictionary_learning_evaluation")


def same(number):
    return pytest.approx(number, abs=TOLERANCE, rel=TOLERANCE)


def of(name):
    """What dictionary_learning computed."""
    return FOUND[f"core.{name}"].item()


def mean(metric):
    """Of a metric of x and x_hat, over batches."""
    numbers = [metric(x, x_hat) for x, x_hat, _ in batches(FOUND)]
    return sum(numbers) / len(numbers)


def test_the_record_says_where_it_comes_from():
    assert VERSIONS.keys() == {"dictionary-learning", "torch", "numpy", "sources"}


def test_cosine_length_bias_and_sparsity_agree():
    assert mean(cosine) == same(of("cossim"))
    assert mean(l2_ratio) == same(of("l2_ratio"))
    assert mean(relative_reconstruction_bias) == same(of("relative_reconstruction_bias"))
    codes = [z for _, _, z in batches(FOUND)]
    assert sum(map(l0, codes)) / len(codes) == same(of("l0"))
    assert alive(torch.cat(codes)) == same(of("frac_alive"))


def test_explained_variance_forgives_a_constant_error_there_and_not_here():
    def forgiving(x, x_hat):
        return explained_variance(x, x_hat + (x - x_hat).mean(0))

    assert mean(forgiving) == same(of("frac_variance_explained"))
    assert of("frac_variance_explained") == pytest.approx(0.4194, abs=1e-4)
    assert mean(explained_variance) == pytest.approx(0.3133, abs=1e-4)
