"""What SAELens computes: its evaluations on texts and on known features, of seeded inputs; see `sae_bench`."""

from __future__ import annotations

import sys

import numpy as np
from sae_lens import evals
from sae_lens.synthetic import evals as synthetic
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor, tensor

from peers.stand_ins import Texts, floats, results, save


def core(random: np.random.Generator) -> dict[str, Tensor]:
    """All numbers of an evaluation on texts."""
    texts = Texts(random)
    sae, model = texts.in_unit(1)
    config = evals.get_eval_everything_config(None, len(texts.tokens), len(texts.tokens))
    config.compute_featurewise_weight_based_metrics = False
    texts.reset_input_dataset()
    scores, by_latent = evals.run_evals(
        sae, texts, model, ActivationScaler(), config, exclude_special_tokens=[texts.left_out]
    )
    return texts.inputs("core", sae) | results("core", scores, by_latent)


def recovery(random: np.random.Generator) -> dict[str, Tensor]:
    """How well a dictionary of 12 latents, with a dead one, some doubled and some negative ones, finds 9 features."""
    directions = random.standard_normal((9, 8))
    W_dec = directions[[0, 1, 2, 3, 4, 5, 0, 1, 2, 8, 8, 8]] + 0.5 * random.standard_normal((12, 8))
    W_dec[[1, 4, 7]] *= -1
    truth = random.exponential(size=(80, 9)) * (random.random((80, 9)) < 0.2)
    z = truth[:, [0, 1, 2, 3, 4, 5, 0, 6, 2, 8, 8, 8]] * (random.random((80, 12)) < 0.8)
    z += random.random((80, 12)) < 0.05
    z[:, 11] = 0
    given = {"W_dec": floats(W_dec), "directions": floats(directions), "z": floats(z), "truth": floats(truth)}
    W_dec, directions, z, truth = given.values()
    scores = vars(synthetic.compute_classification_metrics(z, truth, W_dec, directions))
    scores["mcc"] = synthetic.mean_correlation_coefficient(W_dec, directions)
    scores["uniqueness"] = synthetic.feature_uniqueness(W_dec, directions)
    found = given | {name: tensor(value) for name, value in scores.items()}
    return {f"recovery.{name}": value for name, value in found.items()}


def main(file: str) -> None:
    found = core(np.random.default_rng(3)) | recovery(np.random.default_rng(4))
    save(file, found, ["sae-lens"], (evals, synthetic))


if __name__ == "__main__":
    main(*sys.argv[1:])
