"""Worlds of orbits: what is held out was not trained on, and an autoencoder is trained once."""

import pytest
import torch

from sae_lib import orbit_worlds
from sae_lib.autoencoders import train_autoencoder
from sae_lib.groups import Group
from sae_lib.orbit_worlds import kept_autoencoder, network_world, pictures, planted_world, untrained_autoencoder

GROUP = Group(4)
SETTINGS = {"kind": "mlp", "d_code": 5, "steps": 2, "augmented": 1.0}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(orbit_worlds, "KEPT", tmp_path / "kept")
    return tmp_path / "kept"


def test_held_out_orbits_are_others_of_the_same_features():
    world = planted_world({"n_features": 6, "d_in": 8, "active": 2}, GROUP, 20, 10, seed=3)
    assert (world.train.shape, world.held.shape, world.truth.shape) == ((20, 4, 8), (10, 4, 8), (10, 6))
    assert torch.allclose(torch.einsum("nf,fgd->ngd", world.truth, world.features), world.held, atol=1e-5)
    as_many = planted_world({"n_features": 6, "d_in": 8, "active": 2}, GROUP, 20, 20, seed=3)
    assert not torch.equal(as_many.train, as_many.held)
    assert world.labels == {}
    other = planted_world({"n_features": 6, "d_in": 8, "active": 2}, GROUP, 20, 10, seed=4)
    assert not torch.equal(world.features, other.features)


def test_shapes_come_with_labels_that_no_turn_changes():
    train, held = pictures("shapes", 30, 12, seed=2)
    assert set(held.labels) == {"kind", "colour", "scale"}
    assert len(train.pixels) == 30
    assert all(len(label) == len(held.pixels) == 12 for label in held.labels.values())
    assert not torch.equal(train.pixels[:12], held.pixels)
    assert not torch.equal(held.pixels, pictures("shapes", 30, 12, seed=3)[1].pixels)


def test_digits_are_square_and_split_by_the_seed():
    train, held = pictures("digits", 40, 10**6, seed=0)
    assert train.pixels.shape == (40, 1, 8, 8)
    assert held.pixels.shape == (540, 1, 8, 8)
    assert held.labels["class"].unique().tolist() == list(range(10))


def test_an_autoencoder_is_trained_once_for_what_decides_it(kept, monkeypatch):
    pixels = pictures("shapes", 20, 1, seed=0)[0].pixels
    first = kept_autoencoder(pixels, 1, **SETTINGS)
    fresh = train_autoencoder(pixels, **SETTINGS, seed=1).state_dict()
    monkeypatch.setattr(orbit_worlds, "train_autoencoder", None)
    again = kept_autoencoder(pixels, 1, **SETTINGS)
    for made in (first, again):
        assert all(torch.equal(value, fresh[name]) for name, value in made.state_dict().items())
        assert not any(p.requires_grad for p in made.parameters())
        assert not made.training
    assert [path.suffix for path in kept.iterdir()] == [".safetensors"]
    for others in ((pixels, 2, SETTINGS), (pixels, 1, SETTINGS | {"steps": 3}), (pixels.flip(0), 1, SETTINGS)):
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            kept_autoencoder(others[0], others[1], **others[2])


def test_an_untrained_network_is_the_start_of_the_training():
    pixels = pictures("shapes", 20, 1, seed=0)[0].pixels
    untrained = untrained_autoencoder(pixels, 1, **SETTINGS)
    trained = train_autoencoder(pixels, **SETTINGS, seed=1)
    distance = max((a - b).abs().max() for a, b in zip(untrained.parameters(), trained.parameters(), strict=True))
    assert 0 < distance < 0.02  # two steps of Adam at 0.002


def test_orbits_of_a_network_are_the_codes_of_turned_images():
    train, held = pictures("shapes", 20, 7, seed=0)
    model = untrained_autoencoder(train.pixels, 0, **SETTINGS)
    world = network_world(model, train, held, GROUP)
    assert world.train.shape == (20, 4, 5)
    for p in range(4):
        expected = model.activations(torch.rot90(held.pixels, p, (2, 3)))
        assert torch.allclose(world.held[:, p], expected, atol=1e-5)
    assert world.labels == held.labels
