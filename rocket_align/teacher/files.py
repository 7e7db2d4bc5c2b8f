"""Files of teachers: a hub repository's local copy, JSON, checksums, and writing that leaves no half-written file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
# What any teacher needs of a hub repository; a large model's safetensors come in several files.
HUB_FILES = (CONFIG_NAME, PREPROCESSOR_NAME, "model*.safetensors", "model.safetensors.index.json")
# A repository of the model hub, such as facebook/VGGT-1B.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def local_copy(path: str | Path, patterns: Sequence[str] = HUB_FILES) -> Path:
    """`path` itself, or the snapshot of the hub repository it names, downloaded when it is not there yet.

    Raises ValueError: it looks like a hub id but cannot be had.
    """
    place = Path(path)
    if place.exists() or not _HUB_ID.fullmatch(str(path)) or place.parent.is_dir():
        return place
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=list(patterns)))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: no such file or folder here, and not to be had from the hub: {reason}") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises ValueError: not readable, not JSON, or something else than an object; one line that names the file.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({' '.join(str(error).split())}); accepted: an object") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: found JSON of type {type(values).__name__}; accepted: an object")
    return values


def files_hash(files: Sequence[Path]) -> str:
    """SHA-256 over the names and contents of `files`, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda path: path.name):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it is flushed and renamed to `path`, else removed."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
