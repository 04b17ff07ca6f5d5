"""Who lives: what the selections find by bounds is what looking at every score finds."""

import pytest
import torch

import sae_lib
from sae_lib import selection
from sae_lib.selection import above, candidates, near, top_of_batch, top_of_columns, top_of_rows
from sae_lib.sparse import DenseCode, Scores

UNIT = 2.0**-23  # of 32 bits


@pytest.fixture(params=[False, True], ids=["fp32", "bf16"])
def rounded(request, monkeypatch):
    """Scoring in 32 bits, and in bfloat16."""
    monkeypatch.setattr(selection, "fast_bf16", lambda: request.param)
    monkeypatch.setattr(selection, "WORTH_ROUNDING", 0)
    return request.param


def drawn(batch=200, d_in=64, d_sae=1536, seed=0, centre=0.0, long=1.0):
    """Scores of random tokens and latents: off centre, or with one latent `long` times as long as the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=generator) + centre
    W = torch.randn(d_sae, d_in, generator=generator)
    W[7] *= long
    bias = 0.5 * torch.randn(d_sae, generator=generator)
    return Scores(x, W.T, bias, torch.full((d_in,), 0.9 * centre))


def exact(scores):
    """All scores in 64 bits."""
    return (scores.x.double() - scores.b_dec.double()) @ scores.W_enc.double() + scores.b_enc.double()


def allowance(scores):
    """How far rounding in 32 bits can move a score: the sum of the sizes of its terms, times the unit, times d_in."""
    x = scores.x.double() - scores.b_dec.double()
    return x.shape[1] * UNIT * (x.norm(dim=1)[:, None] * scores.W_enc.double().norm(dim=0) + scores.b_enc.abs())


def disagreements(code, scores, lowest):
    """Pairs chosen or left out against the 64-bit scores, beyond what rounding in 32 bits explains.

    `lowest`: the least score that should live, a row, a column or one for all.
    """
    s, slack = exact(scores), allowance(scores)
    lives = torch.zeros(scores.shape, dtype=torch.bool)
    lives[code.rows, code.cols] = True
    return int((lives & (s < lowest - slack)).sum() + (~lives & (s > lowest + slack)).sum())


HARD = {
    "ordinary": {},
    "off centre": {"centre": 3.0},
    "one long latent": {"long": 50.0},
    "one token": {"batch": 1},
    "odd widths": {"d_in": 37, "d_sae": 1201},
    "many": {"batch": 500, "d_in": 128, "d_sae": 4096},
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("k", [1, 8, 40])
def test_top_of_rows_is_the_64_bit_selection(case, k, rounded):
    scores = drawn(**HARD[case])
    code = top_of_rows(scores, k)
    assert not isinstance(code, DenseCode)
    lowest = exact(scores).topk(k, dim=1).values[:, -1:].clamp(min=0)
    assert disagreements(code, scores, lowest) == 0
    assert torch.bincount(code.rows, minlength=scores.shape[0]).max() <= k
    assert (code.values - exact(scores)[code.rows, code.cols]).abs().max() <= allowance(scores).max()
    assert (code.rows.diff() >= 0).all()


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("k", [1, 8, 40])
def test_top_of_batch_is_the_64_bit_selection(case, k, rounded):
    scores = drawn(**HARD[case])
    code = top_of_batch(scores, k)
    count = k * scores.shape[0]
    lowest = exact(scores).flatten().topk(count).values[-1].clamp(min=0)
    assert disagreements(code, scores, lowest) == 0
    assert len(code.values) == count
    assert (code.rows.diff() >= 0).all()


@pytest.mark.parametrize("case", HARD)
def test_top_of_columns_is_the_64_bit_selection(case, rounded):
    scores = drawn(**HARD[case])
    batch, d_sae = scores.shape
    counts = (batch / 40 / torch.arange(1, d_sae + 1) ** 0.3 * 3).round().long().clamp(max=batch)
    counts[5] = 0
    code = top_of_columns(scores, counts)
    sorted_down = exact(scores).sort(dim=0, descending=True).values
    lowest = sorted_down.gather(0, (counts - 1).clamp(min=0)[None]).clamp(min=0)
    lowest[0, counts == 0] = torch.inf
    assert disagreements(code, scores, lowest) == 0
    assert (torch.bincount(code.cols, minlength=d_sae) <= counts).all()
    assert (code.rows.diff() >= 0).all()
    assert torch.allclose(
        code.values.double(), exact(scores)[code.rows, code.cols], atol=float(allowance(scores).max())
    )


@pytest.mark.parametrize("case", HARD)
def test_above_is_the_64_bit_comparison(case, rounded):
    scores = drawn(**HARD[case])
    threshold = exact(scores).flatten().quantile(0.99) if scores.shape[0] < 9 else exact(scores)[:9].quantile(0.99)
    threshold = (threshold + 0.1 * torch.randn(scores.shape[1], generator=torch.Generator().manual_seed(3))).float()
    code = above(scores, threshold)
    assert not isinstance(code, DenseCode)
    assert disagreements(code, scores, threshold.double().clamp(min=0)) == 0


def test_the_rows_that_top_of_batch_looks_at_may_be_the_poorest(rounded):
    scores = drawn(batch=640)
    scores.x[:: 640 // selection.SAMPLE] *= 0.01  # so the guess is too low, and far more than enough come
    assert len(top_of_batch(scores, 8).values) == 8 * 640
    scores = drawn(batch=640)
    scores.x *= 0.01
    scores.x[:: 640 // selection.SAMPLE] *= 300  # so the guess is far too high
    code = top_of_batch(scores, 8)
    lowest = exact(scores).flatten().topk(8 * 640).values[-1]
    assert disagreements(code, scores, lowest) == 0


def test_equal_scores_do_not_overflow_the_candidates(rounded):
    scores = Scores(torch.zeros(30, 16), torch.randn(16, 960), torch.ones(960))
    for code in (top_of_rows(scores, 4), top_of_batch(scores, 4), top_of_columns(scores, torch.full((960,), 1))):
        assert (code.values == 1).all()
    assert len(top_of_rows(scores, 4).values) == len(top_of_batch(scores, 4).values) == 120
    assert candidates(*selection.recipe(scores), lambda maxima, error, rows: maxima.amax(1) - error) is None


def test_above_turns_dense_when_many_live_and_says_the_same(rounded):
    scores = drawn()
    few, many = exact(scores).quantile(0.97, dim=0).float(), torch.zeros(scores.shape[1])
    assert not isinstance(near(scores, few), DenseCode)
    assert isinstance(near(scores, many), DenseCode)
    assert disagreements(above(scores, many), scores, many) == 0


def test_near_may_look_below_zero():
    scores = Scores(torch.tensor([[-1.0, 2.0, 0.0]]), torch.eye(3), torch.zeros(3))
    code = near(scores, torch.tensor([-2.0, 0.0, 0.0]))
    assert code.dense()[0, :2].tolist() == [-1, 2]


@pytest.mark.parametrize("name", ["rows", "batch", "columns", "above"])
def test_a_matrix_of_scores_selects_as_its_recipe_does(name):
    scores = drawn(batch=50)
    select = {
        "rows": lambda s: top_of_rows(s, 5),
        "batch": lambda s: top_of_batch(s, 5),
        "columns": lambda s: top_of_columns(s, torch.full((1536,), 1)),
        "above": lambda s: above(s, torch.tensor(20.0)),
    }[name]
    assert torch.allclose(select(scores).dense(), select(scores.dense()).dense(), atol=1e-4)


NEARLY = 2.0**-8 * 0.999, 2.0**-8 * 1.001  # of one: bfloat16 rounds the first down and the second up


def test_rounding_that_always_errs_the_same_way_does_not_change_the_selection(rounded):
    down, up = 1 + NEARLY[0], 1 + NEARLY[1]  # whatever bfloat16 takes from 45 latents it takes from all their entries
    x = torch.tensor([down] * 128 + [up] * 128).repeat(8, 1)
    W = torch.zeros(960, 256)
    W[:40, 128:255] = up
    W[40:45, :128] = down
    scores = Scores(x, W.T, torch.full((960,), -127.5))
    assert top_of_rows(scores, 5).cols.view(8, 5).sort().values.tolist() == [[40, 41, 42, 43, 44]] * 8
    assert sorted(set(top_of_batch(scores, 5).cols.tolist())) == [40, 41, 42, 43, 44]
    assert above(scores, torch.tensor(0.85)).fired().nonzero().flatten().tolist() == [40, 41, 42, 43, 44]
    counts = torch.zeros(960, dtype=torch.long)
    counts[40] = 3
    assert len(top_of_columns(scores, counts).values) == 3


@pytest.mark.parametrize("case", ["gaussian", "aligned", "biased"])
def test_rounding_is_bounded_by_what_is_claimed(case, rounded):
    scores = drawn(centre=1.0)
    if case == "aligned":
        x = torch.full((70, 200), 1 + NEARLY[1])
        scores = Scores(x, torch.full((200, 64), 1 + NEARLY[1]), torch.zeros(64), torch.zeros(200))
    if case == "biased":
        scores.b_enc = torch.full_like(scores.b_enc, 300 * (1 + NEARLY[1]))
    x, W, b = selection.recipe(scores)
    furthest = 0.0
    for start, s, error in selection.scored(x, W, b):
        true = exact(scores)[start : start + len(s)]
        slack = allowance(scores)[start : start + len(s)]
        limit = error[:, None] + (selection.ROUNDING if rounded else 0) * s.double().abs() + slack
        furthest = max(furthest, float(((s.double() - true).abs() / limit).max()))
    assert furthest <= 1
    assert not rounded or furthest > (0.1 if case == "gaussian" else 0.5)  # and the bound is no wider than it must be


@pytest.mark.parametrize("name", ["rows", "batch", "above"])
def test_an_infinite_bias_silences_or_wakes_its_latent_alone(name, rounded):
    scores = drawn()
    scores.b_enc[3] = -torch.inf
    select = {"rows": lambda s: top_of_rows(s, 5), "batch": lambda s: top_of_batch(s, 5)}
    code = select.get(name, lambda s: above(s, torch.tensor(20.0)))(scores)
    assert len(code.values) > 100
    assert not code.fired()[3]


@pytest.mark.parametrize(
    "sae", [sae_lib.TopKSAE(8, 96, 3), sae_lib.JumpReLUSAE(8, 96, 3.0), sae_lib.ReLUSAE(8, 96, 0.1)]
)
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_a_token_that_is_no_number_stays_none(sae, threshold):
    if sae.name == "jumprelu":
        sae.threshold.data.fill_(threshold)
    if sae.name == "relu":
        sae.b_enc.data.fill_(-threshold)
    x = torch.randn(40, 8)
    x[5, 2] = torch.nan
    assert sae.eval()(x)[5].isnan().all()


def test_a_density_that_is_too_high_is_seen_in_the_first_rows(rounded, monkeypatch):
    scores, looked_at = drawn(batch=900), []
    monkeypatch.setattr(selection, "linear", lambda a, b, bias: looked_at.append(len(a)) or torch.addmm(bias, a, b.T))
    assert isinstance(near(scores, torch.zeros(scores.shape[1])), DenseCode)
    assert looked_at == [selection.SAMPLE] * (2 if rounded else 1)
