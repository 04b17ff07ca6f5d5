"""What an experiment stands on: the same rows for all its trainings, with gradients where they are asked for."""

import pytest
import torch
from tiny_models import WORDS, tiny_gpt2

from sae_lib import grounds
from sae_lib.grounds import LanguageGround, PlantedGround, ground


@pytest.fixture
def place(tmp_path, monkeypatch) -> dict:
    """A site of a tiny model, and 40 texts; caches go to a folder of their own."""
    monkeypatch.setattr(grounds, "CACHES", tmp_path / "caches")
    texts = [" ".join(WORDS[(7 * i * j) % 20] for j in range(1, 3 + i % 9)) for i in range(1, 41)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    model = {"model": str(tiny_gpt2()), "site": "blocks.1.hook_resid_post", "texts": str(tmp_path / "texts.txt")}
    return model | {"batch_size": 32, "held": 100}


def together(stream):
    """Each row's activation and, beside it, its gradient."""
    return torch.cat([torch.cat([batch.x, batch.grad], dim=1) for batch in stream])


@pytest.mark.parametrize("cache", [False, True])
def test_gradients_come_where_they_are_asked_for_or_all_have_them(cache, place):
    plain, all_have = (LanguageGround(**place, cache=cache, grad=grad) for grad in (False, True))
    assert next(iter(plain.stream(3))).grad is None
    asked, given = next(iter(plain.stream(3, grad=True))), next(iter(all_have.stream(3)))
    assert torch.equal(asked.x, given.x)
    assert torch.equal(asked.grad, given.grad)
    written = list(grounds.CACHES.iterdir()) if cache else []
    assert len(written) == (2 if cache else 0)  # one with gradients and one without


def test_cached_activations_keep_their_own_gradients(place):
    read, cached = (together(LanguageGround(**place, cache=cache).stream(5, grad=True)) for cache in (False, True))
    assert read.shape == cached.shape
    by_element = "donot_use_mm_for_euclid_dist"  # else what is near is rounded
    distances = torch.cdist(read, cached, compute_mode=by_element)  # they come in another order
    assert distances.amin(0).max() < 1e-4
    assert distances.amin(1).max() < 1e-4


def test_a_planted_world_has_no_gradients():
    world = PlantedGround({"n_features": 8, "d_in": 4, "active": 2}, 32, 100)
    assert world.grad is False
    assert next(iter(world.stream(0))).grad is None
    with pytest.raises(ValueError, match="gradients need a model, whose loss they are of, got a planted world"):
        world.stream(0, grad=True)


def test_a_description_may_ask_for_gradients(place):
    assert ground(place | {"grad": True}).grad
    with pytest.raises(ValueError, match="must have its arguments"):
        ground({"planted": {"n_features": 8, "d_in": 4, "active": 2}, "batch_size": 32, "held": 1, "grad": True})
