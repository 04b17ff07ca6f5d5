"""Autoencoders of small images: the models whose activations are turned. Chapter `equivariant`.

    a     = W f(x)             the code: activations of the submodule `code`, which SAEs are trained on
    x_hat = g(a)
    L     = mean (x - x_hat)^2

f and g are convolutions, one hidden layer, or a small vision transformer. The paper trains on autoencoders of shapes;
which ones was not available, so these are our own.

How far a(turned x) follows from a(x) by one matrix is what the chapter measures. Three dials move a model away from it:
images are turned less in training (``augmented``), the model is told where it looks (``position``), and it does not see
the right side of images (``blind``). Only the last moves it far: a code that must reconstruct everything reads all
places alike, with or without being told which they are.
"""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm

from sae_lib.groups import Group, explained
from sae_lib.pocket.provenance import commit, sha256, write_bytes, write_json
from sae_lib.shapes import draw_shapes

KINDS = ("conv", "mlp", "vit")
SHIPPED_IN = Path(__file__).parent / "assets" / "vision"
SHIPPED: dict[str, dict[str, Any]] = {
    "conv": {"kind": "conv"},
    "mlp": {"kind": "mlp"},
    "vit": {"kind": "vit"},
    "conv-upright": {"kind": "conv", "augmented": 0.0},
    "mlp-upright": {"kind": "mlp", "augmented": 0.0},
    "vit-upright": {"kind": "vit", "augmented": 0.0},
    "conv-broken": {"kind": "conv", "augmented": 0.0, "position": 1.0, "blind": 1.0},
}
"""Names of shipped autoencoders of shapes, and the dials of their training."""
IMAGES_AT_ONCE = 500
"""Images in a forward pass."""


class Autoencoder(nn.Module):
    """Encoder, code, decoder. Its submodule ``code`` is the site to read. Chapter `equivariant`.

    Args:
        kind: ``conv``, ``mlp`` or ``vit``.
        shape: (channels, height, width) of an image; height and width are divisible by 4, but for ``mlp``.
        d_code: width of the code, at least 1.
        position: how strongly the model is told where it looks, at least 0: ``conv`` gets its coordinates as two more
            channels, ``vit`` a learned vector for each patch, times this. ``mlp`` has weights for each pixel anyway.
        blind: share, in [0, 1], of the image's right half that the encoder does not see; the decoder must draw it.
        seed: of the initial weights.

    Raises:
        ValueError: for an unknown kind, a shape it does not fit, or a number out of range.
    """

    def __init__(
        self,
        kind: str = "conv",
        shape: tuple[int, int, int] = (3, 24, 24),
        d_code: int = 64,
        position: float = 0.0,
        blind: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        _, height, width = shape
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind != "mlp" and (height % 4 or width % 4):
            raise ValueError(f"height and width must be divisible by 4 for {kind}, got {height} x {width}: take mlp")
        if d_code < 1 or position < 0:
            raise ValueError(f"d_code must be at least 1 and position at least 0, got {d_code} and {position}")
        if not 0 <= blind <= 1:
            raise ValueError(f"blind must be in [0, 1], got {blind}")
        self.settings = {"kind": kind, "shape": shape, "d_code": d_code, "position": position, "blind": blind}
        seen = torch.arange(width) < width - round(blind * width / 2)
        self.register_buffer("seen", seen.float(), persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            build = {"conv": convolutions, "mlp": perceptron, "vit": transformer}[kind]
            self.encoder, features, self.decoder = build(shape, d_code, position)
            self.code = nn.Linear(features, d_code)

    def forward(self, images: Float[Tensor, "images channels height width"]) -> Tensor:
        """Reconstructed images."""
        return self.decoder(self.activations(images))

    def activations(self, images: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images d_code"]:
        """The code."""
        return self.code(self.encoder(images * self.seen))


def convolutions(shape: tuple[int, int, int], d_code: int, position: float) -> tuple[nn.Module, int, nn.Module]:
    """Two convolutions of stride 2 and their transposes."""
    channels, height, width = shape
    small = (24, height // 4, width // 4)
    features = small[0] * small[1] * small[2]
    encoder = nn.Sequential(
        Coordinates(height, width, position),
        nn.Conv2d(channels + 2, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
    )
    decoder = nn.Sequential(
        nn.Linear(d_code, features),
        nn.ReLU(),
        nn.Unflatten(1, small),
        nn.ConvTranspose2d(24, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, channels, 4, stride=2, padding=1),
    )
    return encoder, features, decoder


def perceptron(shape: tuple[int, int, int], d_code: int, position: float) -> tuple[nn.Module, int, nn.Module]:
    """One hidden layer before the code, and one after it."""
    pixels, hidden = shape[0] * shape[1] * shape[2], 96
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.GELU())
    decoder = nn.Sequential(
        nn.Linear(d_code, hidden), nn.GELU(), nn.Linear(hidden, pixels), nn.Unflatten(1, tuple(shape))
    )
    return encoder, hidden, decoder


def transformer(shape: tuple[int, int, int], d_code: int, position: float) -> tuple[nn.Module, int, nn.Module]:
    """Patches of 4 x 4 pixels and two layers of attention; the decoder draws each patch by itself."""
    channels, height, width = shape
    patches, d_model, d_patch = (height // 4) * (width // 4), 32, 16
    options = {"dim_feedforward": 2 * d_model, "dropout": 0.0, "batch_first": True, "norm_first": True}
    encoder = nn.Sequential(
        nn.PixelUnshuffle(4),
        nn.Flatten(2),
        Transpose(),
        nn.Linear(16 * channels, d_model),
        Embedding(patches, d_model, position),
        nn.TransformerEncoderLayer(d_model, 2, **options),
        nn.TransformerEncoderLayer(d_model, 2, **options),
        nn.Linear(d_model, d_patch),
        nn.Flatten(),
    )
    decoder = nn.Sequential(
        nn.Linear(d_code, patches * d_patch),
        nn.Unflatten(1, (patches, d_patch)),
        nn.Linear(d_patch, 2 * d_model),
        nn.GELU(),
        nn.Linear(2 * d_model, 16 * channels),
        Transpose(),
        nn.Unflatten(2, (height // 4, width // 4)),
        nn.PixelShuffle(4),
    )
    return encoder, patches * d_patch, decoder


class Coordinates(nn.Module):
    """Two more channels: how far a pixel is to the right and below, from -1 to 1, times the strength."""

    def __init__(self, height: int, width: int, strength: float):
        super().__init__()
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.register_buffer("channels", strength * torch.stack([columns, rows]), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images, self.channels.expand(len(images), -1, -1, -1)], dim=1)


class Embedding(nn.Module):
    """A learned vector for each patch, times the strength."""

    def __init__(self, patches: int, d_model: int, strength: float):
        super().__init__()
        self.strength, self.vectors = strength, nn.Parameter(torch.randn(patches, d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.strength * self.vectors


class Transpose(nn.Module):
    """Channels before places, or places before channels."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2)


def train_autoencoder(
    pixels: Float[Tensor, "images channels height width"],
    kind: str = "conv",
    augmented: float = 1.0,
    position: float = 0.0,
    blind: float = 0.0,
    steps: int = 800,
    batch_size: int = 128,
    d_code: int = 64,
    seed: int = 0,
) -> Autoencoder:
    """An `Autoencoder` of these images: Adam, its rate falling from 0.002 to 0 as a cosine. Chapter `equivariant`.

    Args:
        pixels: images in their stored pose.
        kind: ``conv``, ``mlp`` or ``vit``.
        augmented: chance, in [0, 1], that an image of a batch is turned, by 0 to 3 quarters.
        position: see `Autoencoder`.
        blind: see `Autoencoder`.
        steps: at least 1.
        batch_size: images in a step, at least 1.
        d_code: width of the code.
        seed: of the initial weights, the order of the images, and their turns.

    Raises:
        ValueError: for images that are turned and not square, or a number out of range; and see `Autoencoder`.
    """
    if not 0 <= augmented <= 1:
        raise ValueError(f"augmented must be in [0, 1], got {augmented}")
    if augmented and pixels.shape[2] != pixels.shape[3]:
        height, width = pixels.shape[2:]
        raise ValueError(f"images must be square to be turned, got {height} x {width}: crop them, or augmented=0")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    model = Autoencoder(kind, tuple(pixels.shape[1:]), d_code, position, blind, seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc=f"autoencoder {kind}", unit="step", leave=False, delay=2):
        images = pixels[torch.randint(len(pixels), (batch_size,), generator=generator)]
        if augmented:
            turns = torch.randint(4, (batch_size,), generator=generator)
            turns[torch.rand(batch_size, generator=generator) >= augmented] = 0
            images = turned(images, turns)
        loss = F.mse_loss(model(images), images)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.requires_grad_(False).eval()


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Each image by its own number of quarter turns, 0 to 3."""
    images = torch.where((turns % 2 == 1)[:, None, None, None], images.rot90(1, (2, 3)), images)
    return torch.where((turns >= 2)[:, None, None, None], images.rot90(2, (2, 3)), images)


def codes(
    model: Autoencoder, images: Float[Tensor, "images channels h h"], group: Group
) -> Float[Tensor, "images group d_code"]:
    """The activations of each image under every element of a group.

    Raises:
        ValueError: if images are not square.
    """
    with torch.no_grad():
        poses = (group.orbit(some) for some in images.split(IMAGES_AT_ONCE))
        return torch.cat([model.activations(some.flatten(0, 1)).unflatten(0, some.shape[:2]) for some in poses])


def load_autoencoder(name: str = "conv", folder: Path = SHIPPED_IN) -> Autoencoder:
    """One of the shipped autoencoders of shapes. Chapter `equivariant`.

    Args:
        name: ``conv``, ``mlp`` or ``vit``, trained on all poses; the same with ``-upright``, on the stored pose alone;
            ``conv-broken``, which saw no other pose, does not see the right half, and is told where it looks.
        folder: where `make_autoencoders` wrote.

    Raises:
        ValueError: for a name that is not there.
    """
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(other.stem for other in folder.glob("*.safetensors"))) or f"none, in {folder}"
        raise ValueError(f"name must be one of {there}, got {name!r}: make others by train_autoencoder")
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        model = Autoencoder(**settings | {"shape": tuple(settings["shape"])})
        model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return model.requires_grad_(False).eval()


def save_autoencoder(model: Autoencoder, path: Path) -> None:
    """Write settings, and weights in half precision."""
    weights = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    write_bytes(path, save(weights, {"settings": json.dumps(model.settings)}))


def make_autoencoders(out: Path = SHIPPED_IN, seed: int = 0, steps: int = 1500, n: int = 20_000) -> dict[str, dict]:
    """Train, write and measure the autoencoders of `SHIPPED`, all that are not in the folder.

    Args:
        out: folder for the weights, and for ``provenance.json``, which says how each was made and what it does.
        seed: of the shapes, the weights and the order of images; the held-out shapes have the seed after it.
        steps: of each training.
        n: shapes to train on; a tenth as many are held out.

    Returns:
        what is known of each that was made, its dials, seed and sizes; ``explained_variance`` of the held-out images
        in all poses; ``map_r2`` of the matrix of a quarter turn, fitted to codes of training images, on those of
        held-out ones; ``cpu_seconds`` of the training, over all threads; commit, versions, ``bytes`` and ``sha256``.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = out / "provenance.json"
    known = json.loads(written.read_text()) if written.exists() else {}
    missing = [name for name in SHIPPED if name not in known or not (out / f"{name}.safetensors").exists()]
    train, test = draw_shapes(n, seed).pixels, draw_shapes(n // 10, seed + 1).pixels
    for name in missing:
        path, started = out / f"{name}.safetensors", time.process_time()
        model = train_autoencoder(train, **SHIPPED[name], steps=steps, seed=seed)
        seconds = round(time.process_time() - started, 1)
        save_autoencoder(model, path)
        known[name] = SHIPPED[name] | {"seed": seed, "steps": steps, "shapes": n}
        known[name] |= measured(load_autoencoder(name, out), train[: n // 5], test)
        known[name] |= {"cpu_seconds": seconds, "bytes": path.stat().st_size, "sha256": sha256(path)}
        known[name] |= {"python": platform.python_version(), "torch": version("torch")}
        known[name] |= {"commit": commit("sae_lib/shapes.py", "sae_lib/autoencoders.py")}
        write_json(written, known)
    return {name: known[name] for name in missing}


def measured(model: Autoencoder, train: Tensor, test: Tensor) -> dict[str, float]:
    """Explained variance of test images over all poses, and R2 on them of the matrix of a quarter turn."""
    group = Group(4)
    poses = group.orbit(test).flatten(0, 1)
    with torch.no_grad():
        x_hat = torch.cat([model(some) for some in poses.split(IMAGES_AT_ONCE)])
    error, spread = (x_hat - poses).square().sum(), (poses - poses.mean(0)).square().sum()
    matrices = group.fit(codes(model, train, group))
    r2 = explained(group.moments(codes(model, test, group).double()), matrices.double())
    return {"explained_variance": round((1 - error / spread).item(), 4), "map_r2": round(r2.item(), 4)}
