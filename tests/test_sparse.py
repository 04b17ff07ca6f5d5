"""The sparse engine agrees with dense arithmetic."""

import gc
import weakref

import pytest
import torch

from sae_lib import Batch, TopKSAE
from sae_lib.selection import above, top_of_batch, top_of_rows
from sae_lib.sparse import Code

SCORES = torch.tensor([[3.0, 1.0, -2.0, 2.0], [0.5, -1.0, -0.5, -3.0], [4.0, 5.0, 0.0, 6.0]])


def dense_top_of_rows(scores, k):
    kept = torch.zeros_like(scores)
    for row, values in zip(kept, scores, strict=True):
        best = values.argsort(descending=True)[:k]
        row[best] = values[best].clamp(min=0)
    return kept


def test_top_of_rows_keeps_the_k_best_positive_scores_of_each_row():
    expected = torch.tensor([[3.0, 0, 0, 2.0], [0.5, 0, 0, 0], [0, 5.0, 0, 6.0]])
    assert torch.equal(top_of_rows(SCORES, 2).dense(), expected)


def test_top_of_batch_keeps_the_best_pairs_wherever_they_stand():
    expected = torch.tensor([[3.0, 0, 0, 2.0], [0, 0, 0, 0], [4.0, 5.0, 0, 6.0]])
    code = top_of_batch(SCORES, 2)
    assert torch.equal(code.dense()[2], expected[2])
    assert code.dense().count_nonzero() == 6  # 3 rows of 2: 6, 5, 4, 3, 2 and 1
    assert code.dense()[0].tolist() == [3.0, 1.0, 0.0, 2.0]


def test_above_needs_both_a_positive_score_and_one_above_the_threshold():
    assert above(SCORES, torch.tensor(2.0)).dense().tolist() == [[3, 0, 0, 0], [0, 0, 0, 0], [4, 5, 0, 6]]
    assert (above(SCORES, torch.tensor(-9.0)).dense() >= 0).all()
    assert above(SCORES, torch.tensor([3.0, 0.0, 0.0, 5.0])).dense().tolist() == [
        [0, 1, 0, 0],
        [0, 0, 0, 0],
        [4, 5, 0, 6],
    ]


def sparse_code(z):
    """The code that lists the pairs of a matrix which are not zero."""
    rows, cols = z.detach().nonzero(as_tuple=True)
    return Code(rows, cols, z[rows, cols], tuple(z.shape))


@pytest.mark.parametrize("k", [0, 1, 3, 4])
def test_sparse_and_dense_codes_agree_in_every_method(k):
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(k)).double()
    W_dec = torch.randn(4, 3, generator=torch.Generator().manual_seed(9)).double()
    dense = Code.from_dense(dense_top_of_rows(scores, k))
    sparse = sparse_code(dense.z)
    assert torch.equal(sparse.rows, dense.rows) and torch.equal(sparse.cols, dense.cols)
    assert torch.equal(sparse.values, dense.values)
    assert sparse.sum() == pytest.approx(dense.sum().item())
    weight = torch.tensor([1.0, 0.0, -1.0, 2.0]).double()
    for code, other in ((sparse.map(torch.mul, weight), dense.map(torch.mul, weight)), (sparse.living(), dense)):
        assert torch.equal(code.dense(), other.dense())
    assert torch.equal(sparse.map(torch.mul, weight).living().dense(), (dense.z * weight).relu())
    assert torch.equal(sparse.dense(), dense.dense())
    assert torch.allclose(sparse.decode(W_dec), dense.decode(W_dec), atol=1e-14)
    assert torch.equal(sparse.fired(), dense.fired())
    assert sparse.l0() == dense.l0()
    for part, whole in zip(sparse.split([1, 3]), dense.split([1, 3]), strict=True):
        assert torch.equal(part.dense(), whole.dense())


def test_rows_with_nothing_alive_decode_to_zero():
    code = top_of_rows(-torch.ones(3, 4), 2)
    assert len(code.values) == 0
    assert torch.equal(code.decode(torch.ones(4, 2)), torch.zeros(3, 2))
    assert not code.fired().any()
    assert code.l0() == 0


@pytest.mark.parametrize(
    "select",
    [lambda s: top_of_rows(s, 2), lambda s: top_of_batch(s, 2), lambda s: sparse_code(s * (s > 0.1))],
    ids=["rows", "batch", "listed"],
)
def test_gradients_of_scores_and_directions_are_those_of_the_dense_product(select):
    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    W_dec = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    target = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sparse = torch.autograd.grad((select(scores).decode(W_dec) - target).square().sum(), (scores, W_dec))
    mask = (select(scores).dense() > 0).double()
    dense = torch.autograd.grad(((scores * mask) @ W_dec - target).square().sum(), (scores, W_dec))
    for a, b in zip(sparse, dense, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_a_step_leaves_nothing_behind():
    """Codes and gradients are no cycles: they are freed when they are dropped, not when Python looks for garbage."""
    sae = TopKSAE(8, 96, 3).train()
    gc.disable()
    try:
        loss = sae.loss(Batch(torch.randn(16, 8)))
        watched = [weakref.ref(loss.code), weakref.ref(loss.code.pairs), weakref.ref(loss.x_hat)]
        loss.total.backward()
        del loss
        assert [watch() for watch in watched] == [None] * 3
    finally:
        gc.enable()


def test_a_code_s_matrix_and_scores_may_be_changed_in_place():
    sae = TopKSAE(8, 96, 3)
    scores = sae.scores(torch.randn(16, 8))
    assert scores.dense().clamp_(min=0).min() == 0
    assert top_of_rows(scores, 2).values.mul_(0).sum() == 0
