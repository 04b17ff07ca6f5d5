"""A made page of the explorer: units whose distances, trees and clusters are real, texts with tokens of every kind."""

import base64

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list

from sae_lib.explorer.page import PART_UNITS
from sae_lib.neuron_embeddings import central, cosine_distances, cut, proxies, tree

WORDS = (
    " the", " bank", " river", " money", " coin", " a", " number", " of", " people", " said", ",", ".", " and", " in",
    " market", " boat", " water", " loan", " she", " he", " sold", " counted", " five", " apples", " Monday", "\n",
    " x", " =", " (", ")", ":", " return", " def", "ing", "ed", "'s", " weiß", " Straße", " déjà", " река", " деньги",
    " 银行", "水", " بنك", " نهر", " शब्द", " 🐟", " não", " für", " élan",
)  # fmt: skip
HOSTILE = (
    "<script>document.title='run'</script>", "</script>", "<img src=x onerror=\"document.title='run'\">", "&lt;b&gt;",
    "<!--", "\0", "\x1b[31m", "\t", "\u202eturned", "\u2028", "\ufffd", "\ud83d", "", " ", "{{data}}", "\"'`\\",
)  # fmt: skip
VOCAB = WORDS + HOSTILE


def made_page(sizes=(48,), examples=60, documents=200, seed=0, length=48):
    """Index and parts for `sae_lib.explorer.page.page`, and each set's distances; unit 3 is dead, 4 quiet."""
    rng = np.random.default_rng(seed)
    texts = rng.choice(len(VOCAB), (documents, length), p=chances()).tolist()
    parts, sets, distances = {"explorer-documents": {"tokens": texts}}, [], []
    for number, n in enumerate(sizes):
        units = [made_unit(rng, unit, examples, texts) for unit in range(n)]
        distances.append([unit.pop("distances") for unit in units])
        for unit in units:
            unit["similar"] = {
                str(cluster): [[int(rng.integers(len(sizes))), 5 + j, 0, 0.9 - 0.1 * j] for j in range(8)]
                for cluster in range(unit["summary"]["clusters"] or 0)
            }
            if number == 1:
                unit["decoder_neighbours"] = [[7 + j, 0.8 - 0.05 * j] for j in range(8)]
                unit["absorption"] = [["b", 7, 0.34]] if unit["examples"] else []
        summaries = [unit.pop("summary") for unit in units]
        names = [f"explorer-part-{len(parts) - 1 + i}" for i in range(-(-n // PART_UNITS))]
        parts |= {name: units[PART_UNITS * i : PART_UNITS * (i + 1)] for i, name in enumerate(names)}
        sets.append(
            {
                "key": ("neurons-1", "topk")[number],
                "name": ("Neurons of layer 1", "TopK SAE of layer 1")[number],
                "kind": ("neurons", "latents")[number],
                "model": "pocket",
                "site": ("blocks.1.mlp.hook_in", "blocks.1.hook_resid_post")[number],
                "n": n,
                "threshold": 0.5,
                "at_least": 0.75,
                "facts": {"texts": f"{documents} made texts", "tokens": f"{documents * length:,}"},
                "summary": {name: [each[name] for each in summaries] for name in summaries[0]},
                "words": words(units, texts),
                "keys": [keys(unit, texts) for unit in units],
                "parts": names,
            }
        )
    return (
        {"title": "A made page", "version": 1, "vocab": list(VOCAB), "documents": "explorer-documents", "sets": sets},
        parts,
        distances,
    )


def chances():
    """Words are commoner than hostile tokens, earlier ones than later ones."""
    weights = np.concatenate([1 / np.arange(2, len(WORDS) + 2), np.full(len(HOSTILE), 0.02)])
    return weights / weights.sum()


def made_unit(rng, number, examples, texts):
    """One unit: a few directions with spread make its examples; everything else follows from them."""
    K = {3: 0, 4: 0, 5: 1, 6: 2}.get(number, int(rng.integers(10, examples + 1)))
    found = np.sort(rng.choice(len(texts), K, replace=False))
    kinds = int(rng.integers(1, 7))
    centres, kind = rng.standard_normal((kinds, 24)), np.minimum(rng.geometric(0.45, K) - 1, kinds - 1)
    h = centres[kind] + rng.uniform(0.25, 0.7) * rng.standard_normal((K, 24))
    d = cosine_distances(torch.tensor(h)) if K else np.zeros((0, 0))
    Z = tree(d) if K else np.empty((0, 4))
    labels = cut(Z) if K else np.zeros(0, int)
    maximum = 0.0 if number == 3 else float(rng.uniform(2, 9))
    positions = [position_of(rng, texts[document], kind[k]) for k, document in enumerate(found)]
    values = rng.uniform(0.75, 1, K) * maximum
    upper = d[np.triu_indices(K, 1)]
    largest = upper.max() if K > 1 else 0
    edges = np.linspace(0, maximum, 25)
    summary = {
        "frequency": 0.0 if number == 3 else float(10 ** rng.uniform(-4, -0.7)),
        "maximum": maximum,
        "examples": K,
    }
    of = (
        proxies(d, labels)
        if K
        else dict.fromkeys("clusters max_distance mean_distance intra_distance inter_distance".split())
    )
    of.pop("size", None)
    summary |= {name: None if value is None or np.isnan(value) else value for name, value in of.items()}
    summary["participation"] = float(rng.uniform(2, 60))
    windows, start = [], [max(0, position - 20) for position in positions]
    for k, (document, position) in enumerate(zip(found, positions, strict=True)):
        shares = rng.uniform(-0.5, 0.45, len(texts[document][start[k] : position + 11])).clip(0)
        shares[position - start[k]] = values[k] / maximum
        windows.append((255 * shares).round().astype(int).tolist())
    important = {int(each) for each in central(d, labels)} if K else set()
    importance = {}
    for k in sorted(important):
        row = rng.uniform(-0.6, 0.6, positions[k] - start[k] + 1).clip(0)
        row[-1] = 1
        importance[str(k)] = (255 * row).round().astype(int).tolist()
    counts = (5e4 * np.exp(-np.arange(24) / 2.5)).astype(int).tolist()
    closeness = (255 * upper / largest).round().astype(np.uint8).tobytes() if K > 1 else b""
    places = zip(found.tolist(), positions, values.tolist(), strict=True)
    logits = sorted(rng.normal(0, 1.5, len(VOCAB)).round(3).tolist())
    ids = rng.permutation(len(VOCAB)).tolist()
    return {
        "examples": [list(place) for place in places],
        "tree": [[int(a), int(b), float(height)] for a, b, height, _ in Z],
        "order": leaves_list(Z).tolist() if K > 1 else list(range(K)),
        "map": scaled(d).tolist(),
        "closeness": base64.b64encode(closeness).decode(),
        "windows": windows,
        "importance": importance,
        "histogram": {"edges": edges.tolist(), "counts": counts} if maximum else None,
        "promotes": [[ids[i], logits[-1 - i]] for i in range(10)],
        "suppresses": [[ids[10 + i], logits[i]] for i in range(10)],
        "summary": summary,
        "distances": d,
    }


def position_of(rng, text, kind):
    """Where an example's key token is: a word of its kind, if the text has one."""
    places = [i for i, token in enumerate(text) if token in (kind + 1, 3 * kind + 10, len(WORDS) + kind)]
    return int(rng.choice(places)) if places else int(rng.integers(len(text)))


def scaled(d):
    """Classical scaling to two dimensions, in the unit square."""
    if len(d) < 2:
        return np.full((len(d), 2), 0.5)
    centre = np.eye(len(d)) - 1 / len(d)
    values, vectors = np.linalg.eigh(-0.5 * centre @ d**2 @ centre)
    xy = vectors[:, -2:] * np.sqrt(values[-2:].clip(0))
    return (xy - xy.min(0)) / np.ptp(xy, 0).clip(1e-9)


def key_tokens(unit, texts):
    return [texts[document][position] for document, position, _ in unit["examples"]]


def keys(unit, texts):
    """The commonest key tokens, commonest first."""
    found = key_tokens(unit, texts)
    return sorted(set(found), key=lambda token: (-found.count(token), token))[:3]


def words(units, texts):
    """Units of each key token, those with most examples of it first."""
    counts = {}
    for number, unit in enumerate(units):
        for token in key_tokens(unit, texts):
            counts.setdefault(token, {}).setdefault(number, 0)
            counts[token][number] += 1
    return {str(token): sorted(of, key=lambda unit: (-of[unit], unit))[:50] for token, of in counts.items()}
