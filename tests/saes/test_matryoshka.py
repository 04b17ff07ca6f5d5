"""Matryoshka: numbers by hand."""

import pytest
import torch

from sae_lib import Batch, BatchTopKSAE, MatryoshkaSAE
from sae_lib.saes.matryoshka import default_groups


def by_hand(group_sizes):
    sae = MatryoshkaSAE(3, 3, k=3, group_sizes=group_sizes).train()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    return sae


X = torch.tensor([[1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("group_sizes", "expected"),
    [([3], 0), ([1, 2], (13 + 0) / 2), ([1, 1, 1], (13 + 9 + 0) / 3)],
)
def test_the_reconstruction_is_the_mean_over_the_prefixes(group_sizes, expected):
    loss = by_hand(group_sizes).loss(Batch(X))
    assert loss.terms["reconstruction"].item() == pytest.approx(expected)
    assert torch.equal(loss.x_hat, X)


def test_every_prefix_adds_the_decoders_bias_once():
    sae = by_hand([1, 2])
    with torch.no_grad():
        sae.b_dec.fill_(1.0)
    # x - b_dec = (0, 1, 2): the first prefix gives (1, 1, 1), the second all of x
    assert sae.loss(Batch(X)).terms["reconstruction"].item() == pytest.approx((1 + 4) / 2)


def test_with_one_group_it_is_batchtopk_to_the_bit():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    one, other = MatryoshkaSAE(6, 12, 3, group_sizes=[12]).train(), BatchTopKSAE(6, 12, 3).train()
    losses = [sae.loss(Batch(x)) for sae in (one, other)]
    assert losses[0].total == losses[1].total
    for loss in losses:
        loss.total.backward()
    assert torch.equal(one.W_dec.grad, other.W_dec.grad)
    assert torch.equal(one.W_enc.grad, other.W_enc.grad)


def test_early_latents_learn_from_more_prefixes_than_late_ones():
    sae = by_hand([1, 2])
    sae.loss(Batch(torch.tensor([[2.0, 2.0, 2.0]]) + 0.1)).total.backward()
    assert sae.W_dec.grad[0].norm() > sae.W_dec.grad[2].norm()


@pytest.mark.parametrize(("d_sae", "groups"), [(64, (2, 4, 8, 16, 34)), (8, (1, 2, 5)), (1, (1,))])
def test_default_groups_add_up(d_sae, groups):
    assert default_groups(d_sae) == groups
    assert sum(groups) == d_sae


@pytest.mark.parametrize("group_sizes", [[1, 1], [4], [], [0, 3], [1.5, 1.5], 3])
def test_groups_must_be_positive_and_add_up(group_sizes, as_a_user):
    with pytest.raises(ValueError, match="group"):
        MatryoshkaSAE(3, 3, 1, group_sizes=group_sizes)
