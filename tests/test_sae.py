"""What all variants share: units, dead latents, AuxK, saving."""

import json

import pytest
import torch

import sae_lib
from sae_lib import Batch, TopKSAE
from sae_lib.sae import Loss, auxk, geometric_median, squared_error, whole
from sae_lib.sparse import Code


def identity_sae(k=1):
    """Two latents in two dimensions, each its own direction."""
    sae = TopKSAE(2, 2, k)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
    return sae


def test_squared_error_sums_over_dimensions_and_averages_over_the_batch():
    assert squared_error(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2)) == 2.5


def test_scores_are_those_of_the_shifted_input():
    sae, x = TopKSAE(6, 12, 3), torch.randn(9, 6)
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_()
    assert torch.allclose(sae.scores(x).dense(), (x - sae.b_dec) @ sae.W_enc + sae.b_enc, atol=1e-5)


def test_auxk_is_zero_where_none_is_dead():
    sae = identity_sae()
    assert auxk(sae, sae.scores(torch.ones(3, 2)), torch.ones(3, 2)) == 0


def test_auxk_by_hand():
    sae = identity_sae()
    sae.dead_window.fill_(1)
    sae.tokens_since_fired.copy_(torch.tensor([0, 5]))
    residual = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    scores = sae.scores(torch.tensor([[9.0, 1.0], [9.0, -1.0]]))  # the encoder is the identity
    # Only latent 1 is dead; it explains 1 of the 2 on the first token: (2 - 1)^2 / ((2 - 1)^2 + (0 - 1)^2)
    assert auxk(sae, scores, residual).item() == pytest.approx(0.5)


def test_auxk_does_not_train_living_latents_and_holds_the_residual_constant():
    sae = TopKSAE(6, 12, 3).train()
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    sae.dead_window.fill_(1)
    sae.tokens_since_fired[:4] = 5
    sae.loss(Batch(x)).terms["aux"].backward()
    assert sae.W_dec.grad[4:].count_nonzero() == 0
    assert sae.W_enc.grad[:, 4:].count_nonzero() == 0
    assert sae.W_dec.grad[:4].count_nonzero() > 0
    assert sae.W_enc.grad[:, :4].count_nonzero() > 0


def test_geometric_median_resists_an_outlier():
    points = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [100.0, 0.0]])
    assert geometric_median(points).norm() < 0.01
    cross = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    assert geometric_median(cross).norm() < 1e-3


def test_the_gradient_of_a_unit_row_has_no_part_along_it():
    sae = TopKSAE(6, 2500, 900).train()  # more rows than one piece has
    sae.loss(Batch(torch.randn(40, 6))).total.backward()
    sae.after_backward()
    along, size = (sae.W_dec.grad * sae.W_dec).sum(1).abs(), sae.W_dec.grad.norm(dim=1)
    assert (along <= 1e-5 * size.max()).all()


def test_a_frozen_decoder_stays_as_it_was():
    sae = TopKSAE(6, 12, 3)
    sae.W_dec.requires_grad_(False)
    before = sae.W_dec.clone()
    sae_lib.train(sae, [torch.randn(32, 6) for _ in range(5)], tokens=160)
    assert torch.equal(sae.W_dec, before)


def test_the_dead_window_is_five_percent_of_the_run_within_limits():
    sae, batch = TopKSAE(6, 12, 3), Batch(torch.randn(32, 6))
    for tokens, window in [(1_000_000, 50_000), (100, 32), (10**12, 10_000_000)]:
        sae.start(batch, tokens)
        assert sae.dead_window == window


def test_a_latent_that_lives_resets_its_counter():
    sae, x = identity_sae(), Batch(torch.ones(4, 2))
    code = Code(torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]), (4, 2))
    sae.after_step(x, code)
    sae.after_step(x, code)
    assert sae.tokens_since_fired.tolist() == [8, 0]


def test_saving_replaces_an_older_sae_and_nothing_else(tmp_path):
    first, second = TopKSAE(6, 12, 3, seed=1), TopKSAE(6, 12, 4, seed=2)
    first.save(tmp_path / "a" / "sae")
    second.save(tmp_path / "a" / "sae")
    assert sae_lib.load(tmp_path / "a" / "sae").k == 4
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["sae"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="new or a saved SAE"):
        first.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "gpt2"}')  # as another library writes it
    with pytest.raises(ValueError, match="new or a saved SAE"):
        first.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"


def test_a_failed_save_leaves_the_older_one_whole(tmp_path, monkeypatch):
    TopKSAE(6, 12, 3).save(tmp_path / "sae")
    broken = TopKSAE(6, 12, 4)
    monkeypatch.setattr("json.dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.save(tmp_path / "sae")
    monkeypatch.undo()
    assert sae_lib.load(tmp_path / "sae").k == 3


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "weights.safetensors").unlink(), "config.json and weights.safetensors"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b"short"), "sha256"),
        (lambda folder: (folder / "config.json").write_text("{"), "must be JSON"),
        (lambda folder: change_config(folder, format="other"), "must say"),
        (lambda folder: change_config(folder, variant="topp"), "variant must be one of.*'topp'"),
        (lambda folder: change_config(folder, config={"d_in": 6, "d_sae": 13, "k": 3}), "must fit its weights"),
        (lambda folder: change_config(folder, config={"d_in": 6}), "must fit its weights"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must say"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_reason(tmp_path, damage, message):
    damage(TopKSAE(6, 12, 3).save(tmp_path / "sae"))
    with pytest.raises(ValueError, match=message):
        sae_lib.load(tmp_path / "sae")


def test_a_path_that_does_not_exist_lists_its_neighbours(tmp_path):
    TopKSAE(6, 12, 3).save(tmp_path / "topk16")
    with pytest.raises(ValueError, match="near it lie topk16"):
        sae_lib.load(tmp_path / "topk17")


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    TopKSAE(6, 12, 3, seed=5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("value", "message"), [(30, r"k must be an integer in \[1, d_sae=24\], got 30"), (0, "got 0"), ("3", "got '3'")]
)
def test_whole_states_rule_and_value(value, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        whole("k", value, most=24, most_name="d_sae")


def test_the_total_is_the_sum_of_the_terms():
    terms = {"a": torch.tensor(1.0), "b": torch.tensor(2.5)}
    assert Loss(terms, Code.from_dense(torch.zeros(1, 1)), torch.zeros(1, 1)).total == 3.5


def test_a_folder_with_anything_else_in_it_is_not_replaced(tmp_path):
    identity_sae().save(tmp_path / "sae")
    (tmp_path / "sae/checkpoint").mkdir()
    with pytest.raises(ValueError, match="holds something else"):
        identity_sae().save(tmp_path / "sae")
    assert (tmp_path / "sae/checkpoint").is_dir()
