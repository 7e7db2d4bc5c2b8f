"""Checkpoints of the model hub: what is taken for a repository's id, and its local copy. Imports no torch.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub. Python files of a
repository are never fetched, since nothing of a checkpoint is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from prismatic.util.errors import UsageError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


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
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{flag}: {name!r} is no folder here and could not be had from the hub: {reason}") from error
