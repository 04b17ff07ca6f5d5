"""What every variant promises. A new variant joins by one line in EXAMPLES."""

import copy
import functools
import json
import subprocess
import sys

import pytest
import torch
from dense import given

import sae_lib
from sae_lib import VARIANTS
from sae_lib.sae import column_major

D_IN, D_SAE, K = 6, 64, 3  # few enough live for the sparse engine
EXAMPLES = {
    "relu": [{"l1_coeff": 0.1}, {"l1_coeff": 0.1, "norm_weighted": True}, {"l1_coeff": 0.1, "embedding_coeff": 0.02}],
    "gated": [{"l1_coeff": 0.1}],
    "topk": [{"k": K}, {"k": K, "embedding_coeff": 0.02}],
    "jumprelu": [{"target_l0": 3.0}, {"l0_coeff": 0.01}],
    "batchtopk": [{"k": K}],
    "matryoshka": [{"k": K, "group_sizes": [8, 16, 40]}],
    "gradient": [{"k": K}, {"k": K, "attribution": "of other latents", "literal": True}],
    "mutual_choice": [{"k": K}],
    "feature_choice": [{"k": K}, {"k": K, "budgets": "uniform"}],
    "atm": [{"l1_coeff": 0.1}, {"l1_coeff": 0.1, "rate": 0.2, "weights": [1.0, 0.0, 2.0], "eval_mask": "expected"}],
    "equivariant": [
        {"k": K, "group_order": 2, "matrix": "fitted"},
        {"k": K, "group_order": 2, "mode": "invariant"},
    ],
    "gba": [{"adapt_every": 2, "groups": 3}, {"htf": 0.3, "groups": 1, "adapt_every": 3}],
}
CASES = [(name, arguments) for name, cases in EXAMPLES.items() for arguments in cases]
each_variant = pytest.mark.parametrize(("name", "arguments"), CASES, ids=lambda value: str(value))


def make(name, arguments, seed=0):
    return VARIANTS[name](d_in=D_IN, d_sae=D_SAE, seed=seed, **arguments)


def batches(n=30, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [3 + 5 * torch.randn(size, D_IN, generator=generator) for _ in range(n)]


def train_anew(name, arguments):
    sae = make(name, arguments)
    sae_lib.train(sae, map(given, batches()), tokens=30 * 64)
    return sae


@functools.cache
def trained_once(case):
    return train_anew(*CASES[case])


def trained(name, arguments):
    return copy.deepcopy(trained_once(CASES.index((name, arguments))))


def test_every_variant_has_an_example():
    assert set(EXAMPLES) == set(VARIANTS)


@each_variant
def test_codes_are_non_negative_and_reconstructions_have_the_shape_of_x(name, arguments):
    sae, x = trained(name, arguments), batches(1, 50, seed=1)[0]
    z = sae.encode(x)
    assert z.shape == (50, D_SAE)
    assert (z >= 0).all()
    assert sae(x).shape == x.shape
    if name == "equivariant":  # its code leaves the pose out
        x_hat = torch.einsum("nij,nj->ni", sae.representation()[sae.pose(x)], sae.decode(z))
    else:
        x_hat = sae.decode(z)
    assert torch.allclose(x_hat, sae(x), rtol=1e-5, atol=1e-4)


@each_variant
def test_evaluation_treats_each_token_alone(name, arguments):
    sae, x = trained(name, arguments), batches(1, 40, seed=2)[0]
    whole, order = sae.encode(x), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(torch.cat([sae.encode(part) for part in x.split(7)]), whole, rtol=1e-5, atol=1e-4)
    assert torch.allclose(sae.encode(x[order]), whole[order], rtol=1e-5, atol=1e-4)


@each_variant
def test_loss_terms_add_up_and_loss_leaves_the_state_alone(name, arguments):
    sae, x = make(name, arguments).train(), batches(1)[0] / 15
    sae.start(given(x), 1000)
    sae.tokens_since_fired.fill_(10**9)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    loss = sae.loss(given(x))
    assert torch.isclose(loss.total, sum(loss.terms.values()))
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())


@each_variant
def test_each_parameter_that_the_loss_uses_has_the_gradient_of_finite_differences_in_its_decoder(name, arguments):
    sae = make(name, arguments).double().train()
    x = batches(1, 8, seed=3)[0].double() / 15
    sae.start(given(x), 1000)

    def reconstruction():
        return sae.loss(given(x)).terms["reconstruction"]

    reconstruction().backward()
    for parameter, index in ((sae.W_dec, (4, 2)), (sae.b_dec, (1,))):
        if name == "gba" and parameter is sae.b_dec:
            continue  # it is held
        # The decoder's bias enters the scores too in most variants; the step is small enough to keep the selection.
        step = torch.zeros_like(parameter)
        step[index] = 1e-6
        with torch.no_grad():
            parameter.add_(step)
            up = reconstruction()
            parameter.sub_(2 * step)
            down = reconstruction()
            parameter.add_(step)
        assert torch.isclose(parameter.grad[index], (up - down) / 2e-6, rtol=1e-4, atol=1e-7)


@each_variant
def test_training_improves_reconstruction_on_data_that_an_sae_can_explain(name, arguments):
    generator = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(8, D_IN, generator=generator), dim=1)
    data = [((torch.rand(128, 8, generator=generator) < 0.2).float() @ directions) * 7 + 2 for _ in range(120)]
    sae = make(name, arguments)
    run = sae_lib.train(sae, map(given, data), tokens=120 * 128)
    first, last = run.history[0]["fvu"], run.history[-1]["fvu"]
    assert last < 0.5 * first
    x = torch.cat(data[-5:])
    assert ((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()) < 0.5


def test_saved_saes_give_the_same_codes_to_the_bit_in_a_new_process(tmp_path):
    x = batches(1, seed=7)[0]
    torch.save(x, tmp_path / "x.pt")
    for i, case in enumerate(CASES):
        trained(*case).save(tmp_path / str(i))
    program = """
import sys, pathlib, torch, sae_lib
folder = pathlib.Path(sys.argv[1])
x = torch.load(folder / "x.pt", weights_only=True)
for i in range(int(sys.argv[2])):
    torch.save(sae_lib.load(folder / str(i)).encode(x).detach(), folder / f"{i}.pt")
"""
    subprocess.run([sys.executable, "-c", program, tmp_path, str(len(CASES))], check=True)
    for i, case in enumerate(CASES):
        sae = trained(*case)
        assert torch.equal(torch.load(tmp_path / f"{i}.pt", weights_only=True), sae.encode(x)), case


@each_variant
def test_loading_restores_configuration_and_state(name, arguments, tmp_path):
    sae = trained(name, arguments)
    sae.save(tmp_path / "sae")
    again = sae_lib.load(tmp_path / "sae")
    assert type(again) is type(sae)
    assert again.config() == sae.config()
    assert json.loads((tmp_path / "sae" / "config.json").read_text())["variant"] == name
    assert again.state_dict().keys() == sae.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), sae.state_dict().values(), strict=True))


@each_variant
def test_copies_and_loads_keep_each_latents_encoder_weights_contiguous(name, arguments, tmp_path):
    sae = make(name, arguments)
    sae.save(tmp_path / "sae")
    versions = (
        sae,
        copy.deepcopy(sae),
        sae_lib.load(tmp_path / "sae"),
        trained(name, arguments),
        make(name, arguments).double(),
    )
    for version in versions:
        assert version.W_enc.T.is_contiguous()
    assert column_major(torch.ones(2, 3)).stride() == (1, 2)


@each_variant
def test_the_seed_decides_the_weights_and_the_run(name, arguments):
    one, two, other = train_anew(name, arguments), train_anew(name, arguments), make(name, arguments, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(make(name, arguments).W_dec, other.W_dec)


@each_variant
def test_folding_scales_codes_and_reconstructions_with_x(name, arguments):
    sae = trained(name, arguments)
    x = batches(1, seed=8)[0].double()
    sae.double()
    z, x_hat = sae.encode(x), sae(x)
    scale = sae.scale.item()
    sae.fold(2 * scale)
    assert torch.allclose(sae.encode(2 * x), 2 * z, rtol=1e-4, atol=1e-6)
    assert torch.allclose(sae(2 * x), 2 * x_hat, rtol=1e-4, atol=1e-6)


@each_variant
def test_rows_of_the_decoder_have_norm_one_after_training(name, arguments):
    assert torch.allclose(trained(name, arguments).W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)


@each_variant
def test_a_latent_is_dead_after_the_window_and_alive_again_when_it_fires(name, arguments):
    sae, x = make(name, arguments).train(), batches(1, 8)[0] / 15
    sae.start(given(x), 160)
    assert sae.dead_window == 8  # 5% of 160 tokens
    code = sae.loss(given(x)).code
    sae.after_step(given(x), code)
    assert torch.equal(sae.dead, ~code.fired())


@each_variant
def test_bad_activations_are_refused_with_rule_and_value(name, arguments, as_a_user):
    sae = make(name, arguments)
    with pytest.raises(ValueError, match=r"d_in=6.*\(4, 5\)"):
        sae.encode(torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"floating, got torch\.int64"):
        sae(torch.zeros(4, 6, dtype=torch.int64))


@each_variant
@pytest.mark.parametrize(("size", "value"), [("d_in", 0), ("d_sae", 0), ("d_in", 2.5), ("d_sae", True), ("seed", -1)])
def test_bad_sizes_are_refused(name, arguments, size, value, as_a_user):
    with pytest.raises(ValueError, match=f"{size} must be an integer at least"):
        VARIANTS[name](**({"d_in": D_IN, "d_sae": D_SAE} | arguments | {size: value}))
