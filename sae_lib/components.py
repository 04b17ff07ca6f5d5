"""Pieces of a page that move for every reader: plain HTML with its own style and script, nothing fetched.

Each function returns a `Piece`, a string that notebooks show as HTML. All text is escaped. Colours are laid over the
page's own ink and paper, so that a piece is legible on a light and on a dark page. Everything works by mouse, touch,
keyboard and screen reader; without JavaScript the first state stands still.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from sae_lib.metrics.polysemanticity import top_examples
from sae_lib.selection import above, top_of_batch, top_of_rows
from sae_lib.sparse import Code

MOST = 30
"""Largest number of tokens and of latents in a picture: more is no longer a picture."""


class Piece(str):
    """HTML that a notebook shows as such."""

    def _repr_html_(self) -> str:
        return str(self)


# Which pairs live ----------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """A selection rule, as `selection_picture` shows it.

    Attributes:
        name: what the reader chooses.
        who_lives: the rule in a sentence.
        knob: what the slider turns, or "" for a rule without a setting.
        levels: the slider's positions.
        select: the rule itself, of scores (tokens, latents) and a level.
    """

    name: str
    who_lives: str
    knob: str
    levels: Sequence[float | int]
    select: Callable[[Float[Tensor, "tokens latents"], float], Code]


def above_share(scores: Float[Tensor, "tokens latents"], share: float) -> Code:
    """Each latent's threshold is a share of its largest score: a stand-in for thresholds that are learned."""
    return above(scores, share * scores.amax(0))


def top_of_columns(scores: Float[Tensor, "tokens latents"], m: int) -> Code:
    """The m largest scores of each column that are positive."""
    code = top_of_rows(scores.T, m)
    order = code.cols.argsort(stable=True)
    return Code(code.cols[order], code.rows[order], code.values[order], tuple(scores.shape))


RULES = (
    Rule("ReLU", "Every pair with a positive score.", "", (0,), lambda scores, _: above(scores, torch.zeros(()))),
    Rule(
        "JumpReLU, Gated",
        "Pairs above a threshold of their latent. It is learned; here it is a share of the latent’s largest score.",
        "share",
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        above_share,
    ),
    Rule("TopK", "The k best latents of each token.", "k", (1, 2, 3, 4, 5, 6), top_of_rows),
    Rule(
        "BatchTopK = Mutual Choice",
        "The best pairs of the whole batch, k a token on average.",
        "k",
        (1, 2, 3, 4, 5, 6),
        top_of_batch,
    ),
    Rule(
        "Feature Choice",
        "The m best tokens of each latent; here m is the same for all latents.",
        "m",
        (1, 2, 3, 4, 5, 6),
        top_of_columns,
    ),
)
"""The rules of the baselines and of the choice paper; a chapter adds its own: ``(*RULES, Rule(...))``."""


def selection_picture(
    scores: Float[Tensor, "..."],
    tokens: Sequence[str] | None = None,
    truth: Bool[Tensor, "..."] | None = None,
    rules: Sequence[Rule] = RULES,
    rule: str = "TopK",
    level: float | int = 2,
) -> Piece:
    """A small matrix of tokens by latents, in which the reader switches the rule and sees which pairs live.

    Chapter `index`.

    Args:
        scores: (tokens, latents), what the encoder gives each pair.
        tokens: a name for each row.
        truth: (tokens, latents), pairs whose feature is really there, marked with a dot and counted.
        rules: what the reader can choose from.
        rule: name of the one shown first.
        level: where its slider stands first.

    Raises:
        ValueError: if a shape does not fit, the matrix is too large for a picture, a score is not finite, no rule has
            the name `rule`, `level` is not one of its levels, or a rule cannot select from such a matrix.
    """
    if scores.ndim != 2 or not 1 <= min(scores.shape) <= max(scores.shape) <= MOST:
        raise ValueError(f"scores must have shape (tokens, latents), each from 1 to {MOST}, got {tuple(scores.shape)}")
    if not torch.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got {int((~torch.isfinite(scores)).sum())} entries that are not")
    scores = scores.detach().float().cpu()
    n_tokens, n_latents = scores.shape
    tokens = [f"token {i + 1}" for i in range(n_tokens)] if tokens is None else [str(token) for token in tokens]
    if len(tokens) != n_tokens:
        raise ValueError(f"tokens must name each of the {n_tokens} rows of scores, got {len(tokens)}")
    if truth is not None and truth.shape != scores.shape:
        raise ValueError(f"truth must have the shape of scores, {tuple(scores.shape)}, got {tuple(truth.shape)}")
    truth = None if truth is None else truth.bool().cpu()
    names = [each.name for each in rules]
    if rule not in names:
        raise ValueError(f"rule must be one of {names}, got {rule!r}")
    first = names.index(rule)
    if level not in rules[first].levels:
        raise ValueError(f"level must be one of {tuple(rules[first].levels)}, the levels of {rule!r}, got {level}")

    data = {"rules": [described(each, scores, truth) for each in rules]}
    position = list(rules[first].levels).index(level)
    state = data["rules"][first]["states"][position]
    choices = "".join(
        f'<label><input type="radio" name="rule" value="{i}"{" checked" if i == first else ""}> {escape(name)}</label>'
        for i, name in enumerate(names)
    )
    strength = scores.clamp(min=0) / scores.max().clamp(min=torch.finfo(scores.dtype).tiny)
    rows = []
    for i, token in enumerate(tokens):
        cells = []
        for j in range(n_latents):
            alive = state["alive"][i * n_latents + j] == "1"
            there = truth is not None and bool(truth[i, j])
            look = "pair" + " alive" * alive + " there" * there
            cells.append(
                f'<td class="{look}" style="--s:{strength[i, j]:.2f}"><span class="score">{scores[i, j]:z.1f}</span>'
                f'<span class="unseen"> <span>{"lives" * alive}</span>{" true" * there}</span></td>'
            )
        cells = "".join(cells)
        rows.append(f'<tr><th scope="row">{shown(token)}</th>{cells}<td class="count">{state["rows"][i]}</td></tr>')
    heads = "".join(f'<th scope="col"><span class="unseen">latent </span>{j + 1}</th>' for j in range(n_latents))
    feet = "".join(f'<td class="count">{count}</td>' for count in state["columns"])
    dots = "; a dot marks the pairs whose feature is really there" if truth is not None else ""
    return piece(
        "selection",
        f"""<form><fieldset><legend>Who lives?</legend>{choices}</fieldset>
<p class="who">{escape(rules[first].who_lives)}</p>
<label class="knob"{" hidden" if not rules[first].knob else ""}><span>{escape(rules[first].knob)}</span>
<input type="range" min="0" max="{len(rules[first].levels) - 1}" value="{position}" step="1"
 aria-valuetext="{state["level"]}"><output>{state["level"]}</output></label></form>
<div class="frame"><table><caption>One row a token, one column a latent; blue pairs live{dots}.</caption>
<thead><tr><td></td>{heads}<th scope="col" class="count">L0</th></tr></thead><tbody>{"".join(rows)}</tbody>
<tfoot><tr><th scope="row">tokens</th>{feet}<td></td></tr></tfoot></table></div>
<p class="said" role="status">{escape(state["said"])}</p>""",
        data,
    )


def described(
    rule: Rule, scores: Float[Tensor, "tokens latents"], truth: Bool[Tensor, "tokens latents"] | None
) -> dict:
    """The rule's outcome at each of its levels: the page shows outcomes, so that a rule is written once, in Python."""
    states = []
    for level in rule.levels:
        try:
            alive = rule.select(scores, level).dense() > 0
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"rule {rule.name!r} must be able to select with {rule.knob} = {level}, got scores of shape "
                f"{tuple(scores.shape)}; give it other levels, or a larger matrix"
            ) from error
        pairs = int(alive.sum())
        said = f"{pairs} of {alive.numel()} pairs live: {pairs / len(alive):.1f} a token on average (the mean L0)."
        if truth is not None:
            found = int((alive & truth).sum())
            said += f" They hold {found} of the {int(truth.sum())} true pairs, and {pairs - found} false ones."
        states.append(
            {
                "level": f"{level:g}",
                "alive": "".join("01"[live] for live in alive.flatten().tolist()),
                "rows": alive.sum(1).tolist(),
                "columns": alive.sum(0).tolist(),
                "said": said,
            }
        )
    return {"who": rule.who_lives, "knob": rule.knob, "states": states}


# Highlighted text ----------------------------------------------------------------------------------------------------


def token_text(
    tokens: Sequence[Sequence[str]],
    values: Sequence[Sequence[float]] | Sequence[Tensor],
    captions: Sequence[str] | None = None,
    value_label: str = "activation",
) -> Piece:
    """Texts whose tokens are coloured by a number, on one scale; pointing at a token, or arrow keys, tell the number.

    Chapter `polysemanticity`.

    Args:
        tokens: the tokens of each example, spaces included.
        values: a number for each token; negative ones get another colour.
        captions: a line above each example.
        value_label: what the number is, with its unit.

    Raises:
        ValueError: if there is no example, one has as many values as tokens not, or a value is not finite.
    """
    if isinstance(tokens, str) or not len(tokens) or any(isinstance(example, str) for example in tokens):
        raise ValueError("tokens must be a list of examples, each a list of strings; put a single example into a list")
    numbers = [[float(value) for value in example] for example in values]
    if [len(example) for example in numbers] != [len(example) for example in tokens]:
        got = f"{[len(example) for example in tokens]} tokens and {[len(example) for example in numbers]} values"
        raise ValueError(f"each example must have one value a token, got {got}")
    if captions is not None and len(captions) != len(tokens):
        raise ValueError(f"captions must name each of the {len(tokens)} examples, got {len(captions)}")
    if not all(math.isfinite(value) for example in numbers for value in example):
        raise ValueError("values must be finite, got NaN or infinity; mask those tokens with 0")
    largest = max((abs(value) for example in numbers for value in example), default=0.0)
    negative = any(value < 0 for example in numbers for value in example)

    parts = []
    for i, (words, row) in enumerate(zip(tokens, numbers, strict=True)):
        spans = "".join(
            f'<span data-value="{value:.3g}" class="{"down" if value < 0 else "up" if value else "none"}"'
            f' style="--s:{abs(value) / (largest or 1):.2f}">{shown(word)}</span>'
            for word, value in zip(words, row, strict=True)
        )
        strongest = sorted(zip(row, words, strict=True), key=lambda pair: -abs(pair[0]))[:3]
        told = f"Example {i + 1}; strongest: " + ", ".join(f"{word.strip()} {value:.3g}" for value, word in strongest)
        caption = f"<figcaption>{escape(captions[i])}</figcaption>" if captions is not None else ""
        text = f'<p class="text" tabindex="0" role="group" aria-label="{escape(told)}">{spans}</p>'
        parts.append(f"<figure>{caption}{text}</figure>")
    scale = f"<span>{-largest if negative else 0:.3g}</span><i></i><span>{largest:.3g}</span> {escape(value_label)}"
    scale = f'<p class="scale{" both" * negative}">{scale}</p>'
    return piece("text", f'{scale}{"".join(parts)}<p class="unseen" role="status"></p>', {"label": value_label})


def unit_text(
    activations: Float[Tensor, "tokens units"],
    units: Sequence[int],
    words: Sequence[str],
    documents: Int[Tensor, " tokens"],
    captions: Sequence[str],
    most: int = 3,
    around: int = 8,
) -> Piece:
    """The tokens on which each unit is most active, one a document, with what stands around them. Chapter `relu`.

    Args:
        activations: of neurons or latents on all tokens.
        units: which of them to show, in this order.
        words: the token of each row of `activations`.
        documents: the number of each token's document; the tokens of a document stand together.
        captions: what to say of each document; the unit and how often it is active stand before it.
        most: examples a unit, at least 1.
        around: tokens shown on either side, of the same document.

    Raises:
        ValueError: if no unit is active, or shapes do not fit.
    """
    if len(words) != len(activations):
        raise ValueError(f"words must name each of the {len(activations)} tokens, got {len(words)}")
    examples = top_examples(activations[:, list(units)], documents, threshold=0, most=most).tolist()
    shown = [(unit, place) for unit, places in zip(units, examples, strict=True) for place in places if place >= 0]
    tokens, values, lines = [], [], []
    for unit, place in shown:
        near = range(max(0, place - around), min(len(words), place + around + 1))
        near = [i for i in near if documents[i] == documents[place]]
        tokens.append([f"{words[i]} " for i in near])
        values.append(activations[near, unit] / activations[:, unit].max())
        often = (activations[:, unit] > 0).float().mean()
        lines.append(f"{unit}, on {often:.2%} of tokens: {captions[documents[place]]}")
    return token_text(tokens, values, lines, value_label="share of the unit's largest activation")


# A knob that turns through figures ------------------------------------------------------------------------------------


def slider(figures: Mapping[str, Figure], label: str, start: str, alt: str) -> Piece:
    """A slider that shows one of several finished figures; they are closed. Chapter `relu`.

    Args:
        figures: the slider's positions, in order, each with its matplotlib figure, all of one size.
        label: what the slider turns, with its unit.
        start: the position shown first, and the one that stands still without JavaScript.
        alt: what the figures show, for those who cannot see them.

    Raises:
        ValueError: if there are fewer than two figures, or `start` is not one of the positions.
    """
    if len(figures) < 2 or start not in figures:
        raise ValueError(f"start must be one of at least two positions, got {start!r} and {list(figures)}")
    images = []
    for position, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="webp", dpi=160, bbox_inches=figure.bbox_inches, pil_kwargs={"quality": 85})
        plt.close(figure)
        images.append(
            f'<img src="data:image/webp;base64,{base64.b64encode(picture.getvalue()).decode()}"'
            f' alt="{escape(f"{label} {position}: {alt}")}"{"" if position == start else " hidden"}>'
        )
    return piece(
        "slider",
        f"""<label class="knob"><span>{escape(label)}</span>
<input type="range" min="0" max="{len(figures) - 1}" value="{list(figures).index(start)}" step="1"
 aria-valuetext="{escape(start)}"><output>{escape(start)}</output></label>
{"".join(images)}""",
        {"positions": list(figures)},
    )


# What all are made of ------------------------------------------------------------------------------------------------


def shown(token: str) -> str:
    """The token as HTML, with line breaks and tabs made visible."""
    return escape(token).replace("\n", "↵").replace("\t", "⇥")


def piece(kind: str, body: str, data: dict) -> Piece:
    """The body with the style and the script of all pieces; the same piece twice on a page works twice."""
    packed = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Piece(
        f'<div class="sae-piece sae-{kind}" data-kind="{kind}"><style>{asset("components.css")}</style>{body}'
        f'<script type="application/json">{packed}</script><script>{asset("components.js")}</script></div>'
    )


@cache
def asset(name: str) -> str:
    """A text file of the folder ``assets``."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")
