"""Images and their classifier."""

import numpy as np
import pytest
import torch

from sae_lib.vision import Classifier, Images, accuracy, load_images, load_square_images, train_classifier


def test_the_digits_are_split_by_the_seed_with_all_classes_in_both_parts():
    train, test = load_images("digits", seed=3)
    assert train.pixels.shape == (1257, 64)
    assert test.pixels.shape == (540, 64)
    assert train.labels.bincount().min() >= 100
    assert test.labels.bincount().min() >= 50
    both = torch.cat([train.pixels, test.pixels])
    assert len(both.unique(dim=0)) == 1797  # no image is in both
    again, other = load_images("digits", seed=3)[1], load_images("digits", seed=4)[1]
    assert torch.equal(test.pixels, again.pixels)
    assert not torch.equal(test.labels, other.labels)


def test_pixels_are_standardised_by_those_of_the_training_images():
    train, test = load_images("digits")
    assert train.pixels.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.pixels.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert train.pixels.min() == test.pixels.min()  # black is black in both


def test_a_classifier_by_hand():
    classifier = Classifier(2, 2, 2)
    with torch.no_grad():
        classifier.W_in.copy_(torch.eye(2))
        classifier.b_in.copy_(torch.tensor([0.0, -1.0]))
        classifier.W_out.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        classifier.b_out.copy_(torch.tensor([0.5, 0.0]))
    pixels = torch.tensor([[1.0, 3.0], [-1.0, 0.5]])
    assert classifier.activations(pixels).tolist() == [[1, 2], [0, 0]]
    assert classifier(pixels).tolist() == [[7.5, 10], [0.5, 0]]
    assert accuracy(classifier(pixels), torch.tensor([1, 1])) == 0.5


def test_training_learns_the_digits_and_the_seed_decides_it():
    train, test = load_images("digits")
    one, two, other = (train_classifier(train, d_hidden=32, epochs=8, seed=seed) for seed in (0, 0, 1))
    assert accuracy(one(test.pixels), test.labels) > 0.8
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.W_in, other.W_in)
    assert not any(p.requires_grad for p in one.parameters())


@pytest.fixture
def folder(tmp_path):
    """Writes a data set of images to a folder, as `datasets` reads it."""
    datasets = pytest.importorskip("datasets")

    def write(sizes=((3, 2), (3, 2)), label="label"):
        for split in ("train", "test"):
            images = [np.full(size, 10 * (split == "train") + n, dtype=np.uint8) for n, size in enumerate(sizes)]
            features = datasets.Features({"image": datasets.Image(), label: datasets.Value("int64")})
            rows = datasets.Dataset.from_dict({"image": images, label: [5, 7]}, features=features)
            rows.to_parquet(tmp_path / f"{split}.parquet")
        return str(tmp_path)

    return write


def test_other_images_are_read_with_the_split_that_they_come_with(folder):
    train, test = load_images(folder())
    assert train.labels.tolist() == test.labels.tolist() == [5, 7]
    assert train.pixels.shape == (2, 6)
    assert torch.allclose(train.pixels, torch.tensor([[-1.0], [1.0]]).expand(2, 6))  # 10 and 11: mean 10.5, sd 0.5
    assert torch.allclose(test.pixels, torch.tensor([[-21.0], [-19.0]]).expand(2, 6))


def test_images_of_several_sizes_and_other_columns_are_refused(folder):
    with pytest.raises(ValueError, match="images must have one size, got some of 2 x 2 and some of 3 x 2"):
        load_images(folder(sizes=((3, 2), (2, 2))))
    with pytest.raises(ValueError, match="must have image and label, got image, digit"):
        load_images(folder(label="digit"))


def test_square_images_have_channels_first_and_pixels_from_0_to_1(folder):
    train, test = load_square_images(folder(sizes=((2, 2, 3), (2, 2, 3))))
    assert train.pixels.shape == (2, 3, 2, 2)
    assert train.pixels[:, 0, 0, 0].tolist() == pytest.approx([10 / 255, 11 / 255])
    assert test.labels.tolist() == [5, 7]
    ours, _ = load_square_images("digits", seed=3)
    theirs, _ = load_images("digits", seed=3)  # the same split, each pixel in its place
    assert ours.pixels.shape == (1257, 1, 8, 8)
    assert (ours.pixels.min(), ours.pixels.max()) == (0, 1)
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.corrcoef(torch.stack([ours.pixels.flatten(), theirs.pixels.flatten()]))[0, 1] > 1 - 1e-5


def test_large_images_are_averaged_down(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = np.array([[0, 100, 40, 40], [100, 200, 40, 40], [8, 8, 0, 0], [8, 8, 0, 0]], dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"image": [image], "label": [1]}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")
    train, _ = load_square_images(str(tmp_path), side=2)
    assert torch.allclose(255 * train.pixels, torch.tensor([[[[100.0, 40.0], [8.0, 0.0]]]]))


def test_images_that_cannot_be_turned_are_refused(folder):
    with pytest.raises(ValueError, match="must be square to be turned, got 3 x 2: crop them"):
        load_square_images(folder())
    with pytest.raises(ValueError, match="side of digits must be 8, got 24"):
        load_square_images("digits", side=24)


def test_classes_are_those_of_the_training_images():
    images = Images(torch.randn(4, 3), torch.tensor([0, 2, 1, 2]))
    assert train_classifier(images, d_hidden=2, epochs=1).W_out.shape == (2, 3)
