"""What a cache of activations is on disk: a folder of checksummed shards and the manifest that names them.

``manifest.json`` says where the activations come from, and has the size and the sha256 of every shard and of itself.
Shards are ``00000.safetensors``, ``00001.safetensors``, ...; each holds one tensor: ``x`` of shape (rows, d_in) or,
with gradients, ``x_and_grad`` of shape (rows, 2, d_in). Its header is padded to 64 KiB, and all shards but the last
have rows that fill whole pages, so that the shards, mapped into memory one behind the other, are one array.

Each file appears whole or not at all, by a rename, and the manifest is written again after every shard: what it names
was whole once, and what it does not name was never finished.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor
from tqdm.auto import tqdm

Manifest = dict[str, Any]

MANIFEST, FORMAT = "manifest.json", {"format": "sae_lib activations", "format_version": 1}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
HEADER_BYTES = 2**16
"""Length of a shard's header; no processor has larger pages, huge ones aside."""
HUGE_PAGE = 2**21
"""Where files and addresses agree modulo this, the system can map so much at once, and random reads get faster."""
REMEDY = "copy it anew, or call stream.cache with the same folder, which writes it again"


def dtype_of(manifest: Manifest) -> torch.dtype:
    """In which the rows are stored."""
    return getattr(torch, manifest["dtype"])


def row_shape(manifest: Manifest) -> tuple[int, ...]:
    """(d_in,), or (2, d_in) where each activation is followed by its gradient."""
    return (2, manifest["d_in"]) if manifest["grad"] else (manifest["d_in"],)


def rows_that_fill_pages(row_bytes: int, about: int) -> int:
    """Rows in a shard of at most `about` bytes that fill whole huge pages or, if none do, whole pages of any processor.

    If not even those do, which takes an odd width, the least number of rows that fills pages, and a larger shard.
    """
    for page in (HUGE_PAGE, HEADER_BYTES):
        step = page // math.gcd(page, row_bytes)
        if step * row_bytes <= about:
            break
    return max(1, about // row_bytes // step) * step


# Writing --------------------------------------------------------------------------------------------------------------


def write_shard(folder: Path, manifest: Manifest, rows: Shaped[Tensor, "rows *row"], following: list[int]) -> None:
    """Write one shard, and then the manifest that names it; `following` is where reading goes on after it."""
    name = f"{len(manifest['shards']):05d}.safetensors"
    head, data = header(manifest, len(rows)), memoryview(rows.view(torch.uint8).numpy()).cast("B")
    digest = hashlib.sha256(head)
    digest.update(data)
    write_whole(folder / name, head, data)
    shard = {"file": name, "rows": len(rows), "bytes": len(head) + len(data), "sha256": digest.hexdigest()}
    manifest["shards"].append(shard | {"next": following})
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with its own hash in it."""
    text = json.dumps(manifest | {"sha256": own_hash(manifest)}, indent=1) + "\n"
    write_whole(folder / MANIFEST, text.encode())


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file that appears whole or not at all, also when the power fails.

    Raises:
        ValueError: if the disk is full, read-only or broken.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            for data in parts:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ValueError(
            f"{path} must be writable, got {error.strerror!r}; the shards that {MANIFEST} names are whole: remedy that "
            "and call stream.cache with the same folder, which goes on from there"
        ) from error
    finally:
        if part.exists():
            part.unlink()


# Reading --------------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, if this version wrote it and nobody else touched it.

    Raises:
        ValueError: if there is none, or it is another program's, of another version, or not as it was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"folder must hold a cache, got {folder}, without {MANIFEST}; write one with stream.cache")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT["format"]:
        raise ValueError(
            f"{path} must be the manifest of a cache, got something else or half of it; copy it anew, or write the "
            "cache again in another folder"
        )
    if manifest.get("format_version") != FORMAT["format_version"]:
        raise ValueError(
            f"{path} must have format_version {FORMAT['format_version']}, got {manifest.get('format_version')!r}; "
            "write the cache again in another folder, or use the version of sae_lib that wrote it"
        )
    if manifest.get("sha256") != own_hash(manifest):
        raise ValueError(
            f"{path} must be as it was written, but its sha256 is not its own: it was edited or damaged; copy it anew, "
            "or write the cache again in another folder"
        )
    row_bytes = math.prod(row_shape(manifest)) * dtype_of(manifest).itemsize
    for shard in manifest["shards"]:
        if (
            not re.fullmatch(r"\d{5,}\.safetensors", shard["file"])
            or shard["bytes"] != HEADER_BYTES + shard["rows"] * row_bytes
        ):
            raise ValueError(
                f"{path} must name shards of {row_bytes} bytes a row in its own folder, got {shard}; write the cache "
                "again in another folder"
            )
    return manifest


def own_hash(manifest: Manifest) -> str:
    """The sha256 of all that a manifest says but the hash itself."""
    bare = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def fault(folder: Path, manifest: Manifest, shard: dict[str, Any]) -> str | None:
    """What is wrong with a shard, as far as its size and header tell, and what to do; None if nothing is."""
    path = folder / shard["file"]
    if not path.is_file():
        return f"{path} must be there, since {MANIFEST} names it, but is missing; {REMEDY}"
    if (size := path.stat().st_size) != shard["bytes"]:
        return f"{path} must have {shard['bytes']:,} bytes, got {size:,}: truncated, or another file; {REMEDY}"
    with open(path, "rb") as file:
        if file.read(HEADER_BYTES) != header(manifest, shard["rows"]):
            return f"{path} must begin with the header of {shard['rows']:,} rows, got other bytes; {REMEDY}"
    return None


def check_hash(folder: Path, shard: dict[str, Any]) -> None:
    """Hash all bytes of a shard.

    Raises:
        ValueError: if they are not those that were written.
    """
    path = folder / shard["file"]
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard["sha256"]:
        raise ValueError(
            f"{path} must have the sha256 {shard['sha256'][:16]}..., got {found[:16]}...: its bytes have changed since "
            "they were written; copy it anew, or remove it and call stream.cache with the same folder, which writes "
            "it again"
        )


def header(manifest: Manifest, rows: int) -> bytes:
    """Header of a safetensors file of one tensor; the format allows spaces at its end."""
    shape, dtype = [rows, *row_shape(manifest)], dtype_of(manifest)
    offsets = [0, math.prod(shape) * dtype.itemsize]
    name = "x_and_grad" if manifest["grad"] else "x"
    text = json.dumps({name: {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": offsets}})
    return (HEADER_BYTES - 8).to_bytes(8, "little") + text.encode().ljust(HEADER_BYTES - 8)


def mapped(paths: list[Path]) -> np.ndarray:
    """The data of all shards as one array of bytes, which cannot be written.

    The files are mapped one behind the other into a stretch of addresses that was reserved for them. Where the system
    cannot map to a chosen place (Windows), they are read into memory.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.concatenate([np.fromfile(path, np.uint8, offset=HEADER_BYTES) for path in paths])
    sizes = [path.stat().st_size - HEADER_BYTES for path in paths]
    reserved = mmap.mmap(-1, sum(sizes) + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
    whole = np.frombuffer(reserved, np.uint8)
    begin = (HEADER_BYTES - whole.ctypes.data) % HUGE_PAGE
    data = whole[begin : begin + sum(sizes)]
    map_file = ctypes.CDLL(None, use_errno=True).mmap
    map_file.restype = ctypes.c_void_p
    map_file.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_longlong]
    address, fixed = data.ctypes.data, 0x10  # MAP_FIXED, which Python does not name
    for path, size in zip(paths, sizes, strict=True):
        with open(path, "rb") as file:
            place = map_file(address, size, mmap.PROT_READ, mmap.MAP_SHARED | fixed, file.fileno(), HEADER_BYTES)
        if place != address:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        address += size
    reserved.madvise(mmap.MADV_RANDOM)  # what is not in memory is read row by row, not with its neighbours
    return data


def progress(total: int | None, unit: str, what: str, done: int = 0) -> tqdm:
    """A bar that shows after two seconds, and leaves nothing behind."""
    return tqdm(total=total, initial=done, unit=unit, unit_scale=True, desc=what, leave=False, delay=2)
