"""The tokenizer: WordPiece with a chosen vocabulary of 6,144 entries, saved as an ordinary Hugging Face tokenizer.

Every word of the generator and the most frequent words of the prose are one token wherever they stand, for spaces are
not tokens; so a word has one position in a prompt, and its letter is nowhere to be read. Digits and punctuation stand
alone, a newline is a token, other words are cut into the longest known pieces. Like Gemma's, it puts ``<|bos|>`` in
front unless told not to. A character outside printable ASCII and the letters of French, German and Spanish becomes
``<unk>``; the project's texts have none. Chapter: ``pocket``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sae_lib.pocket.provenance import write_json

VOCABULARY = 6_144
PIECES = 350  # word pieces of two letters and more
SPECIAL = ["<|bos|>", "<|pad|>", "<unk>"]
ACCENTED = "áéíóúñüäößçèàêâîôûëï¿¡"
CONTEXT = 128


def _words(texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"[^\W\d_]+", text))
    return counts


def choose_vocabulary(required: Iterable[str], prose: Iterable[str]) -> list[str]:
    """Special tokens, characters, words that must be whole, frequent words of the prose, and pieces for the others.

    Args:
        required: generated texts and words; every word in them gets a token.
        prose: texts whose most frequent words fill the rest.
    """
    characters = [chr(code) for code in range(33, 127)] + list(ACCENTED)
    letters = [character for character in characters if character.isalpha()]
    chosen = [*SPECIAL, "\n", *characters, *("##" + letter for letter in letters)]
    whole = sorted(word for word in _words(required) if len(word) > 1)
    counts = _words(prose)
    by_frequency = sorted(counts, key=lambda word: (-counts[word], word))
    frequent = [word for word in by_frequency if len(word) > 1 and word not in set(whole)]
    room = VOCABULARY - len(chosen) - len(whole) - PIECES
    if room < 0:
        raise ValueError(
            f"the vocabulary has {VOCABULARY} entries, but {VOCABULARY - room} are required; ask for fewer words"
        )
    pieces: Counter[str] = Counter()
    for word in frequent[room:]:
        for start in range(1, len(word)):
            for end in range(start + 2, min(start + 6, len(word)) + 1):
                pieces[word[start:end]] += counts[word] * (end - start - 1)
    best = sorted(pieces, key=lambda piece: (-pieces[piece], piece))[:PIECES]
    return chosen + whole + frequent[:room] + ["##" + piece for piece in best]


def build(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer over a chosen vocabulary; the place of an entry is its id."""
    ids = {token: place for place, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(
        models.WordPiece(ids, unk_token="<unk>", continuing_subword_prefix="##", max_input_chars_per_word=100)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", ids["<|bos|>"])]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|bos|>",
        pad_token="<|pad|>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        padding_side="right",
    )


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary Hugging Face tokenizer, under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    write_json(config, json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"})
