"""Clusters on disk: what the files hold, that they are whole, and that nothing is done twice."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_gpt2

from sae_lib import TopKSAE, neuron_clusters
from sae_lib.models import load_model
from sae_lib.neuron_clusters import write_clusters, write_model
from sae_lib.neuron_embeddings import collect, cosine_distances, cut, embeddings, latents, neurons, proxies, tree

TEXTS = [
    "the cat sings",
    "a dog sleeps under the moon",
    "king",
    "old river",
    "the moon sings",
    "a new king and a queen",
]


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_gpt2(), device="cpu")


def test_a_file_holds_the_examples_trees_and_clusters_of_its_layer(model, tmp_path):
    paths = write_model(model, TEXTS, tmp_path / "gpt2", most=4)
    assert [path.name for path in paths] == ["layer-0.safetensors", "layer-1.safetensors", "layer-2.safetensors"]
    assert sorted(paths) == sorted((tmp_path / "gpt2").iterdir()), "nothing else is left there"
    units = neurons(model, 1)
    examples, held = collect(units, TEXTS, most=4), load_file(paths[1])
    assert torch.equal(held["document"], examples.document.int())
    assert torch.equal(held["value"], examples.value)
    assert held["tree"].shape == (20, 3, 3)
    several = 0
    for unit in range(20):
        h = examples.of(unit)[3]
        if len(h) < 2:
            continue
        several += 1
        distances = cosine_distances(embeddings(h, units.weights[unit]))
        merges, labels = tree(distances), cut(tree(distances))
        assert held["cluster"][unit, : len(h)].tolist() == labels.tolist()
        assert (held["cluster"][unit, len(h) :] == -1).all()
        assert held["tree"][unit, : len(h) - 1].numpy() == pytest.approx(merges[:, :3], rel=1e-6)
        assert held["tree"][unit, len(h) - 1 :].isnan().all()
        for name, value in proxies(distances, labels).items():
            assert held[name][unit].item() == pytest.approx(value, rel=1e-6, nan_ok=True)
    assert several > 5
    assert np.isfinite(held["maximum"].numpy()).all()


def test_a_run_that_was_stopped_goes_on_with_the_layers_that_are_missing(model, tmp_path, monkeypatch):
    done = []

    def stops(units, texts, **options):
        done.append(units.name)
        if len(done) == 2:
            raise KeyboardInterrupt
        return collect(units, texts, **options)

    monkeypatch.setattr(neuron_clusters, "collect", stops)
    with pytest.raises(KeyboardInterrupt):
        write_model(model, TEXTS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["layer-0.safetensors"]
    first = (tmp_path / "layer-0.safetensors").stat().st_mtime_ns
    write_model(model, TEXTS, tmp_path)
    assert done[2:] == ["blocks.1.mlp neurons", "blocks.2.mlp neurons"]
    assert (tmp_path / "layer-0.safetensors").stat().st_mtime_ns == first
    assert not write_clusters(neurons(model, 2), TEXTS, tmp_path / "layer-2.safetensors")


def test_units_without_examples_have_none(model, tmp_path):
    sae = TopKSAE(d_in=12, d_sae=6, k=6)
    sae.b_enc.data[3] = -1e6
    assert write_clusters(latents(model, "blocks.0.hook_resid_post", sae), TEXTS, tmp_path / "sae.safetensors")
    held = load_file(tmp_path / "sae.safetensors")
    assert (held["cluster"][3] == -1).all()
    assert held["size"][3] == held["clusters"][3] == 0


def test_a_file_of_other_units_or_texts_is_refused(model, tmp_path):
    write_clusters(neurons(model, 0), TEXTS, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="must hold the clusters of blocks.1.mlp neurons, got other units, weights"):
        write_clusters(neurons(model, 1), TEXTS, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="got other texts: choose another path"):
        write_clusters(neurons(model, 0), TEXTS[1:], tmp_path / "one.safetensors")
