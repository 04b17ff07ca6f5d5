"""Activations on disk (`shards`, `cached`, `cache`): what is written, in which order it is read, what damage does."""

import errno
import gc
import json
import mmap
import threading
import time
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_activations import SITE, Numbers, same_rows, some_texts, stream_of
from tiny_models import tiny_gpt2
from torch import nn

import sae_lib
from sae_lib import Activations, Batch, CachedActivations, PlantedDictionary, cached, shards
from sae_lib import cache as cache_file
from sae_lib.cache import cache
from sae_lib.models import load_model

D_IN, ROWS = 256, 64  # a row of float32 is 1 KiB, so that 64 rows fill a page of 64 KiB, and a shard here
TOKENS = 200  # 3 shards and 8 rows


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_file, "SHARD_BYTES", 2**16)


class Rows:
    """Rows whose first entry is their number, in batches of 24, which fit no shard; can fail at one of them."""

    fingerprint, batch_size, seed = "00", 16, 0

    def __init__(self, tokens=TOKENS, fails_at=None, grad=False, d_in=D_IN):
        self.x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(0))
        self.x[:, 0] = torch.arange(tokens)
        self.fails_at, self.grad = fails_at, 1e-6 * self.x.flip(1) if grad else None

    def __iter__(self):
        for number, x in enumerate(self.x.split(24)):
            if number == self.fails_at:
                raise KeyboardInterrupt
            yield Batch(x, None if self.grad is None else self.grad.split(24)[number])


def numbers_of(stream):
    return torch.cat([batch.x[:, 0] for batch in stream]).int()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_order(stream):
    x = torch.cat([batch.x for batch in stream])
    return x[x[:, 0].argsort()]


# What is written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_row_is_read_once_an_epoch_as_it_was_written(tmp_path, dtype):
    rows = Rows()
    stream = cache(rows, tmp_path, dtype, tokens=TOKENS)
    batches = list(stream)
    assert [len(batch.x) for batch in batches] == [16] * 12 + [8]
    assert len(stream) == 13 and stream.tokens == TOKENS and stream.d_in == D_IN
    assert all(batch.x.dtype == torch.float32 and batch.grad is None for batch in batches)
    assert torch.equal(in_order(batches), rows.x.to(dtype).float())


def test_shards_are_plain_safetensors_in_the_order_of_reading(tmp_path):
    rows = Rows(grad=True)
    cache(rows, tmp_path / "x", tokens=TOKENS)
    cache(Rows(), tmp_path / "narrow", torch.bfloat16, tokens=TOKENS)
    names = sorted(path.name for path in (tmp_path / "x").glob("*.safetensors"))
    assert names == [f"{number:05d}.safetensors" for number in range(7)]  # with gradients, 32 rows fill a page
    whole = torch.cat([load_file(tmp_path / "x" / name)["x_and_grad"] for name in names])
    assert torch.equal(whole, torch.stack([rows.x, rows.grad], dim=1))
    narrow = load_file(tmp_path / "narrow/00000.safetensors")["x"]
    assert torch.equal(narrow, rows.x[:128].bfloat16())


def test_no_more_tokens_are_written_than_asked_for_and_no_more_than_there_are(tmp_path):
    assert sorted(numbers_of(cache(Rows(), tmp_path / "few", tokens=70))) == list(range(70))
    assert cache(Rows(), tmp_path / "all", tokens=10**6).tokens == TOKENS


def test_small_gradients_survive_in_16_bits(tmp_path):
    rows = Rows(grad=True)
    for dtype, precision in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        stream = cache(rows, tmp_path / str(dtype), dtype, tokens=TOKENS)
        x, grad = (torch.cat(parts) for parts in zip(*((b.x, b.grad) for b in stream), strict=True))
        grad = grad[x[:, 0].argsort()]
        largest = rows.grad.abs().max()
        assert 1e-6 < largest < 1e-3, "below what float16 holds with full precision"
        large = rows.grad.abs() > 1e-3 * largest
        assert torch.allclose(grad[large], rows.grad[large], rtol=precision, atol=0)
        assert torch.equal(x[x[:, 0].argsort()], rows.x.to(dtype).float()), "activations are not scaled"


def test_the_scale_of_gradients_is_a_power_of_two_that_leaves_room(tmp_path):
    rows = Rows(grad=True)
    rows.grad = torch.full_like(rows.grad, 3e-6)
    cache(rows, tmp_path, torch.float16, tokens=TOKENS)
    assert json.loads((tmp_path / "manifest.json").read_text())["grad_scale"] == 2.0**28  # 3e-6 * 2^28 = 805


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, torch.float16, r"float16 must hold every value, up to 65504, got 100000 in batch 3"),
        (float("nan"), torch.float32, r"must be finite, got 0.02% NaN or infinite entries in batch 3"),
        (float("inf"), torch.float16, r"must be finite, got 0.02% NaN"),
    ],
)
def test_values_that_cannot_be_stored_are_refused(tmp_path, value, dtype, message):
    rows = Rows()
    rows.x[80, 7] = value  # one of 24 * 256 in batch 3
    with pytest.raises(ValueError, match=message):
        cache(rows, tmp_path, dtype, tokens=TOKENS)
    rows.x[80, 7] = 1e4
    cache(rows, tmp_path / "other", dtype, tokens=TOKENS)


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_gpt2(), device="cpu")


@pytest.mark.parametrize("grad", [False, True])
def test_a_models_cache_holds_what_its_stream_yields_and_later_runs_need_no_forward(model, tmp_path, grad, monkeypatch):
    stream = stream_of(model, grad=grad)
    stored = stream.cache(tmp_path)
    live, read = (
        [torch.cat(parts) for parts in zip(*(b[: 1 + grad] for b in s), strict=True)] for s in (stream, stored)
    )
    assert same_rows(torch.cat(live, 1), torch.cat(read, 1))
    assert (stored.batch_size, stored.seed, stored.device) == (16, 0, torch.device("cpu"))
    monkeypatch.setattr(Activations, "read", None)
    again = stream_of(model, grad=grad, seed=5).cache(tmp_path)
    assert again.seed == 5 and again.tokens == stored.tokens


def test_module_and_planted_streams_are_cached(tmp_path):
    inputs = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    stream = Activations(Numbers(), "first", inputs=inputs, batch_size=7)
    assert same_rows(torch.cat([b.x for b in stream.cache(tmp_path / "module")]), inputs)
    planted = PlantedDictionary(8, 4).batches(16, seed=3)
    read = torch.cat([b.x for b in cache(planted, tmp_path / "planted", tokens=48)])
    expected = torch.cat([b.x for b, _ in zip(planted, range(3), strict=False)])
    assert same_rows(read, expected)


# The order of reading


def test_an_epoch_mixes_all_shards_and_is_decided_by_the_seed(tmp_path):
    stream = cache(Rows(1000), tmp_path, tokens=1000)
    first, again = numbers_of(stream), numbers_of(stream)
    assert torch.equal(first, again)
    other = numbers_of(CachedActivations(tmp_path, batch_size=50, seed=1))
    assert sorted(first.tolist()) == sorted(other.tolist()) == list(range(1000))
    assert (first == other).float().mean() < 0.02
    assert (first.diff() == 1).float().mean() < 0.02
    correlation = torch.corrcoef(torch.stack([first.float(), torch.arange(1000.0)]))[0, 1]
    assert correlation.abs() < 0.1
    assert len((first[:50] // ROWS).unique()) > 10, "the first 50 rows come from most of the 16 shards"


def test_each_row_is_as_likely_as_any_other_to_come_first(tmp_path):
    stream = cache(Rows(160), tmp_path, tokens=160)
    counts = torch.zeros(10)
    for seed in range(500):
        stream.seed = seed
        counts[int(next(iter(stream)).x[0, 0]) // 16] += 1
    assert (counts - 50).square().sum() / 50 < 27.9, "chi squared of 9 degrees of freedom, at 99.9%"


def test_the_global_generator_is_neither_read_nor_moved(tmp_path):
    stream = cache(Rows(), tmp_path, tokens=TOKENS)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = numbers_of(stream)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(numbers_of(stream), first)


@pytest.mark.parametrize("grad", [False, True])
def test_a_stream_goes_on_with_the_same_bits_after_any_batch(tmp_path, grad):
    stream = cache(Rows(grad=grad), tmp_path, tokens=TOKENS)
    expected = list(stream)
    iteration = iter(stream)
    for done in range(len(expected) + 1):
        save_file(stream.state_dict(), tmp_path / "state")
        resumed = CachedActivations(tmp_path, batch_size=16, seed=99)
        resumed.load_state_dict(load_file(tmp_path / "state"))
        assert torch.equal(resumed.state_dict()["position"], torch.tensor([min(16 * done, TOKENS), 0]))
        rest = list(resumed)
        assert len(rest) == len(expected) - done
        for left, right in zip(rest, expected[done:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True) if b is not None)
        next(iteration, None)
    assert len(list(resumed)) == len(expected), "the iteration after a resumed one starts anew"
    assert torch.equal(CachedActivations(tmp_path).state_dict()["position"], torch.zeros(2, dtype=torch.long))


def test_a_state_of_another_stream_is_refused(tmp_path):
    stream, other = (cache(Rows(n), tmp_path / str(n), tokens=n) for n in (100, 101))
    with pytest.raises(ValueError, match="must be that of the cache in .*100, got another stream's"):
        stream.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="got another stream's"):
        stream.load_state_dict(Activations(Numbers(), "first", inputs=[torch.ones(4, 2)], batch_size=2).state_dict())


# Reading ahead


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("sae_lib.cache")]


def wait_for_no_reader():
    deadline = time.monotonic() + 10
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not readers()


def test_readers_end_with_the_epoch_and_with_an_iterator_that_is_dropped(tmp_path):
    stream = cache(Rows(), tmp_path, tokens=TOKENS)
    iteration = iter(stream)
    next(iteration)
    assert 1 <= len(readers()) <= cached.READERS
    del iteration
    gc.collect()
    assert wait_for_no_reader()
    iteration = iter(stream)
    list(iteration)
    assert wait_for_no_reader()
    assert next(iteration, None) is None


def test_an_error_in_a_reader_reaches_who_reads(tmp_path, monkeypatch):
    stream = cache(Rows(), tmp_path, tokens=TOKENS)
    gather, calls = CachedActivations._gather_rows, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return gather(*arguments)

    monkeypatch.setattr(cached, "READERS", 1)
    monkeypatch.setattr(CachedActivations, "_gather_rows", failing)
    iteration = iter(stream)
    next(iteration), next(iteration)
    with pytest.raises(OSError, match="the disk is gone"):
        next(iteration)


def test_the_order_does_not_depend_on_which_reader_is_first(tmp_path, monkeypatch):
    stream = cache(Rows(), tmp_path, tokens=TOKENS)
    expected, gather = numbers_of(stream), CachedActivations._gather_rows

    def slow(self, numbers):
        time.sleep(0.01 * (int(numbers[0]) % 3))
        return gather(self, numbers)

    monkeypatch.setattr(CachedActivations, "_gather_rows", slow)
    assert torch.equal(numbers_of(stream), expected)


def test_memory_is_used_again_but_never_while_a_batch_or_a_view_of_it_is_held(tmp_path):
    stream = cache(Rows(1000), tmp_path, tokens=1000)
    kept = [batch.x for batch in stream]
    views = [batch.x[3:5] for batch in stream]
    arrays = [batch.x.numpy()[3:5] for batch in stream]
    places = {batch.x.data_ptr() for batch in stream}
    assert 1 < len(places) <= 2 + cached.AHEAD + cached.READERS < len(stream) == len(kept)
    assert sorted(torch.cat(kept)[:, 0].tolist()) == list(range(1000))
    for x, view, array in zip(kept, views, arrays, strict=True):
        assert torch.equal(x[3:5], view)
        assert torch.equal(view, torch.from_numpy(array))


def test_a_larger_batch_gets_memory_of_its_own(tmp_path):
    stream = cache(Rows(), tmp_path, tokens=TOKENS)
    list(stream)
    stream.batch_size = 50
    assert [len(batch.x) for batch in stream] == [50] * 4
    assert torch.equal(in_order(stream), Rows().x)


def test_rows_are_touched_in_parts_that_cover_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "TOUCHED_BYTES", 5000)  # 4 rows of float32, 9 of bfloat16
    for dtype in (torch.float32, torch.bfloat16):
        stream = cache(Rows(), tmp_path / str(dtype), dtype, tokens=TOKENS)
        assert torch.equal(in_order(stream), Rows().x.to(dtype).float())


def test_where_files_cannot_be_mapped_to_a_place_they_are_read(tmp_path, monkeypatch):
    expected = numbers_of(cache(Rows(), tmp_path, tokens=TOKENS))
    monkeypatch.delattr(mmap, "MAP_ANONYMOUS")
    assert torch.equal(numbers_of(CachedActivations(tmp_path, batch_size=16)), expected)


@pytest.mark.parametrize(
    ("row_bytes", "rows"),
    [
        (4096, 65536),  # 512 rows fill 2 MiB
        (9216, 28672),  # 2048 do, 14 times
        (3076, 81920),  # 2^19 would take 1.6 GB; 16384 fill a multiple of 64 KiB, 5 times
        (49156, 16384),  # one filling is more than 256 MiB
    ],
)
def test_shards_fill_whole_pages_so_that_the_next_one_can_be_mapped_behind_them(row_bytes, rows):
    assert shards.rows_that_fill_pages(row_bytes, 2**28) == rows
    assert rows * row_bytes % 2**16 == 0


# Cut off


@pytest.mark.parametrize("fails_at", range(9))
def test_a_cut_off_write_goes_on_and_ends_in_the_same_bytes(tmp_path, fails_at):
    expected = cache(Rows(grad=True), tmp_path / "whole", torch.float16, tokens=TOKENS)
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        cache(Rows(grad=True, fails_at=fails_at), folder, torch.float16, tokens=TOKENS)
    if fails_at:
        whole = fails_at * 24 // ROWS
        assert len(list(folder.glob("*.safetensors"))) == whole
        with pytest.raises(ValueError, match=f"cut off after {whole} shards; call stream.cache with the same folder"):
            CachedActivations(folder)
        (folder / ".00009.safetensors.77.part").write_bytes(b"half of a shard")
        (folder / f"{whole:05d}.safetensors").write_bytes(b"a shard that the manifest does not name yet")
    cache(Rows(grad=True), folder, torch.float16, tokens=TOKENS)
    assert files(folder) == files(expected.folder)


def test_shards_that_are_whole_are_not_written_again(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        cache(Rows(fails_at=6), tmp_path, tokens=TOKENS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(before) == 2
    cache(Rows(), tmp_path, tokens=TOKENS)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("grad", [False, True])
def test_a_models_cache_goes_on_without_the_forward_passes_before(model, tmp_path, grad, monkeypatch):
    monkeypatch.setattr(shards, "HEADER_BYTES", mmap.PAGESIZE)  # narrow rows fill small pages sooner
    monkeypatch.setattr(cache_file, "SHARD_BYTES", 1)
    texts = some_texts(400)
    whole = stream_of(model, texts=texts, grad=grad).cache(tmp_path / "whole")
    assert len(whole.manifest["shards"]) > 2
    calls, read = [], Activations.read

    def failing(self, sequence):
        calls.append(1)
        if len(calls) == 45:
            raise RuntimeError("the lights went out")
        return read(self, sequence)

    with monkeypatch.context() as patch:
        patch.setattr(Activations, "read", failing)
        with pytest.raises(RuntimeError):
            stream_of(model, texts=texts, grad=grad).cache(tmp_path / "cut")
        calls[:] = [1] * 50
        stream_of(model, texts=texts, grad=grad).cache(tmp_path / "cut")
    forwards = len(list(stream_of(model, texts=texts).sequences()))
    assert 0 < len(calls) - 50 < forwards
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_cut_off_write_goes_on_in_the_same_order_only(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cache(Rows(fails_at=6), tmp_path, tokens=TOKENS)
    other = Rows()
    other.seed = 7
    with pytest.raises(ValueError, match="was written with seed=0, got 7; pass the same"):
        cache(other, tmp_path, tokens=TOKENS)
    cache(Rows(), tmp_path, tokens=TOKENS)
    assert cache(other, tmp_path, tokens=TOKENS).seed == 7, "a whole cache is read in any order"


def test_a_disk_that_fills_up_is_named_and_what_was_written_stays(tmp_path, monkeypatch):
    calls = []

    def full(_):
        calls.append(1)
        if len(calls) == 5:  # after the manifest, and two shards with theirs but one
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(
            ValueError, match=r"manifest.json must be writable, got 'No space left on device'; the shards"
        ):
            cache(Rows(), tmp_path, tokens=TOKENS)
    assert not list(tmp_path.glob(".*"))
    assert len(json.loads((tmp_path / "manifest.json").read_text())["shards"]) == 1
    assert torch.equal(in_order(cache(Rows(), tmp_path, tokens=TOKENS)), Rows().x)


def test_a_file_gets_its_name_when_it_is_whole(tmp_path, monkeypatch):
    sizes = []

    def replace(part, path):
        sizes.append((path.name, part.stat().st_size))
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(ValueError, match="manifest.json must be writable, got 'Read-only file system'"):
        cache(Rows(), tmp_path, tokens=TOKENS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="00000.safetensors must be writable"):
        shards.write_shard(
            tmp_path, {"dtype": "float32", "d_in": 2, "grad": False, "shards": []}, torch.ones(3, 2), [0, 0]
        )
    assert not list(tmp_path.iterdir())
    assert sizes[1] == ("00000.safetensors", 2**16 + 24)


def test_room_on_the_disk_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 0, 10**5))
    folder = tmp_path / "new" / "folder"
    message = (
        r"must have room for 0.000467 GB \(200 tokens of 1,024 bytes\), got 0.0001 GB free; free some, store fewer"
    )
    with pytest.raises(ValueError, match=message):  # 200 KiB of rows, and 4 headers of 64 KiB
        cache(Rows(), folder, tokens=TOKENS)
    assert not folder.parent.exists()
    cache(Rows(), folder, tokens=20)


# Damage


def damaged(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    return path


def test_a_flipped_byte_is_named_by_file_before_the_first_batch(tmp_path):
    cache(Rows(), tmp_path, tokens=TOKENS)
    generator = torch.Generator().manual_seed(0)
    for name in sorted(files(tmp_path)):
        whole = (tmp_path / name).read_bytes()
        size = len(whole) if name == "manifest.json" else shards.HEADER_BYTES + 8 * 1024
        for place in torch.randint(size, (12,), generator=generator).tolist():
            (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            if name == "manifest.json" and json_or_none(tmp_path / name) == json.loads(whole):
                continue  # in the white space between
            with pytest.raises(ValueError, match=f"{name} must"):
                next(iter(CachedActivations(tmp_path)))
        (tmp_path / name).write_bytes(whole)
    assert sorted(numbers_of(CachedActivations(tmp_path))) == list(range(TOKENS))


def json_or_none(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_rows_that_changed_are_found_once_and_the_remedy_works(tmp_path):
    stream = cache(Rows(), tmp_path, tokens=TOKENS)
    before = files(tmp_path)
    path = damaged(tmp_path, "00001.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 128]))
    damagedly_opened = CachedActivations(tmp_path)
    for check in (damagedly_opened.verify, lambda: iter(damagedly_opened)):
        with pytest.raises(
            ValueError, match=r"00001.safetensors must have the sha256 .*copy it anew, or remove it and"
        ):
            check()
    path.unlink()
    stream = cache(Rows(), tmp_path, tokens=TOKENS)
    assert files(tmp_path) == before
    assert torch.equal(in_order(stream), Rows().x)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("00002.safetensors", lambda data: data[:-5], "00002.safetensors must have 131,072 bytes, got 131,067"),
        ("00002.safetensors", lambda data: data + b"x", "00002.safetensors must have 131,072 bytes, got 131,073"),
        ("00001.safetensors", None, "00001.safetensors must be there, since manifest.json names it, but is missing"),
        ("00000.safetensors", lambda d: d.replace(b"F32", b"I32"), "00000.safetensors must begin with the header"),
        ("manifest.json", None, "folder must hold a cache, got .* without manifest.json"),
        ("manifest.json", lambda data: data[:100], "must be the manifest of a cache, got something else or half of it"),
        ("manifest.json", lambda data: b"[1]", "must be the manifest of a cache, got something else"),
        ("manifest.json", lambda data: b'{"format": "other"}', "must be the manifest of a cache"),
        ("manifest.json", lambda d: d.replace(b'n": 1,', b'n": 2,'), "must have format_version 1, got 2; write"),
        ("manifest.json", lambda d: d.replace(b'"rows": 64', b'"rows": 63', 1), "its sha256 is not its own"),
    ],
)  # fmt: skip
def test_damaged_folders_are_refused_when_they_are_opened(tmp_path, name, change, message):
    cache(Rows(), tmp_path, tokens=TOKENS)
    if change is None:
        (tmp_path / name).unlink()
    else:
        damaged(tmp_path, name, change)
    with pytest.raises(ValueError, match=message):
        CachedActivations(tmp_path)


def test_lost_shards_are_written_again(tmp_path):
    cache(Rows(), tmp_path, tokens=TOKENS)
    before = files(tmp_path)
    (tmp_path / "00000.safetensors").unlink()
    damaged(tmp_path, "00002.safetensors", lambda data: data[:1000])
    cache(Rows(), tmp_path, tokens=TOKENS)
    assert files(tmp_path) == before


def test_lost_shards_whose_writing_is_cut_off_again_leave_no_whole_cache(tmp_path):
    cache(Rows(), tmp_path, tokens=TOKENS)
    before = files(tmp_path)
    (tmp_path / "00001.safetensors").unlink()
    with pytest.raises(KeyboardInterrupt):
        cache(Rows(fails_at=4), tmp_path, tokens=TOKENS)
    with pytest.raises(ValueError, match="cut off after 1 shards"):
        CachedActivations(tmp_path)
    cache(Rows(), tmp_path, tokens=TOKENS)
    assert files(tmp_path) == before


# What does not belong together


def test_a_cache_of_another_stream_is_refused_with_the_difference(model, tmp_path):
    texts = some_texts()
    stream_of(model).cache(tmp_path)
    others = [
        (stream_of(model, texts=texts[1:]), "fingerprint='"),
        (stream_of(model, grad=True), "grad=False, got True"),
        (stream_of(model, context=5), "context=16, got 5"),
        (Activations(model, "blocks.0.hook_resid_post", texts=texts), f"site='{SITE}', got 'blocks.0"),
        (stream_of(load_model(tiny_gpt2(), device="cpu", dtype=torch.bfloat16)), "weights='"),
        (Rows(), "tokens=None, got 200"),
    ]
    for stream, message in others:
        with pytest.raises(ValueError, match=f"must be a cache of this stream, but was written with {message}"):
            cache(stream, tmp_path, tokens=TOKENS if isinstance(stream, Rows) else None)
    with pytest.raises(ValueError, match="dtype='float32', got 'bfloat16'"):
        stream_of(model).cache(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="tokens=None, got 7"):
        stream_of(model).cache(tmp_path, tokens=7)


def test_a_stream_of_as_many_texts_that_begin_alike_but_are_more_is_another(model, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_lib.activations.FINGERPRINT_TEXTS", 20)
    texts = some_texts()
    stream_of(model, texts=texts).cache(tmp_path)
    longer = stream_of(model, texts=[*texts, "cat"])
    assert longer.fingerprint == stream_of(model, texts=texts).fingerprint
    with pytest.raises(ValueError, match="items=30, got 31"):
        longer.cache(tmp_path)


def test_weights_that_were_trained_on_are_another_model(tmp_path):
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    stream = Activations(net, "0", inputs=torch.ones(4, 3), batch_size=2)
    stream.cache(tmp_path)
    with torch.no_grad():
        net[1].bias[1] += 0.5
    with pytest.raises(ValueError, match="weights='"):
        stream.cache(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float64}, "dtype must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64"),
        ({"tokens": 0}, "tokens must be an integer of at least 1, got 0"),
        ({"tokens": True}, "tokens must be an integer of at least 1, got True"),
        ({"tokens": None}, "tokens must be given for a Rows, whose end is not known"),
        (
            {"stream": [torch.ones(2, 2)]},
            "stream must have a fingerprint, by which the cache is known again, got a list",
        ),
        ({"stream": Rows(0)}, "must yield at least one row, got none in 1 batches"),
    ],
)
def test_what_cannot_be_cached_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        cache(**({"stream": Rows(), "folder": tmp_path, "tokens": TOKENS} | arguments))
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("item", [torch.ones(3), torch.ones(2, 2, dtype=torch.long), "cat", Batch(torch.ones(2, 2, 2))])
def test_batches_that_are_no_rows_are_refused(tmp_path, item, as_a_user):
    rows = Rows()
    rows.x = None
    stream = type("Other", (), {"fingerprint": "00", "batch_size": 2, "seed": 0, "__iter__": lambda _: iter([item])})()
    with pytest.raises(ValueError, match=r"must yield Batch or floating tensors \(batch, d_in\)"):
        cache(stream, tmp_path, tokens=4)


def test_batches_of_different_kinds_are_refused(tmp_path):
    rows = Rows()
    for other in (Batch(torch.ones(2, 3)), Batch(torch.ones(2, D_IN), torch.ones(2, D_IN))):
        items = [Batch(rows.x[:24]), other]
        stream = type(
            "Mixed", (), {"fingerprint": "00", "batch_size": 2, "seed": 0, "__iter__": lambda _, i=items: iter(i)}
        )
        with pytest.raises(ValueError, match=f"all batches must have d_in={D_IN} and a gradient if the first one has"):
            cache(stream(), tmp_path / str(other.x.shape), tokens=100)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="folder must be new, empty or a cache, got .*choose another"):
            cache(Rows(), folder, tokens=TOKENS)
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]


@pytest.mark.parametrize("batch_size", [0, True, 2.5])
def test_a_batch_of_no_whole_number_is_refused(tmp_path, batch_size, as_a_user):
    cache(Rows(), tmp_path, tokens=TOKENS)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got"):
        CachedActivations(tmp_path, batch_size=batch_size)


# Training


def test_training_reads_a_cache_and_evaluation_refuses_what_was_trained_on(model, tmp_path):
    stream = stream_of(model, texts=some_texts(100)).cache(tmp_path)
    saes = [sae_lib.TopKSAE(12, 24, 3), sae_lib.TopKSAE(12, 24, 3)]
    for sae in saes:
        run = sae_lib.train(sae, stream, tokens=300, seed=4)
    assert run.tokens == 300
    assert torch.equal(saes[0].W_dec, saes[1].W_dec)
    with pytest.raises(ValueError, match="held out, got the texts that the SAE was trained on"):
        sae_lib.evaluate(saes[0], stream, tokens=100)
    with pytest.raises(ValueError, match="held out"):
        sae_lib.evaluate(saes[0], stream_of(model, texts=some_texts(100)), tokens=100)
    report = sae_lib.evaluate(saes[0], stream, tokens=100, allow_train=True)
    assert "fvu" in report and "loss_recovered" not in report


def test_it_says_what_it_is(tmp_path):
    stream = cache(Rows(), tmp_path / "here", torch.bfloat16, tokens=TOKENS)
    assert "here', d_in=256, tokens=200, dtype=torch.bfloat16, batch_size=16, seed=0, grad=False)" in repr(stream)


def test_what_was_repaired_is_what_is_read(tmp_path):
    stream = cache(Rows(), tmp_path, tokens=TOKENS)
    path = tmp_path / "00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="00001"):
        next(iter(stream))
    path.unlink()
    path.write_bytes(whole)  # another file of the same name
    assert torch.equal(in_order(stream), Rows().x)


def test_memory_of_batches_that_were_held_is_given_back(tmp_path):
    stream = cache(Rows(), tmp_path, tokens=TOKENS)
    stream.batch_size = 4
    held = list(stream)
    assert len(held) == 50
    del held
    gc.collect()
    assert len(stream._free) < 20


def test_hidden_files_are_not_something_else(tmp_path):
    (tmp_path / ".manifest.json.77.part").write_text("{")
    (tmp_path / ".DS_Store").write_text("")
    assert numbers_of(cache(Rows(), tmp_path, tokens=TOKENS)).sort().values.tolist() == list(range(TOKENS))


@pytest.mark.parametrize("change", [{"file": "../00000.safetensors"}, {"rows": 10**6}])
def test_a_manifest_names_only_shards_of_its_own_folder_and_size(change, tmp_path):
    cache(Rows(), tmp_path, tokens=TOKENS)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0] |= change
    manifest["sha256"] = shards.own_hash(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="must name shards"):
        CachedActivations(tmp_path)
