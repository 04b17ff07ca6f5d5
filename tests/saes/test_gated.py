"""Gated: numbers by hand."""

import math

import pytest
import torch

from sae_lib import Batch, GatedSAE


def by_hand():
    sae = GatedSAE(2, 2, l1_coeff=0.5).train()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.r_mag.copy_(torch.tensor([math.log(2.0), 0.0]))
        sae.b_gate.copy_(torch.tensor([-1.0, 0.0]))
        sae.b_mag.copy_(torch.tensor([0.0, 0.5]))
        sae.b_dec.copy_(torch.tensor([0.0, 1.0]))
    return sae


X = torch.tensor([[2.0, 3.0], [0.5, -1.0]])
# p = (2, 2), (0.5, -2); gate = (1, 2), (-0.5, -2); magnitude = (4, 2.5), (1, 0)


def test_a_closed_gate_silences_a_large_magnitude():
    assert torch.allclose(by_hand().encode(X), torch.tensor([[4.0, 2.5], [0.0, 0.0]]))


def test_loss_by_hand():
    terms = by_hand().loss(Batch(X)).terms
    assert terms["reconstruction"].item() == pytest.approx(((2 - 4) ** 2 + (3 - 3.5) ** 2 + 0.5**2 + 2**2) / 2)
    assert terms["sparsity"].item() == pytest.approx(0.5 * (1 + 2) / 2)
    assert terms["aux"].item() == pytest.approx(((2 - 1) ** 2 + (3 - 3) ** 2 + 0.5**2 + 2**2) / 2)


def gradients(term):
    sae = by_hand()
    sae.loss(Batch(X)).terms[term].backward()
    return {name: 0 if p.grad is None else p.grad.abs().sum().item() for name, p in sae.named_parameters()}


def test_the_auxiliary_term_does_not_train_the_decoder():
    moved = gradients("aux")
    assert moved["W_dec"] == 0
    assert moved["W_enc"] > 0
    assert moved["b_gate"] > 0


def test_the_gate_does_not_learn_from_the_reconstruction():
    moved = gradients("reconstruction")
    assert moved["b_gate"] == 0
    assert moved["r_mag"] > 0
    assert moved["b_mag"] > 0


def test_the_penalty_does_not_shrink_the_magnitudes():
    moved = gradients("sparsity")
    assert moved["r_mag"] == moved["b_mag"] == 0


def test_the_encoders_bias_is_the_gates():
    sae = by_hand()
    assert sae.b_enc is sae.b_gate
    with pytest.raises(AttributeError):
        sae.b_enc = torch.zeros(2)
