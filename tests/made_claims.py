"""Claims and rows of two SAEs, A and B, whose verdict can be worked out by hand."""

from datetime import date

from sae_lib.claims import checked, judge

PAPERS = {"topk": "TopK", "relu": "ReLU"}


def described(**changes) -> dict:
    """A claim as the file has it: the metric m of A, minus that of B, is above 0."""
    test = {"experiment": "topk/small", "metric": "m", "a": {"sae": "A"}, "b": {"sae": "B"}} | changes.pop("test", {})
    return {
        "id": "topk-1",
        "paper": "topk",
        "statement": "A is better than B.",
        "source": {"where": "Table 1", "known": "paper's body"},
        "prediction": "higher",
        "control": "The same steps.",
        "kind": "difference",
        "margin": 0,
        "scale": "pocket",
        "date": date(2026, 11, 22),
        "chapter": "topk",
        "test": {name: part for name, part in test.items() if part is not None},
    } | changes


def row(sae, seed, noise=0.0, **numbers) -> dict:
    return {
        "experiment": "small",
        "sae": sae,
        "seed": seed,
        "noise": dict.fromkeys(numbers, noise),
        "unmeasured": {},
    } | numbers


def pairs(*differences, **settings) -> list[dict]:
    """Rows of A and B, one pair a seed, whose m differs by so much."""
    rows = [row("A", seed, m=5.0 + by, l0=16.0, **settings) for seed, by in enumerate(differences)]
    return rows + [row("B", seed, m=5.0, l0=16.0, **settings) for seed in range(len(differences))]


def one(rows, **changes):
    (verdict,) = judge([checked(described(**changes), PAPERS)], lambda chapter, scale: rows)
    return verdict


def in_range(low, high, **test) -> dict:
    return {"kind": "range", "prediction": "within", "margin": [low, high], "test": test}


VALUE = {"statistic": "value", "b": None}
