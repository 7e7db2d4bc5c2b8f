"""The format that a dataset on disk has."""

from __future__ import annotations

from pathlib import Path

from prismatic.util.errors import UsageError
from prismatic.vla.datasets.builder import open_dataset
from prismatic.vla.datasets.episodes import DatasetSplit
from prismatic.vla.datasets.frame_index import RLDSSplit
from prismatic.vla.datasets.specs import DatasetSpec
from prismatic.vla.platforms import Platform


def find_splits(
    data_root_dir: Path,
    name: str,
    spec: DatasetSpec,
    platform: Platform,
    with_proprio: bool = True,
    num_images: int | None = None,
) -> dict[str, DatasetSplit]:
    """The splits of the dataset in `data_root_dir/name`: LeRobot when it holds meta/info.json, else RLDS.

    States that are not used (`with_proprio` False), and views after the first `num_images`, may be missing or wrong.

    Raises:
        UsageError: a missing folder, unreadable metadata, or a schema that does not fit `spec` and `platform`.
    """
    if (data_root_dir / name / "meta" / "info.json").is_file():
        from prismatic.vla.datasets.lerobot.split import open_lerobot

        if spec.rlds_only:
            raise UsageError(
                f"{data_root_dir / name}: a LeRobot dataset, but {name!r} is registered for its RLDS features "
                f"({', '.join(spec.numbers)}); accepted: RLDS files, or a name of its own (--dataset_file)"
            )
        return dict(open_lerobot(data_root_dir / name, spec, platform, with_proprio, num_images))
    rlds = open_dataset(data_root_dir, name, spec, platform, with_proprio, num_images)
    return {split: RLDSSplit(files) for split, files in rlds.items()}
