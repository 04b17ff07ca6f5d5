"""What a turn does: images in all poses, eigenvalues, and a piece that turns an image while its code stays or jumps.

See `sae_lib.components` for what pieces are made of. Chapter `equivariant`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from sae_lib.components import Piece, piece
from sae_lib.figures import INK, PALETTE

WIDE, HIGH, MARK = 100.0, 20.0, 0.5
"""Of a strip's drawing, in units of its own; the last is how thick the lines of what is expected are."""


def gallery(
    images: Float[Tensor, "rows columns channels height width"],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    size: float = 1.0,
) -> Figure:
    """A table of small images, each pixel a square. Chapter `equivariant`.

    Args:
        images: values in [0, 1], one channel (grey) or three; values outside are shown as the nearest inside.
        rows: a name for each row.
        columns: a name for each column.
        size: of an image, in inches.

    Raises:
        ValueError: if `images` has another shape, or the names do not fit it.
    """
    images = as_pictures(images)
    n_rows, n_columns = images.shape[:2]
    for what, names, number in (("rows", rows, n_rows), ("columns", columns, n_columns)):
        if names is not None and len(names) != number:
            raise ValueError(f"{what} must name each of the {number} {what} of images, got {len(names)}")
    beside = 0.08 * max(map(len, rows or [""]))  # inches that the names of the rows take
    figure, axes = plt.subplots(n_rows, n_columns, figsize=(size * n_columns + beside, size * n_rows), squeeze=False)
    for i, j in np.ndindex(n_rows, n_columns):
        axes[i, j].imshow(images[i, j], interpolation="nearest")
        axes[i, j].set(xticks=[], yticks=[])
        axes[i, j].spines[:].set_visible(False)
    for ax, name in zip(axes[:, 0], rows or [], strict=rows is not None):
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    for ax, name in zip(axes[0], columns or [], strict=columns is not None):
        ax.set_title(name, loc="center", fontsize="small")
    return figure


def eigenvalues(matrices: Mapping[str, Float[Tensor, "d_in d_in"]], order: int) -> Figure:
    """The eigenvalues of each matrix in the complex plane, beside the roots of one. Chapter `equivariant`.

    If `order` turns are none, each eigenvalue of a turn's matrix is one of the `order` roots of one, on the unit
    circle; those of a matrix that shrinks lie inside.

    Args:
        matrices: label -> matrix, at least one.
        order: of the turn, at least 1.

    Raises:
        ValueError: if there is no matrix.
    """
    if not matrices:
        raise ValueError("matrices must hold at least one label, got none")
    circle = torch.polar(torch.ones(241), torch.linspace(0, 2 * torch.pi, 241))
    roots = torch.polar(torch.ones(order), torch.arange(order) * 2 * torch.pi / order)
    figure, axes = plt.subplots(1, len(matrices), figsize=(3.1 * len(matrices), 3.2), sharey=True, squeeze=False)
    for ax, (label, matrix) in zip(axes[0], matrices.items(), strict=True):
        values = torch.linalg.eigvals(matrix.detach().double()).cpu()
        ax.plot(circle.real, circle.imag, color=INK, linewidth=0.8)
        ax.plot(roots.real, roots.imag, "o", color=PALETTE[1], fillstyle="none", markersize=13)
        ax.plot(values.real, values.imag, ".", color=PALETTE[0], alpha=0.6)
        ax.set(title=label, xlabel="real part", aspect="equal")
    axes[0, 0].set_ylabel("imaginary part")
    return figure


def turning(
    images: Float[Tensor, "images poses channels height width"],
    activations: Float[Tensor, "images poses d_in"],
    predicted: Float[Tensor, "images poses d_in"],
    codes: Mapping[str, Float[Tensor, "images poses d_sae"]],
    names: Sequence[str],
) -> Piece:
    """The reader turns an image and sees what a matrix predicts of its activations, and what becomes of its codes.

    Bars are what is; lines are what is expected: of activations the prediction, of a code that of the stored pose. So a
    bar without a line is a latent that came with the turn, and a line without a bar one that went. Chapter
    `equivariant`.

    Args:
        images: each in all poses, pose p turned by p / poses of a full turn; values in [0, 1], one channel or three.
        activations: of each image in each pose; less their mean they are easier to see.
        predicted: what a matrix makes of those of pose 0, in the same units.
        codes: for each SAE, of each image in each pose; what lives in no pose of an image is left out.
        names: of the images.

    Raises:
        ValueError: if there are fewer than two poses, a shape does not fit, or a number is not finite.
    """
    pictures = as_pictures(images)
    n_images, n_poses = pictures.shape[:2]
    if n_poses < 2 or len(names) != n_images:
        got = f"{n_poses} poses of {n_images} images and {len(names)} names"
        raise ValueError(f"images must have at least 2 poses, and names one for each image, got {got}")
    for what, values in {"activations": activations, "predicted": predicted, **codes}.items():
        if values.ndim != 3 or tuple(values.shape[:2]) != (n_images, n_poses):
            raise ValueError(f"{what} must have shape ({n_images}, {n_poses}, width), got {tuple(values.shape)}")
        if not torch.isfinite(values).all():
            raise ValueError(f"{what} must be finite, got {int((~torch.isfinite(values)).sum())} that are not")
    if activations.shape != predicted.shape:
        raise ValueError(f"predicted must have the shape of activations, got {predicted.shape[2]} numbers an image")

    angles = [f"{360 * pose / n_poses:g}°" for pose in range(n_poses)]
    living = [[code[i][:, (code[i] > 0).any(0)] for code in codes.values()] for i in range(n_images)]
    columns = max([1, *(code.shape[1] for row in living for code in row)])
    own = [
        [of_activations(activations[i], predicted[i]), *(of_code(code, columns) for code in living[i])]
        for i in range(n_images)
    ]
    data = {
        "angles": angles,
        "sources": [[source(picture) for picture in row] for row in pictures],
        "strips": own,
        "names": list(names),
    }
    choices = "".join(
        f'<label title="{escape(name)}"><input type="radio" name="image" value="{i}"{"" if i else " checked"}>'
        f'<img src="{data["sources"][i][0]}" alt="{escape(name)}"></label>'
        for i, name in enumerate(names)
    )
    heads = ["activations, and what the matrix predicts", *(f"code of {name}" for name in codes)]
    strips = "".join(
        f'<figure><figcaption>{escape(head)}: <span class="said">{escape(state["said"])}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDE:g} {HIGH:g}" preserveAspectRatio="none" aria-hidden="true">'
        + "".join(f'<path class="{part}" d="{state[part]}"/>' for part in ("kept", "new", "expected"))
        + "</svg></figure>"
        for head, state in zip(heads, (strip[0] for strip in own[0]), strict=True)
    )
    return piece(
        "turning",
        f"""<div class="view"><form><fieldset><legend>Which image?</legend>{choices}</fieldset>
<img class="turned" src="{data["sources"][0][0]}" alt="{escape(names[0])}, turned by {angles[0]}">
<label class="knob"><span>turn</span><input type="range" min="0" max="{n_poses - 1}" value="0" step="1"
 aria-valuetext="{angles[0]}"><output>{angles[0]}</output></label></form>
<div class="strips">{strips}</div></div><p class="unseen" role="status"></p>""",
        data,
    )


def of_activations(real: Float[Tensor, "poses d_in"], predicted: Float[Tensor, "poses d_in"]) -> list[dict[str, str]]:
    """The strip of one image's activations, in each pose."""
    largest = torch.cat([real, predicted]).abs().max().clamp(min=torch.finfo(real.dtype).tiny)
    step, base = WIDE / real.shape[1], HIGH / 2
    states = []
    for now, expected in zip(real, predicted, strict=True):
        cosine, alone = (F.cosine_similarity(now, other, dim=0).item() for other in (expected, real[0]))
        bar, line = ((part / largest * (base - MARK)).tolist() for part in (now, expected))
        said = f"cosine {cosine:z.2f}; without the matrix {alone:z.2f}"
        states.append({"kept": bars(bar, step, base), "new": "", "expected": lines(line, step, base), "said": said})
    return states


def of_code(code: Float[Tensor, "poses living"], columns: int) -> list[dict[str, str]]:
    """The strip of one image's code, in each pose: its latents from left to right as strong as in the stored pose."""
    order = sorted(range(code.shape[1]), key=lambda latent: [-value for value in code[:, latent].tolist()])
    code = code[:, order]
    stored, step = code[0] > 0, WIDE / columns
    heights = code / code.max() * (HIGH - MARK) if code.numel() else code
    states = []
    for now, height in zip(code, heights, strict=True):
        same, cosine = int(((now > 0) & stored).sum()), F.cosine_similarity(now, code[0], dim=0).item()
        states.append(
            {
                "kept": bars((height * stored).tolist(), step, HIGH),
                "new": bars((height * ~stored).tolist(), step, HIGH),
                "expected": lines(heights[0, stored].tolist(), step, HIGH),
                "said": f"{same} of {int((now > 0).sum())} latents stayed; cosine {cosine:z.2f}",
            }
        )
    return states


def bars(heights: Sequence[float], step: float, base: float) -> str:
    """A path with a bar in each column, up from the base or, where negative, down."""
    return "".join(
        f"M{(i + 0.1) * step:.2f} {base:g}v{-height:z.2f}h{0.8 * step:.2f}v{height:z.2f}z"
        for i, height in enumerate(heights)
    )


def lines(heights: Sequence[float], step: float, base: float) -> str:
    """A path with a line across each column, at the height of a bar."""
    return "".join(
        f"M{i * step:.2f} {base - height - MARK / 2:.2f}h{step:.2f}v{MARK}h{-step:.2f}z"
        for i, height in enumerate(heights)
    )


def as_pictures(images: Float[Tensor, "rows columns channels height width"]) -> Float[np.ndarray, "..."]:
    """As matplotlib takes them: (rows, columns, height, width, 3), in [0, 1]."""
    if images.ndim != 5 or images.shape[2] not in (1, 3) or not images.numel():
        got = tuple(images.shape)
        raise ValueError(f"images must have shape (rows, columns, channels 1 or 3, height, width), got {got}")
    grey_or_colour = images.detach().float().cpu().clamp(0, 1).expand(-1, -1, 3, -1, -1)
    return grey_or_colour.movedim(2, -1).numpy()


def source(picture: Float[np.ndarray, "height width 3"]) -> str:
    """A picture as the address of an image that holds it."""
    stored = io.BytesIO()
    plt.imsave(stored, picture, format="png")
    return f"data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()}"
