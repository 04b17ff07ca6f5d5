"""Orbits to train and measure on: planted ones, or the codes of an autoencoder of images. Chapter `equivariant`.

A world has training orbits and held-out ones, and what is known of the latter: the planted features, or labels of the
images that do not depend on the pose. The seed decides all of it, the autoencoder too. An autoencoder that was trained
is kept below ``_build/autoencoders``, since several experiments stand on the same one.
"""

from __future__ import annotations

import hashlib
import json
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from sae_lib import autoencoders
from sae_lib.autoencoders import Autoencoder, codes, train_autoencoder
from sae_lib.groups import Group
from sae_lib.orbits import PlantedOrbits
from sae_lib.pocket.provenance import write_bytes
from sae_lib.shapes import draw_shapes
from sae_lib.vision import load_square_images

KEPT = Path(__file__).parent.parent / "_build" / "autoencoders"
HELD = 1000
"""Added to a seed, for what is held out."""


class World(NamedTuple):
    """Orbits and what is known of them.

    Attributes:
        train: orbits to train on.
        held: held-out ones.
        labels: of the held-out inputs, by name; none of them depends on the pose. Empty for planted orbits.
        features: directions of the planted features in each pose.
        truth: coefficients of the features in the held-out inputs.
    """

    train: Float[Tensor, "n group d_in"]
    held: Float[Tensor, "held group d_in"]
    labels: dict[str, Int[Tensor, " held"]]
    features: Float[Tensor, "n_features group d_in"] | None = None
    truth: Float[Tensor, "held n_features"] | None = None


class Pictures(NamedTuple):
    """Images and labels.

    Attributes:
        pixels: in their stored pose.
        labels: by name; none of them depends on the pose.
    """

    pixels: Float[Tensor, "images channels size size"]
    labels: dict[str, Int[Tensor, " images"]]


def planted_world(planted: dict[str, Any], group: Group, inputs: int, held: int, seed: int) -> World:
    """Of `PlantedOrbits` with these arguments; the seed draws directions and samples."""
    world = PlantedOrbits(**planted, group=group, seed=seed)
    (train, _), (rest, truth) = world.sample(inputs, seed), world.sample(held, seed + HELD)
    return World(train, rest, {}, world.turned, truth)


def network_world(model: Autoencoder, train: Pictures, held: Pictures, group: Group) -> World:
    """The codes of images in all poses."""
    return World(codes(model, train.pixels, group), codes(model, held.pixels, group), held.labels)


def pictures(source: str, inputs: int, held: int, seed: int, side: int | None = None) -> tuple[Pictures, Pictures]:
    """Training and held-out images.

    Args:
        source: ``shapes``, drawn; or what `load_square_images` takes, of which the first are taken.
        inputs: training images; of other sources than shapes all, if there are fewer.
        held: held-out images; the same.
        seed: of all that is drawn, and of the split.
        side: pixels on a side, of a data set of the Hub.
    """
    if source == "shapes":
        drawn = draw_shapes(inputs, seed), draw_shapes(held, seed + HELD)
        return tuple(Pictures(s.pixels, {"kind": s.kind, "colour": s.colour, "scale": s.scale}) for s in drawn)
    both = zip(load_square_images(source, seed, side), (inputs, held), strict=True)
    return tuple(Pictures(images.pixels[:n], {"class": images.labels[:n]}) for images, n in both)


def kept_autoencoder(pixels: Float[Tensor, "images channels size size"], seed: int, **settings: Any) -> Autoencoder:
    """What `train_autoencoder` makes of these images, from a file if it was made before with the same source."""
    said = json.dumps([settings, seed, list(pixels.shape), torch.__version__], sort_keys=True).encode()
    source = Path(autoencoders.__file__).read_bytes()
    digest = hashlib.sha256(said + source + pixels.contiguous().numpy().tobytes()).hexdigest()
    path = KEPT / f"{digest[:24]}.safetensors"
    if not path.exists():
        with torch.enable_grad():  # a measurement may be the first to ask for it
            model = train_autoencoder(pixels, **settings, seed=seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, to_bytes({name: value.contiguous() for name, value in model.state_dict().items()}))
        return model
    model = untrained_autoencoder(pixels, seed, **settings)
    model.load_state_dict(from_bytes(path.read_bytes()))
    return model


def untrained_autoencoder(
    pixels: Float[Tensor, "images channels size size"], seed: int, **settings: Any
) -> Autoencoder:
    """The `Autoencoder` that the training of the same settings starts from."""
    own = settings.keys() & signature(Autoencoder).parameters
    model = Autoencoder(shape=tuple(pixels.shape[1:]), seed=seed, **{name: settings[name] for name in own})
    return model.requires_grad_(False).eval()
