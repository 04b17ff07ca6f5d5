"""The explorer: neurons and latents with their examples, clusters and measures, in one HTML file.

    units = neurons(model, layer=1)   # or latents(model, site, sae), or a list of two, side by side
    explorer.show(units, texts)       # in a notebook
    explorer.write(explorer.render(units, texts), "explorer.html")

The file opens from disk, without a server or a network. On the command line: ``python -m sae_lib explore``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from sae_lib.explorer.collect import contents
from sae_lib.explorer.page import page as assembled
from sae_lib.explorer.page import write
from sae_lib.neuron_embeddings import Units
from sae_lib.records import Record

if TYPE_CHECKING:
    from sae_lib.components import Piece

__all__ = ["framed", "render", "show", "write"]


def render(units: Units | Sequence[Units], texts: Iterable[str | Record], **settings: Any) -> str:
    """The HTML of a page of the explorer. Chapter `explorer`.

    Args:
        units: one population, or two that are shown side by side.
        texts: in which their examples are found, strings or records.
        settings: ``title``, ``source``, ``threshold`` and ``most``, as `sae_lib.explorer.collect.contents` takes them.

    Raises:
        ValueError: as `contents`.
    """
    return assembled(*contents([units] if isinstance(units, Units) else list(units), texts, **settings))


def show(units: Units | Sequence[Units], texts: Iterable[str | Record], height: int = 800, **settings: Any) -> Piece:
    """The explorer inside a notebook: in Jupyter, in Colab, and in pages that are made of notebooks.

    The page is part of the cell's output: the notebook grows by its bytes. For many units, `write` a file.

    Args:
        units: as `render` takes them, as the texts and the settings.
        height: of the frame, in pixels.
    """
    return framed(render(units, texts, **settings), height)


def framed(html: str, height: int = 800) -> Piece:
    """A page in a frame of its own, whose style and script touch nothing around it.

    Args:
        html: from `render`.
        height: of the frame, in pixels.
    """
    from sae_lib.components import Piece  # here, because it brings matplotlib, which a file does not need

    return Piece(
        f'<iframe title="Explorer" style="width: 100%; height: {int(height)}px; border: 0" loading="lazy" '
        f'sandbox="allow-scripts allow-forms" srcdoc="{escape(html)}"></iframe>'
    )
