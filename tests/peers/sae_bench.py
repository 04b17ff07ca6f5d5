"""What sae-bench computes: its own functions on seeded inputs, both written to a file that `peers.parity` reads.

    <its environment>/bin/python -m peers.sae_bench <file>

Its probes are trained from random weights in random order; here their weights are inputs like all others, and training
is seen once, in a single batch and from the weights that ours begins with. A tensor of the file is named after its part
and the argument, or after what sae-bench calls the result.
"""

from __future__ import annotations

import os
import sys
from unittest.mock import patch

os.environ["JAXTYPING_DISABLE"] = "1"  # its annotations contradict each other: "train_dataset_size" has two sizes

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sae_bench.evals.absorption import feature_absorption, k_sparse_probing, probing
from sae_bench.evals.absorption import feature_absorption_calculator as calculator
from sae_bench.evals.absorption import main as absorption_main
from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.sparse_probing import probe_training
from sae_bench.sae_bench_utils import activation_collection
from torch import Tensor

from peers.stand_ins import Known, Model, Texts, floats, results, save

LETTERS = "abcdefghijklmnopqrstuvwxyz"
KS = (1, 2, 5)
MOST = 4
"""Up to how many latents a k-sparse probe reads."""


def probes_of(weights: Tensor) -> probing.LinearProbe:
    """Its probes, a row each, with these weights and without biases."""
    probe = probing.LinearProbe(weights.shape[1], len(weights))
    probe.fc.weight.data, probe.fc.bias.data = weights.clone(), torch.zeros(len(weights))
    return probe


# Absorption ----------------------------------------------------------------------------------------------------------


def absorption(random: np.random.Generator) -> dict[str, Tensor]:
    """Fraction and full, of words made for each case of the definition and of random ones, for three letters.

    Each letter has a probe, and latents at the given cosines from it: two main ones, one that points away, three that
    absorb well, three that do so less, one below the threshold of the fraction, one below both. They are orthogonal to
    the other letters' probes. `A` is the projection of the activation on the unit probe.
    """
    cosines = (0.9, 0.5, -0.3, 0.6, 0.4, 0.3, 0.2, 0.15, 0.12, 0.05, 0.01)
    main, second, away, absorber = 0, 1, 2, 3
    mains = {"a": [main], "b": [main, second], "c": [away, main]}
    d_in, n = 16, len(cosines)
    probes, _ = np.linalg.qr(random.standard_normal((d_in, len(mains))))
    across = random.standard_normal((len(mains) * n, d_in))
    across -= across @ probes @ probes.T
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    c = np.array(cosines * len(mains))[:, None]
    W_dec = c * np.repeat(probes.T, n, axis=0) + np.sqrt(1 - c**2) * across
    cases = [  # latents that live, and A
        ({main: 2, absorber: 1}, 1.7),  # the main latent is enough
        ({main: 1, absorber: 0.3}, 2.0),  # the others' share is too small
        ({absorber: 2}, 1.3),  # absorbed, wholly
        ({main: 1e-9, absorber: 2}, 1.3),  # as good as silent
        ({main: 1e-7, absorber: 2}, 1.3),  # not silent
        ({main: 0.5, absorber: 2}, 1.8),  # absorbed in part
        ({main: 0.5, absorber: 4}, 1.8),  # by more than there is to absorb
        ({main: 0.5, **dict.fromkeys(range(3, 9), 2)}, 4.0),  # by more than three
        (dict.fromkeys(range(3, 10), 4), 5.0),
        ({away: 1, absorber: 2}, 1.0),  # a latent that points away lives
        ({away: 5, main: 0.5, absorber: 3}, 2.0),
        ({9: 30}, 1.5),  # the cosine is too small for the fraction, not for full absorption
        ({10: 200}, 2.0),  # nor for either
        ({}, 1.0),  # nothing lives
        ({away: 3}, 0.5),
        ({main: 1, absorber: 2}, -0.5),  # activation that points away from the probe
        ({absorber: 2}, -1.2),
        ({away: 4, absorber: 2}, -0.7),
        ({main: 1, second: 1, absorber: 2.5}, 3.0),
        ({second: 0.4, absorber: 1.5, 4: 1.5}, 2.2),
    ]
    rows, projections = [], []
    for letter in range(len(mains)):
        for alive, projection in cases:
            z = np.zeros(len(W_dec))
            for latent, value in alive.items():
                z[letter * n + latent] = value
            rows.append(z)
            projections.append(projection)
        for _ in range(20):
            z = random.exponential(size=len(W_dec)) * (random.random(len(W_dec)) < 0.25)
            rows.append(z)
            projections.append((z @ W_dec @ probes[:, letter]) * random.uniform(0.6, 1.6) + 0.1)
    words = len(cases) + 20
    x = random.standard_normal((len(rows), d_in))
    x = x - x @ probes @ probes.T + np.array(projections)[:, None] * np.repeat(probes.T, words, axis=0)
    x, z, W_dec, weights = floats(x), floats(rows), floats(W_dec), floats(3 * probes.T)

    asked = {}
    for i, (letter, latents) in enumerate(mains.items()):
        its = [f"{letter}{i * words + j}" for j in range(words)]
        latents = [i * n + latent for latent in latents]
        asked[letter] = feature_absorption.StatsAndLikelyFalseNegativeResults(words, 0, latents, its)
    measure = calculator.FeatureAbsorptionCalculator(Model(x), icl_word_list=[])
    table = feature_absorption.calculate_projection_and_cos_sims(
        measure, Known(x, z, W_dec), probes_of(weights), 0, asked
    )
    rates = absorption_main._aggregate_results_df(table)
    return {
        "absorption.x": x,
        "absorption.z": z,
        "absorption.W_dec": W_dec,
        "absorption.probes": weights,
        **{f"absorption.main.{letter}": torch.tensor(asked[letter].split_feats) for letter in mains},
        "absorption.absorption_fraction": floats(table["absorption_fraction"]),
        "absorption.is_full_absorption": torch.tensor(table["is_full_absorption"].tolist()),
        "absorption.mean_absorption_fraction": floats(rates["mean_absorption_fraction"]),
        "absorption.full_absorption_rate": floats(rates["full_absorption_rate"]),
    }


def k_sparse(random: np.random.Generator) -> dict[str, Tensor]:
    """Latents, F1 and number of splits of k-sparse probes.

    A letter has one latent that lives on some share of its words; half the letters have a second one on most of the
    others. All live on other words too, now and then. The last latents are noise.
    """
    letters, d_sae, train, test = len(LETTERS), 34, 10, 6
    labels = np.tile(np.arange(letters), train + test)
    share = random.uniform(0.4, 1.0, letters)
    z = random.exponential(size=(len(labels), d_sae)) * (random.random((len(labels), d_sae)) < 0.06)
    for row, label in zip(z, labels, strict=True):
        if random.random() < share[label]:
            row[label] = random.uniform(1, 2)
        elif label % 2 and label // 4 + letters < d_sae:
            row[label // 4 + letters] = random.uniform(1, 2)
    x = np.stack([np.arange(len(labels)), random.standard_normal(len(labels))], axis=1)
    cut = letters * train
    of = [labels[:cut] == letter for letter in range(letters)]
    weights = np.stack([z[:cut][its].mean(0) - z[:cut][~its].mean(0) for its in of])
    x, z, weights = floats(x), floats(z), floats(weights)

    begun = torch.empty(d_sae, letters).uniform_(-1, 1, generator=torch.Generator().manual_seed(0)).T / d_sae**0.5
    trained = probes_of(begun)
    with patch.object(probing, "LinearProbe", lambda *_, **__: trained):
        one_hot = F.one_hot(torch.tensor(labels[:cut]))
        k_sparse_probing.train_sparse_multi_probe(z[:cut], one_hot, torch.device("cpu"), show_progress=False)
    sae = Known(x, z, torch.eye(2).repeat(d_sae // 2, 1))
    named = [(f"{LETTERS[label]}{i}", int(label)) for i, label in enumerate(labels)]
    with patch.object(k_sparse_probing, "train_sparse_multi_probe", lambda *_, **__: probes_of(weights)):
        probes = k_sparse_probing.train_k_sparse_probes(sae, named[:cut], x[:cut], ks=range(1, MOST + 1))
    truth = probes_of(torch.ones(letters, 2))
    scores = k_sparse_probing.eval_probe_and_sae_k_sparse_raw_scores(sae, truth, probes, named[cut:], x[cut:])
    about = k_sparse_probing.sae_k_sparse_metadata(sae, truth, probes, "known", 0)
    table = k_sparse_probing.build_metrics_df(scores, about, MOST)
    k_sparse_probing.add_feature_splits_to_metrics_df(table, MOST)
    found = {
        "k_sparse.z_train": z[:cut],
        "k_sparse.labels_train": torch.tensor(labels[:cut]),
        "k_sparse.z_test": z[cut:],
        "k_sparse.labels_test": torch.tensor(labels[cut:]),
        "k_sparse.weights": weights,
        "k_sparse.trained.weights": trained.weights.detach(),
        "k_sparse.trained.biases": trained.biases.detach(),
        "k_sparse.f1": torch.tensor(table[[f"f1_sparse_sae_{k}" for k in range(1, MOST + 1)]].to_numpy()),
        "k_sparse.split_feats": torch.tensor([len(latents) for latents in table["split_feats"]]),
    }
    for k in range(1, MOST + 1):
        latents = np.stack([probes[k][label].feature_ids.numpy() for label in range(letters)])
        found[f"k_sparse.feats.{k}"] = torch.tensor(latents)
    return found


def feature_splits(random: np.random.Generator) -> dict[str, Tensor]:
    """Number of splits, of F1 that rises by more and by less than the threshold, and falls here and there."""
    f1 = 0.4 + random.uniform(-0.02, 0.08, (len(LETTERS), MOST)).cumsum(1)
    columns = {"letter": list(LETTERS)}
    for k in range(1, MOST + 1):
        columns[f"f1_sparse_sae_{k}"] = f1[:, k - 1]
        columns[f"sparse_sae_k_{k}_feats"] = len(LETTERS) * [np.arange(k)]
    table = pd.DataFrame(columns)
    k_sparse_probing.add_feature_splits_to_metrics_df(table, MOST)
    splits = torch.tensor([len(latents) for latents in table["split_feats"]])
    return {"feature_splits.f1": torch.tensor(f1), "feature_splits.split_feats": splits}


# Sparse probing ------------------------------------------------------------------------------------------------------


def sparse_probing(random: np.random.Generator) -> dict[str, Tensor]:
    """Pooled codes, selected latents and accuracy, of texts of two classes; some latents tell them apart, none well."""
    texts, positions, d_sae = (40, 25), 4, 16  # a class, for training and for testing
    found, known_x, known_z, classes = {}, [], [], []
    for part, n in zip(("train", "test"), texts, strict=True):
        labels = np.arange(2 * n) % 2
        z = random.exponential(size=(2 * n, positions, d_sae)) * (random.random((2 * n, positions, d_sae)) < 0.3)
        z[labels == 1, :, :3] *= 2 - 0.4 * np.arange(3)
        z[labels == 0, :, 7:9] *= np.array([1.5, 1.2])
        keep = random.random((2 * n, positions)) < 0.7
        keep[:, 0] = True
        x = random.standard_normal((2 * n, positions, 2)) * keep[..., None]
        labels, x, z = torch.tensor(labels), floats(x), floats(z)
        known_x.append(x.flatten(0, 1))
        known_z.append(z.flatten(0, 1))
        classes.append({name: x[labels == value] for name, value in (("no", 0), ("yes", 1))})
        found |= {f"probing.z_{part}": z, f"probing.keep_{part}": torch.tensor(keep), f"probing.y_{part}": labels}
    sae = Known(torch.cat(known_x), torch.cat(known_z), torch.eye(2).repeat(d_sae // 2, 1))
    train, test = (activation_collection.get_sae_meaned_activations(its, sae, 7) for its in classes)
    for part, pooled in (("train", train), ("test", test)):
        both = torch.empty(sum(map(len, pooled.values())), d_sae)
        for name, value in (("no", 0), ("yes", 1)):
            both[found[f"probing.y_{part}"] == value] = pooled[name]
        found[f"probing.pooled_{part}"] = both
    for k in KS:
        left_out = probe_training.get_top_k_mean_diff_mask(
            found["probing.pooled_train"], found["probing.y_train"].int(), k
        )
        _, accuracy = probe_training.train_probe_on_activations(train, test, select_top_k=k)
        found[f"probing.top.{k}"] = (~left_out).nonzero().flatten()
        found[f"probing.accuracy.{k}"] = torch.tensor(accuracy["yes"], dtype=torch.float64)
    return found


# Core ----------------------------------------------------------------------------------------------------------------


def core_metrics(random: np.random.Generator) -> dict[str, Tensor]:
    """All numbers of the core evaluation; once as `Texts` are, and once in a unit ten times as large."""
    asked = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    found, texts = {}, Texts(random)
    for name, unit in (("core", 1), ("core_small", 10)):
        sae, model = texts.in_unit(unit)
        config = CoreEvalConfig(
            model_name="none",
            n_eval_reconstruction_batches=len(texts.tokens),
            n_eval_sparsity_variance_batches=len(texts.tokens),
            exclude_special_tokens_from_reconstruction=True,
            **{f"compute_{what}": True for what in asked},
        )
        texts.reset_input_dataset()
        scores, by_latent = core.run_evals(sae, texts, model, config, ignore_tokens={texts.left_out})
        found |= texts.inputs(name, sae) | results(name, scores, by_latent)
    return found


def main(file: str) -> None:
    found = {}
    for seed, part in enumerate((absorption, k_sparse, sparse_probing, core_metrics, feature_splits)):
        found |= part(np.random.default_rng(seed))
    read = (calculator, absorption_main, k_sparse_probing, activation_collection, probe_training, core)
    save(file, found, ["sae-bench", "scikit-learn"], read)


if __name__ == "__main__":
    main(*sys.argv[1:])
