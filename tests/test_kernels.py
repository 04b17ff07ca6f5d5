"""The Triton kernels agree with plain torch: on a GPU where there is one, else in Triton's interpreter on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae_lib
from sae_lib import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not kernels.available(), reason="Triton exists for Linux only")
on_a_device = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="there is no GPU; the test of the interpreter runs this one on the CPU"
)

RUNS = {
    "ragged": [3, 0, 1, 8, 9, 2],
    "one": [1],
    "nothing": [0, 0, 0],
    "first and last empty": [0, 5, 0],
    "one latent on every token": [0, 1500, 0, 2, 0, 1],
    "about as long as a piece": [255, 256, 257, 0, 511, 512, 513, 769],
}


def case(counts, d, table_rows=11, dtype=torch.float32, index_dtype=torch.int64, seed=0):
    """A table (table_rows, d), and for each run as many (value, row of the table) as `counts` says."""
    generator = torch.Generator().manual_seed(seed)
    pairs = sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(index_dtype)
    table = torch.randn(table_rows, d, generator=generator, dtype=torch.float64).to(dtype)
    values = torch.randn(pairs, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.randint(table_rows, (pairs,), generator=generator).to(index_dtype)
    return table, values, index, offsets


def sums_of_rows(table, values, index, offsets):
    """In plain torch, in fp64: the sums, and the sums of magnitudes, by which an error is measured."""
    run = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff().long())
    terms = values.double()[:, None] * table.double()[index.long()]
    zeros = torch.zeros(len(offsets) - 1, table.shape[1], dtype=torch.float64)
    return zeros.index_add(0, run, terms), zeros.index_add(0, run, terms.abs())


def agrees(kernel, arguments, tolerance=1e-6):
    out = kernel(*(argument.to(DEVICE) for argument in arguments)).cpu()
    expected, magnitude = sums_of_rows(*arguments)
    return out.shape == expected.shape and bool(((out - expected).abs() <= tolerance * magnitude).all())


@on_a_device
def test_decode_worked_by_hand():
    W_dec = torch.tensor([[1.0, 0, 2], [0, 1, 0], [3, 3, 3]], device=DEVICE)
    values, cols = torch.tensor([10.0, 2, 1], device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
    offsets = torch.tensor([0, 2, 2, 3], device=DEVICE)  # the second token has nothing alive
    assert kernels.decode(W_dec, values, cols, offsets).tolist() == [[10, 2, 20], [0, 0, 0], [3, 3, 3]]


@on_a_device
@pytest.mark.parametrize("kernel", [kernels.decode, kernels.weight_gradient])
@pytest.mark.parametrize("counts", RUNS.values(), ids=RUNS)
def test_sums_of_rows_are_those_of_plain_torch(kernel, counts):
    assert agrees(kernel, case(counts, d=70))


@on_a_device
@pytest.mark.parametrize("d", [1, 64, 100, 128, 300, 768])
def test_every_width_is_summed_to_its_end(d):
    assert agrees(kernels.decode, case(RUNS["ragged"], d))
    a, _, rows, _ = case([20], d)
    b, _, cols, _ = case([20], d, seed=1)
    products = kernels.pair_products(*(argument.to(DEVICE) for argument in (a, b, rows, cols))).cpu()
    terms = a.double()[rows] * b.double()[cols]
    assert ((products - terms.sum(1)).abs() <= 1e-6 * terms.abs().sum(1)).all()


@on_a_device
@pytest.mark.parametrize("pairs", [0, 1, 16, 17, 100])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_pair_products_are_those_of_plain_torch(pairs, index_dtype):
    a, _, rows, _ = case([pairs], 70, index_dtype=index_dtype)
    b, _, cols, _ = case([pairs], 70, table_rows=5, index_dtype=index_dtype, seed=1)
    products = kernels.pair_products(*(argument.to(DEVICE) for argument in (a, b, rows, cols))).cpu()
    terms = a.double()[rows.long()] * b.double()[cols.long()]
    assert products.shape == (pairs,)
    assert ((products - terms.sum(1)).abs() <= 1e-6 * terms.abs().sum(1)).all()


@on_a_device
def test_indices_of_32_bits_will_do():
    assert agrees(kernels.decode, case(RUNS["about as long as a piece"], 64, index_dtype=torch.int32))


@on_a_device
def test_64_bits_stay_64_bits():
    arguments = case(RUNS["one latent on every token"], 70, dtype=torch.float64)
    assert kernels.weight_gradient(*(argument.to(DEVICE) for argument in arguments)).dtype == torch.float64
    assert agrees(kernels.weight_gradient, arguments, tolerance=1e-14)


@on_a_device
def test_bfloat16_is_added_up_in_fp32():
    """In bfloat16 a sum of 1,500 numbers near 1 would stop at 256."""
    arguments = case(RUNS["one latent on every token"], 70, dtype=torch.bfloat16)
    assert kernels.decode(*(argument.to(DEVICE) for argument in arguments)).dtype == torch.float32
    assert agrees(kernels.decode, arguments)
    ones = torch.ones(2, 1500, dtype=torch.bfloat16, device=DEVICE)
    index = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert kernels.pair_products(ones, ones, index, index).tolist() == [1500.0]


@on_a_device
def test_matrices_may_be_laid_out_by_columns():
    table, values, index, offsets = case(RUNS["ragged"], 70)
    assert agrees(kernels.decode, (table.T.contiguous().T, values, index, offsets))
    rows = torch.arange(11, device=DEVICE)
    table = table.to(DEVICE)
    by_columns = kernels.pair_products(table.T.contiguous().T, table, rows, rows)
    assert torch.equal(by_columns, kernels.pair_products(table, table, rows, rows))


@on_a_device
def test_the_same_arguments_give_the_same_bits():
    arguments = [argument.to(DEVICE) for argument in case(RUNS["one latent on every token"], 70)]
    first = kernels.weight_gradient(*arguments)
    assert all(torch.equal(first, kernels.weight_gradient(*arguments)) for _ in range(2))


@on_a_device
def test_a_step_of_topk_has_the_gradients_of_the_dense_one():
    """The three kernels, put together as an engine does, against autograd through dense products."""
    generator = torch.Generator().manual_seed(0)
    batch, d_in, d_sae, k = 12, 20, 30, 4
    x, target = torch.randn(2, batch, d_in, generator=generator)
    W_enc = torch.randn(d_in, d_sae, generator=generator).requires_grad_()
    W_dec = torch.randn(d_sae, d_in, generator=generator).requires_grad_()
    values, cols = (x @ W_enc).topk(k)
    z = torch.zeros(batch, d_sae).scatter(1, cols, values)
    dense = torch.autograd.grad(0.5 * (z @ W_dec - target).square().sum(), (W_enc, W_dec))

    rows = torch.arange(batch).repeat_interleave(k)
    x, W, values, cols, rows = (t.detach().to(DEVICE) for t in (x, W_dec, values.flatten(), cols.flatten(), rows))
    x_hat = kernels.decode(W, values, cols, torch.arange(0, batch * k + 1, k, device=DEVICE))
    g = x_hat - target.to(DEVICE)
    by_latent = cols.sort(stable=True).indices
    offsets = torch.cat([cols.new_zeros(1), torch.bincount(cols, minlength=d_sae).cumsum(0)])
    into_values = kernels.pair_products(g, W, rows, cols)
    into_W_dec = kernels.weight_gradient(g, values[by_latent], rows[by_latent], offsets)
    into_W_enc = kernels.weight_gradient(x, into_values[by_latent], rows[by_latent], offsets).T
    assert torch.allclose(into_W_enc.cpu(), dense[0], rtol=1e-5, atol=1e-4)
    assert torch.allclose(into_W_dec.cpu(), dense[1], rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU, and on a CPU the engine leaves the kernels alone")
def test_the_engine_has_the_same_gradients_with_and_without_kernels(monkeypatch):
    sae = sae_lib.TopKSAE(d_in=300, d_sae=1000, k=8).to(DEVICE).train()
    batch = sae_lib.Batch(torch.randn(128, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    gradients = []
    for asked in ("0", "1"):
        monkeypatch.setenv("SAE_LIB_TRITON", asked)
        gradients.append(torch.autograd.grad(sae.loss(batch).total, list(sae.parameters())))
    for without, with_kernels in zip(*gradients, strict=True):
        assert (without - with_kernels).norm() <= 1e-5 * without.norm()


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="it is what runs this")
def test_every_test_of_a_device_passes_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    ran = subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) > 30


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", [80, 90], ids=["A100", "H100"])
@pytest.mark.parametrize("table", ["fp32", "bf16"])
def test_kernels_compile_without_a_gpu(capability, table, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = dict.fromkeys(("table", "a", "b"), f"*{table}")
    pointers |= dict.fromkeys(("index", "work", "rows", "cols"), "*i64")
    pointers |= dict.fromkeys(("values", "parts", "out"), "*fp32")
    constants = {"ROWS": 8, "PAIRS": 16, "WIDTH": 256}
    for kernel in kernels._compiled():
        signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in kernel.arg_names}
        sizes = {(place,): constants[n] for place, n in enumerate(kernel.arg_names) if n in constants}
        source = ASTSource(kernel, signature, constexprs=sizes)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


@pytest.mark.parametrize(
    ("d", "width", "slices"), [(2304, 256, 9), (768, 256, 3), (4096, 256, 16), (320, 64, 5), (1, 64, 1)]
)
def test_slices_leave_as_few_lanes_idle_as_they_can(d, width, slices):
    assert kernels._slices(d) == (width, slices)


def test_kernels_are_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("SAE_LIB_TRITON", raising=False)
    assert not kernels.enabled()
    monkeypatch.setenv("SAE_LIB_TRITON", "0")
    assert not kernels.enabled()
    monkeypatch.setenv("SAE_LIB_TRITON", "1")
    assert kernels.enabled()


def test_without_triton_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(kernels, "_compiled", kernels._compiled.__wrapped__)
    with pytest.raises(ImportError, match="pip install triton, or unset SAE_LIB_TRITON"):
        kernels.decode(*case([1], 4))


def test_the_benchmark_runs_its_jobs_and_writes_nothing_without_a_gpu(monkeypatch, tmp_path):
    from peers import gpu_speed

    monkeypatch.setenv("SAE_LIB_TRITON", "")
    work = gpu_speed.jobs(d_in=12, d_sae=100, k=2, batch=8, device="cpu")
    results = {name: job() for name, job in work.items()}
    assert [name for name, result in results.items() if result is None] == [
        "topk, without kernels",
        "topk, with kernels",
    ]
    assert results[gpu_speed.UNIT].shape == results[f"{gpu_speed.UNIT}, bf16"].shape == (8, 100)
    monkeypatch.setattr(gpu_speed, "RESULTS", tmp_path / "speed.gpu.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU was found: nothing was measured"):
        gpu_speed.main()
    assert list(tmp_path.iterdir()) == []
