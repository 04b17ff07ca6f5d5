"""The ledger as a page: every claim with where it was seen, our test, the effect and the verdict, in one table.

Plain HTML that a reader can filter by paper and verdict; see `sae_lib.components`. Chapter `claims`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from html import escape

from sae_lib.claims import FEWEST, POWER, WORDS, Claim, Verdict
from sae_lib.components import Piece, piece

SIGNS = {"holds": "✓", "fails": "✗", "inconclusive": "≈", "not run": "○"}
"""Beside its word and its colour, each verdict has a sign of its own."""
WIDTH, HEIGHT, MARGIN = 176, 30, 6
"""Of the picture of an effect, in pixels; the margin is what its marks need at both ends."""


def ledger(verdicts: Sequence[Verdict], papers: Mapping[str, str], chapters: Collection[str] = ()) -> Piece:
    """The table of all claims, with a filter by paper and verdict. Chapter `claims`.

    Args:
        verdicts: in the order in which they are shown, those of a paper together.
        papers: the name of each paper.
        chapters: those that exist; a claim of one of them links to its page.

    Raises:
        ValueError: a claim is of a paper without a name.
    """
    if nameless := {verdict.claim.paper for verdict in verdicts} - set(papers):
        raise ValueError(f"papers must name each paper, got no name for {', '.join(sorted(nameless))}")
    groups = {paper: [verdict for verdict in verdicts if verdict.claim.paper == paper] for paper in papers}
    counts = Counter(verdict.word for verdict in verdicts)
    choices = "".join(
        f'<label class="{slug(word)}"><input type="radio" name="verdict" value="{word}"> '
        f"{mark(word)} <b>{counts[word]}</b></label>"
        for word in WORDS
    )
    options = "".join(
        f'<option value="{escape(paper)}">{escape(papers[paper])} ({len(group)})</option>'
        for paper, group in groups.items()
        if group
    )
    bodies = "".join(
        f'<tbody role="rowgroup" data-paper="{escape(paper)}"><tr role="row" class="paper">'
        f'<th role="rowheader" scope="rowgroup" colspan="4">{escape(papers[paper])}</th></tr>'
        f"{''.join(line(verdict, chapters) for verdict in group)}</tbody>"
        for paper, group in groups.items()
        if group
    )
    heads = "".join(
        f'<th role="columnheader" scope="col">{name}</th>' for name in ("Claim", "Our test", "Effect", "Verdict")
    )
    return piece(
        "ledger",
        f"""<form><fieldset><legend>Verdict</legend>
<label><input type="radio" name="verdict" value="" checked> all <b>{len(verdicts)}</b></label>{choices}</fieldset>
<label>Paper <select name="paper"><option value="">all papers</option>{options}</select></label></form>
<p class="said" role="status">{len(verdicts)} of {len(verdicts)} claims are shown.</p>
<table role="table"><caption class="unseen">All claims</caption>
<thead role="rowgroup"><tr role="row">{heads}</tr></thead>{bodies}</table>""",
        {},
    )


def line(verdict: Verdict, chapters: Collection[str]) -> str:
    """One claim as a row."""
    claim = verdict.claim
    name = escape(claim.id)
    chapter = escape(claim.chapter)
    link = f'<a href="{chapter}.html">{chapter}</a>' if claim.chapter in chapters else f"{chapter} (no chapter yet)"
    about = (
        f"<strong>{escape(claim.statement)}</strong>"
        f"<small>Seen: {escape(claim.source['known'])}; {escape(claim.source['where'])}.</small>"
        f'<small><a class="own" href="#claim-{name}">{name}</a> · {claim.date:%Y-%m-%d} · chapter {link}</small>'
    )
    test = (
        f"{in_words(claim)}<small>Control: {escape(claim.control)}</small>"
        f"<small>{escape(claim.kind)} · scale {escape(claim.scale)}</small>"
    )
    why = f"<small>{escape(verdict.reason)}</small>" if verdict.reason else ""
    if verdict.word == "not run":
        why += f"<small><code>{escape(claim.command)}</code></small>"
    if verdict.word == "inconclusive" and verdict.detectable is not None:
        why += f"<small>{POWER:.0%} of such experiments would have detected {verdict.detectable:.2g}</small>"
    cells = [
        ("Our test", test),
        ("Effect", effect(verdict)),
        ("Verdict", f'<span class="verdict {slug(verdict.word)}">{mark(verdict.word)}</span>{why}'),
    ]
    return (
        f'<tr role="row" id="claim-{name}" data-verdict="{verdict.word}"><th role="rowheader" scope="row">{about}</th>'
        + "".join(f'<td role="cell" data-label="{label}">{content}</td>' for label, content in cells)
        + "</tr>"
    )


def slug(word: str) -> str:
    return word.replace(" ", "-")


def mark(word: str) -> str:
    return f'<span aria-hidden="true">{SIGNS[word]}</span> {word}'


# A test in words ------------------------------------------------------------------------------------------------------


def in_words(claim: Claim) -> str:
    """What is compared, where, and which effects the claim allows, as HTML."""
    test, metric = claim.test, claim.test.get("metric")
    parts = [arm(test[which], metric) for which in "ab" if which in test]
    over = escape(", ".join(test["saes"])) if "saes" in test else "all SAEs"
    compared = {
        "difference": " − ".join(parts),
        "ratio": " ÷ ".join(parts),
        "value": parts[0] if parts else "",
        "spread": f"distance from the median over seeds: {' − '.join(parts)}",
        "at_equal_l0": f"{' − '.join(parts)}, read off at L0 {test.get('l0')}",
        "rank_correlation": f"rank correlation of {' and '.join(code(name) for name in metric or ())}, over {over}",
        "reliability": f"reliability of {code(str(metric))} over {over}",
    }[claim.statistic]
    if isinstance(metric, str) and parts:
        compared = f"{code(metric)}: {compared}"
    if "beyond" in test:
        compared += f", minus the same at {settings(test['beyond'])}"
    where = f"; {settings(test['where'])}" if test.get("where") else ""
    equal = f"; at equal {escape(', '.join(test['equal']))}" if "equal" in test else ""
    return f"{compared}; {code(test['experiment'])}{where}{equal}. The claim: {allowed(claim)}."


def arm(chosen: Mapping[str, object], metric: object) -> str:
    own = {name: value for name, value in chosen.items() if name not in ("sae", "metric")}
    named = f"{code(str(chosen['metric']))} of " if "metric" in chosen and chosen["metric"] != metric else ""
    return f"{named}{escape(str(chosen['sae']))}{f' at {settings(own)}' if own else ''}"


def settings(chosen: Mapping[str, object]) -> str:
    return escape(", ".join(f"{name} {value}" for name, value in chosen.items()))


def code(name: str) -> str:
    return f"<code>{escape(name)}</code>"


def allowed(claim: Claim) -> str:
    low, high = claim.region
    if claim.kind == "identity":
        return "equal in every seed, to the last bit"
    if math.isinf(high):
        return f"above {shown(low)}"
    return f"below {shown(high)}" if math.isinf(low) else f"{shown(low)} to {shown(high)}"


# An effect in numbers and as a picture --------------------------------------------------------------------------------


def effect(verdict: Verdict) -> str:
    """Mean and interval, every seed with its sign, and the picture of them, as HTML."""
    if verdict.mean is None:
        return '<span class="none">none</span>'
    signed = verdict.claim.statistic not in ("value", "ratio")
    n = len(verdict.effects)
    seeds = " ".join(shown(value, signed) for value in verdict.effects.values())
    said = f"<b>{shown(verdict.mean, signed)}</b>"
    if verdict.interval is not None:
        bottom, top = (shown(end, signed) for end in verdict.interval)
        said = f"{picture(verdict)}{said} [{bottom}, {top}]<small>{1 - verdict.alpha:.1%} interval, n = {n}</small>"
    else:
        said += f"<small>no interval, n = {n}{f' of {FEWEST} needed' if n < FEWEST else ''}</small>"
    return f"{said}<small>seed by seed: {seeds}</small>"


def shown(number: float, signed: bool = False) -> str:
    """Three digits, with a true minus sign."""
    return f"{number:{'+' if signed else ''}.3g}".replace("-", "−")


def picture(verdict: Verdict) -> str:
    """The interval over the region where the claim is true, with a line at its ends and at zero, and a mark a seed."""
    region, seeds = verdict.claim.region, list(verdict.effects.values())
    two_sided = "b" in verdict.claim.test
    lines = [verdict.claim.neutral] if two_sided else []
    ends = [end for end in region if math.isfinite(end)]
    low, high = (pick([*verdict.interval, *seeds, *lines, *ends]) for pick in (min, max))
    span = high - low or 1.0

    def x(number: float) -> float:
        place = (min(max(number, low), high) - low) / span
        at_edge = {-math.inf: 0.0, math.inf: float(WIDTH)}
        return at_edge.get(number, MARGIN + place * (WIDTH - 2 * MARGIN))

    left, right, bottom, top = (x(number) for number in (*region, *verdict.interval))
    marks = "".join(f'<path class="seed" d="M{x(seed):.1f} 19v7"/>' for seed in seeds)
    edges = "".join(f'<path class="end" d="M{x(end):.1f} 0v{HEIGHT}"/>' for end in ends)
    zero = "".join(f'<path class="zero" d="M{x(line):.1f} 0v{HEIGHT}"/>' for line in lines)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" aria-hidden="true">'
        f'<rect class="region" x="{left:.1f}" y="0" width="{right - left:.1f}" height="{HEIGHT}"/>{edges}{zero}'
        f'<path class="interval" d="M{bottom:.1f} 10H{top:.1f}"/><circle cx="{x(verdict.mean):.1f}" cy="10" r="4"/>'
        f"{marks}</svg>"
    )
