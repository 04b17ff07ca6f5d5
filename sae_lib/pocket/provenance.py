"""Where a file comes from: commit, hashes, versions; and files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path


def commit(*paths: str) -> str:
    """The commit of this source, ``+`` if files of it have changed since; ``unknown`` without a repository.

    Args:
        paths: files and folders that count, by default ``sae_lib/pocket``.
    """
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--", *(paths or ["sae_lib/pocket"])) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_json(path: Path, content: object) -> None:
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
