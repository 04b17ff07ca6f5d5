"""Effects of latents: by zeroing them, and by gradients."""

import pytest
import torch

from sae_lib import BatchTopKSAE, TopKSAE, load_model
from sae_lib.metrics import LatentEffects, ablation, gradient_times_activation, integrated_gradients
from sae_lib.metrics.attribution import summed_loss
from sae_lib.models import LanguageModel, Tokens
from tests.tiny_models import WORDS, tiny_gpt2

SITE = "blocks.1.hook_resid_post"
TEXTS = ["the cat sings", "old king and blue river", "a dog runs under the moon ."]


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_gpt2())


@pytest.fixture(scope="module")
def tokens(model):
    return model.tokenize(TEXTS)


@pytest.fixture(scope="module")
def sae():
    sae = TopKSAE(12, 20, 4)
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(1))
        sae.W_dec.mul_(torch.linspace(0.5, 2, 20)[:, None])
    return sae.eval()


def last_logit(logits):
    return logits[:, -1, 5]


def spread_out(logits):
    return logits[:, :, 4:8].square().sum((1, 2))


def everywhere(model, tokens, latent):
    return torch.full((len(tokens.ids), 1), latent)


class Linear(LanguageModel):
    """A model of one map, ``logits = x W`` with x = (id, id squared), whose only site is x."""

    device = torch.device("cpu")

    def __init__(self, W):
        self.W, self.bos = W, 0

    def activations(self, tokens, site):
        return torch.stack([tokens.ids, tokens.ids.square()], -1).float()

    def logits(self, tokens, site=None, patch=None):
        x = self.activations(tokens, site)
        return (x if patch is None else patch(x)) @ self.W


def test_ablation_equals_a_patch_by_hand(model, tokens, sae):
    content = model.content(tokens)
    with torch.no_grad():
        x = model.activations(tokens, SITE)
        z = sae.encode(x.flatten(0, 1)).view(*x.shape[:2], -1)
        error = x - sae.decode(z.flatten(0, 1)).view_as(x)
        latent = int((z * content[..., None]).sum((0, 1)).argmax())
        z[..., latent] = 0
        patched = sae.decode(z.flatten(0, 1)).view_as(x) + error
        by_hand = spread_out(model.logits(tokens)) - spread_out(
            model.logits(tokens, SITE, lambda x: torch.where(content[..., None], patched, x))
        )
    effect = ablation(model, tokens, SITE, sae, spread_out, everywhere(model, tokens, latent))
    assert effect.abs().min() > 0.01
    torch.testing.assert_close(effect, by_hand)


def test_each_row_loses_its_own_latents_together(model, tokens, sae):
    one = model.tokenize(TEXTS[1])
    alive = gradient_times_activation(model, one, SITE, sae, spread_out).cols.unique()[:3]
    rows = Tokens(one.ids.repeat(4, 1), one.mask.repeat(4, 1))
    latents = torch.stack([alive[[0, 0]], alive[[1, 1]], alive[[2, 2]], alive[[0, 1]]])
    effects = ablation(model, rows, SITE, sae, spread_out, latents)
    alone = [ablation(model, one, SITE, sae, spread_out, alive[[i]][None]) for i in range(3)]
    torch.testing.assert_close(effects[:3], torch.cat(alone))
    together = ablation(model, one, SITE, sae, spread_out, alive[None, :2])
    torch.testing.assert_close(effects[3:], together)
    assert not torch.allclose(together, alone[0])


def test_a_silent_latent_has_no_effect_and_no_gradient_times_activation(model, tokens, sae):
    alive = gradient_times_activation(model, tokens, SITE, sae, spread_out).cols.unique().tolist()
    silent = next(latent for latent in range(20) if latent not in alive)
    assert ablation(model, tokens, SITE, sae, spread_out, everywhere(model, tokens, silent)).eq(0).all()


def test_where_the_model_is_linear_attribution_and_integrated_gradients_are_ablation():
    linear = Linear(torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, 1.0]]))
    ids = torch.tensor([[0, 1, 2], [0, 3, 1]])
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    sae = TopKSAE(2, 6, 3).eval()

    def metric(logits):
        return logits[:, :, 1].sum(1)

    found = gradient_times_activation(linear, tokens, "x", sae, metric)
    row_of = tokens.mask.logical_and(tokens.ids != 0).nonzero()[:, 0]
    for latent in range(6):
        exact = ablation(linear, tokens, "x", sae, metric, torch.full((2, 1), latent))
        by_row = torch.zeros(2).index_add_(0, row_of, found.dense()[:, latent])
        torch.testing.assert_close(by_row, exact)
    steps = integrated_gradients(linear, tokens, "x", sae, metric)
    torch.testing.assert_close(steps.dense(), found.dense())


def test_attribution_is_the_derivative_in_the_latents_strength(model, tokens, sae):
    found = gradient_times_activation(model, tokens, SITE, sae, spread_out)
    positions = model.content(tokens).nonzero()
    pair = int(found.values.abs().argmax())
    (row, pos), latent = positions[found.rows[pair]], found.cols[pair]
    direction = sae.W_dec.detach()[latent]
    z = sae.encode(model.activations(tokens, SITE)[row, pos][None])[0, latent].item()

    def at(strength):
        def patch(x):
            x = x.clone()
            x[row, pos] += (strength - 1) * z * direction
            return x

        return spread_out(model.logits(tokens, SITE, patch))[row].item()

    assert found.values[pair].item() == pytest.approx((at(1.01) - at(0.99)) / 0.02, rel=1e-2)


def test_integrated_gradients_of_a_square_are_summed_at_the_levels_of_the_reference():
    """m = x^2 with x = z + e, z = 3, e = 1: gradients 2 (1 + 3 l) at l = 1 and 1/2 are 8 and 5, so 3 * 13 / 2."""
    sae = TopKSAE(2, 2, 1).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        sae.b_enc.copy_(torch.tensor([-1.0, 0.0]))
    tokens = Tokens(torch.tensor([[0, 4]]), torch.tensor([[True, True]]))
    linear = Linear(torch.eye(2))

    def square(logits):
        return logits[:, 1, 0].square()

    found = integrated_gradients(linear, tokens, "x", sae, square, steps=2)
    assert (found.rows.tolist(), found.cols.tolist()) == ([0], [0])
    assert found.values.tolist() == [19.5]
    assert gradient_times_activation(linear, tokens, "x", sae, square).values.tolist() == [24]
    assert ablation(linear, tokens, "x", sae, square, torch.tensor([[0]])).tolist() == [15]  # 4^2 - 1^2
    assert integrated_gradients(linear, tokens, "x", sae, square).values.tolist() == [pytest.approx(16.5)]


def test_integrated_gradients_are_complete(model, tokens, sae):
    found = integrated_gradients(model, tokens, SITE, sae, spread_out, steps=100)
    everything = ablation(model, tokens, SITE, sae, spread_out, torch.arange(20).repeat(3, 1))
    assert found.values.sum().item() == pytest.approx(everything.sum().item(), rel=5e-2)
    rough = gradient_times_activation(model, tokens, SITE, sae, spread_out).values.sum()
    assert abs(rough - everything.sum()) > 5 * abs(found.values.sum() - everything.sum())


def test_only_the_marked_positions_are_attributed_and_zeroed(model, tokens, sae):
    where = torch.zeros_like(tokens.mask)
    where[1, 2] = True
    found = integrated_gradients(model, tokens, SITE, sae, last_logit, where, steps=3)
    assert found.shape == (1, 20)
    full = gradient_times_activation(model, tokens, SITE, sae, last_logit)
    place = model.content(tokens).nonzero().tolist().index([1, 2])
    here = gradient_times_activation(model, tokens, SITE, sae, last_logit, where)
    torch.testing.assert_close(here.dense()[0], full.dense()[place])
    effect = ablation(model, tokens, SITE, sae, last_logit, torch.arange(20).repeat(3, 1), where)
    assert effect[1] != 0
    assert effect[[0, 2]].eq(0).all()


def test_a_training_sae_is_read_as_in_evaluation_and_left_as_it_was(model, tokens):
    sae = BatchTopKSAE(12, 20, 3).train()
    training = gradient_times_activation(model, tokens, SITE, sae, spread_out)
    assert sae.training
    torch.testing.assert_close(
        training.dense(), gradient_times_activation(model, tokens, SITE, sae.eval(), spread_out).dense()
    )
    assert all(parameter.grad is None for parameter in sae.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"where": torch.zeros(3, 8, dtype=torch.bool)}, "where must mark one or more tokens.*got 0 positions"),
        ({"where": torch.ones(3, 8, dtype=torch.bool)}, "neither BOS nor padding, got 24 positions"),
        ({"where": torch.ones(3, 7, dtype=torch.bool)}, "got 21 positions of .3, 7."),
        ({"metric": lambda logits: logits.mean()}, "a finite number for each of the 3 rows"),
        ({"metric": lambda logits: logits[:, 0, 0] / 0}, "a finite number for each of the 3 rows"),
        ({"metric": lambda logits: logits[:, 0, 0].detach()}, "metric must depend on the activations"),
        ({"steps": 0}, "steps must be an integer at least 1, got 0"),
    ],
)
def test_what_cannot_be_attributed_is_refused(as_a_user, model, tokens, sae, change, message):
    arguments = {"metric": spread_out} | change
    with pytest.raises(ValueError, match=message):
        integrated_gradients(model, tokens, SITE, sae, **arguments)


def test_latents_that_do_not_exist_or_fit_no_row_are_refused(as_a_user, model, tokens, sae):
    with pytest.raises(ValueError, match="latents must be in \\[0, d_sae=20\\), got 20 to 20"):
        ablation(model, tokens, SITE, sae, spread_out, torch.full((3, 1), 20))
    with pytest.raises(ValueError, match="latents must be \\(batch=3, zeroed\\), got \\(2, 1\\)"):
        ablation(model, tokens, SITE, sae, spread_out, torch.zeros(2, 1, dtype=torch.int64))


def test_the_effects_of_latents_equal_those_by_hand(model, sae):
    """All texts are the same one, so it does not matter which is drawn for a latent."""
    text = model.tokenize(TEXTS[1])
    where = torch.tensor([[False, True, True, True, True, False]])  # neither BOS nor the last token
    metric = summed_loss(text)
    loss, counted = model.loss(text)
    torch.testing.assert_close(metric(model.logits(text)), (loss * counted).sum(1))
    found = gradient_times_activation(model, text, SITE, sae, metric, where)
    alive = found.cols.unique()
    exact = torch.cat([ablation(model, text, SITE, sae, metric, latent[None, None], where) for latent in alive])
    firings = torch.bincount(found.cols)[alive]
    assert firings.max() > 1
    report = LatentEffects(model, SITE, [TEXTS[1]] * 40)(sae)
    assert report["ablated"] == len(alive)
    assert report["ablation_loss"] == pytest.approx(-(exact / firings).mean().item(), rel=1e-4)
    for name, effects in {
        "attribution": found,
        "integrated": integrated_gradients(model, text, SITE, sae, metric, where),
    }.items():
        near = effects.dense().sum(0)[alive]
        assert report[f"{name}_r"] == pytest.approx(torch.corrcoef(torch.stack([near, exact]))[0, 1].item(), rel=1e-3)
        ranks = torch.stack([near.argsort().argsort(), exact.argsort().argsort()]).double()
        assert report[f"{name}_rank_r"] == pytest.approx(torch.corrcoef(ranks)[0, 1].item(), abs=1e-6)


def test_the_last_token_of_a_text_is_left_out_as_it_changes_no_loss(model):
    task = LatentEffects(model, SITE, TEXTS * 20)
    content = model.content(task.tokens)
    assert len(content.sum(1).unique()) > 1
    assert (task.where.sum(1) == content.sum(1) - 1).all()
    assert not (task.where & ~content).any()


def test_the_sample_of_latents_is_decided_by_the_seed(model, sae):
    texts = [f"{first} {second} cat sings" for first in WORDS[:8] for second in WORDS[:8]]
    reports = [LatentEffects(model, SITE, texts, seed, latents=5)(sae) for seed in (0, 0, 1)]
    assert reports[0] == reports[1] != reports[2]
    assert reports[0]["ablated"] == 5


def test_too_few_texts_latents_or_firings_are_refused(model, sae):
    with pytest.raises(ValueError, match="texts must be at least 32, got 31"):
        LatentEffects(model, SITE, TEXTS[:1] * 31)
    with pytest.raises(ValueError, match="latents must be an integer at least 3, got 2"):
        LatentEffects(model, SITE, TEXTS * 20, latents=2)
    dead = TopKSAE(12, 20, 4).eval()
    with torch.no_grad():
        dead.b_enc.fill_(-1000)
    with pytest.raises(ValueError, match="at least 3 latents must fire in the 32 texts, got 0"):
        LatentEffects(model, SITE, TEXTS * 20)(dead)
