"""Opening models, and reading, replacing and differentiating their activations; tiny random models stand in."""

import shutil
import sys

import pytest
import torch
from tiny_models import tiny_gemma2, tiny_gpt2

from sae_lib import models
from sae_lib.models import Tokens, load_model

TEXTS = ["the cat sings", "a dog sleeps under the moon and the queen runs", "king"]


@pytest.fixture(scope="module")
def gpt2():
    return load_model(tiny_gpt2(), device="cpu")


@pytest.fixture(scope="module", params=[tiny_gpt2, tiny_gemma2], ids=["gpt2", "gemma2"])
def pair(request):
    """The same weights as a LanguageModel and in plain transformers."""
    from transformers import AutoModelForCausalLM

    folder = request.param()
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return load_model(folder, device="cpu"), plain


def blocks_of(plain):
    return plain.transformer.h if hasattr(plain, "transformer") else plain.model.layers


def plain_hidden(plain, ids, layer):
    """Output of a block, by a hook of plain PyTorch, kept in the graph, and the logits."""
    seen = []
    hook = lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    handle = blocks_of(plain)[layer].register_forward_hook(hook)
    logits = plain(ids).logits
    handle.remove()
    return seen[0], logits


def summed_loss(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


# Parity with plain transformers


@pytest.mark.parametrize("layer", [0, 1])
def test_activations_and_logits_are_those_of_plain_transformers(pair, layer):
    model, plain = pair
    ids = model.tokenize(TEXTS[1]).ids
    with torch.no_grad():
        hidden, logits = plain_hidden(plain, ids, layer)
    assert torch.allclose(model.activations(ids, f"blocks.{layer}.hook_resid_post"), hidden, atol=1e-5)
    assert torch.allclose(model.logits(ids), logits, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_are_those_of_plain_transformers(pair, layer):
    model, plain = pair
    ids = model.tokenize(TEXTS[1]).ids
    hidden, logits = plain_hidden(plain, ids, layer)
    (expected,) = torch.autograd.grad(summed_loss(logits, ids), hidden)
    x, gradient = model.gradients(ids, f"blocks.{layer}.hook_resid_post")
    assert torch.allclose(x, hidden, atol=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-5)
    assert expected.abs().max() > 1e-2
    assert not x.requires_grad


def test_mlp_activations_are_what_the_last_mlp_matrix_reads(pair):
    model, plain = pair
    mlp = blocks_of(plain)[1].mlp
    seen = []
    handle = (mlp.c_proj if hasattr(mlp, "c_proj") else mlp.down_proj).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    ids = model.tokenize(TEXTS[1]).ids
    with torch.no_grad():
        plain(ids)
    handle.remove()
    assert torch.allclose(model.activations(ids, "blocks.1.mlp.hook_post"), seen[0], atol=1e-5)


def test_several_sites_are_read_in_one_pass_in_the_order_asked_for(pair):
    model, _ = pair
    ids, calls = model.tokenize(TEXTS[1]).ids, []
    sites = ("blocks.1.mlp.out.hook_in", "blocks.0.hook_resid_post", "blocks.1.mlp.hook_in")
    handle = model.bridge.blocks[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    late = model.bridge.unembed.register_forward_pre_hook(lambda module, args: calls.append(2))
    together = model.activations(ids, sites)
    assert calls == [1]
    handle.remove()
    late.remove()
    for site, x in zip(sites, together, strict=True):
        assert torch.equal(x, model.activations(ids, site))
    with pytest.raises(ValueError, match="got 'blocks.9.mlp'"):
        model.activations(ids, (*sites, "blocks.9.mlp"))


def test_gradients_agree_with_finite_differences():
    model = load_model(tiny_gpt2(), device="cpu", dtype=torch.float64)
    tokens, site, step = model.tokenize(TEXTS), "blocks.0.hook_resid_post", 1e-5
    x, gradient = model.gradients(tokens, site)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))

    def total(shift):
        loss, counted = model.loss(tokens, site, lambda x: x + shift * direction)
        return loss[counted].double().sum()

    difference = (total(step) - total(-step)) / (2 * step)
    assert (gradient * direction).sum() == pytest.approx(difference.item(), rel=1e-3)


def test_gradients_towards_other_tokens_cancel_out_in_the_models_own_expectation(gpt2):
    tokens, site = gpt2.tokenize("the cat"), "blocks.1.hook_resid_post"
    likely = gpt2.logits(tokens)[0].softmax(-1)
    expected, second = 0, tokens.ids[0, 2]
    for token in range(gpt2.vocab_size):
        labels = torch.tensor([[token, second]])
        expected = expected + likely[0, token] * gpt2.gradients(tokens, site, labels)[1][0, 0]
    of_second = (
        gpt2.gradients(tokens, site, tokens.ids[:, 1:])[1][0, 0] - gpt2.gradients(tokens[0][:, :2], site)[1][0, 0]
    )
    assert torch.allclose(expected, of_second, atol=1e-5)
    assert torch.equal(gpt2.gradients(tokens, site, tokens.ids[:, 1:])[1], gpt2.gradients(tokens, site)[1])


def test_sampled_tokens_are_drawn_from_the_models_prediction_and_do_not_know_the_next_token(gpt2):
    tokens = gpt2.tokenize(["the cat sings", "dog"])
    draws = torch.stack([gpt2.sample(tokens, torch.Generator().manual_seed(seed)) for seed in range(2000)])
    assert draws.shape == (2000, 2, 3)
    likely = gpt2.logits(tokens)[0, 1].softmax(-1)
    drawn = torch.bincount(draws[:, 0, 1], minlength=gpt2.vocab_size) / 2000
    assert (drawn - likely).abs().max() < 5 * (0.25 / 2000) ** 0.5
    other = gpt2.tokenize(["the cat runs", "dog"])  # only the last token differs
    same = [gpt2.sample(text, torch.Generator().manual_seed(3)) for text in (tokens, other)]
    assert torch.equal(*same)


def test_labels_of_another_shape_are_refused(gpt2):
    with pytest.raises(ValueError, match=r"one for each next token, of shape \(1, 2\), got \(1, 3\)"):
        gpt2.loss(gpt2.tokenize("the cat"), labels=torch.ones(1, 3, dtype=torch.long))


# Padding


@pytest.mark.parametrize("site", ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"])
def test_padding_changes_neither_activations_nor_gradients_nor_losses(pair, site):
    model, _ = pair
    together = model.tokenize(TEXTS)
    x, gradient = model.gradients(together, site)
    loss, counted = model.loss(together)
    for row, text in enumerate(TEXTS):
        alone = model.tokenize(text)
        length = alone.ids.shape[1]
        assert counted[row].sum() == length - 1
        expected = model.activations(alone, site)[0]
        assert torch.allclose(model.activations(together, site)[row, :length], expected, atol=1e-5)
        assert torch.allclose(x[row, :length], expected, atol=1e-5)
        assert torch.allclose(gradient[row, :length], model.gradients(alone, site)[1][0], atol=1e-5)
        assert torch.allclose(loss[row, : length - 1], model.loss(alone)[0][0], atol=1e-5)


def test_the_gradient_of_the_last_token_and_of_padding_is_zero_and_of_others_is_not(gpt2):
    tokens = gpt2.tokenize(TEXTS)
    _, gradient = gpt2.gradients(tokens, "blocks.0.hook_resid_post")
    has_next = torch.cat([tokens.mask[:, 1:], torch.zeros(len(TEXTS), 1, dtype=torch.bool)], dim=1)
    assert torch.equal(gradient.abs().sum(-1) > 0, has_next)


# Early exit


def test_nothing_after_the_site_runs(gpt2):
    calls = []
    inside = {
        "block 0": gpt2.bridge.blocks[0],
        "mlp 1": gpt2.bridge.blocks[1].mlp,
        "last matrix of mlp 1": gpt2.bridge.blocks[1].mlp.out,
        "block 2": gpt2.bridge.blocks[2],
        "unembed": gpt2.bridge.unembed,
    }
    handles = [
        part.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
        for name, part in inside.items()
    ]
    ids = torch.tensor([[2, 4, 5]])
    for site, expected in {
        "blocks.0.hook_resid_post": ["block 0"],
        "blocks.1.hook_mlp_out": ["block 0", "mlp 1", "last matrix of mlp 1"],
        "blocks.1.mlp.hook_pre": ["block 0", "mlp 1"],
    }.items():
        calls.clear()
        gpt2.activations(ids, site)
        assert calls == expected
    calls.clear()
    before = gpt2.logits(ids)
    assert calls == list(inside)
    for handle in handles:
        handle.remove()
    gpt2.activations(ids, "blocks.0.hook_resid_post")
    assert torch.equal(gpt2.logits(ids), before), "an early exit must leave nothing behind"


# Losses and patches


def test_loss_is_the_cross_entropy_that_transformers_reports(pair):
    model, plain = pair
    tokens = model.tokenize(TEXTS)
    loss, counted = model.loss(tokens)
    labels = tokens.ids.masked_fill(~tokens.mask, -100)
    with torch.no_grad():
        expected = plain(tokens.ids, attention_mask=tokens.mask.long(), labels=labels).loss
    assert loss.shape == counted.shape == (3, tokens.ids.shape[1] - 1)
    assert loss[counted].mean().item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_patch_that_returns_the_activation_changes_nothing(gpt2):
    tokens = gpt2.tokenize(TEXTS)
    for site in ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.0.attn.hook_z"):
        assert torch.equal(gpt2.logits(tokens, site, lambda x: x.clone()), gpt2.logits(tokens))


def test_with_the_last_residual_stream_zeroed_all_positions_predict_the_same(gpt2):
    tokens = gpt2.tokenize(TEXTS)
    logits = gpt2.logits(tokens, "blocks.2.hook_resid_post", torch.zeros_like)
    assert torch.allclose(logits, logits[0, 0].expand_as(logits), atol=1e-6)
    loss, _ = gpt2.loss(tokens, "blocks.2.hook_resid_post", torch.zeros_like)
    expected = -logits[0, 0].log_softmax(-1)[tokens.ids[:, 1:]]
    assert torch.allclose(loss, expected, atol=1e-5)


def test_a_patch_of_another_text_gives_that_texts_logits(gpt2):
    ours, theirs = gpt2.tokenize("the cat sings"), gpt2.tokenize("a king runs")
    donor = gpt2.activations(theirs, "blocks.1.hook_resid_post")
    patched = gpt2.logits(ours, "blocks.1.hook_resid_post", lambda x: donor)
    assert torch.allclose(patched, gpt2.logits(theirs), atol=1e-6)


def test_a_patch_can_be_trained_through(gpt2):
    shift = torch.zeros(12, requires_grad=True)
    loss, _ = gpt2.loss(gpt2.tokenize("the cat sings"), "blocks.1.hook_resid_post", lambda x: x + shift)
    loss.sum().backward()
    assert shift.grad.abs().sum() > 0


@pytest.mark.parametrize("use", ["logits", "gradients"])
def test_the_middle_of_a_block_is_refused_where_the_stream_goes_on_beside_it(gpt2, use):
    tokens, site = gpt2.tokenize("the cat"), "blocks.1.hook_resid_mid"
    with pytest.raises(ValueError, match=r"only the MLP reads 'blocks.1.hook_resid_mid'.*use hook_resid_pre"):
        gpt2.logits(tokens, site, lambda x: x) if use == "logits" else gpt2.gradients(tokens, site)
    assert gpt2.activations(tokens, site).shape == (1, 3, 12)


# Sites


def test_sites_have_the_width_of_their_activations(pair):
    model, _ = pair
    ids = torch.tensor([[2, 4, 5, 6]])
    assert len(model.sites()) > 60
    for site in model.sites()[::4]:
        assert model.activations(ids, site).shape == (1, 4, model.width(site))


def test_sites_are_only_those_with_a_row_for_each_position(pair):
    model, _ = pair
    others = {"blocks.0.attn.hook_pattern", "blocks.0.attn.hook_attn_scores", "embed.hook_in"}
    assert others <= set(model.bridge.hook_dict)
    assert not (others | {"blocks.0.attn.hook_cos"}) & set(model.sites())


def test_widths_by_hand(gpt2):
    expected = {"blocks.1.hook_resid_post": 12, "blocks.1.mlp.hook_post": 20, "blocks.1.attn.hook_z": 2 * 6}
    assert {site: gpt2.width(site) for site in expected} == expected


def test_an_unknown_site_is_refused_with_the_nearest_names(gpt2):
    with pytest.raises(ValueError, match=r"got 'blocks.1.hook_resid_pots': the nearest are blocks.1.hook_resid_post"):
        gpt2.width("blocks.1.hook_resid_pots")
    for call in (gpt2.activations, gpt2.gradients, lambda tokens, site: gpt2.logits(tokens, site, lambda x: x)):
        with pytest.raises(ValueError, match="the nearest are"):
            call(gpt2.tokenize("cat"), "layer 1")


# Tokens


def test_tokens_have_one_bos_first_and_padding_on_the_right(gpt2):
    tokens = gpt2.tokenize(["the cat", "dog", "the cat sings"])  # words are numbered from 4 in the order of WORDS
    assert tokens.mask.tolist() == [[True, True, True, False], [True, True, False, False], [True] * 4]
    assert [row[mask].tolist() for row, mask in zip(*tokens, strict=True)] == [[2, 4, 5], [2, 6], [2, 4, 5, 13]]
    content = [[False, True, True, False], [False, True, False, False], [False, True, True, True]]
    assert gpt2.content(tokens).tolist() == content


def test_a_bos_written_in_the_text_is_not_doubled(gpt2):
    assert gpt2.tokenize("<bos> cat").ids.tolist() == [[2, 5]]
    inner = gpt2.tokenize("cat <bos> dog")
    assert inner.ids.tolist() == [[2, 5, 2, 6]]
    assert gpt2.content(inner).tolist() == [[False, True, False, True]]


def test_a_model_without_bos_starts_rows_with_its_end_of_text():
    bridge = load_model(tiny_gpt2(), device="cpu").bridge
    bridge.tokenizer.bos_token = None
    assert load_model(bridge).tokenize("cat").ids.tolist() == [[1, 5]]
    bridge.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have a BOS or end-of-text token"):
        load_model(bridge)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "texts must be one or more strings, got none"),
        ([3], r"texts must be one or more strings, got \['int'\]"),
        (["cat", ""], "at least one token, got '' at index 1"),
        (["cat", "  "], "at least one token, got '  ' at index 1"),
        (["cat", "cat " * 16], "must fit the context of 16 tokens, BOS included, got 17 at index 1: shorten it"),
    ],
)
def test_texts_that_cannot_be_tokenized_are_refused(gpt2, texts, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        gpt2.tokenize(texts)


def test_a_text_may_fill_the_context(gpt2):
    assert gpt2.tokenize("cat " * 15).ids.shape == (1, 16)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([2, 4]), r"integers \(batch, pos\), got torch.int64 of shape \(2,\)"),
        (torch.ones(1, 2), "got torch.float32"),
        (torch.ones(1, 0, dtype=torch.long), r"of shape \(1, 0\)"),
        (torch.ones(1, 17, dtype=torch.long), "must fit the context of 16 tokens, got 17"),
        (torch.tensor([[2, 26]]), r"must be in \[0, 26\), got 2 to 26"),
        (torch.tensor([[2, -1]]), r"must be in \[0, 26\), got -1 to 2"),
    ],
)
def test_ids_that_the_model_cannot_read_are_refused(gpt2, ids, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        gpt2.logits(ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "blocks.0.hook_resid_post"}, "must be given together"),
        ({"patch": torch.zeros_like}, "must be given together"),
        (
            {"site": "blocks.0.hook_resid_post", "patch": lambda x: x[:, 1:]},
            r"must keep the shape \(1, 3, 12\), got \(1, 2, 12\)",
        ),
    ],
)
def test_patches_that_do_not_fit_are_refused(gpt2, arguments, message):
    with pytest.raises(ValueError, match=message):
        gpt2.logits(gpt2.tokenize("the cat"), **arguments)


# Opening


def test_weights_are_frozen_and_in_evaluation_mode(pair):
    model, _ = pair
    assert not any(parameter.requires_grad for parameter in model.bridge.parameters())
    assert not any(module.training for module in model.bridge.original_model.modules())


def test_sizes_are_those_of_the_folders_configuration(gpt2):
    assert (gpt2.n_layers, gpt2.d_model, gpt2.context, gpt2.vocab_size) == (3, 12, 16, 26)
    assert (gpt2.dtype, gpt2.device.type, gpt2.name) == (torch.float32, "cpu", str(tiny_gpt2()))
    assert "n_layers=3" in repr(gpt2)


def test_weights_stored_in_16_bits_are_opened_in_32_unless_asked(tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_gpt2(), tmp_path, dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(tiny_gpt2()).half().save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.float32
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_an_open_bridge_is_taken_as_it_is_or_moved_where_asked():
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(tiny_gpt2()), device="cpu", dtype=torch.float64)
    model = load_model(bridge)
    assert model.bridge is bridge
    assert model.dtype == torch.float64
    assert not any(parameter.requires_grad for parameter in bridge.parameters())
    assert load_model(bridge, dtype=torch.float32).dtype == torch.float32


def test_the_embedded_model_is_opened_by_its_name_like_any_folder(monkeypatch, tmp_path, gpt2):
    shutil.copytree(tiny_gpt2(), tmp_path / "pocket")
    monkeypatch.setattr(models, "ASSETS", tmp_path)
    model = load_model("pocket", device="cpu")
    assert model.name == "pocket"
    assert torch.equal(model.logits(torch.tensor([[2, 4, 5]])), gpt2.logits(torch.tensor([[2, 4, 5]])))
    with pytest.raises(ValueError, match=r"one of \['pocket'\].*got 'poket': did you mean 'pocket'\?"):
        load_model("poket")


def test_opening_a_folder_prints_nothing_and_leaves_progress_bars_as_they_were(capfd):
    from transformers.utils import logging

    for switch, shown in ((logging.disable_progress_bar, False), (logging.enable_progress_bar, True)):
        switch()
        load_model(tiny_gpt2(), device="cpu")
        assert logging.is_progress_bar_enabled() == shown
    assert capfd.readouterr() == ("", "")


def test_folders_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json, \*.safetensors, tokenizer\*: write them there with"):
        load_model(tmp_path)
    shutil.copytree(tiny_gpt2(), tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model' has no \*.safetensors: write them"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["/no/such/folder", "./folder", "a/b/c", ""])
def test_paths_that_do_not_exist_are_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr("transformer_lens.model_bridge.TransformerBridge.boot_transformers", None)
    with pytest.raises(ValueError, match="there is no such folder"):
        load_model(name)


def test_a_name_that_the_hub_does_not_give_is_refused():
    with pytest.raises(ValueError, match="can be reached from here, got 'nobody/nothing'"):
        load_model("nobody/nothing")


def test_what_is_no_name_is_refused(as_a_user):
    with pytest.raises(ValueError, match="must be a string, a path or a TransformerBridge, got int"):
        load_model(3)


def test_without_transformer_lens_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    with pytest.raises(ImportError, match=r'need the extra "lm".*pip install "transformer-lens'):
        load_model(tiny_gpt2())


def test_ids_may_come_as_tokens_or_bare(gpt2):
    tokens = gpt2.tokenize("the cat sings")
    assert isinstance(tokens, Tokens)
    assert torch.equal(gpt2.logits(tokens), gpt2.logits(tokens.ids))
