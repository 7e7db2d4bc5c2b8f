"""Depth and camera pose read out of a policy's own tokens by a probe that knows each token's place.

Tokens are those the policy has when it acts. What is the same in every picture, a token's place, earns nothing: numbers
are R2 above the mean of each place, on frames of other tasks. Not an analysis of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.analysis.config import ReadoutConfig
from experiments.analysis.depth import MAX_DEPTH
from experiments.analysis.reach import policy_flags
from experiments.analysis.readout_pictures import DepthPictures, save_pictures, side_by_side
from experiments.analysis.report import Report, line_style, new_figure, save_figure, write_json
from experiments.mini.make.teacher_data import TeacherDataConfig, parse_tasks, read_shard
from experiments.mini.make.teacher_data import main as render_frames
from experiments.robot.libero.suites.tasks import get_task
from experiments.robot.openvla_utils import OpenVLAPolicy
from experiments.robot.policy import Query
from prismatic.checkpoint.folder import check_policy_flags, open_checkpoint, resolve_unnorm_key
from prismatic.checkpoint.layout import split_checkpoint_name
from prismatic.util.errors import UsageError
from prismatic.vla.datasets.image_transforms import CROP_AREA
from rocket_align.analysis.depth_probe import depth_map, patch_depths
from rocket_align.analysis.place_probe import ExplainedBeyondPlace, PlaceProbe, PlaceReadout

_CELLS = 2


@dataclass(frozen=True)
class FrameBatch:
    """Frames of one task: queries of a policy, depth (B, V, H, W) in meters, camera pose (B, V, 6).

    A pose is the camera's position in meters and the direction in which it looks, in the world's frame.
    """

    queries: list[Query]
    depths_BVHW: Tensor
    poses_BVK: Tensor


def read_frames(config: ReadoutConfig, tasks: str) -> Iterator[FrameBatch]:
    """Frames of `experiments.mini.make.teacher_data`, a few at a time.

    Raises:
        UsageError: damaged frames, or frames from before they held the robot's state.
    """
    for suite, task in parse_tasks("tasks", tasks):
        file, instruction = frames_folder(config) / f"{suite}-{task}.npz", get_task(suite, task).instruction
        images, depths, states, cameras = read_shard(file, ("images", "depths", "states", "camera_to_world")).values()
        for first in range(0, len(images), config.batch_size):
            part = slice(first, first + config.batch_size)
            queries = [
                Query(views[0], views[1], state, instruction) for views, state in zip(images[part], states[part])
            ]
            poses = np.concatenate((cameras[part, :, :3, 3], cameras[part, :, :3, 2]), axis=-1)
            depth = torch.from_numpy(depths[part]).float().clamp(max=MAX_DEPTH)
            yield FrameBatch(queries, depth, torch.from_numpy(poses).double())


def chosen_frames(config: ReadoutConfig) -> FrameBatch:
    """`--pictures` test frames, evenly spread: which ones does not depend on any policy."""
    batches = list(read_frames(config, config.test_tasks))
    queries = [query for frames in batches for query in frames.queries]
    chosen = np.linspace(0, len(queries) - 1, config.pictures + 2).round().astype(int)[1:-1]
    depths, poses = (torch.cat([getattr(frames, name) for frames in batches]) for name in ("depths_BVHW", "poses_BVK"))
    return FrameBatch([queries[index] for index in chosen], depths[chosen], poses[chosen])


def frames_folder(config: ReadoutConfig) -> Path:
    """Folder of the frames, in which missing ones are made."""
    return config.frames_dir or config.out_dir / "frames"


class TokenReader:
    """A policy, and the states (L + 1, B, V, P, C) of its vision tokens while it acts; 0 is the embeddings."""

    def __init__(self, policy: OpenVLAPolicy, num_views: int, *, shift: bool) -> None:
        self.policy, self.num_views = policy, num_views
        llama: Any = policy.vla.language_model.model
        self._states: list[Tensor] = []
        for layer in llama.layers:
            layer.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        llama.norm.register_forward_hook(lambda module, inputs, output: self._states.append(output))
        patches = policy.vla.vision_backbone.get_num_patches() * num_views
        self._tokens = slice(1 + shift, 1 + shift + patches)

    def _keep_input(self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        self._states.append(inputs[0] if inputs else named["hidden_states"])

    def __call__(self, queries: list[Query]) -> Tensor:
        """The states at the end of one answer; of a diffusion policy, its last denoising step."""
        self._states.clear()
        self.policy.act(queries)
        depth = len(self.policy.vla.language_model.model.layers) + 1
        states = torch.stack([state[:, self._tokens].float() for state in self._states[-depth:]])
        return states.unflatten(2, (self.num_views, -1))


def cropped(depths_BVHW: Tensor, *, center_crop: bool) -> Tensor:
    """The part of a depth map that the policy sees, to the nearest pixel."""
    if not center_crop:
        return depths_BVHW
    height, width = depths_BVHW.shape[-2:]
    rows, columns = (round(size * CROP_AREA**0.5) for size in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    return depths_BVHW[..., top : top + rows, left : left + columns]


class ReadoutStudy:
    """Probes of every state and view of one policy."""

    def __init__(self, config: ReadoutConfig, folder: str) -> None:
        self.config, self.folder = config, folder
        self.flags = policy_flags(config, folder)
        checkpoint = open_checkpoint(folder, config.base_checkpoint or None)
        key = config.unnorm_key or sorted(checkpoint.statistics)[0]
        self.flags.task_suite_name = ""  # Frames of any suite will do; actions are not looked at.
        if checkpoint.family != "openvla":
            raise UsageError(f"--checkpoint: {checkpoint.path} is a {checkpoint.family} policy; accepted: openvla")
        check_policy_flags(self.flags, checkpoint, resolve_unnorm_key(checkpoint.statistics, key, ""))
        policy = OpenVLAPolicy.from_checkpoint(checkpoint, self.flags, key)
        self.views = min(2, self.flags.num_images_in_input)
        if self.flags.num_images_in_input > self.views:
            raise UsageError(f"--checkpoint: {folder} takes {self.flags.num_images_in_input} views; accepted: 1 or 2")
        self.read = TokenReader(policy, self.views, shift=config.shift)
        self.depth_readouts: list[PlaceReadout] = []

    def see(self, frames: FrameBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (L + 1, B, V, P, C), log-depths (B, V, P, cells), poses (B, V, 6)."""
        tokens = self.read(frames.queries)
        side = int(tokens.shape[3] ** 0.5)
        seen = cropped(frames.depths_BVHW[:, : self.views], center_crop=self.flags.center_crop)
        return tokens, patch_depths(seen, (side, side), _CELLS), frames.poses_BVK[:, : self.views]

    def batches(self, tasks: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """:meth:`see`, of all frames of some tasks."""
        return map(self.see, read_frames(self.config, tasks))

    def measure(self) -> Report:
        """R2 of every state, by view: `depth` of each token, `pose` of the mean of a view's tokens."""
        probes: dict[tuple[int, int], tuple[PlaceProbe, PlaceProbe]] = {}
        for tokens, depths, poses in self.batches(self.config.train_tasks):
            for place in np.ndindex(len(tokens), self.views):
                pair = probes.setdefault(place, (PlaceProbe(self.config.ridge), PlaceProbe(self.config.ridge)))
                pair[0].update(tokens[place[0], :, place[1]], depths[:, place[1]])
                pair[1].update(*_whole_view(tokens[place[0], :, place[1]], poses[:, place[1]]))
        scores = {place: tuple(ExplainedBeyondPlace(probe.solve()) for probe in pair) for place, pair in probes.items()}
        self.depth_readouts = [score[0].readout for (_, view), score in scores.items() if view == 0]
        for tokens, depths, poses in self.batches(self.config.test_tasks):
            for (state, view), score in scores.items():
                score[0].update(tokens[state, :, view], depths[:, view])
                score[1].update(*_whole_view(tokens[state, :, view], poses[:, view]))
        states = range(len({state for state, _ in scores}))
        return {
            "checkpoint": Path(self.folder).name,
            "label": _label(self.folder),
            "step": split_checkpoint_name(Path(self.folder).name)[1] or 0,
            "depth": [[scores[state, view][0].result() for view in range(self.views)] for state in states],
            "pose": [[scores[state, view][1].result() for view in range(self.views)] for state in states],
        }

    def picture(self, frames: FrameBatch) -> DepthPictures:
        """Depth of the third-person view, read out as the mean over states 1 to the last; after :meth:`measure`."""
        tokens, depths, _ = self.see(frames)
        usual = self.depth_readouts[0].outputs_PK
        read = torch.stack([readout(tokens[state, :, 0]) for state, readout in enumerate(self.depth_readouts)])
        side = int(tokens.shape[3] ** 0.5)
        true, policy = (
            depth_map((values - usual)[:, None], (side, side), _CELLS)[:, 0].float().cpu().numpy()
            for values in (depths[:, 0], read[1:].mean(dim=0))
        )
        images = torch.stack([torch.as_tensor(query.image) for query in frames.queries]).movedim(-1, 1)
        seen = cropped(images, center_crop=self.flags.center_crop).movedim(1, -1).numpy()
        return DepthPictures(seen, true, (policy,), (_label(self.folder),))


def _label(folder: str) -> str:
    """Run and step of a checkpoint folder."""
    run, step = split_checkpoint_name(Path(folder).name)
    return run if step is None else f"{run}, step {step:,}"


def _whole_view(tokens_BPC: Tensor, pose_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The mean token and the pose, as the only place of a view."""
    return tokens_BPC.mean(dim=1, keepdim=True), pose_BK[:, None]


def readout(config: ReadoutConfig) -> int:
    """Measure; write readout.json, .png and the depth pictures. Frames are rendered where they are missing."""
    tested = parse_tasks("--test_tasks", config.test_tasks)
    trained = parse_tasks("--train_tasks", config.train_tasks)
    if overlap := set(trained).intersection(tested):
        raise UsageError(f"--test_tasks: {sorted(overlap)} found in --train_tasks too; accepted: other tasks")
    shards = [frames_folder(config) / f"{suite}-{task}.npz" for suite, task in (*trained, *tested)]
    if config.frames_dir is None or not all(shard.is_file() for shard in shards):
        render_frames(
            TeacherDataConfig(
                frames_folder(config),
                tasks=f"{config.train_tasks};{config.test_tasks}",
                episodes=config.episodes,
                frames=config.frames,
                image_size=config.image_size,
                seed=config.seed,
                scene=config.scene,
            )
        )
    parts, pictures = [], []
    for folder in config.checkpoints:
        study = ReadoutStudy(config, folder)
        parts.append(study.measure())
        if config.pictures:
            pictures.append(study.picture(chosen_frames(config)))
    settings = {name: getattr(config, name) for name in ("train_tasks", "test_tasks", "ridge", "shift", "seed")}
    draw(config, parts)
    if pictures:
        save_pictures(side_by_side(pictures), config.out_dir)
    # Last: where it is, all is.
    write_json(config.out_dir / "readout.json", {"analysis": "readout", **settings, "subjects": parts})
    for part in parts:
        depth, pose = (np.mean(part[name][1:]) for name in ("depth", "pose"))
        print(f"{part['label']}: R2 above the place, mean of states 1 to the last: depth {depth:.3f}, pose {pose:.3f}")
    return 0


def draw(config: ReadoutConfig, parts: list[Report]) -> None:
    """Depth and pose by state: a color a policy, dashed for the wrist view."""
    figure = new_figure(6.6, 2.8)
    for axes, name in zip(figure.subplots(1, 2), ("depth", "pose")):
        for number, part in enumerate(parts):
            for view, values in enumerate(np.array(part[name]).T):
                label = part["label"] if view == 0 else None
                axes.plot(range(len(values)), values, ls="--" if view else "-", label=label, **line_style(number))
        axes.set(xlabel="state", title=f"{name}: R2 above the mean of the place")
        axes.axhline(0, color="gray", lw=0.6)
    axes.legend(frameon=False)
    save_figure(figure, config.out_dir / "readout.png")
