"""Small images, and a classifier with one hidden layer to look into. Chapter `neuron_embeddings`.

    h      = ReLU(x W_in + b_in)        the hidden units, whose activations SAEs are trained on
    logits = h W_out + b_out            classes

An image is a row of pixels, less the mean of all training pixels and divided by their standard deviation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

TEST_SHARE = 0.3
"""Of images that come without a split."""


class Images(NamedTuple):
    """Pixels and classes.

    Attributes:
        pixels: of an image in one row.
        labels: its class, from 0.
    """

    pixels: Float[Tensor, "images d_pixels"]
    labels: Int[Tensor, " images"]


def load_images(source: str = "digits", seed: int = 0) -> tuple[Images, Images]:
    """Training and test images.

    Args:
        source: ``digits``, the 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn; or what
            `datasets` loads, a folder or a name on the Hub such as ``ylecun/mnist``, with splits train and test whose
            rows have an ``image``, all of one size, and a ``label``.
        seed: of the split of ``digits``: 30% of each class are for the test. Other sources come with theirs.

    Raises:
        ValueError: rows have other columns, or images of several sizes.
        ImportError: `datasets` is needed and not installed.
    """
    if source == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        x, x_test, y, y_test = train_test_split(
            digits.data, digits.target, test_size=TEST_SHARE, stratify=digits.target, random_state=seed
        )
    else:
        (x, y), (x_test, y_test) = (read_images(source, split) for split in ("train", "test"))
        x, x_test = x.reshape(len(x), -1), x_test.reshape(len(x_test), -1)
    mean, deviation = x.mean(), x.std()
    return tuple(
        Images(torch.tensor((pixels - mean) / deviation).float(), torch.tensor(labels).long())
        for pixels, labels in ((x, y), (x_test, y_test))
    )


class SquareImages(NamedTuple):
    """Images that can be turned, and classes.

    Attributes:
        pixels: in [0, 1], of one channel or three, in the pose in which they are stored.
        labels: class, from 0.
    """

    pixels: Float[Tensor, "images channels side side"]
    labels: Int[Tensor, " images"]


def load_square_images(
    source: str = "digits", seed: int = 0, side: int | None = None
) -> tuple[SquareImages, SquareImages]:
    """Training and test images to be turned. Chapter `equivariant`.

    Args:
        source: ``digits``, of 8 x 8 pixels in one channel; or what `datasets` loads, as in `load_images`, such as
            ``matthieulel/galaxy10_decals`` (galaxies, 256 x 256) or ``danjacobellis/bloodmnist_224`` (blood cells,
            224 x 224).
        seed: of the split of ``digits``, as in `load_images`.
        side: average images of other sources down to so many pixels on a side; by default they stay as they are.

    Raises:
        ValueError: images are not square, or as `load_images`.
        ImportError: `datasets` is needed and not installed.
    """
    if source == "digits":
        if side not in (None, 8):
            raise ValueError(f"side of digits must be 8, got {side}: leave it out")
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        x, x_test, y, y_test = train_test_split(
            digits.images / 16, digits.target, test_size=TEST_SHARE, stratify=digits.target, random_state=seed
        )
        read = (x, y), (x_test, y_test)
    else:
        read = ((pixels / 255, labels) for pixels, labels in (read_images(source, s, side) for s in ("train", "test")))
    return tuple(square(pixels, labels) for pixels, labels in read)


def square(pixels: np.ndarray, labels: np.ndarray) -> SquareImages:
    """Images of (height, width) or (height, width, channels) as tensors, channels first."""
    if pixels.shape[1] != pixels.shape[2]:
        raise ValueError(f"images must be square to be turned, got {pixels.shape[1]} x {pixels.shape[2]}: crop them")
    pixels = torch.tensor(pixels).float()
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.movedim(3, 1).contiguous()
    return SquareImages(pixels, torch.tensor(labels).long())


def read_images(source: str, split: str, side: int | None = None) -> tuple[np.ndarray, Int[np.ndarray, " images"]]:
    """Pixels of one split of a data set, (images, height, width) or with channels last, and classes.

    Args:
        source: see `load_images`.
        split: its name.
        side: average each image down to so many pixels on a side.
    """
    try:
        import datasets
    except ImportError as missing:
        raise ImportError(f"{source!r} is read by datasets, which is missing: pip install datasets") from missing
    rows = datasets.load_dataset(source, split=split)
    if not {"image", "label"} <= set(rows.column_names):
        raise ValueError(f"rows of {source} must have image and label, got {', '.join(rows.column_names)}")
    pixels = []
    for row in tqdm(rows, desc=f"{split} images", unit="image", leave=False, delay=2):
        image = row["image"]
        if side is not None and image.height == image.width:
            image = image.resize((side, side), resample=4)  # PIL's box filter: the mean of what falls into a pixel
        pixels.append(np.asarray(image))
    if len(sizes := {" x ".join(map(str, image.shape)) for image in pixels}) > 1:
        raise ValueError(f"images must have one size, got some of {min(sizes)} and some of {max(sizes)}")
    return np.stack(pixels), np.array(rows["label"])


class Classifier(nn.Module):
    """One hidden layer of ReLU units. Its submodule ``hidden`` is the site to read.

    Args:
        d_pixels: numbers of an image.
        d_hidden: hidden units.
        classes: number of classes.
        seed: of the initial weights.
    """

    def __init__(self, d_pixels: int, d_hidden: int, classes: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.W_in = nn.Parameter(torch.randn(d_pixels, d_hidden, generator=generator) * (2 / d_pixels) ** 0.5)
        self.b_in = nn.Parameter(torch.zeros(d_hidden))
        self.hidden = nn.ReLU()
        self.W_out = nn.Parameter(torch.randn(d_hidden, classes, generator=generator) / d_hidden**0.5)
        self.b_out = nn.Parameter(torch.zeros(classes))

    def forward(self, pixels: Float[Tensor, "images d_pixels"]) -> Float[Tensor, "images classes"]:
        """Logits."""
        return self.logits(self.activations(pixels))

    def activations(self, pixels: Float[Tensor, "images d_pixels"]) -> Float[Tensor, "images d_hidden"]:
        """Of the hidden units."""
        return self.hidden(pixels @ self.W_in + self.b_in)

    def logits(self, h: Float[Tensor, "images d_hidden"]) -> Float[Tensor, "images classes"]:
        """From the activations of the hidden units."""
        return h @ self.W_out + self.b_out


def train_classifier(
    images: Images, d_hidden: int = 64, epochs: int = 3, batch_size: int = 128, seed: int = 0
) -> Classifier:
    """A `Classifier` of these images: Adam at 0.001, cross-entropy.

    Args:
        images: to train on.
        d_hidden: hidden units, at least 1.
        epochs: times that all images are seen, at least 1.
        batch_size: images in a step, at least 1.
        seed: of the initial weights and the order of the images.
    """
    classifier = Classifier(images.pixels.shape[1], d_hidden, int(images.labels.max()) + 1, seed)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(epochs), desc="classifier", unit="epoch", leave=False, delay=2):
        for rows in torch.randperm(len(images.pixels), generator=generator).split(batch_size):
            loss = F.cross_entropy(classifier(images.pixels[rows]), images.labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return classifier.requires_grad_(False).eval()


def accuracy(logits: Float[Tensor, "images classes"], labels: Int[Tensor, " images"]) -> float:
    """Share of the images whose largest logit is that of their class.

    >>> accuracy(torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1]))
    0.5
    """
    return (logits.argmax(1) == labels).double().mean().item()
