"""Streams of activations: what they read, in which order, and what they refuse."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from tiny_models import WORDS, tiny_gpt2
from torch import nn

import sae_lib
from sae_lib.activations import Activations
from sae_lib.groups import Group
from sae_lib.models import load_model

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_gpt2(), device="cpu")


def some_texts(count=30, longest=12, seed=1):
    """Texts of 1 to `longest` words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()) for n in lengths]


TEXTS = some_texts()
TOKENS = sum(len(text.split()) for text in TEXTS)


def stream_of(model, texts=TEXTS, **arguments):
    defaults = {"batch_size": 16, "buffer_size": 64, "forward_tokens": 50}
    return Activations(model, SITE, texts=texts, **(defaults | arguments))


def rows_of(stream):
    return torch.cat([batch.x for batch in stream])


def same_rows(left, right):
    """Whether two sets of rows agree to 1e-5, paired so that they agree best."""
    distance = torch.cdist(left.double(), right.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return len(left) == len(right) and distance.numpy()[linear_sum_assignment(distance)].max() < 1e-5


def alone(model, texts, site=SITE):
    """Activations of every word of every text, each run on its own."""
    return torch.cat([model.activations(model.tokenize(text), site)[0, 1:] for text in texts])


def drawn_apart(rows):
    """Share of neighbours in the stream that were neighbours in reading: 0 when shuffled, 1 when not."""
    return (rows.diff() == 1).float().mean().item()


class Numbers(nn.Module):
    """A module that passes its input through, so that rows can be recognised."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, x):
        return self.second(self.first(x) * 1.0)


def numbers_in(count, rows=10):
    """Inputs whose rows are numbered: (rows, 1) each."""
    return list(torch.arange(float(count * rows)).view(count, rows, 1))


# What is read


@pytest.mark.parametrize("forward_tokens", [5, 50])  # two rounds of 16 forward passes, and one
def test_every_token_but_bos_and_padding_is_read_once(model, forward_tokens):
    rows = rows_of(stream_of(model, forward_tokens=forward_tokens))
    assert rows.shape == (TOKENS, 12)
    assert same_rows(rows, alone(model, TEXTS))


def test_a_long_text_is_cut_into_windows_that_each_begin_with_bos(model):
    words = (WORDS * 2)[:40]  # 15 + 15 + 10 words fill the context of 16, of which BOS takes one place
    windows = [" ".join(words[:15]), " ".join(words[15:30]), " ".join(words[30:])]
    stream = stream_of(model, texts=[" ".join(words)])
    rows = [row for tokens in stream.sequences() for row in map(list, zip(*tokens, strict=True))]
    assert all(ids[0] == model.bos for ids, _ in rows)
    assert sorted(int(mask.sum()) for _, mask in rows) == [11, 16, 16]
    assert same_rows(rows_of(stream), alone(model, windows))


def test_windows_can_be_made_shorter_than_the_context(model):
    rows = rows_of(stream_of(model, texts=["the cat sings and the dog runs"], context=4))
    expected = alone(model, ["the cat sings", "and the dog", "runs"])
    assert same_rows(rows, expected)


@pytest.mark.parametrize(
    "wrap",
    [lambda text: text, lambda text: SimpleNamespace(text=text), lambda text: {"text": text, "topic": "animals"}],
    ids=["strings", "records", "mappings"],
)
def test_texts_may_be_strings_records_or_mappings(model, wrap):
    assert torch.equal(rows_of(stream_of(model, texts=[wrap(text) for text in TEXTS])), rows_of(stream_of(model)))


def test_batches_are_full_but_the_last_one(model):
    sizes = [len(batch.x) for batch in stream_of(model)]
    assert sizes == [16] * (TOKENS // 16) + [TOKENS % 16]
    assert TOKENS % 16 > 0
    assert [len(batch.x) for batch in stream_of(model, texts=["the cat sings"])] == [3]


def test_gradients_belong_to_their_rows_and_tokens_without_a_next_one_are_left_out(model):
    expected = []
    for text in TEXTS:
        x, gradient = (tensor[0] for tensor in model.gradients(model.tokenize(text), SITE))
        expected.append(torch.cat([x, gradient], dim=1)[1:-1])
    batches = list(stream_of(model, grad=True))
    rows = torch.cat([torch.cat([batch.x, batch.grad], dim=1) for batch in batches])
    assert len(rows) == TOKENS - len(TEXTS)
    assert same_rows(rows, torch.cat(expected))
    assert all(batch.grad is None for batch in stream_of(model))


def test_texts_are_read_no_further_than_the_buffer_needs(model):
    read = []

    class Lazy:
        def __iter__(self):
            for number in range(100_000):
                read.append(number)
                yield "the cat sings"

    stream = stream_of(model, texts=Lazy())
    assert not read
    next(iter(stream))
    assert 0 < len(read) < 1000


def test_batches_are_in_32_bits_whatever_the_model_computes_in():
    half = load_model(tiny_gpt2(), device="cpu", dtype=torch.bfloat16)
    batch = next(iter(stream_of(half, grad=True)))
    assert batch.x.dtype == batch.grad.dtype == torch.float32
    assert torch.equal(batch.x, batch.x.bfloat16().float())


# Order and seeds


def test_each_iteration_gives_the_same_bits_and_seeds_differ(model):
    stream = stream_of(model, seed=3)
    first, again = rows_of(stream), rows_of(stream)
    other = rows_of(stream_of(model, seed=4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert same_rows(first, other)


def test_iterations_side_by_side_do_not_disturb_each_other(model):
    stream = stream_of(model)
    pairs = list(zip(stream, stream, strict=True))
    assert all(torch.equal(left.x, right.x) for left, right in pairs)


def test_the_global_generator_is_neither_read_nor_moved(model):
    torch.manual_seed(0)
    first = rows_of(stream_of(model))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(rows_of(stream_of(model)), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_that_can_be_indexed_are_read_in_an_order_of_the_seed_and_others_in_their_own(model):
    class Iterable:
        def __iter__(self):
            return iter(TEXTS)

    def reading_order(texts, seed):
        stream = stream_of(model, texts=texts, seed=seed)
        return list(itertools.chain.from_iterable(stream._token_rows()))

    own = list(itertools.chain.from_iterable(model.encode(TEXTS)))
    assert reading_order(Iterable(), seed=1) == reading_order(Iterable(), seed=2) == own
    assert reading_order(TEXTS, seed=1) != reading_order(TEXTS, seed=2)
    assert sorted(reading_order(TEXTS, seed=1)) == sorted(own)


def test_a_batch_mixes_rows_of_the_whole_buffer():
    stream = Activations(Numbers(), "first", inputs=numbers_in(100), batch_size=50, buffer_size=400)
    rows = rows_of(stream)[:, 0]
    assert sorted(rows.tolist()) == list(range(1000))
    assert drawn_apart(rows) < 0.02
    first = rows[:50]
    assert first.min() < 100
    assert first.max() > 300
    assert first.max() < 400, "the first batch comes as soon as the buffer is full"
    later = rows[200:250]  # after the first refill, half of the buffer is older than 400, half is newer
    assert 10 < (later < 400).sum() < 40


def test_the_buffer_is_allocated_once_and_never_grows():
    iteration = iter(Activations(Numbers(), "first", inputs=numbers_in(100), batch_size=50, buffer_size=400))
    places = set()
    for _ in iteration:
        (buffer,) = iteration.buffers
        places.add((buffer.data_ptr(), len(buffer)))
    assert len(places) == 1
    assert places.pop()[1] == 400


# Forward passes


def test_forward_passes_hold_windows_of_similar_length_within_the_limit(model):
    texts = some_texts(count=100)
    tokens = list(stream_of(model, texts=texts, forward_tokens=64).sequences())
    assert all(ids.numel() <= 64 for ids, _ in tokens)
    places = sum(mask.numel() for _, mask in tokens)
    assert sum(int(mask.sum()) for _, mask in tokens) > 0.9 * places
    assert sum(len(ids) for ids, _ in tokens) == len(texts)
    widths = [ids.shape[1] for ids, _ in tokens]
    assert widths != sorted(widths), "short windows must not all come first"


def test_a_window_longer_than_the_limit_has_a_forward_pass_to_itself(model):
    tokens = list(stream_of(model, forward_tokens=3).sequences())
    assert {len(ids) for ids, _ in tokens} == {1}
    assert len(tokens) == len(TEXTS)


def test_sequences_are_what_the_batches_were_read_from(model):
    stream = stream_of(model)
    rows = torch.cat([stream.read(tokens)[0] for tokens in stream.sequences()])
    assert same_rows(rows, rows_of(stream))


# Other modules


def test_the_output_of_a_named_module_is_read():
    mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    stream = Activations(mlp, "1", inputs=x.split(7), batch_size=8)
    assert stream.d_in == 5
    with torch.no_grad():
        expected = mlp[1](mlp[0](x))
    assert same_rows(rows_of(stream), expected)
    whole = Activations(mlp, "1", inputs=x, batch_size=8)
    assert same_rows(rows_of(whole), expected)
    labelled = Activations(mlp, "1", inputs=[(part, torch.zeros(len(part))) for part in x.split(7)], batch_size=8)
    assert torch.equal(rows_of(labelled), rows_of(stream))
    assert not next(iter(stream)).x.requires_grad


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 3), [[0, 1, 2], [3, 4, 5]]),
        ((1, 2, 3), [[0, 1, 2], [3, 4, 5]]),
        ((1, 2, 1, 3), [[0, 3], [1, 4], [2, 5]]),  # 2 channels, 3 places
    ],
)
def test_outputs_are_flattened_to_rows(shape, expected):
    x = torch.arange(6.0).reshape(shape)
    stream = Activations(Numbers(), "first", inputs=[x], batch_size=2)
    assert stream.d_in == len(expected[0])
    assert sorted(rows_of(stream).tolist()) == expected


def test_nothing_after_the_module_runs_and_modes_and_hooks_are_left_as_they_were():
    calls = []
    net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    net[2].register_forward_hook(lambda *_: calls.append(1))
    net.train()
    net[0].eval()
    x = torch.ones(8, 2)
    rows = rows_of(Activations(net, "1", inputs=[x], batch_size=8))
    assert torch.allclose(rows, net[0](x).detach()), "dropout must be off"
    assert not calls
    assert [net.training, net[0].training, net[1].training] == [True, False, True]
    assert not net[1]._forward_hooks


def test_the_first_item_of_a_modules_tuple_is_read():
    gru = nn.Sequential(nn.GRU(2, 3, batch_first=True))
    assert Activations(gru, "0", inputs=[torch.ones(4, 5, 2)], batch_size=2).d_in == 3


# Going on where one stopped


def two_streams(kind, model):
    if kind == "module":
        return [Activations(Numbers(), "first", inputs=numbers_in(30), batch_size=16, buffer_size=64) for _ in range(2)]
    return [stream_of(model, grad=kind == "gradients", seed=5) for _ in range(2)]


@pytest.mark.parametrize("kind", ["texts", "gradients", "module"])
def test_a_stream_goes_on_with_the_same_bits_after_any_batch(kind, model, tmp_path):
    stream, resumed = two_streams(kind, model)
    expected = list(stream)
    iteration = iter(stream)
    for done in range(len(expected) + 1):
        save_file(stream.state_dict(), tmp_path / "state.safetensors")
        resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
        rest = list(resumed)
        assert len(rest) == len(expected) - done
        for left, right in zip(rest, expected[done:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True) if b is not None)
        next(iteration, None)
    assert len(list(resumed)) == len(expected), "the iteration after a resumed one starts anew"


def test_a_resumed_stream_does_not_run_the_model_on_what_was_read_before():
    calls = []
    stream = Activations(Numbers(), "first", inputs=numbers_in(30), batch_size=16, buffer_size=64)
    iteration = iter(stream)
    for _ in range(15):
        next(iteration)
    state = stream.state_dict()
    stream.model.first.register_forward_pre_hook(lambda module, args: calls.append(args[0][0, 0].item()))
    stream.load_state_dict(state)
    list(stream)
    assert min(calls) >= 150
    assert torch.equal(stream.state_dict()["position"], torch.zeros(5, dtype=torch.long)), "none is under way"


def test_a_state_that_was_loaded_is_the_state_until_it_is_used():
    stream = Activations(Numbers(), "first", inputs=numbers_in(30), batch_size=16, buffer_size=64)
    iteration = iter(stream)
    next(iteration)
    state = stream.state_dict()
    stream.load_state_dict(state)
    next(iteration)
    assert torch.equal(stream.state_dict()["position"], state["position"])


def test_a_state_of_other_texts_is_refused(model):
    with pytest.raises(ValueError, match="over the same texts or inputs"):
        stream_of(model).load_state_dict(stream_of(model, texts=TEXTS[1:]).state_dict())


# Fingerprints


def test_the_fingerprint_is_that_of_the_first_thousand_texts(model):
    texts = [f"cat {number}" for number in range(1002)]
    fingerprint = stream_of(model, texts=texts).fingerprint
    assert stream_of(model, texts=[SimpleNamespace(text=text) for text in texts], seed=1).fingerprint == fingerprint
    assert stream_of(model, texts=texts[:1000], grad=True).fingerprint == fingerprint
    assert Activations(model, "blocks.0.hook_resid_post", texts=texts).fingerprint == fingerprint
    assert stream_of(model, texts=texts[:999]).fingerprint != fingerprint
    assert stream_of(model, texts=texts[::-1]).fingerprint != fingerprint
    assert stream_of(model, texts=["a", "bc"]).fingerprint != stream_of(model, texts=["ab", "c"]).fingerprint


def test_the_fingerprint_of_inputs_sees_values_shapes_and_types():
    def fingerprint(*inputs):
        return Activations(Numbers(), "first", inputs=list(inputs)).fingerprint

    zeros = torch.zeros(2, 3)
    assert fingerprint(zeros) == fingerprint(zeros.clone())
    others = [torch.ones(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.bfloat16)]
    assert len({fingerprint(x) for x in [zeros, *others]} | {fingerprint(zeros, zeros)}) == 5


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 33}, r"buffer_size must be at least 2 \* batch_size = 66, got 64"),
        ({"context": 17}, r"context must be in \[2, 16\], the model's, got 17"),
        ({"context": 1}, r"context must be in \[2, 16\]"),
        ({"texts": None}, "reads texts, got none or got inputs"),
        ({"inputs": [torch.ones(1, 1)]}, "reads texts, got none or got inputs"),
        ({"texts": []}, "texts must hold at least one item, got none"),
        ({"texts": "the cat"}, "texts must be a sequence or another iterable, got one str: put it in a list"),
        ({"texts": 3}, "texts must be a sequence or another iterable, got one int"),
        ({"texts": {"text": "cat"}}, "texts must be a sequence or another iterable, got one dict"),
        ({"texts": (text for text in TEXTS)}, "must be readable more than once, got a generator: pass a list"),
    ],
)
def test_arguments_that_make_no_stream_are_refused(model, arguments, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        stream_of(model, **arguments)


def test_an_unknown_site_is_refused_with_the_nearest_names(model):
    with pytest.raises(ValueError, match=r"got 'blocks.1.resid_post': the nearest are .*blocks.1.hook_resid_post"):
        Activations(model, "blocks.1.resid_post", texts=TEXTS)
    with pytest.raises(ValueError, match="names in model.named_modules.*got 'frist': the nearest are first"):
        Activations(Numbers(), "frist", inputs=numbers_in(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one token, got '' at index 2"),
        (" ", "at least one token, got ' ' at index 2"),
        (7, r'must be a string, .text or \["text"\], got int at index 2'),
        ({"words": "cat"}, "got dict at index 2"),
    ],
)
def test_texts_without_text_are_refused_where_they_are_read(model, text, message):
    stream = stream_of(model, texts=["cat", "dog", text, "sun"])
    with pytest.raises(ValueError, match=message):
        list(stream)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a module reads inputs and has no loss of its own"),
        ({"texts": TEXTS}, "a module reads inputs"),
        ({"inputs": numbers_in(1), "grad": True}, "without grad"),
        ({"inputs": []}, "inputs must hold at least one item"),
        ({"inputs": iter(numbers_in(2))}, "inputs must be readable more than once, got a list_iterator"),
        (
            {"inputs": [torch.ones(2, 2, dtype=torch.long)], "site": "first"},
            "floating tensor, got torch.int64 at 'first'",
        ),
        ({"inputs": [torch.ones(3)]}, r"2, 3 or 4 dimensions, got \(3,\) at 'second'"),
        ({"inputs": [torch.ones(1, 1, 1, 1, 1)]}, r"got \(1, 1, 1, 1, 1\)"),
    ],
)
def test_inputs_that_make_no_stream_are_refused(arguments, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        Activations(Numbers(), **({"site": "second"} | arguments))


def test_a_module_that_is_never_called_is_refused():
    net = Numbers()
    net.unused = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="never calls 'unused'"):
        Activations(net, "unused", inputs=numbers_in(1))


def test_what_is_no_model_is_refused(as_a_user):
    with pytest.raises(ValueError, match="must be a LanguageModel or a torch.nn.Module, got str"):
        Activations("pocket", SITE, texts=TEXTS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_with_their_place_and_share(bad):
    inputs = numbers_in(4)
    inputs[2] = inputs[2].clone()
    inputs[2][3] = bad
    stream = Activations(Numbers(), "first", inputs=inputs, batch_size=5, buffer_size=10)
    iteration = iter(stream)
    next(iteration)  # read from the first inputs, which are good
    with pytest.raises(
        ValueError, match=r"got 10.00% NaN or infinite entries at 'first', forward pass 2 of the stream"
    ):
        list(iteration)


def test_gradients_that_are_not_finite_are_refused():
    broken = load_model(tiny_gpt2(), device="cpu")
    broken.bridge.original_model.transformer.h[2].mlp.c_proj.bias.data.fill_(float("nan"))
    assert rows_of(stream_of(broken)).isfinite().all(), "the site lies below"
    with pytest.raises(ValueError, match="gradients must be finite, got 100.00% NaN"):
        list(stream_of(broken, grad=True))


# Orbits ---------------------------------------------------------------------------------------------------------------


def test_with_a_group_a_batch_carries_the_activations_of_all_poses_in_rows_that_belong_together():
    images = torch.rand(40, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 5))
    stream = Activations(module, "1", inputs=images, batch_size=7, buffer_size=20, orbit=Group(4, reflections=True))
    assert stream.d_in == 5
    found = list(stream)
    assert torch.equal(torch.cat([batch.x for batch in found]), torch.cat([batch.orbit[:, 0] for batch in found]))
    expected = torch.stack([module(Group(4, True).act(i, images)).detach() for i in range(8)], 1)
    orbits = torch.cat([batch.orbit for batch in found])
    assert same_rows(orbits.flatten(1), expected.flatten(1))
    assert not torch.equal(orbits, expected)  # shuffled


def test_a_stream_of_orbits_goes_on_where_it_stood():
    images = torch.rand(50, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Sequential(torch.nn.Flatten())
    settings = {"inputs": images.split(8), "batch_size": 4, "buffer_size": 16, "orbit": Group(4)}
    stream, again = (Activations(module, "0", **settings) for _ in range(2))
    batches = iter(stream)
    first = [next(batches) for _ in range(5)]
    again.load_state_dict(batches.state_dict())
    rest = list(batches)
    assert all(torch.equal(a.orbit, b.orbit) for a, b in zip(rest, again, strict=True))
    assert len(first) + len(rest) == 13


def test_maps_of_turned_images_are_turned_back_so_that_a_row_is_one_place():
    images = torch.rand(6, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    blind = torch.nn.Sequential(torch.nn.AvgPool2d(3, stride=1))  # commutes with turns: all poses have the same rows
    stream = Activations(blind, "0", inputs=images, batch_size=8, orbit=Group(4))
    for batch in stream:
        assert torch.allclose(batch.orbit, batch.x[:, None].expand(-1, 4, -1))


def test_held_out_orbits_are_measured_in_all_poses():
    images = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    stream = Activations(torch.nn.Sequential(torch.nn.Flatten()), "0", inputs=images, batch_size=8, orbit=Group(4))
    report = sae_lib.evaluate(sae_lib.TopKSAE(4, 8, 2), stream, tokens=1000)
    assert report["tokens"] == 24


def test_orbits_are_not_cached_and_texts_have_none(model, tmp_path, as_a_user):
    stream = Activations(torch.nn.Flatten(), "", inputs=torch.rand(4, 1, 2, 2), orbit=Group(4))
    with pytest.raises(ValueError, match="a cache holds rows, got a stream of orbits"):
        stream.cache(tmp_path / "cache")
    with pytest.raises(ValueError, match="or orbit: pass texts= alone"):
        Activations(model, SITE, texts=TEXTS, orbit=Group(4))
