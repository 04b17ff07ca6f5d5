"""Autoencoders of small images: their dials, what shipping keeps of them, and what one matrix explains."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sae_lib.__main__ import app
from sae_lib.activations import Activations
from sae_lib.autoencoders import (
    SHIPPED,
    SHIPPED_IN,
    Autoencoder,
    codes,
    load_autoencoder,
    make_autoencoders,
    measured,
    save_autoencoder,
    train_autoencoder,
    turned,
)
from sae_lib.groups import Group
from sae_lib.shapes import draw_shapes

KINDS = ("conv", "mlp", "vit")


@pytest.fixture(scope="module")
def images():
    return draw_shapes(300, seed=1, size=8, clutter=1).pixels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 8, 8)])
def test_reconstructions_have_the_shape_of_the_images_and_the_code_is_a_site(kind, shape):
    model, batch = Autoencoder(kind, shape, d_code=5), torch.rand(4, *shape)
    assert model(batch).shape == batch.shape
    stream = Activations(model, "code", inputs=batch, batch_size=4, buffer_size=8)
    assert stream.d_in == 5
    read = next(iter(stream)).x
    assert torch.allclose(read.sort(0).values, model.activations(batch).sort(0).values, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_weights_and_leaves_the_global_generator_alone(kind):
    torch.manual_seed(5)
    one = Autoencoder(kind, seed=1)
    after = torch.rand(1)
    again, other = Autoencoder(kind, seed=1), Autoencoder(kind, seed=2)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.code.weight, other.code.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_the_seed_decides_it(kind, images):
    options = {"kind": kind, "steps": 120, "batch_size": 32, "d_code": 16}
    one, two, other = (train_autoencoder(images, **options, seed=seed) for seed in (0, 0, 1))
    untrained = Autoencoder(kind, (3, 8, 8), 16, seed=0)
    mean = (images - images.mean(0)).square().mean()
    assert (one(images) - images).square().mean() < 0.8 * mean
    assert (untrained(images) - images).square().mean() > mean
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.code.weight, other.code.weight)
    assert not any(p.requires_grad for p in one.parameters())
    assert not one.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_blind_model_does_not_see_the_right_side(kind, images):
    changed = images.clone()
    changed[..., 6:] = 0  # the right quarter
    seeing, half, blind = (Autoencoder(kind, (3, 8, 8), blind=share) for share in (0.0, 0.5, 1.0))
    assert not torch.allclose(seeing.activations(images), seeing.activations(changed), atol=1e-4)
    assert torch.equal(half.activations(images), half.activations(changed))
    changed[..., 4:] = 1
    assert torch.equal(blind.activations(images), blind.activations(changed))
    assert not torch.allclose(half.activations(images), half.activations(changed), atol=1e-4)
    changed[..., 3:] = 0
    assert not torch.allclose(blind.activations(images), blind.activations(changed), atol=1e-4)


@pytest.mark.parametrize("kind", ["conv", "vit"])
def test_position_tells_places_apart_before_any_layer_that_could(kind):
    flat = torch.full((1, 3, 8, 8), 0.5)
    maps = {}
    for position in (0.0, 1.0):
        model = Autoencoder(kind, (3, 8, 8), position=position)
        told = 5 if kind == "vit" else 1  # what comes out of the patches' vectors, or of the coordinates
        maps[position] = model.encoder[:told](flat).flatten(1)
    spread = {position: found.std().item() for position, found in maps.items()}
    assert not torch.allclose(maps[0.0], maps[1.0])
    assert spread[1.0] > spread[0.0]


def test_coordinates_by_hand():
    told = Autoencoder("conv", (1, 4, 4), position=0.5).encoder[0](torch.zeros(1, 1, 4, 4))[0]
    line = torch.tensor([-0.5, -1 / 6, 1 / 6, 0.5])
    assert torch.allclose(told[1], line.expand(4, 4))
    assert torch.allclose(told[2], line[:, None].expand(4, 4))


def test_each_image_is_turned_by_its_own_number_of_quarters():
    images = torch.rand(8, 3, 8, 8)
    turns = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    expected = torch.stack([image.rot90(int(n), (1, 2)) for image, n in zip(images, turns, strict=True)])
    assert torch.equal(turned(images, turns), expected)


@pytest.mark.parametrize(("augmented", "share"), [(0.0, 0.0), (0.4, 0.3), (1.0, 0.75)])
def test_augmented_is_how_often_an_image_is_turned(monkeypatch, augmented, share):
    seen = []
    monkeypatch.setattr("sae_lib.autoencoders.turned", lambda images, turns: seen.append(turns) or images)
    train_autoencoder(torch.rand(50, 1, 4, 4), "mlp", augmented, steps=40, batch_size=100, d_code=2)
    turns = torch.cat(seen) if seen else torch.zeros(4000)
    assert (turns > 0).double().mean().item() == pytest.approx(share, abs=0.03)  # three turns in four are some


def test_codes_of_all_poses_are_those_of_the_turned_images(images):
    model = Autoencoder("conv", (3, 8, 8), d_code=6)
    found = codes(model, images, Group(4, reflections=True))
    assert found.shape == (300, 8, 6)
    assert torch.allclose(found[:, 3], model.activations(images.rot90(3, (2, 3))), atol=1e-5)
    assert torch.allclose(found[:, 5], model.activations(images.flip(3).rot90(1, (2, 3))), atol=1e-5)
    assert not found.requires_grad


class Reader(nn.Module):
    """A model whose code is a fixed choice of pixels, and which draws nothing."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def activations(self, images):
        return images.flatten(1)[:, self.places]

    def forward(self, images):
        return torch.zeros_like(images)


def test_one_matrix_explains_a_code_of_all_pixels_and_not_one_that_loses_what_a_turn_brings(as_a_user):
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(500, 1, 2, 2, generator=generator) for _ in range(2))
    every = measured(Reader([0, 1, 2, 3]), train, test)
    assert every["map_r2"] == pytest.approx(1, abs=1e-3)
    assert every["explained_variance"] == pytest.approx(0, abs=0.02)  # black is no better than the mean, which is black
    # of the left column (upper left, lower left) a turn leaves (upper right, upper left): one of two pixels is known
    assert measured(Reader([0, 2]), train, test)["map_r2"] == pytest.approx(0.5, abs=0.05)


def test_what_is_saved_is_loaded_in_half_precision(tmp_path, images):
    model = Autoencoder("vit", (3, 8, 8), d_code=7, position=0.25, blind=0.5, seed=3)
    save_autoencoder(model, tmp_path / "own.safetensors")
    back = load_autoencoder("own", tmp_path)
    assert back.settings == model.settings
    assert all(torch.equal(a.half().float(), b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    assert torch.allclose(back(images), model(images), atol=0.01)
    with pytest.raises(ValueError, match="name must be one of own, got 'conv'"):
        load_autoencoder("conv", tmp_path)


def test_the_command_makes_what_is_missing_and_says_how_it_was_made(tmp_path):
    arguments = ["vision", "--out", str(tmp_path), "--steps", "2", "--images", "20"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.output.splitlines()] == [
        str(tmp_path / f"{name}.safetensors") for name in SHIPPED
    ]
    said = json.loads((tmp_path / "provenance.json").read_text())
    assert list(said) == list(SHIPPED)
    assert {"blind": 1.0, "seed": 0, "steps": 2, "shapes": 20}.items() <= said["conv-broken"].items()
    settings = load_autoencoder("conv-broken", tmp_path).settings
    assert (settings["position"], settings["blind"]) == (1, 1)
    before = (tmp_path / "vit.safetensors").stat().st_mtime_ns
    (tmp_path / "mlp.safetensors").unlink()
    del said["conv"]  # as after a stop between the weights and what is said of them
    (tmp_path / "provenance.json").write_text(json.dumps(said))
    assert list(make_autoencoders(tmp_path, seed=1, steps=2, n=20)) == ["conv", "mlp"]
    said = json.loads((tmp_path / "provenance.json").read_text())
    assert (said["conv"]["seed"], said["mlp"]["seed"], said["vit"]["seed"]) == (1, 1, 0)
    assert (tmp_path / "vit.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_autoencoders_draw_shapes_and_do_what_is_said_of_them(name):
    said = json.loads((SHIPPED_IN / "provenance.json").read_text())[name]
    model, shapes = load_autoencoder(name), draw_shapes(1200, seed=77).pixels
    found = measured(model, shapes[:1000], shapes[1000:])
    assert found["explained_variance"] == pytest.approx(said["explained_variance"], abs=0.03)
    assert found["map_r2"] == pytest.approx(said["map_r2"], abs=0.05)
    assert {dial: model.settings[dial] for dial in SHIPPED[name] if dial != "augmented"}.items() <= SHIPPED[
        name
    ].items()


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"kind": "cnn"}, "kind must be one of conv, mlp, vit, got 'cnn'"),
        ({"kind": "vit"}, "must be divisible by 4 for vit, got 6 x 6: take mlp"),
        ({"kind": "mlp", "d_code": 0}, "d_code must be at least 1 and position at least 0, got 0"),
        ({"kind": "mlp", "position": -1.0}, "position at least 0, got 64 and -1.0"),
        ({"kind": "mlp", "blind": 1.5}, r"blind must be in \[0, 1\], got 1.5"),
        ({"kind": "mlp", "augmented": 2.0}, r"augmented must be in \[0, 1\], got 2.0"),
        ({"kind": "mlp", "steps": 0}, "steps and batch_size must be at least 1, got 0 and 128"),
    ],
)
def test_bad_arguments_are_refused(as_a_user, wrong, rule):
    with pytest.raises(ValueError, match=rule):
        train_autoencoder(torch.rand(4, 1, 6, 6), **wrong)


def test_images_that_are_not_square_train_only_as_they_are(as_a_user):
    wide = torch.rand(4, 1, 4, 8)
    with pytest.raises(ValueError, match="must be square to be turned, got 4 x 8: crop them, or augmented=0"):
        train_autoencoder(wide, "mlp", steps=1)
    assert train_autoencoder(wide, "mlp", augmented=0.0, steps=1)(wide).shape == wide.shape
