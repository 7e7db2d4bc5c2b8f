"""Copies of a checkpoint for others: on the model hub, or in a folder as they would be there."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from prismatic.util.errors import UsageError
from prismatic.util.files import read_json

CARD = "README.md"
_LEFT_HERE = ("training_state", "tensorboard", "wandb")
# Flags of a run that tell about the machine or the account it ran on, and of no use to others.
_PRIVATE_FLAGS = ("data_root_dir", "run_root_dir", "wandb_entity", "wandb_project", "vggt_cache_dir")
_RUN_CONFIG = "run_config.json"
_ADAPTER_CONFIG = "lora_adapter/adapter_config.json"


def published_files(folder: Path) -> list[PurePosixPath]:
    """What of a checkpoint folder others need, relative to it: all but training state, logs, hidden files and code."""
    found = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and not hidden and name.parts[0] not in _LEFT_HERE and file.suffix not in (".py", ".jsonl"):
            found.append(PurePosixPath(name.as_posix()))
    return [name for name in found if str(name) != CARD]


def changed_texts(folder: Path, base_model: str) -> dict[str, str]:
    """Texts that are published instead of files, by name: nothing of this machine's folders is in them.

    The run's flags lose what tells about the machine; the adapter names `base_model`, where others find it too.
    """
    texts = {}
    if (folder / _RUN_CONFIG).is_file():
        flags = {name: value for name, value in read_json(folder / _RUN_CONFIG).items() if name not in _PRIVATE_FLAGS}
        for name, value in flags.items():
            if isinstance(value, str) and Path(value).is_absolute():
                flags[name] = Path(value).name
        texts[_RUN_CONFIG] = json.dumps(flags, indent=2) + "\n"
    if (folder / _ADAPTER_CONFIG).is_file():
        adapter = {**read_json(folder / _ADAPTER_CONFIG), "base_model_name_or_path": base_model}
        texts[_ADAPTER_CONFIG] = json.dumps(adapter, indent=2) + "\n"
    return texts


def write_copy(folder: Path, files: Sequence[PurePosixPath], texts: Mapping[str, str], target: Path) -> None:
    """Write the files and texts into the new folder `target`, which appears when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, temporary / name)
        for text_name, text in texts.items():
            (temporary / text_name).write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(
    folder: Path, files: Sequence[PurePosixPath], texts: Mapping[str, str], repo_id: str, *, private: bool, message: str
) -> str:
    """Commit the files and texts to the hub repository `repo_id`, all at once; returns its address.

    Raises:
        UsageError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    sources: dict[str, str | bytes] = {str(name): str(folder / name) for name in files}
    sources |= {name: text.encode() for name, text in texts.items()}
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in sources.items()]
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message=message)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"--repo_id: {repo_id!r} could not be published: {reason}") from error
    return str(url)
