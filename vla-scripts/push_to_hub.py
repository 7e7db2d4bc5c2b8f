"""Publish a checkpoint on the model hub, with a model card filled from its files.

    python vla-scripts/push_to_hub.py --checkpoint runs/my-run--50005_chkpt --repo_id me/my-policy --license llama2 \
        --results runs/eval/spatial/summary.json,runs/eval/object/summary.json

`--dry_run DIR` writes what would be published into DIR and asks no hub. The token is huggingface_hub's (HF_TOKEN, or
`hf auth login`); HF_ENDPOINT names another hub. Training state (optimizer, random states) stays here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismatic.util.cli import run
from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import HUB_ID, refuse_no_folder
from prismatic.util.flags import check, limited, names, split_names, split_paths

_LICENSE = "the hub's name of a license, such as llama2 (OpenVLA-7B's weights) or mit"


@dataclass
class PushConfig:
    checkpoint: str = limited("", needed="a checkpoint folder")  # Checkpoint folder to publish
    # Repository on the hub (owner/name); created when it is not there
    repo_id: str = limited("", needed="a hub id (owner/name)")
    # Of the weights, as the hub names licenses (llama2, mit, other, ...); the base model's binds you
    license: str = limited("", needed=_LICENSE)
    base_model: str = ""  # Hub id of the base model; default: what the checkpoint's files say
    datasets: str = names("")  # Hub ids of the training data, as a comma list
    results: str = ""  # summary.json files of run_libero_eval.py, as a comma list: success rates for the card
    private: bool = False  # Create the repository as a private one
    message: str = "Upload checkpoint"  # Of the commit
    dry_run: str = ""  # Folder to write the files into instead of publishing them


def main(config: PushConfig) -> int:
    """Publish, or write what would be published; returns 0."""
    _check(config)
    from experiments.robot import publish
    from prismatic.util.files import read_json

    folder = Path(config.checkpoint).expanduser()
    facts = publish.CardFacts.from_checkpoint(folder, config.base_model)
    summaries = [read_json(Path(file)) for file in split_paths(config.results)]
    for file, summary in zip(split_paths(config.results), summaries, strict=True):
        if "suites" not in summary:
            raise UsageError(f"--results: {file} has no suites; accepted: summary.json files of run_libero_eval.py")
    if not facts.merged and not HUB_ID.fullmatch(facts.base_model):
        raise UsageError(
            f"--base_model: {folder} holds only an adapter, whose base model {facts.base_model!r} others cannot find; "
            "accepted: the base model's hub id"
        )
    if config.base_model and not HUB_ID.fullmatch(config.base_model):
        raise UsageError(f"--base_model: {config.base_model!r} found; accepted: a hub id (owner/name)")
    dataset_ids = list(split_names(config.datasets))
    try:
        card = publish.model_card(facts, config.repo_id, config.license, dataset_ids=dataset_ids, summaries=summaries)
    except Exception as error:  # A template fails in its own ways.
        if isinstance(error, UsageError) or not summaries:
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UsageError(f"--results: {config.results}: damaged ({reason}); accepted: summary.json files") from error
    files = publish.published_files(folder)
    texts = {publish.CARD: card, **publish.changed_texts(folder, facts.base_model)}
    if config.dry_run:
        publish.write_copy(folder, files, texts, Path(config.dry_run).expanduser())
        print(f"would publish {len(files) + 1} files as {config.repo_id}: {config.dry_run}")
        return 0
    url = publish.publish(folder, files, texts, config.repo_id, private=config.private, message=config.message)
    print(f"published {len(files) + 1} files: {url}")
    return 0


def _check(config: PushConfig) -> None:
    """Refuse wrong flags before anything is read. Raises UsageError: a flag has a value that cannot work."""
    check(config)
    if not Path(config.checkpoint).expanduser().is_dir():
        raise UsageError(f"--checkpoint: no such folder: {config.checkpoint!r}; accepted: a checkpoint folder")
    for flag, ids in (
        ("repo_id", [config.repo_id]),
        ("datasets", split_names(config.datasets)),
    ):
        for name in ids:
            if not HUB_ID.fullmatch(name):
                raise UsageError(f"--{flag}: {name!r} found; accepted: a hub id (owner/name)")
    if config.dry_run:
        if Path(config.dry_run).expanduser().exists():
            raise UsageError(f"--dry_run: {config.dry_run} exists; accepted: the name of a new folder")
        refuse_no_folder("--dry_run", config.dry_run)


if __name__ == "__main__":
    run(PushConfig, main)
