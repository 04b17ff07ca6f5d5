"""CPython's own prose: language reference topics, docstrings and comments of the standard library, cleaned.

Real English by many hands, and every Python brings it along. It is extracted once, from the Python that builds the
texts, and shipped as records under the licence of the Python Software Foundation, which stands beside them
(``PSF-LICENSE.txt``). Chapter: ``pocket``.
"""

from __future__ import annotations

import ast
import io
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from sae_lib.pocket.marks import LIMIT

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
_SKIPPED = {"site-packages", "__pycache__", "lib2to3", "ensurepip", "pydoc_data"}
_FUNCTION_WORDS = frozenset(
    "the of to a is in and or if be for that with this not are by from it an on as can which will".split()
)


def reads_like_english(paragraph: str) -> bool:
    """At least eight words, of which 18% are function words, and 84% of the visible characters are letters."""
    words = re.findall("[A-Za-z]+", paragraph)
    if len(words) < 8:
        return False
    letters = sum(map(len, words)) / len(paragraph.replace(" ", ""))
    return letters > 0.84 and sum(word.lower() in _FUNCTION_WORDS for word in words) / len(words) > 0.18


def paragraphs(text: str) -> Iterator[str]:
    """The English paragraphs of a text, each in one line, without mark-up and characters beyond ASCII."""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = re.sub(r"[`*]+", "", " ".join(paragraph.split())).encode("ascii", "ignore").decode()
        if reads_like_english(paragraph):
            yield paragraph


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Blocks of comments on successive lines, with the line where each begins."""
    start, last, block = 0, -2, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        if line != last + 1:
            if block:
                yield start, "\n".join(block)
            start, block = line, []
        block.append(token.string.lstrip("#! ").rstrip())
        last = line
    if block:
        yield start, "\n".join(block)


def texts_of(source: str) -> list[str]:
    """Docstrings and comments of a Python source, in the order in which they stand; nothing if it does not parse."""
    try:
        tree, comments = ast.parse(source), list(_comments(source))
    except (SyntaxError, tokenize.TokenError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [
        (node.body[0].lineno, ast.get_docstring(node))
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node)
    ]
    return [text for _, text in sorted([*docstrings, *comments])]


def modules() -> Iterator[tuple[str, list[str]]]:
    """Name of each module of the standard library, and ``language`` for the language reference, with its paragraphs.

    A paragraph that occurs again, anywhere, is dropped.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()

    def fresh(texts: list[str]) -> list[str]:
        kept = []
        for text in texts:
            for paragraph in paragraphs(text):
                if paragraph not in seen:
                    seen.add(paragraph)
                    kept.append(paragraph)
        return kept

    for title in sorted(topics):
        yield "language", fresh([topics[title]])
    for path in sorted(STANDARD_LIBRARY.rglob("*.py")):
        parts = path.relative_to(STANDARD_LIBRARY).with_suffix("").parts
        if not _SKIPPED.intersection(parts):
            name = ".".join(part for part in parts if part != "__init__")
            yield name, fresh(texts_of(path.read_text(encoding="utf-8", errors="ignore")))


def documents(tokenizer: Tokenizer) -> Iterator[dict]:
    """Records of at most 127 tokens: successive sentences of one module, which is the ``topic``.

    Paragraphs stand on lines of their own. A sentence that is too long is dropped.
    """
    for name, texts in modules():
        pieces = [
            ("\n" if place == 0 else " ", sentence)
            for text in texts
            for place, sentence in enumerate(re.split(r"(?<=[.!?:]) +(?=[A-Z])", text))
        ]
        lengths = [
            len(encoding.ids) for encoding in tokenizer.encode_batch([s for _, s in pieces], add_special_tokens=False)
        ]
        record, room = "", LIMIT
        for (glue, sentence), size in zip(pieces, lengths, strict=True):
            size += glue == "\n"
            if size > LIMIT:
                continue
            if size > room:
                yield {"register": "prose", "marked": record, "topic": name}
                record, room = "", LIMIT
            record = record + glue + sentence if record else sentence
            room -= size
        if record:
            yield {"register": "prose", "marked": record, "topic": name}
