"""The three splits of texts: made once, then shipped and frozen.

``texts/{train,validation,test}.jsonl.xz`` hold one document a line, its text with marks; ``data.load_texts`` reads
them. Beside them stand ``words.json`` (the spelling words of each split), the licence of the prose, and where all of
it comes from. Chapter: ``pocket``.
"""

from __future__ import annotations

import json
import lzma
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from sae_lib.pocket import grammar, lexicon, prose, spelling, tokenizer
from sae_lib.pocket.dice import Dice
from sae_lib.pocket.marks import LIMIT, length, plain
from sae_lib.pocket.provenance import commit, sha256, write_bytes, write_json

SPLITS = ("train", "validation", "test")
GENERATED_TOKENS = {"train": 1_450_000, "validation": 75_000, "test": 75_000}
SPELLING_TOKENS = {"train": 350_000, "validation": 30_000, "test": 30_000}
HELD_OUT_PROSE = 0.06  # share of the prose in validation, and again in test

ATTRIBUTION = """The records of the register "prose" are taken from the documentation, docstrings and comments
of CPython {version}, shortened and cleaned. Copyright (c) 2001 and later, Python Software Foundation;
all rights reserved. They are used and passed on under the licence below. All other texts are made by
this project's generator and stand under the project's licence.

"""


def _some(draw: Callable[..., dict], arguments: tuple, tokens: int, unwanted: set[str]) -> Iterator[dict]:
    """Documents until their tokens add up; none whose text is in ``unwanted``."""
    while tokens > 0:
        document = draw(*arguments)
        if document["marked"] not in unwanted:
            tokens -= length(document["marked"])
            yield document


def _licence() -> str:
    for folder in (prose.STANDARD_LIBRARY, *prose.STANDARD_LIBRARY.parents):
        if (folder / "LICENSE.txt").exists():
            return (folder / "LICENSE.txt").read_text(encoding="utf-8")
    raise FileNotFoundError(
        f"LICENSE.txt of Python must stand in or above {prose.STANDARD_LIBRARY}; take a Python that ships it"
    )


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    dice = Dice(f"{seed} vocabulary")
    generated = [plain(grammar.document(dice)["marked"]) for _ in range(10_000)]
    spelled = [spelling.LINES[form](dice, lexicon.DAYS) for form in spelling.FORMS]
    paragraphs = [paragraph for _, texts in prose.modules() for paragraph in texts]
    return tokenizer.build(
        tokenizer.choose_vocabulary([*lexicon.words(), *generated, *map(plain, spelled)], paragraphs)
    )


def make_texts(folder: Path, tokens: PreTrainedTokenizerFast, seed: int) -> None:
    """Write the splits, their words, licence and provenance into a folder.

    Raises:
        ValueError: a document does not fit into the context, or has a character without a token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = spelling.split_words(tokens.get_vocab())
    write_json(folder / "words.json", words)
    pages = Dice(f"{seed} prose").shuffled(list(prose.documents(tokens.backend_tokenizer)))
    held_out = int(len(pages) * HELD_OUT_PROSE)
    pages = {"validation": pages[:held_out], "test": pages[held_out : 2 * held_out], "train": pages[2 * held_out :]}
    seen: set[str] = set()
    counts = {}
    for split in SPLITS:
        dice = Dice(f"{seed} {split}")
        documents = [
            *_some(grammar.document, (dice,), GENERATED_TOKENS[split], seen),
            *_some(spelling.document, (dice, words[split]), SPELLING_TOKENS[split], seen),
            *pages[split],
        ]
        seen |= {document["marked"] for document in documents}
        counts[split] = _count(documents, tokens)
        lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in dice.shuffled(documents))
        write_bytes(folder / f"{split}.jsonl.xz", lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
    notice = ATTRIBUTION.format(version=platform.python_version()) + _licence()
    write_bytes(folder / "PSF-LICENSE.txt", notice.encode())
    write_json(
        folder / "provenance.json",
        {
            "commit": commit(),
            "seed": seed,
            "python": platform.python_version(),
            "tokens": counts,
            "words": {split: len(members) for split, members in words.items()},
            "sha256": {path.name: sha256(path) for path in sorted(folder.glob("*.xz"))},
            "licence": "prose: PSF-2.0 (PSF-LICENSE.txt); all else: MIT",
        },
    )


def _count(documents: list[dict], tokens: PreTrainedTokenizerFast) -> dict[str, int]:
    """Tokens in each register, after a check of every document."""
    counts: dict[str, int] = {}
    texts = [plain(document["marked"]) for document in documents]
    for document, encoding in zip(
        documents, tokens.backend_tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        if not 0 < len(encoding.ids) <= LIMIT or tokens.unk_token_id in encoding.ids:
            raise ValueError(f"a document must have 1 to {LIMIT} known tokens, got {len(encoding.ids)}: {document}")
        counts[document["register"]] = counts.get(document["register"], 0) + len(encoding.ids)
    return counts
