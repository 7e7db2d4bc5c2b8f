"""Write LIBERO's HDF5 demonstrations (as regenerate_libero_dataset.py leaves them) as an RLDS dataset to fine-tune on.

    python experiments/robot/libero/convert_hdf5_to_rlds.py --task_suite_name libero_spatial \
        --hdf5_dir LIBERO/datasets/libero_spatial_no_noops --out datasets/modified_libero_rlds

The result is `<out>/<suite>_no_noops/1.0.0`, in the layout of the published data: images rotated by 180 degrees, JPEG
of quality 95. LIBERO's own files can be converted as they are, too (128 pixels, with no-ops; choose another
--dataset_name).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np

from experiments.robot.libero.demonstrations import (
    Demonstration,
    demonstration_files,
    instruction_of,
    read_demonstrations,
    rotate,
)
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.files import refuse_long_name, refuse_no_folder
from prismatic.vla.datasets.rlds_writer import Episode, RLDSWriter, encode_jpeg, serialize_episode


@dataclass
class ConvertConfig:
    """Flags of the conversion."""

    hdf5_dir: Path = Path("LIBERO/datasets/libero_spatial_no_noops")  # Folder of <task>_demo.hdf5
    out: Path = Path("datasets/rlds")  # Folder of datasets
    task_suite_name: str = "libero_spatial"  # Names the dataset
    dataset_name: str = ""  # Default <task_suite_name>_no_noops

    def __post_init__(self) -> None:
        self.hdf5_dir, self.out = Path(self.hdf5_dir).expanduser(), Path(self.out).expanduser()
        self.dataset_name = self.dataset_name or f"{self.task_suite_name}_no_noops"


def as_episode(demonstration: Demonstration, instruction: str, source: str) -> Episode:
    """The demonstration in the layout of the RLDS data."""
    return Episode(
        images=[encode_jpeg(rotate(image)) for image in demonstration.images],
        wrist_images=[encode_jpeg(rotate(image)) for image in demonstration.wrist_images],
        state=np.concatenate([demonstration.ee_states, demonstration.gripper_states], axis=1),
        joint_state=demonstration.joint_states,
        action=demonstration.actions,
        instruction=instruction,
        source=source,
    )


def convert(config: ConvertConfig) -> Path:
    """Convert every file; returns the dataset's folder. Raises UsageError: damaged files, or data in the way."""
    files = demonstration_files(config.hdf5_dir, "--hdf5_dir")
    refuse_no_folder("--out", config.out)
    target = config.out / config.dataset_name
    refuse_long_name("--dataset_name", target)
    if target.exists():
        raise UsageError(f"--dataset_name: {target} exists; accepted: another name or --out, or remove it")
    config.out.mkdir(parents=True, exist_ok=True)
    size = 0
    payloads: list[Path] = []
    # Finished episodes wait on disk: a suite at 256 pixels is some 3 GB.
    with tempfile.TemporaryDirectory(dir=config.out, prefix=".converting-") as staging:
        for file in files:
            instruction = instruction_of(file)
            for name, demonstration in read_demonstrations(file):
                shapes = {images.shape[1:] for images in (demonstration.images, demonstration.wrist_images)}
                size = size or demonstration.images.shape[1]
                if shapes != {(size, size, 3)}:
                    raise UsageError(f"{file}: {name}: images of shape {sorted(shapes)}; accepted: ({size}, {size}, 3)")
                episode = as_episode(demonstration, instruction, f"{file.name}/{name}")
                payloads.append(Path(staging) / f"{len(payloads):06d}")
                payloads[-1].write_bytes(serialize_episode(episode))
            print(f"{file.name}: {len(payloads)} episodes so far", flush=True)
        if not payloads:
            raise UsageError(f"--hdf5_dir: the files of {config.hdf5_dir} hold no demonstration")
        notes = "Written by experiments.robot.libero.convert_hdf5_to_rlds"
        folder = RLDSWriter(config.out, config.dataset_name, image_size=size, notes=notes).write_payloads(payloads)
    print(f"wrote {len(payloads)} episodes: {folder}")
    return folder


def main(config: ConvertConfig) -> None:
    convert(config)


if __name__ == "__main__":
    run(ConvertConfig, main)
