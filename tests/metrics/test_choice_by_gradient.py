"""What the gradient adds to the choice of latents: each choice is measured with its own gradient."""

import pytest
import torch

from sae_lib import Activations, GradientSAE, ReLUSAE, TopKSAE, evaluate, load_model
from sae_lib.metrics import ChoiceByGradient, PatchedLoss
from sae_lib.metrics.choice_by_gradient import choosing_by
from tests.tiny_models import WORDS, tiny_gpt2

SITE, ROWS = "blocks.1.hook_resid_post", 80
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 3 + i % 5]) for i in range(40)]


@pytest.fixture(scope="module")
def stream():
    return Activations(load_model(tiny_gpt2()), SITE, texts=TEXTS, batch_size=32, forward_tokens=64)


@pytest.fixture(scope="module")
def task(stream):
    return ChoiceByGradient(PatchedLoss(stream, tokens=ROWS), rows=ROWS)


def g_sae(beta, d_in=12):
    sae = GradientSAE(d_in, 40, 4, beta=beta).eval()
    sae.mean_size.fill_(0.1)
    return sae


def test_gradients_stand_beside_their_own_activations(stream, task):
    read, gradients = zip(
        *(Activations.read(with_gradient(stream), item) for item in task.patched.sequences), strict=True
    )
    read, gradients = torch.cat(read), torch.cat(gradients)
    inner = task.gradients["gradient"].any(1)  # the last token of a text has none
    assert torch.allclose(task.patched.x[inner], read, atol=1e-6)
    assert torch.allclose(task.gradients["gradient"][inner], gradients, atol=1e-6)
    assert 0 < (~inner).sum() == task.patched.text[-1] + 1


def with_gradient(stream):
    return Activations(stream.model, SITE, texts=TEXTS, batch_size=32, forward_tokens=64, grad=True)


def test_the_sampled_gradient_is_another_one_and_its_seed_decides_it(task):
    again, other = (ChoiceByGradient(task.patched, ROWS, seed) for seed in (0, 1))
    assert torch.equal(task.gradients["sampled"], again.gradients["sampled"])
    assert torch.equal(task.gradients["gradient"], other.gradients["gradient"])
    assert not torch.allclose(task.gradients["sampled"], other.gradients["sampled"])
    assert not torch.allclose(task.gradients["sampled"], task.gradients["gradient"])


def test_without_weight_on_the_gradient_all_choices_are_that_of_activation(stream, task):
    sae = g_sae(0.0)
    (report,), plain = task([sae]), evaluate(sae, stream, tokens=ROWS)
    for name in ("gradient", "sampled"):
        assert report[f"loss_recovered_{name}"] == pytest.approx(plain["loss_recovered"])
        assert report[f"kl_{name}"] == pytest.approx(plain["kl"])
    assert report["explained_variance_gradient"] == pytest.approx(plain["explained_variance"])
    assert report["l0_gradient"] == plain["l0"]
    assert report["alive_gradient"] == plain["alive"]
    assert report["moved_gradient"] == 0


def test_numbers_are_those_of_codes_chosen_with_the_gradient(task):
    sae, topk = g_sae(3.0), TopKSAE(12, 40, 4, seed=1).eval()
    reports = task([sae, topk])
    x, gradient = task.patched.x[:ROWS], task.gradients["gradient"][:ROWS]
    for report, chooser in zip(reports, (sae, choosing_by(task.gradients["gradient"], topk)), strict=True):
        z = chooser.encode(x, gradient)
        error = (x - chooser.decode(z)).square().sum() / (x - x.mean(0)).square().sum()
        assert report["explained_variance_gradient"] == pytest.approx(1 - error.item(), rel=1e-4)
        assert report["alive_gradient"] == (z > 0).any(0).double().mean().item()
        new = ((z > 0) & (chooser.encode(x) == 0)).sum() / (z > 0).sum()
        assert report["moved_gradient"] == pytest.approx(new.item())
        assert new > 0
        for name, gradients in task.gradients.items():
            (expected,) = task.patched([lambda x, rows, g=gradients, c=chooser: c.decode(c.encode(x, g[rows]))])
            assert report[f"loss_recovered_{name}"] == expected["loss_recovered"]


def test_topk_chooses_with_the_gradient_by_its_own_weights(task):
    topk = TopKSAE(12, 40, 4, seed=1).eval()
    chooser = choosing_by(task.gradients["gradient"], topk)
    x = task.patched.x
    assert torch.equal(chooser.encode(x), topk.encode(x))
    assert torch.equal(chooser.W_dec, topk.W_dec)
    assert chooser.beta == 1
    inner = task.gradients["gradient"].any(1)
    size = (task.gradients["gradient"][inner] @ topk.W_dec.T).abs().mean().item()
    assert chooser.mean_size.item() == pytest.approx(size)


def test_other_variants_are_refused(task):
    with pytest.raises(ValueError, match="must be a g-SAE or TopK, got ReLUSAE"):
        task([ReLUSAE(12, 40, l1_coeff=0.1)])
