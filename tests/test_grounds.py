"""What an experiment stands on: the same rows for all its trainings, with gradients where they are asked for."""

import pytest
import torch
from tiny_models import WORDS, tiny_gpt2

from sae_lib import TopKSAE, grounds, orbit_worlds, train
from sae_lib.grounds import AutoencoderGround, ImageGround, LanguageGround, PlantedGround, PlantedOrbitGround, ground
from sae_lib.records import Record


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
    asked, given = next(iter(plain.stream(3, "grad"))), next(iter(all_have.stream(3)))
    assert torch.equal(asked.x, given.x)
    assert torch.equal(asked.grad, given.grad)
    written = list(grounds.CACHES.iterdir()) if cache else []
    assert len(written) == (2 if cache else 0)  # one with gradients and one without


def test_cached_activations_keep_their_own_gradients(place):
    read, cached = (together(LanguageGround(**place, cache=cache).stream(5, "grad")) for cache in (False, True))
    assert read.shape == cached.shape
    by_element = "donot_use_mm_for_euclid_dist"  # else what is near is rounded
    distances = torch.cdist(read, cached, compute_mode=by_element)  # they come in another order
    assert distances.amin(0).max() < 1e-4
    assert distances.amin(1).max() < 1e-4


def test_texts_without_splits_are_held_apart_and_context_and_type_are_the_grounds(place):
    plain, apart = LanguageGround(**place), LanguageGround(**place, held_texts=7, context=5, dtype="bfloat16")
    every = plain.texts["train"]
    assert plain.texts["test"] == every
    assert (apart.texts["test"], apart.texts["train"]) == (every[:7], every[7:])
    for stream in (apart.stream(0), apart.held_out(0, 0)):
        tokens = next(stream.sequences())
        assert tokens.ids.shape[1] == 5
        assert stream.read(tokens)[0].dtype == torch.bfloat16
        assert next(iter(stream)).x.dtype == torch.float32
    assert apart.stream(0).fingerprint != apart.held_out(0, 0).fingerprint
    with pytest.raises(ValueError, match=r"held_texts must be in \[1, 39\], for .* has 40, got 40"):
        LanguageGround(**place, held_texts=40)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        LanguageGround(**place, dtype="int8")


def test_a_test_split_of_the_hub_is_read_only_as_far_as_it_is_needed(monkeypatch):
    asked = []
    monkeypatch.setattr(
        grounds, "load_texts", lambda source, split, limit: asked.append((split, limit)) or [Record("a")]
    )
    for limit in (50_000, 100, None):
        grounds.split_texts("org/texts", limit, None)
    assert asked[::2] == [("train", 50_000), ("train", 100), ("train", None)]
    assert asked[1::2] == [("test", 20_000), ("test", 100), ("test", None)]


def test_a_planted_world_has_no_gradients():
    world = PlantedGround({"n_features": 8, "d_in": 4, "active": 2}, 32, 100)
    assert world.grad is False
    assert next(iter(world.stream(0))).grad is None
    with pytest.raises(ValueError, match="PlantedGround has single activations, got reading 'grad'"):
        world.stream(0, "grad")


def test_a_description_may_ask_for_gradients(place):
    assert ground(place | {"grad": True}).grad
    with pytest.raises(ValueError, match="must have its arguments"):
        ground({"planted": {"n_features": 8, "d_in": 4, "active": 2}, "batch_size": 32, "held": 1, "grad": True})


DIGITS = {"images": "digits", "epochs": 1, "batch_size": 64, "held": 100, "d_hidden": 16}


def test_hidden_units_are_those_of_the_training_images_epoch_after_epoch():
    place = ground(DIGITS)
    classifier, images, test = place.world(1)
    expected = classifier.activations(images.pixels)
    stream = iter(place.stream(1))
    x = torch.cat([next(stream).x for _ in range(60)])  # about three epochs
    assert x.shape == (60 * 64, place.d_in)
    counts = (torch.cdist(x, expected, compute_mode="donot_use_mm_for_euclid_dist") < 1e-6).sum(0)
    assert counts.min() >= 1
    (held,) = place.held_out(1, 0)
    assert torch.equal(held.x, classifier.activations(test.pixels))
    assert len(held.x) == len(test.labels) == 100
    assert place.rows(1, 0).shape == (100, 16)


def test_the_seed_makes_another_classifier_of_other_images():
    one, again, other = (ImageGround(**DIGITS).world(seed) for seed in (1, 1, 2))
    assert torch.equal(one[0].W_in, again[0].W_in)
    assert torch.equal(one[1].pixels, again[1].pixels)
    assert not torch.equal(one[0].W_in, other[0].W_in)
    assert not torch.equal(one[2].labels, other[2].labels)


def test_training_on_images_goes_on_where_it_stopped(tmp_path):
    def run(folder, tokens=None):
        stream, made = ImageGround(**DIGITS).stream(1), TopKSAE(16, 32, 2)
        if tokens is not None:
            stop = made.after_step

            def after_step(batch, code):
                stop(batch, code)
                if made.tokens_trained >= tokens:
                    raise KeyboardInterrupt

            made.after_step = after_step
        return train(made, stream, 3000, seed=1, checkpoint=folder, checkpoint_every=500).saes[0]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", tokens=1800)
    went_on, unbroken = run(tmp_path / "stopped"), run(tmp_path / "unbroken")
    assert all(torch.equal(a, b) for a, b in zip(went_on.parameters(), unbroken.parameters(), strict=True))


def test_a_classifier_has_no_gradients_of_next_tokens():
    with pytest.raises(ValueError, match="ImageGround has single activations, got reading 'grad'"):
        ImageGround(**DIGITS).stream(0, "grad")
    with pytest.raises(ValueError, match="epochs must be an integer at least 1, got 0"):
        ground(DIGITS | {"epochs": 0})


# Orbits ---------------------------------------------------------------------------------------------------------------

ORBITS = {"orbits": {"n_features": 6, "d_in": 8, "active": 2}, "inputs": 40, "batch_size": 8, "held": 10}
SHAPES = {"autoencoder": {"kind": "mlp", "d_code": 5, "steps": 2}, "source": "shapes", "inputs": 20, "batch_size": 4}


def test_orbits_are_read_as_a_whole_stacked_or_apart():
    place = ground(ORBITS)
    assert isinstance(place, PlantedOrbitGround)
    first = {reading: next(iter(place.stream(1, reading))) for reading in ("", "orbit", "stacked")}
    for reading, batch in first.items():
        width, activations = place.row(reading)
        assert batch.x.shape == (8 * 4 // activations, width)
    assert torch.equal(first["orbit"].orbit.flatten(0, 1), first[""].x)
    train, (held,) = place.world(1).train.flatten(0, 1), (batch.x for batch in place.held_out(1, 0))
    assert held.shape == (40, 8)
    assert torch.cdist(held, train).amin(1).median() > 1e-3
    with pytest.raises(ValueError, match="PlantedOrbitGround has single activations and orbit and stacked, got"):
        place.stream(1, "grad")
    with pytest.raises(ValueError, match="PlantedGround has single activations, got reading 'orbit'"):
        PlantedGround({"n_features": 8, "d_in": 4, "active": 2}, 32, 100).stream(0, "orbit")


def test_a_ground_of_a_dihedral_group_has_eight_poses():
    place = ground(ORBITS | {"group": {"order": 4, "reflections": True}})
    assert place.world(0).held.shape == (10, 8, 8)
    assert place.row("stacked") == (64, 8)


def test_the_seed_decides_images_and_autoencoder_and_the_untrained_one_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr(orbit_worlds, "KEPT", tmp_path)
    place, again = (ground(SHAPES | {"held": 6}) for _ in range(2))
    assert isinstance(place, AutoencoderGround)
    assert torch.equal(place.world(1).held, again.world(1).held)
    assert place.world(1) is place.world(1)
    assert not torch.equal(place.world(1).held, place.world(2).held)
    assert not torch.allclose(place.world(1).held, place.world(1, "untrained").held)
    assert len([*tmp_path.iterdir()]) == 2
    with pytest.raises(ValueError, match="must have its arguments"):
        ground(SHAPES | {"held": 6, "epochs": 3})
