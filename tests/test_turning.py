"""The turned image, its activations and its codes are shown as they are, by keyboard too, and nothing is fetched."""

import base64
import io
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from sae_lib.turning import eigenvalues, gallery, turning

UPRIGHT = torch.tensor([[[0.0, 1.0], [0.2, 0.4]]]).expand(3, 2, 2)
IMAGES = torch.stack([torch.stack([torch.rot90(UPRIGHT, p, (1, 2)) for p in range(4)]), torch.zeros(4, 3, 2, 2)])
ACTIVATIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]).expand(2, 4, 2)
PREDICTED = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [-1.0, 0.0]]).expand(2, 4, 2)
STAYS = torch.tensor([[0.0, 3.0, 1.0]]).expand(4, 3).expand(2, 4, 3)
JUMPS = torch.tensor([[0.0, 3.0, 4.0], [5.0, 0.0, 4.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).expand(2, 4, 3)


def small(**given):
    arguments = {"images": IMAGES, "activations": ACTIVATIONS, "predicted": PREDICTED, "names": ["a", "b"]}
    return turning(**(arguments | {"codes": {"E-SAE": STAYS, "TopK": JUMPS}} | given))


def data_of(piece):
    [packed] = re.findall(r'<script type="application/json">(.*?)</script>', piece, re.DOTALL)
    return json.loads(packed)


def strip(piece, number):
    """What one strip shows of the first image, in each pose."""
    return data_of(piece)["strips"][0][number]


def test_each_pose_shows_its_own_image():
    sources = data_of(small())["sources"]
    for pose in range(4):
        stored = base64.b64decode(sources[0][pose].removeprefix("data:image/png;base64,"))
        expected = np.rot90(UPRIGHT[0].numpy(), pose)
        assert plt.imread(io.BytesIO(stored))[..., 0] == pytest.approx(expected, abs=1 / 254)
    white = data_of(small(images=IMAGES + 5))["sources"][0]
    assert len(set(white)) == 1, "outside of [0, 1]: the nearest inside"
    assert data_of(small())["angles"] == ["0°", "90°", "180°", "270°"]


def test_activations_are_told_beside_prediction_and_stored_pose():
    told = [pose["said"] for pose in strip(small(), 0)]
    assert told == [
        "cosine 1.00; without the matrix 1.00",
        "cosine 1.00; without the matrix 0.00",
        "cosine 1.00; without the matrix -1.00",
        "cosine 0.00; without the matrix 0.00",
    ]


def test_bars_and_lines_are_as_high_as_the_numbers():
    turned = strip(small(), 0)[1]  # activations 0 and 1, of which 0 and 2 were predicted; the largest of all is 2
    assert re.findall(r"v(-?[\d.]+)h", turned["kept"]) == ["0.00", "-4.75"], "half of (20 / 2 - 0.5), upwards"
    assert re.findall(r"M\S+ ([\d.]+)h", turned["expected"]) == ["9.75", "0.25"], "the middle, and the top"
    assert turned["new"] == ""


def test_codes_are_told_beside_that_of_the_stored_pose():
    assert {pose["said"] for pose in strip(small(), 1)} == {"2 of 2 latents stayed; cosine 1.00"}
    assert [pose["said"] for pose in strip(small(), 2)] == [
        "2 of 2 latents stayed; cosine 1.00",
        "1 of 2 latents stayed; cosine 0.50",  # 16 / (5 sqrt 41)
        "0 of 1 latents stayed; cosine 0.00",
        "0 of 0 latents stayed; cosine 0.00",
    ]


def test_latents_that_came_with_the_turn_are_drawn_apart():
    stored, turned, _, _ = strip(small(), 2)  # latents in the order of the stored pose: 4, 3, then the one that comes
    assert re.findall(r"v(-?[\d.]+)h", stored["kept"]) == ["-15.60", "-11.70", "0.00"], "4 and 3 of 5, of 19.5"
    assert re.findall(r"v(-?[\d.]+)h", turned["kept"]) == ["-15.60", "0.00", "0.00"]
    assert re.findall(r"v(-?[\d.]+)h", turned["new"]) == ["0.00", "0.00", "-19.50"]
    assert turned["expected"] == stored["expected"]
    assert len(re.findall("M", stored["expected"])) == 2, "no line where the stored pose has no latent"


def test_columns_are_as_wide_in_every_code():
    widths = {re.search(r"h([\d.]+)", strip(small(), number)[0]["kept"]).group(1) for number in (1, 2)}
    assert widths == {f"{0.8 * 100 / 3:.2f}"}, "three latents live in the fuller of the two"


def test_the_stored_pose_stands_in_the_page_without_a_script():
    piece = small()
    for number in range(3):
        state = strip(piece, number)[0]
        assert state["said"] in piece.split("<script")[0]
        assert f'd="{state["kept"]}"' in piece
    assert piece.split("<script")[0].count("<path") == 9
    assert "<output>0°</output>" in piece


def test_text_is_escaped_and_nothing_is_fetched():
    nasty = '</script><img src=x onerror="alert(1)">&\''
    piece = small(names=[nasty, "b"], codes={nasty: STAYS})
    assert "<img src=x" not in piece
    assert piece.count("</script>") == 2, "one for the data, one for the script"
    assert not re.search(r"https?:|//cdn|\bimport\b|@import|url\(|fetch\(", piece)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": IMAGES[0]}, r"channels 1 or 3, height, width\), got \(4, 3, 2, 2\)"),
        ({"images": IMAGES[:, :, :2]}, r"got \(2, 4, 2, 2, 2\)"),
        ({"images": IMAGES[:, :1]}, "at least 2 poses, .* got 1 poses of 2 images"),
        ({"names": ["a"]}, "got 4 poses of 2 images and 1 names"),
        ({"activations": ACTIVATIONS[:, :3]}, r"activations must have shape \(2, 4, width\), got \(2, 3, 2\)"),
        ({"predicted": PREDICTED[..., :1]}, "predicted must have the shape of activations, got 1 numbers"),
        ({"codes": {"mine": JUMPS[:1]}}, r"mine must have shape \(2, 4, width\), got \(1, 4, 3\)"),
        ({"codes": {"mine": JUMPS / 0}}, "mine must be finite, got 24 that are not"),
    ],
)
def test_a_piece_refuses_what_it_cannot_show(as_a_user, given, message):
    with pytest.raises(ValueError, match=message):
        small(**given)


def test_in_a_browser_arrow_keys_turn_the_image_and_all_that_follows(page):
    piece = small()
    data = data_of(piece)
    page.set_content(f"<!doctype html>{piece}")
    page.locator("[type=range]").focus()
    for pose in (1, 2, 3):
        page.keyboard.press("ArrowRight")
        assert page.locator(".turned").get_attribute("src") == data["sources"][0][pose]
        assert page.locator(".said").all_inner_texts() == [strip(piece, number)[pose]["said"] for number in range(3)]
        for part in ("kept", "new", "expected"):
            drawn = page.locator(f"path.{part}").evaluate_all("paths => paths.map(path => path.getAttribute('d'))")
            assert drawn == [strip(piece, number)[pose][part] for number in range(3)]
        assert page.locator("[type=range]").get_attribute("aria-valuetext") == data["angles"][pose]
        assert page.locator("[role=status]").inner_text().startswith(f"a, turned by {data['angles'][pose]}. ")
    assert page.errors == []


def test_in_a_browser_another_image_is_chosen_by_keyboard_and_keeps_its_pose(page):
    piece = small()
    page.set_content(f"<!doctype html>{piece}")
    page.locator("[type=range]").fill("2")
    page.locator("[name=image]:checked").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".turned").get_attribute("src") == data_of(piece)["sources"][1][2]
    assert page.locator(".turned").get_attribute("alt") == "b, turned by 180°"
    assert page.errors == []


def test_a_gallery_shows_every_image_at_its_place_and_names_them():
    figure = gallery(IMAGES[:, :3], rows=["one", "two"], columns=["0°", "90°", "180°"])
    axes = np.array(figure.axes).reshape(2, 3)
    assert np.allclose(axes[0, 1].images[0].get_array()[..., 2], np.rot90(UPRIGHT[0].numpy()))
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["one", "two"]
    assert [ax.get_title(loc="center") for ax in axes[0]] == ["0°", "90°", "180°"]
    grey = gallery(torch.full((1, 1, 1, 2, 2), 0.5))
    assert grey.axes[0].images[0].get_array().shape == (2, 2, 3)
    plt.close("all")
    with pytest.raises(ValueError, match="columns must name each of the 4 columns of images, got 1"):
        gallery(IMAGES, columns=["0°"])


def test_eigenvalues_stand_beside_the_roots_of_one():
    figure = eigenvalues({"turn": torch.tensor([[0.0, -0.5], [0.5, 0.0]]), "none": torch.eye(2)}, order=4)
    for ax, expected in zip(figure.axes, ([(0, -0.5), (0, 0.5)], [(1, 0), (1, 0)]), strict=True):
        _, roots, values = (sorted(zip(*(part.round(4) for part in line.get_data()), strict=True)) for line in ax.lines)
        assert np.allclose(values, expected)
        assert np.allclose(roots, [(-1, 0), (0, -1), (0, 1), (1, 0)], atol=1e-6)
    assert [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes] == ["turn", "none"]
    plt.close("all")
    with pytest.raises(ValueError, match="at least one label"):
        eigenvalues({}, order=4)
