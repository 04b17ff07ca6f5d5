"""What sae-bench's whole core evaluation finds of SAEs that were trained here, as they are; see `sae_bench`.

A tiny language model with random weights stands for the one that sae-bench would download, and texts in a folder for
its data set. Whatever SAELens can hold too is evaluated a second time, as SAELens reads the folder that we write.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

os.environ["JAXTYPING_DISABLE"] = "1"  # its annotations contradict each other

import torch
from sae_bench.evals.core import main as core
from sae_bench.sae_bench_utils import activation_collection, general_utils
from sae_lens import SAE
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer

import sae_lib
from peers.stand_ins import SITE, save
from sae_lib.formats import for_sae_bench, save_as

ROOT = Path(__file__).parents[2]
WORDS = "the old cat saw a small dog near the river and then it went home to sleep in a warm house".split()
VARIANTS = {"topk": {"k": 3}, "jumprelu": {"target_l0": 3.0}, "batchtopk": {"k": 3}, "gba": {"groups": 2}}
EXACT = ("topk", "jumprelu", "batchtopk")
"""Variants that SAELens can hold."""
D_IN, D_SAE, CONTEXT = 8, 24, 16


def tiny_model() -> HookedTransformer:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "sae_lib/assets/pocket")
    sizes = {"n_layers": 2, "d_model": D_IN, "n_heads": 2, "d_head": 4, "d_mlp": 16, "n_ctx": 32}
    config = HookedTransformerConfig(**sizes, d_vocab=len(tokenizer), act_fn="gelu", seed=0)
    return HookedTransformer(config, tokenizer=tokenizer)


def core_scores(sae: object, model: HookedTransformer, texts: Path, results: Path, dtype: str) -> Tensor:
    """All numbers of its core evaluation but those of each latent, in the order of their names."""
    with patch.object(HookedTransformer, "from_pretrained_no_processing", lambda *_, **__: model):
        (found,) = core.multiple_evals(
            [("tiny", sae)],
            n_eval_reconstruction_batches=2,
            n_eval_sparsity_variance_batches=2,
            eval_batch_size_prompts=4,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            exclude_special_tokens_from_reconstruction=True,
            dataset=str(texts),
            context_size=CONTEXT,
            output_folder=str(results),
            dtype=dtype,
            device="cpu",
            force_rerun=True,
        )
    scores = {name: value for group in found["metrics"].values() for name, value in group.items()}
    return torch.tensor([scores[name] for name in sorted(scores)])


def main(file: str) -> None:
    folder = Path(file).with_suffix("")
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    rows = [" ".join(WORDS[i % 7 : 7 + i % 13] * 8) for i in range(60)]
    (texts / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    model = tiny_model()
    tokens = model.to_tokens(rows[:20])[:, :CONTEXT]
    x = model.run_with_cache(tokens, names_filter=SITE)[1][SITE].detach()
    found = {"x": x[:2]}
    for name, settings in VARIANTS.items():
        sae = sae_lib.VARIANTS[name](D_IN, D_SAE, **settings)
        sae_lib.train(sae, 40 * [x.flatten(0, 1)], tokens=40 * len(x) * CONTEXT)
        theirs = save_as(sae, folder / "sae_lens" / name, "sae_lens", "tiny", SITE) if name in EXACT else None
        custom, start = for_sae_bench(sae, "tiny", SITE), f"{name}.trained."
        found |= {f"{start}state.{key}": value.clone() for key, value in sae.state_dict().items()}
        found |= {f"{start}z": custom.encode(x[:2]).detach(), f"{start}x_hat": custom(x[:2]).detach()}
        pooled = activation_collection.get_sae_meaned_activations({"all": x[:2]}, custom, 7)["all"]
        found[f"{start}pooled"] = pooled.detach()
        found[f"{start}scores"] = core_scores(custom, model, texts, folder / "results", "float32")
        if theirs is not None:
            again = core_scores(SAE.load_from_disk(theirs), model, texts, folder / "results", "float32")
            found[f"{start}scores of the SAELens folder"] = again
        core_scores(custom, model, texts, folder / "results", "bfloat16")
        assert (custom.dtype, custom.cfg.dtype) == (torch.bfloat16, "bfloat16")
    save(file, found, ["sae-bench", "sae-lens"], (core, activation_collection, general_utils))


if __name__ == "__main__":
    main(*sys.argv[1:])
