"""One HTML file that holds a whole explorer: its style, its script and its data; nothing is fetched.

What the file holds, in this order: the template's own few lines, ``explorer.css``, the *index* as plain JSON (names,
token texts, one number a unit for each measure), the *parts* (`PART_UNITS` units each, and the texts), and
the scripts. A part is JSON, compressed by gzip and written in base64: a browser opens it when one of its units is
first shown, so that a page of many units still opens at once. The same data give the same bytes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

from sae_lib.pocket.provenance import write_bytes

FOLDER = Path(__file__).parent
VERSION = 1
"""Of the data's shape."""
PART_UNITS = 32
"""Consecutive units of a set in one part."""
SCRIPTS = ("data.js", "drawings.js", "pane.js", "finder.js", "explorer.js")
"""Joined in this order: each uses names of those before it."""
MOST_BYTES = 15_000_000
"""Largest page that is written: what a browser opens from disk without effort."""
SIGN = b'id="explorer-index"'
"""What only a page of the explorer holds."""


def page(index: Mapping, parts: Mapping[str, object]) -> str:
    """The file's text; of the data every character is ASCII, whatever the tokens are.

    Args:
        index: title, vocabulary and sets, as `sae_lib.explorer.collect.contents` makes them.
        parts: the data that is opened later, by the name under which the index knows it.

    Raises:
        ValueError: if a number is not finite, or the index names other parts than are given.
    """
    named = [index["documents"], *(name for each in index["sets"] for name in each["parts"])]
    if sorted(named) != sorted(parts):
        missing, unnamed = sorted(set(named) - set(parts)), sorted(set(parts) - set(named))
        raise ValueError(f"the index must name each part once, got {missing} named alone and {unnamed} given alone")
    data = [f'<script type="application/json" id="explorer-index">{inert(as_json(index))}</script>']
    for name in named:
        data.append(f'<script type="application/octet-stream" id="{escape(name)}">{packed(parts[name])}</script>')
    style = (FOLDER / "explorer.css").read_text(encoding="utf-8")
    script = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    fills = {
        "title": escape(index["title"]).encode("ascii", "xmlcharrefreplace").decode(),
        "style": style,
        "script": script,
        "style_hash": fingerprint(style),
        "script_hash": fingerprint(script),
        "data": "\n".join(data),
    }
    template = (FOLDER / "explorer.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda marker: fills[marker[1]], template)


def write(html: str, path: str | Path, most: int = MOST_BYTES) -> Path:
    """Write a page, whole or not at all. An older page of the explorer there is replaced.

    Args:
        html: from `page`.
        path: the file.
        most: bytes that the page may have.

    Raises:
        ValueError: if the page is larger, the folder does not exist, or `path` holds something else.
    """
    path, content = free(path), html.encode()
    if len(content) > most:
        raise ValueError(
            f"a page must have at most {most / 1e6:.1f} MB, so that it opens at once, got {len(content) / 1e6:.1f} MB: "
            "ask for fewer examples a unit, fewer texts, or one set instead of two"
        )
    write_bytes(path, content)
    return path


def free(path: str | Path) -> Path:
    """`path`, if a page can be written there.

    Raises:
        ValueError: if its folder does not exist, or it holds something other than a page of the explorer.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"the folder of a page must exist, got {path}: make {path.parent} first")
    if path.exists() and not (path.is_file() and SIGN in path.read_bytes()):
        raise ValueError(
            f"path must be new or an explorer's page, got {path}, which holds something else: take another"
        )
    return path


def sizes(html: str) -> dict[str, int]:
    """Bytes of a page by what they hold: ``all``, ``index``, ``documents``, ``units``, and ``page`` itself."""
    held = {"index": 0, "documents": 0, "units": 0}
    for name, content in re.findall(r'<script type="application/[\w-]+" id="([^"]+)">([^<]*)</script>', html):
        kind = name.removeprefix("explorer-")
        held[kind if kind in held else "units"] += len(content)
    everything = len(html.encode())
    return {"all": everything, **held, "page": everything - sum(held.values())}


def as_json(content: object) -> str:
    """JSON without spaces; what is not ASCII, and every half of a surrogate pair, is written as ``\\uXXXX``."""
    try:
        return json.dumps(content, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise ValueError("numbers of a page must be finite; write None where a value is undefined") from error


def fingerprint(text: str) -> str:
    """What a page's Content-Security-Policy names its own style and script by, so that no other is applied or run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def inert(text: str) -> str:
    """JSON that no HTML parser takes for anything else."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(content: object) -> str:
    """Base64 of gzip of JSON, without the time at which it was made."""
    return base64.b64encode(gzip.compress(as_json(content).encode(), 9, mtime=0)).decode()
