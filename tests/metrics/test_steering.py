"""Directions of latents, added to texts that they have nothing to do with."""

import pytest
import torch
from torch.nn import functional as F

import sae_lib.metrics.steering as steering
from sae_lib import TopKSAE, load_model
from sae_lib.metrics import Steering
from sae_lib.models import Tokens
from tests.tiny_models import WORDS, tiny_gpt2

SITE = "blocks.1.hook_resid_post"
TEXTS = [" ".join(WORDS[(place + step * step) % 22] for step in range(3 + place % 9)) for place in range(60)]


@pytest.fixture(scope="module", autouse=True)
def few():
    """The sizes of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering, "CONTEXTS", 4)
        patch.setattr(steering, "OWN_TEXTS", 40)
        patch.setattr(steering, "RANDOM", 5)
        yield


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_gpt2())


@pytest.fixture(scope="module")
def task(model):
    return Steering(model, SITE, TEXTS, seed=3, size=0.5, latents=6)


@pytest.fixture(scope="module")
def sae():
    return TopKSAE(12, 16, 3).eval()


def centred(logits):
    return logits - logits.mean(-1, keepdim=True)


def test_kl_and_rise_equal_a_patch_by_hand(model, task, sae):
    found = task.of_latents(sae)
    content = model.content(task.contexts)
    x = model.activations(task.contexts, SITE)
    size = 0.5 * x[content].norm(dim=1).mean()
    direction = F.normalize(sae.W_dec.detach()[found.latents[2]], dim=0)
    clean, moved = (
        logits[content]
        for logits in (
            model.logits(task.contexts),
            model.logits(task.contexts, SITE, lambda x: torch.where(content[..., None], x + size * direction, x)),
        )
    )
    log_p, log_q = clean.log_softmax(1), moved.log_softmax(1)
    assert found.kl[2].item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum(1).mean().item(), rel=1e-4)
    rise = (centred(moved) - centred(clean))[:, found.targets[2]].mean().item()
    assert found.rise[2].item() == pytest.approx(rise, rel=1e-4)
    assert abs(rise) > 0.01


def test_the_target_loses_most_probability_where_the_latent_is_zeroed(model, task, sae):
    found = task.of_latents(sae)
    latent, x, content = found.latents[1], model.activations(task.own, SITE), model.content(task.own)
    z = sae.encode(x.flatten(0, 1)).view(*x.shape[:2], -1)[..., latent] * content
    rows = z.amax(1).topk(4).indices
    gained = torch.zeros(model.vocab_size)
    for row in rows.tolist():
        place = int(z[row].argmax())
        text = Tokens(task.own.ids[[row]], task.own.mask[[row]])

        def zeroed(x, row=row, place=place):
            x = x.clone()
            x[0, place] -= z[row, place] * sae.W_dec[latent]
            return x

        gained += (model.logits(text).softmax(-1) - model.logits(text, SITE, zeroed).softmax(-1))[0, place]
    assert found.targets[1] == gained.argmax()


def test_directions_are_compared_at_one_size_whatever_the_decoders_norms(task, sae):
    large = TopKSAE(12, 16, 3).eval()
    with torch.no_grad():
        large.W_dec.copy_(sae.W_dec * 7)
        large.W_enc.copy_(sae.W_enc / 7)
        large.b_enc.copy_(sae.b_enc / 7)
    for one, other in zip(task.of_latents(sae), task.of_latents(large), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_twice_the_size_moves_the_model_more(model, sae, task):
    further = Steering(model, SITE, TEXTS, seed=3, size=1, latents=6)
    assert further.size == pytest.approx(2 * task.size)
    assert further(sae)["steering_kl"] > task(sae)["steering_kl"] > 0


def test_success_counts_the_random_directions_that_raise_the_target_less(task, sae):
    found = task.of_latents(sae)
    by_hand = [
        sum(float(rise > random[target]) for random in task.random_rises) / 5
        for rise, target in zip(found.rise, found.targets, strict=True)
    ]
    assert found.success.tolist() == pytest.approx(by_hand)
    report = task(sae)
    assert report["steering_success"] == pytest.approx(sum(by_hand) / 6)
    assert 0 < report["steering_success"] < 1
    assert report["steering_random_kl"] == pytest.approx(task.random_kl.mean().item())
    assert report["steering_kl_ratio"] == pytest.approx(report["steering_kl"] / report["steering_random_kl"])
    assert report["steering_latents"] == 6


def test_only_latents_that_fire_in_four_texts_are_sampled_and_the_number_is_told(model, sae):
    everything = Steering(model, SITE, TEXTS, seed=3, latents=100)
    x, content = everything.x, model.content(everything.own)
    fires = ((sae.encode(x.flatten(0, 1)).view(*x.shape[:2], -1) > 0) & content[..., None]).any(1).sum(0)
    found = everything.of_latents(sae)
    assert sorted(found.latents.tolist()) == (fires >= 4).nonzero().flatten().tolist()
    assert everything(sae)["steering_latents"] == len(found.latents) < 16


def test_matched_means_are_of_the_share_of_tokens_on_which_a_latent_fires(model, task, sae, monkeypatch):
    found, content = task.of_latents(sae), model.content(task.own)
    z = sae.encode(task.x.flatten(0, 1)).view(*content.shape, -1)[content]
    assert found.frequencies.tolist() == pytest.approx((z > 0).float().mean(0)[found.latents].tolist())
    middle = found.frequencies.median().item()
    monkeypatch.setattr("sae_lib.metrics.matched.LIMITS", (0, middle, 1))
    rare, report = found.frequencies <= middle, task(sae)
    for name, values in {"kl": found.kl, "rise": found.rise}.items():
        by_hand = (values[rare].mean() + values[~rare].mean()).item() / 2
        assert report[f"steering_{name}_matched"] == pytest.approx(by_hand)


def test_what_fires_on_bos_alone_is_not_alive(model, task):
    sae, bos = TopKSAE(12, 16, 3).eval(), task.x[0, 0]
    others = task.x[model.content(task.own)]
    with torch.no_grad():
        toward = 100 * torch.linalg.solve(others.T.cov(), bos - others.mean(0))
        sae.W_enc[:, 5], sae.b_enc[5] = toward, -(bos @ toward + (others @ toward).max()) / 2
    assert sae.encode(bos[None])[0, 5] > 0
    assert sae.encode(others)[:, 5].eq(0).all()
    found = Steering(model, SITE, TEXTS, seed=3, latents=100).of_latents(sae)
    assert 5 not in found.latents.tolist()


def test_another_seed_draws_other_texts_and_other_latents(model, task, sae):
    again = Steering(model, SITE, TEXTS, seed=3, size=0.5, latents=6)
    assert again(sae) == pytest.approx(task(sae), nan_ok=True)
    other = Steering(model, SITE, TEXTS, seed=4, size=0.5, latents=6)
    assert not torch.equal(other.random_rises, task.random_rises)
    assert other.of_latents(sae).latents.tolist() != task.of_latents(sae).latents.tolist()


def test_no_text_is_both_steered_and_a_source_of_targets(model):
    task = Steering(model, SITE, [f"{first} {second}" for first in WORDS[:8] for second in WORDS[:8]])
    rows = [{tuple(row) for row in tokens.ids[:, 1:].tolist()} for tokens in (task.contexts, task.own)]
    assert (len(rows[0]), len(rows[1])) == (4, 40)
    assert not rows[0] & rows[1]


def test_a_dead_sae_is_refused(task):
    dead = TopKSAE(12, 16, 3).eval()
    with torch.no_grad():
        dead.b_enc.fill_(-1000)
    with pytest.raises(ValueError, match="fire in at least 4 of the 40 texts.*none of 16"):
        task(dead)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": TEXTS[:43]}, "texts must be at least 44, got 43"),
        ({"size": 0}, "size must be a finite number above 0, got 0"),
        ({"latents": 0}, "latents must be an integer at least 1, got 0"),
        ({"site": "blocks.1.hook_resid_mid"}, "replaced"),
    ],
)
def test_what_cannot_be_steered_is_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        Steering(**{"model": model, "site": SITE, "texts": TEXTS} | change)
