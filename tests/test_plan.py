"""What a plan promises is what tiny models, tensors and files turn out to be."""

import dataclasses
import json
import weakref

import pytest
import torch
from tiny_models import tiny_gemma2, tiny_gpt2
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import sae_lib
from sae_lib.__main__ import app
from sae_lib.plan import ARITHMETIC, DEVICES, FAMILIES, KNOWN, SITES, model_shape, plan
from sae_lib.shards import HEADER_BYTES
from sae_lib.train import adam, one_step

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 40, "vocab_size": 60, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": 60}
CONFIGS = {
    "gpt2": GPT2,
    "gpt2 with a narrow MLP": GPT2 | {"n_inner": 30},
    "gpt_neox": {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")},
    **dict.fromkeys(["llama", "mistral", "qwen2", "gemma", "gemma2"], SMALL),
    "llama with a tied unembedding": SMALL | {"tie_word_embeddings": True},
}


def folder_of(config, path):
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model_that_transformers_builds(name, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name.split()[0], **CONFIGS[name])
    if name == "qwen2":
        config.head_dim = SMALL["head_dim"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    assert model_shape(tmp_path).parameters == sum(p.numel() for p in model.parameters())


def test_every_family_is_tried():
    assert {name.split()[0] for name in CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize(("name", "config"), [("gpt2", "GPT2Config"), ("gemma-2-2b", "Gemma2Config")])
def test_known_models_are_the_defaults_of_transformers(name, config, tmp_path):
    import transformers

    getattr(transformers, config)().save_pretrained(tmp_path)
    assert model_shape(tmp_path) == KNOWN[name] == model_shape(f"google/{name}")


def test_known_models_have_the_published_number_of_parameters():
    published = {
        "gpt2": 124_439_808, "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "pythia-70m": 70_426_624,
        "pythia-160m": 162_322_944, "llama-3.1-8b": 8_030_261_248, "gpt2-medium": 354_823_168,
    }  # fmt: skip
    assert {name: model_shape(name).parameters for name in KNOWN} == published


@pytest.mark.parametrize("folder", [tiny_gpt2, tiny_gemma2])
@pytest.mark.parametrize("site", SITES)
def test_flops_and_width_are_those_of_the_forward_to_the_site(folder, site):
    model = sae_lib.load_model(folder(), device="cpu")
    tokens = model.tokenize(["the cat sings under a red sun", "the dog sleeps over the old"])
    positions, window = tokens.ids.numel(), tokens.ids.shape[1]
    assert f"blocks.1.{site}" in model.sites()  # the model has run once, to measure its widths
    with FlopCounterMode(display=False) as counter:
        x = model.activations(tokens, f"blocks.1.{site}")
    promised = plan(folder(), d_sae=8, k=2, site=f"blocks.1.{site}", context=window)
    assert counter.get_total_flops() == positions * model_shape(folder()).flops(1, SITES[site][0], window)
    assert promised.flops["model"] == round(counter.get_total_flops() / (2 * (window - 1)))
    assert promised.d_in == x.shape[-1]


def test_a_dense_step_has_five_products():
    batch, d_in, d_sae = 6, 10, 100
    x, W_enc = torch.randn(batch, d_in), torch.randn(d_in, d_sae, requires_grad=True)
    W_dec, b_enc = torch.randn(d_sae, d_in, requires_grad=True), torch.randn(d_sae, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ((x @ W_enc + b_enc).relu() @ W_dec - x).square().sum().backward()
    promised = plan("pocket", d_sae=d_sae, k=3)
    assert counter.get_total_flops() == batch * 10 * d_in * d_sae
    assert promised.flops["dense step"] == 10 * 128 * d_sae
    assert promised.flops["sparse step"] == 2 * 128 * 100 + 8 * 128 * 3


def test_memory_of_an_sae_is_that_of_its_tensors():
    sae = sae_lib.TopKSAE(d_in=128, d_sae=300, k=4)
    optimiser = adam(sae, 10)
    one_step(sae, optimiser, sae_lib.Batch(torch.randn(16, 128)), rate=1.0, progress=0.0)
    memory = plan("pocket", d_sae=300, k=4).memory
    assert memory["weights of the SAEs"] == sum(p.nbytes for p in sae.parameters())
    assert memory["gradients"] == sum(p.grad.nbytes for p in sae.parameters())
    moments = [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert memory["optimiser"] == sum(moment.nbytes for moment in moments)
    two = plan("pocket", d_sae=300, k=4, saes=2, batch_size=4096, processes=2).memory
    assert two["gradients"] == 2 * memory["gradients"]
    assert two["a sparse step, at most"] == memory["a sparse step, at most"] / 2 == 1.5 * 2048 * 300 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_the_model_and_of_the_buffer_is_that_of_their_tensors(dtype):
    model = sae_lib.load_model(tiny_gpt2(), device="cpu", dtype=getattr(torch, dtype))
    stream = sae_lib.Activations(
        model, "blocks.1.hook_resid_post", ["the cat sings"] * 40, batch_size=16, buffer_size=64
    )
    iteration = iter(stream)
    next(iteration)
    options = {"model_dtype": dtype, "batch_size": 16, "buffer_size": 64, "context": 16}
    memory = plan(tiny_gpt2(), d_sae=30, k=4, site=stream.site, **options).memory
    assert memory["buffer of activations"] == sum(buffer.nbytes for buffer in iteration.buffers)
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.bridge.parameters()}
    assert memory["model"] == sum(stored.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_disk_of_a_cache_is_that_of_its_files(dtype, tmp_path):
    model = sae_lib.load_model(tiny_gpt2(), device="cpu")
    stream = sae_lib.Activations(model, "blocks.1.hook_resid_post", ["the cat sings under a red sun"] * 60)
    stream.cache(tmp_path, dtype=getattr(torch, dtype), tokens=400)
    files = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    promised = plan(tiny_gpt2(), d_sae=100, k=4, site=stream.site, tokens=400, cache_dtype=dtype).disk
    assert promised[f"cache, {dtype}"] == sum(files) - len(files) * HEADER_BYTES


def test_disk_of_checkpoints_is_that_of_their_files(tmp_path):
    model = sae_lib.load_model(tiny_gpt2(), device="cpu")
    texts = ["the cat sings under a red sun and the dog sleeps over the old stone"] * 400
    stream = sae_lib.Activations(model, "blocks.1.hook_resid_post", texts, batch_size=16, buffer_size=2048)
    saes = [sae_lib.TopKSAE(d_in=12, d_sae=3000, k=4, seed=seed) for seed in (0, 1)]
    sae_lib.train(saes, stream, tokens=96, checkpoint=tmp_path, checkpoint_every=80)
    (file,) = tmp_path.glob("*80/state.safetensors")
    options = {"saes": 2, "batch_size": 16, "buffer_size": 2048, "context": 16}
    promised = plan(tiny_gpt2(), d_sae=3000, k=4, site=stream.site, **options).disk["three checkpoints"] / 3
    generators_and_names = 3 * 5056 + 6000
    assert promised - 80 * 12 * 4 < file.stat().st_size < promised + generators_and_names


class Peak(TorchDispatchMode):
    """The most bytes that tensors made in this context held at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in given:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("folder", [tiny_gpt2, tiny_gemma2])
def test_memory_of_a_forward_is_right_within_a_factor_of_two(folder, monkeypatch):
    model = sae_lib.load_model(folder(), device="cpu")
    tokens = model.tokenize(["the cat sings under a red sun and the dog sleeps over the old"] * 64)
    assert "blocks.1.hook_resid_post" in model.sites()  # the model has run once, to measure its widths
    monkeypatch.setattr("sae_lib.plan.FORWARD_TOKENS", tokens.ids.numel())
    with Peak() as peak:
        model.activations(tokens, "blocks.1.hook_resid_post")
    promised = plan(folder(), d_sae=100, k=4, context=tokens.ids.shape[1]).memory["one block's forward, about"]
    assert promised / 2 < peak.peak < promised * 2


def test_hours_worked_by_hand():
    promised = dataclasses.replace(
        plan("pocket", d_sae=1000, k=4, batch_size=4000, processes=2, tokens=8_000_000, saes=3),
        flops={"model": 10_000_000, "sparse step": 1_000_000}, moved=1_000_000_000,
    )  # fmt: skip
    hours = promised.hours("a100", "bf16", utilisation=0.5)
    peak = 2 * 0.5 * 312e12  # two devices
    assert hours["model"] * 3600 == pytest.approx(8e6 * 1e7 / peak)
    # 2,000 steps of three SAEs, each of which moves 1 GB at half of 2,039 GB/s
    assert hours["saes"] * 3600 == pytest.approx(3 * (8e6 * 1e6 / peak + 2000 / (0.5 * 2039)))


def test_a_step_moves_weights_pairs_and_scores():
    promised = plan("pocket", d_sae=1000, k=5, batch_size=200, processes=2)
    parameters = 2 * 128 * 1000 + 1000 + 128
    assert promised.moved == 56 * parameters + 4 * (4 * 100 * 5 * 128) + 2 * (4 * 100 * 1000)


def test_peaks_do_not_fall_with_the_bits():
    for device in DEVICES.values():
        assert device.fp32 <= device.tf32 <= device.bf16
    assert set(ARITHMETIC) <= set(DEVICES["h100"]._fields)


def test_the_site_is_the_middle_of_the_model_and_its_windows_short_unless_said_otherwise():
    assert plan("gemma-2-2b", d_sae=16_384).site == "blocks.13.hook_resid_post"
    long, default = plan("gemma-2-2b", d_sae=16_384, context=8192), plan("gemma-2-2b", d_sae=16_384)
    assert default == plan("gemma-2-2b", d_sae=16_384, context=1024)
    assert long.flops["model"] > 1.3 * default.flops["model"]
    assert plan("pocket", d_sae=100) == plan("pocket", d_sae=100, context=128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt-5"}, "model must be pocket, one of gpt2, .* or a folder that holds a config.json, got 'gpt-5'"),
        ({"d_sae": 0}, "d_sae must be at least 1, got 0"),
        ({"buffer_size": 0}, "buffer_size must be at least 1, got 0"),
        ({"saes": -1}, "saes must be at least 1, got -1"),
        ({"k": 101}, "k must be in [1, d_sae=100], got 101"),
        ({"batch_size": 100, "processes": 3}, "batch_size must be a multiple of processes=3, got 100"),
        ({"context": 129}, "context must be in [2, 128], the model's, got 129"),
        ({"cache_dtype": "int8"}, "cache_dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"site": "blocks.4.hook_resid_post"}, "layer in [0, 3]"),
        ({"site": "blocks.1.hook_scale"}, "got 'blocks.1.hook_scale'"),
    ],
)
def test_what_makes_no_plan_is_refused(changes, message):
    if ".*" not in message:
        message = message.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=message):
        plan(**{"model": "pocket", "d_sae": 100, "k": 10} | changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json must be a model's configuration in JSON"),
        ("3", "config.json must be a model's configuration in JSON"),
        ({"model_type": "mamba"}, "must be one of gpt2, .*, got 'mamba'"),
        ({"model_type": "llama", "num_attention_heads": 2}, "hidden_size must be a positive integer, got None"),
        ({"model_type": "gpt2", **GPT2, "n_layer": "12"}, "n_layer must be a positive integer, got '12'"),
    ],
)
def test_a_configuration_without_what_is_needed_is_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        model_shape(folder_of(config, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tpu", "bf16", 0.4), "device must be one of h200, .*, got 'tpu'"),
        (("h100", "fp8", 0.4), "arithmetic must be one of fp32, tf32, bf16, got 'fp8'"),
        (("h100", "bf16", 40), "utilisation must be in \\(0, 1\\], got 40"),
    ],
)
def test_hours_of_unknown_devices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan("pocket", d_sae=100).hours(*arguments)


def test_the_command_prints_the_plan():
    arguments = ["plan", "--model", "gemma-2-2b", "--d-sae", "65536", "--saes", "4", "--gpu", "a100,l4"]
    printed = CliRunner().invoke(app, [*arguments, "--utilisation", "0.3"])
    assert printed.exit_code == 0
    assert printed.stdout.strip() == plan("gemma-2-2b", 65536, saes=4).table(("a100", "l4"), 0.3)
    assert "2,614.342 million" in printed.stdout
    assert "l4 has 24 GB: too little for a process" in printed.stdout
    assert "a100 has" not in printed.stdout
    assert "at 30% of the data sheet's peaks (assumed, not measured)" in printed.stdout


def test_the_command_says_what_is_wrong_without_a_traceback():
    refused = CliRunner().invoke(app, ["plan", "--model", "gpt-5", "--d-sae", "10", "--k", "1"])
    assert refused.exit_code == 1
    assert "a folder that holds a config.json, got 'gpt-5'" in refused.output
    assert "Traceback" not in refused.output
