"""What an experiment stands on: activations to train on, and held-out ones to measure on, for each seed.

A ground is a line of ``book/experiments.yml``: a planted world, whose every seed is another dictionary with other
samples; a site of a language model, where a seed is another order of the same texts; the hidden units of a classifier
of images, whose every seed is another classifier; or orbits, planted ones or those of an autoencoder's code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat as endlessly
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lib.activations import Activations
from sae_lib.cached import CachedActivations
from sae_lib.data import SPLITS, Batch, PlantedDictionary, PlantedStream, load_texts
from sae_lib.groups import Group
from sae_lib.metrics.evaluation import rows
from sae_lib.metrics.sparse_probing import labelled_texts
from sae_lib.models import load_model
from sae_lib.orbit_worlds import World, kept_autoencoder, network_world, pictures, planted_world, untrained_autoencoder
from sae_lib.orbits import Orbits
from sae_lib.pocket.spelling import split_words
from sae_lib.records import Record
from sae_lib.sae import whole
from sae_lib.vision import Classifier, Images, load_images, train_classifier

CACHES = Path(__file__).parent.parent / "_build" / "activations"
DTYPES = ("float32", "bfloat16", "float16")
MOST_HELD_TEXTS = 20_000
"""Most texts that are read of a split ``test`` of the Hub: many times the tokens that are measured on."""
KEPT = 8
"""So many of the things that were prepared last are kept."""


class Ground:
    """Streams of a seed, and whatever is prepared once for all SAEs."""

    d_in: int
    held: int
    """Held-out rows of one measurement."""
    grad: bool = False
    """Whether all SAEs are trained on batches with gradients, also those that do not need them."""
    readings: ClassVar[tuple[str, ...]] = ()
    """What batches can hold beside single activations, or in place of them."""

    def __init__(self) -> None:
        self._prepared: dict[tuple, Any] = {}

    def prepared(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once for a key."""
        if key not in self._prepared:
            self._prepared[key] = make()
            for old in list(self._prepared)[:-KEPT]:
                del self._prepared[old]
        return self._prepared[key]

    def rows(self, seed: int, repeat: int) -> Float[Tensor, "held d_in"]:
        """The held-out activations of a measurement."""
        stream = self.held_out(seed, repeat)
        return self.prepared(("rows", seed, repeat), lambda: torch.cat(list(rows(stream, self.held))))

    def stream(self, seed: int, reading: str = "") -> Iterable[Batch]:
        """To train on.

        Args:
            seed: of the training.
            reading: ``grad`` for gradients of the model's loss, ``orbit`` or ``stacked`` (`Orbits`); by default single
                activations.

        Raises:
            ValueError: if this ground has no such reading.
        """
        raise NotImplementedError

    def checked(self, reading: str) -> str:
        """`reading`, if this ground has it."""
        if reading not in ("", *self.readings):
            has = " and ".join(["single activations", *self.readings])
            raise ValueError(f"{type(self).__name__} has {has}, got reading {reading!r}: take another ground")
        return reading

    def row(self, reading: str) -> tuple[int, int]:
        """The width of a row of a batch, and how many activations it stands for."""
        return self.d_in, 1

    def held_out(self, seed: int, repeat: int) -> Iterable[Batch]:
        """To measure on; another repetition has other rows."""
        raise NotImplementedError


class PlantedGround(Ground):
    """A `PlantedDictionary`; the seed draws its directions and the samples.

    Args:
        planted: arguments of `PlantedDictionary`, without its seed.
        batch_size: samples in a training step.
        held: held-out samples of one measurement.
    """

    def __init__(self, planted: dict[str, Any], batch_size: int, held: int):
        super().__init__()
        self.planted = {name: tuple(value) if isinstance(value, list) else value for name, value in planted.items()}
        self.batch_size = whole("batch_size", batch_size)
        self.d_in, self.held = planted["d_in"], whole("held", held)

    def dictionary(self, seed: int) -> PlantedDictionary:
        """The world of a seed."""
        return self.prepared(("dictionary", seed), lambda: PlantedDictionary(**self.planted, seed=seed))

    def stream(self, seed: int, reading: str = "") -> PlantedStream:
        """To train on."""
        self.checked(reading)
        return self.dictionary(seed).batches(self.batch_size, seed=seed)

    def held_out(self, seed: int, repeat: int) -> PlantedStream:
        """Samples with seeds of their own: 1,000 and above, which no training has."""
        return self.dictionary(seed).batches(self.held, seed=1000 * (seed + 1) + repeat)


class LanguageGround(Ground):
    """A site of a language model; the seed is the order of the training texts, which are the same for all.

    Args:
        model: what `load_model` takes.
        site: where the activations are read.
        texts: what `load_texts` takes; trained on is the split ``train``, measured on ``test``; see `split_texts`.
        batch_size: tokens in a training step.
        held: held-out tokens of one measurement.
        limit: at most so many texts of a split; the Hub needs it.
        held_texts: of texts without a split ``test``: the first so many, which are measured on and not trained on.
        context: most tokens in a window, BOS included; the model's, if None.
        dtype: of the model's weights; activations are float32 from the stream on.
        cache: write the training activations to disk first, and read them from there in every training.
        grad: train all SAEs on batches with gradients, which have no last tokens of texts, so that those that need
            gradients and those that do not see the same rows; without it only those that need them do.
        labelled: labelled texts of the Hub for sparse probing, as arguments of `labelled_texts`; the embedded texts
            carry their labels.

    Attributes:
        spelled: where first letters are looked for, and of which words: in the held-out embedded texts, the words whose
            letters the embedded model was taught; of other models None and None, for SAEBench's prompts.
        probed: labelled texts for sparse probing, and the most of a class.
    """

    readings = ("grad",)

    def __init__(
        self,
        model: str,
        site: str,
        texts: str,
        batch_size: int,
        held: int,
        limit: int | None = None,
        held_texts: int | None = None,
        context: int | None = None,
        dtype: str = "float32",
        cache: bool = False,
        grad: bool = False,
        labelled: dict[str, Any] | None = None,
    ):
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.texts = split_texts(texts, limit, held_texts)
        self.model, self.site, self.context = load_model(model, dtype=getattr(torch, dtype)), site, context
        self.batch_size, self.held = whole("batch_size", batch_size), whole("held", held)
        self.cache, self.grad, self._cached = cache, grad, {}
        self.d_in = self.model.width(site)
        self.spelled, self.probed = (None, None), None if labelled is None else (labelled_texts(**labelled), 5000)
        if texts == "pocket":
            natural = [record for record in self.texts["test"] if record.register != "spelling"]
            taught = split_words(self.model.tokenizer.get_vocab())
            self.spelled = natural, [word for split in SPLITS for word in taught[split]]
            self.probed = self.texts["train"], 400

    def stream(self, seed: int, reading: str = "") -> Activations | CachedActivations:
        """To train on; with gradients, if they are asked for or all trainings have them."""
        grad = self.checked(reading) == "grad" or self.grad
        if not self.cache:
            return self._stream(seed, grad)
        if grad not in self._cached:
            stream = self._stream(0, grad)
            self._cached[grad] = stream.cache(CACHES / name_of(stream))
        self._cached[grad].seed = seed
        return self._cached[grad]

    def _stream(self, seed: int, grad: bool) -> Activations:
        return self._activations("train", seed, grad)

    def held_out(self, seed: int, repeat: int) -> Activations:
        """Texts that no training sees, the same for all seeds; a repetition begins with others of them."""
        return self._activations("test", repeat)

    def _activations(self, split: str, seed: int, grad: bool = False) -> Activations:
        options = {"batch_size": self.batch_size, "seed": seed, "grad": grad, "context": self.context}
        return Activations(self.model, self.site, texts=self.texts[split], **options)


def split_texts(source: str, limit: int | None, held_texts: int | None) -> dict[str, Sequence[Record]]:
    """Texts to train on and others to measure on.

    Args:
        source: what `load_texts` takes.
        limit: at most so many texts of a split, and of ``test`` at most 20,000.
        held_texts: take the first so many of ``train`` in place of ``test``, and leave them out there.

    Raises:
        ValueError: if no text is left to train on.
    """
    train = load_texts(source, "train", limit=limit)
    if held_texts is None:
        return {"train": train, "test": load_texts(source, "test", limit=limit and min(limit, MOST_HELD_TEXTS))}
    if not 0 < held_texts < len(train):
        raise ValueError(
            f"held_texts must be in [1, {len(train) - 1}], for {source} has {len(train)}, got {held_texts}"
        )
    return {"train": train[held_texts:], "test": train[:held_texts]}


class ImageGround(Ground):
    """The hidden units of a classifier of images, trained first; the seed decides the split, weights and orders.

    Args:
        images: what `sae_lib.vision.load_images` takes.
        epochs: of the classifier's training.
        batch_size: images in a training step, of the classifier and of SAEs.
        held: test images of one measurement; all, if there are fewer.
        d_hidden: hidden units.
    """

    def __init__(self, images: str, epochs: int, batch_size: int, held: int, d_hidden: int = 64):
        super().__init__()
        self.images, self.epochs, self.d_in = images, whole("epochs", epochs), whole("d_hidden", d_hidden)
        self.batch_size, self.held = whole("batch_size", batch_size), whole("held", held)

    def world(self, seed: int) -> tuple[Classifier, Images, Images]:
        """The classifier of a seed, its training images, and the test images."""

        def make() -> tuple[Classifier, Images, Images]:
            train, test = load_images(self.images, seed)
            classifier = train_classifier(train, self.d_in, self.epochs, self.batch_size, seed)
            return classifier, train, Images(test.pixels[: self.held], test.labels[: self.held])

        return self.prepared(("world", seed), make)

    def stream(self, seed: int, reading: str = "") -> Activations:
        """To train on: the training images, epoch after epoch."""
        self.checked(reading)
        classifier, train, _ = self.world(seed)
        options = {"batch_size": self.batch_size, "seed": seed}
        size = max(2 * self.batch_size, len(train.pixels))
        return Activations(classifier, "hidden", inputs=Epochs(train.pixels), buffer_size=size, **options)

    def held_out(self, seed: int, repeat: int) -> list[Batch]:
        """The test images, the same for all repetitions."""
        classifier, _, test = self.world(seed)
        return [Batch(classifier.activations(test.pixels))]


class Epochs:
    """The same inputs again and again; each iteration starts anew."""

    def __init__(self, inputs: Tensor):
        self.inputs = inputs

    def __iter__(self) -> Iterator[Tensor]:
        return endlessly(self.inputs)


class OrbitGround(Ground):
    """Orbits that are held in memory; see `sae_lib.orbit_worlds`.

    Args:
        d_in: width of the activations.
        inputs: to train on.
        batch_size: inputs in a training step.
        held: held-out inputs of one measurement.
        group: arguments of `Group`.
    """

    readings = ("orbit", "stacked")

    def __init__(self, d_in: int, inputs: int, batch_size: int, held: int, group: dict[str, Any] | None = None):
        super().__init__()
        self.group = Group(**group or {})
        self.d_in, self.inputs = whole("d_in", d_in), whole("inputs", inputs)
        self.batch_size, self.held = whole("batch_size", batch_size), whole("held", held)

    def world(self, seed: int, network: str = "trained") -> World:
        """The orbits of a seed; ``untrained``: those of a network with the weights that training starts from."""
        return self.prepared((network, seed), lambda: self.make(seed, network))

    def make(self, seed: int, network: str) -> World:
        """The same, made anew."""
        raise NotImplementedError

    def stream(self, seed: int, reading: str = "") -> Orbits:
        """To train on; single activations are those of all poses."""
        orbits = self.world(seed).train
        return Orbits(orbits, self.batch_size, self.checked(reading) or "apart", group=self.group, seed=seed)

    def row(self, reading: str) -> tuple[int, int]:
        size = self.group.size
        return {"": (self.d_in, 1), "orbit": (self.d_in, size), "stacked": (self.d_in * size, size)}[reading]

    def held_out(self, seed: int, repeat: int) -> list[Batch]:
        """The held-out activations in all poses, the same for all repetitions."""
        return [Batch(self.world(seed).held.flatten(0, 1))]


class PlantedOrbitGround(OrbitGround):
    """`PlantedOrbits`; the seed draws their directions and the samples.

    Args:
        orbits: arguments of `PlantedOrbits`, without group and seed.
        sizes: see `OrbitGround`.
    """

    def __init__(self, orbits: dict[str, Any], **sizes: Any):
        super().__init__(orbits["d_in"], **sizes)
        self.orbits = orbits

    def make(self, seed: int, network: str) -> World:
        if network != "trained":
            raise ValueError(f"planted orbits come from no network, got {network!r}: take an autoencoder's")
        return planted_world(self.orbits, self.group, self.inputs, self.held, seed)


class AutoencoderGround(OrbitGround):
    """The code of an autoencoder of images, trained first; the seed decides images, weights and orders.

    Args:
        autoencoder: arguments of `train_autoencoder`, without images and seed.
        source: of the images; see `sae_lib.orbit_worlds.pictures`.
        side: pixels on a side, of a data set of the Hub.
        sizes: see `OrbitGround`.
    """

    def __init__(self, autoencoder: dict[str, Any], source: str, side: int | None = None, **sizes: Any):
        super().__init__(autoencoder["d_code"], **sizes)
        self.autoencoder, self.source, self.side = autoencoder, source, side

    def make(self, seed: int, network: str) -> World:
        train, held = pictures(self.source, self.inputs, self.held, seed, self.side)
        make = {"trained": kept_autoencoder, "untrained": untrained_autoencoder}[network]
        return network_world(make(train.pixels, seed, **self.autoencoder), train, held, self.group)


def name_of(stream: Activations) -> str:
    """The folder of a stream's cache: another stream has another."""
    return hashlib.sha256(json.dumps(stream.identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def ground(described: dict[str, Any]) -> Ground:
    """The ground that a line of ``experiments.yml`` describes.

    Raises:
        ValueError: it has no key that names a kind, or an argument that its kind does not take.
    """
    kinds = {
        "planted": PlantedGround,
        "model": LanguageGround,
        "images": ImageGround,
        "orbits": PlantedOrbitGround,
        "autoencoder": AutoencoderGround,
    }
    for name, kind in kinds.items():
        if name in described:
            try:
                return kind(**described)
            except TypeError as error:
                raise ValueError(f"a ground of kind {name} must have its arguments, got {described}: {error}") from None
    raise ValueError(f"a ground must have the key {' or '.join(kinds)}, got {', '.join(described) or 'none'}")
