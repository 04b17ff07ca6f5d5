"""Autoencoders of small images: the models whose activations are turned. Chapter `equivariant`.

    a     = W f(x)             the code: activations of the submodule `code`, which SAEs are trained on
    x_hat = g(a)
    L     = mean (x - x_hat)^2

f and g are convolutions, one hidden layer, or a small vision transformer. The paper trains on autoencoders of shapes;
which ones was not available, so these are our own.

How far a(turned x) follows from a(x) by one matrix is what the chapter measures, and two things here decide it: whether
images are turned in training (``augmented``), and whether the model is told where it looks (``position``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

KINDS = ("conv", "mlp", "vit")


class Autoencoder(nn.Module):
    """Encoder, code, decoder. Its submodule ``code`` is the site to read. Chapter `equivariant`.

    Args:
        kind: ``conv``, ``mlp`` or ``vit``.
        shape: (channels, height, width) of an image; height and width are divisible by 4, but for ``mlp``.
        d_code: width of the code, at least 1.
        position: how strongly the model is told where it looks, at least 0: ``conv`` gets its coordinates as two more
            channels, ``vit`` a learned vector for each patch, times this. ``mlp`` has weights for each pixel anyway.
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
        self.settings = {"kind": kind, "shape": shape, "d_code": d_code, "position": position, "seed": seed}
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
        return self.code(self.encoder(images))


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
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU())
    decoder = nn.Sequential(
        nn.Linear(d_code, hidden), nn.ReLU(), nn.Linear(hidden, pixels), nn.Unflatten(1, tuple(shape))
    )
    return encoder, hidden, decoder


def transformer(shape: tuple[int, int, int], d_code: int, position: float) -> tuple[nn.Module, int, nn.Module]:
    """Patches of 4 x 4 pixels, two layers of attention, and one in the decoder."""
    channels, height, width = shape
    patches, d_model, d_patch = (height // 4) * (width // 4), 48, 16

    def layers(n: int) -> nn.Module:
        options = {"dim_feedforward": 2 * d_model, "dropout": 0.0, "batch_first": True, "norm_first": True}
        return nn.Sequential(*(nn.TransformerEncoderLayer(d_model, 4, **options) for _ in range(n)))

    encoder = nn.Sequential(
        nn.PixelUnshuffle(4),
        nn.Flatten(2),
        Transpose(),
        nn.Linear(16 * channels, d_model),
        Embedding(patches, d_model, position),
        layers(2),
        nn.Linear(d_model, d_patch),
        nn.Flatten(),
    )
    decoder = nn.Sequential(
        nn.Linear(d_code, patches * d_patch),
        nn.Unflatten(1, (patches, d_patch)),
        nn.Linear(d_patch, d_model),
        layers(1),
        nn.Linear(d_model, 16 * channels),
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
    steps: int = 1500,
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
    model = Autoencoder(kind, tuple(pixels.shape[1:]), d_code, position, seed)
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
