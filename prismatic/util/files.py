"""Atomic writes (a reader sees the old file or the whole new one, also after a power cut), reading of JSON, and local
copies of the model hub's repositories.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub. Python files of a
repository are never fetched, since nothing of a checkpoint is ever run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from prismatic.util.errors import UsageError, one_line

# What torch raises for a file of its own that is damaged: a wrong byte surfaces as whatever it causes first.
DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    pickle.UnpicklingError,
    struct.error,
)
# What is taken for the id of a model hub's repository.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def longest_name(folder: str | Path) -> int:
    """Bytes that the name of a file in `folder`, which need not exist yet, may have."""
    path = Path(folder).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return os.pathconf(path, "PC_NAME_MAX")


def refuse_long_name(flag: str, path: str | Path) -> None:
    """Raise UsageError, naming `flag`, if the file system takes no name as long as that of `path`."""
    path = Path(path)
    size, most = len(path.name.encode()), longest_name(path.parent)
    if size > most:
        raise UsageError(f"{flag}: a name of {size} bytes found, {path.name[:40]}...; accepted: at most {most}")


def refuse_no_folder(flag: str, path: str | Path) -> None:
    """Raise UsageError, naming `flag`, if `path`, to write into or to make, is no folder and none can be made there."""
    refuse_long_name(flag, path)
    place = Path(path).expanduser().absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"{flag}: {place} is not a folder; accepted: a folder, or a place for a new one")
    try:
        tempfile.TemporaryFile(dir=place).close()  # os.access grants root what a file system may refuse.
    except OSError as error:
        raise UsageError(f"{flag}: {place} is not writable ({error.strerror}); accepted: a folder that is") from None


def refuse_no_file(flag: str, path: str | Path) -> None:
    """Raise UsageError, naming `flag`, if no file can be written to `path`, in a folder that is made where needed."""
    refuse_long_name(flag, path)
    if os.path.isdir(Path(path).expanduser()):
        raise UsageError(f"{flag}: {path} is a folder; accepted: a file")
    refuse_no_folder(flag, Path(path).parent)


def fitting_name(name: str, most: int) -> str:
    """`name`, or when it has more than `most` bytes its beginning, a hash of all of it, and its end."""
    whole = name.encode()
    if len(whole) <= most:
        return name
    digest = f"..{hashlib.sha256(whole).hexdigest()[:8]}.."
    kept = (most - len(digest)) // 2
    return whole[:kept].decode(errors="ignore") + digest + whole[-kept:].decode(errors="ignore")


def temporary_prefix(target: Path) -> str:
    """Beginning of the temporary name beside `target`; short, since a name near the longest must be writable too."""
    return f".{fitting_name(target.name, 60)}."


@contextmanager
def storage_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn what a full, read-only or failing disk makes writers raise into one line.

    Raises UsageError: names `what` was to be written, and the room in `folder`.
    """
    try:
        yield
    except BaseException as error:
        # Writers in Rust (safetensors, tokenizers) and C++ (torch) raise no OSError.
        if not isinstance(error, OSError) and not re.search(
            r"os error \d|\[Errno|iostream|inline_container", str(error)
        ):
            raise
        free = f"{shutil.disk_usage(folder).free / 1e9:.1f} GB" if folder.is_dir() else "nothing"
        raise UsageError(
            f"{what}: cannot be written to {folder}, where {free} is left ({one_line(error, 160)}); what "
            "was written before is kept; accepted: a folder with room, then the same command with --resume True"
        ) from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    The temporary name keeps the suffix of `path`, since several writers choose their format by it.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=temporary_prefix(target), suffix=target.suffix[-60:])
    except FileNotFoundError as error:  # Of /proc, which takes no folders, and in a working folder that was removed.
        said = "no such folder, and none can be made there"
        raise NotADirectoryError(errno.ENOTDIR, said, str(target.parent)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; give the result the mode an ordinary open() would have.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        _fsync(temporary)
        temporary.replace(target)
        _fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path` atomically, creating parent folders."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_mapping(path: Path) -> dict[str, Any]:
    """An object from a JSON file, or from a YAML file told by its ending.

    Raises UsageError: the file is missing, is of neither kind, or is not an object.
    """
    return _read_object(path, "YAML" if path.suffix in (".yaml", ".yml") else "JSON")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UsageError: the file is missing, is not JSON, or is not an object."""
    return _read_object(path, "JSON")


def _read_object(path: Path, kind: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if kind == "YAML" else json.loads(text)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (ValueError, RecursionError, yaml.YAMLError, OSError) as error:
        raise UsageError(f"{path}: not valid {kind} ({one_line(error)})") from None
    if not isinstance(content, dict):
        name = "mapping" if kind == "YAML" else "object"
        raise UsageError(f"{path}: expected a {kind} {name}, found {type(content).__name__}")
    return content


def is_hub_id(name: str) -> bool:
    """Tell whether `name` can be a hub repository: it looks like owner/name, and its first part is no folder here."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).parent.is_dir()


def find_folder(flag: str, name: str, patterns: Sequence[str] | None = None) -> Path:
    """The local folder `name`, or the local snapshot of the hub repository of that id, downloaded where needed.

    `patterns` are the files wanted of a hub repository, as in "*.json"; None: all of them. Raises UsageError: neither
    exists.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if not is_hub_id(name):
        raise UsageError(f"{flag}: no such folder: {name!r}; accepted: a checkpoint folder or a hub id (owner/name)")
    import huggingface_hub

    wanted = None if patterns is None else list(patterns)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*.py"]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = one_line(error, 200)
        raise UsageError(f"{flag}: {name!r} is no folder here and could not be had from the hub: {reason}") from error
