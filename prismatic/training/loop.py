"""The training loop: steps, log lines, checkpoints, and a clean stop.

Nothing in a step waits for the device; metrics are fetched once a log line. The first Ctrl-C (or SIGTERM, as sent by
cluster schedulers) finishes the step, saves and stops; a second one stops at once.
"""

from __future__ import annotations

import math
import signal
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from prismatic.training.config import TrainConfig
from prismatic.training.ema import WeightAverage
from prismatic.training.engine import Engine
from prismatic.training.metrics import MetricAverager, MetricLog, used_memory
from prismatic.training.module import move_batch
from prismatic.util.errors import UsageError
from prismatic.util.progress import progress_bar
from prismatic.vla.batch import Batch
from prismatic.vla.datasets import MixtureLoader

SPIKE_WINDOW, SPIKE_LEAST = 100, 20  # Steps whose median loss is the usual one, and how many it takes.
Targets = Callable[[Batch], object]


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag; the previous handlers are back for a second one, and on exit."""

    def __init__(self) -> None:
        self.requested = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()


@dataclass
class TrainState:
    """Progress of training: finished optimizer steps, and the signal that ended it early, or 0."""

    step: int = 0
    stopped_by: int = 0


@dataclass
class Trainer:
    """Runs the optimizer steps of one run."""

    config: TrainConfig
    engine: Engine  # Holds the prepared :class:`TrainablePolicy` and its optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler  # Of that optimizer
    targets: Targets  # From a batch (on the device) to the auxiliary loss's targets; called without gradients
    save: Callable[[int], None]  # Writes a checkpoint of a step
    log: MetricLog
    validate: Callable[[], dict[str, float]] | None = None
    average: WeightAverage | None = None  # What checkpoints and validation use
    loader: MixtureLoader | None = None  # Where the batches come from, to say which they were

    def __post_init__(self) -> None:
        self.accelerator, self.module = self.engine.accelerator, self.engine.module
        self.state = TrainState()
        self._logged_at = 0
        self._averages = MetricAverager()
        self._console = Console(stderr=True)
        # Since the last check: step, draw, loss (on the device).
        self._recent: list[tuple[int, int, torch.Tensor]] = []
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)  # Of the last steps, where spikes are left out.

    def fit(self, batches: Iterator[Batch], start_step: int = 0) -> TrainState:
        """Train from `start_step` to `max_steps`; always saves at the end, also when stopped."""
        self.state = TrainState(start_step)
        self.module.train()
        saved_at = start_step
        self._logged_at = start_step
        clock = time.perf_counter()
        with StopRequest() as stop, self._progress() as progress:
            task = progress.add_task("training", total=self.config.max_steps, completed=start_step, info="")
            while self.state.step < self.config.max_steps:
                self.train_step(batches)
                progress.advance(task)
                if self._logs_now():
                    self._check_finite()
                    clock = self._write_log(clock, progress, task)
                if self._validates_now():
                    self._run_validation()
                if self._saves_now():
                    self._check_finite()
                    self.save(self.state.step)
                    saved_at = self.state.step
                if number := self._stop_agreed(stop):
                    self.state.stopped_by = number if self.state.step < self.config.max_steps else 0
                    break
        if saved_at != self.state.step:
            self._check_finite()
            self.save(self.state.step)
        return self.state

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step over `grad_accumulation_steps` batches."""
        micro_steps = self.config.grad_accumulation_steps
        metrics = []
        module = self.engine.plain
        module.step = self.state.step
        for micro in range(micro_steps):
            batch = move_batch(self._next(batches), self.accelerator.device)
            if micro == 0 and self._samples_now():
                self._averages.add(self._sampled_errors(batch))
            with torch.no_grad(), self.accelerator.autocast():
                targets = self.targets(batch) if module.uses_targets else None
            with self.engine.micro_step(last=micro == micro_steps - 1):
                with self.accelerator.autocast():
                    output = self.module(batch, targets)
                self.engine.backward(output.loss / micro_steps)
            metrics.append(output.metrics)
            draw = self.loader.last_draw if self.loader is not None else 0
            self._recent.append((self.state.step + 1, draw, output.loss.detach()))
        if (self.config.skip_nonfinite or self.config.skip_spikes) and (reason := self._reason_to_leave_out()):
            self._leave_out(reason)
            return
        for values in metrics:
            self._averages.add(values)
        norm = self.engine.update(self.config.max_grad_norm)
        if norm is not None:
            self._averages.add({"grad_norm": norm})
        if self.average is not None:
            self.average.update()
        self.scheduler.step()
        self.state.step += 1

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch. Raises UsageError, with the step, for data that are gone or damaged."""
        try:
            return next(batches)
        except UsageError as error:
            raise UsageError(f"step {self.state.step + 1}: {error}; the last checkpoint is kept") from error

    def _reason_to_leave_out(self) -> str:
        """Say what is wrong with the step's loss or gradient, which all processes share; "" where nothing is."""
        losses = torch.stack([loss for step, _, loss in self._recent if step == self.state.step + 1])
        loss = float(self.accelerator.reduce(losses.float().mean(), reduction="mean"))
        if not (math.isfinite(loss) and self.engine.gradient_norm().isfinite()):
            return "loss or gradient is not finite" if self.config.skip_nonfinite else ""
        usual = statistics.median(self.losses) if len(self.losses) >= SPIKE_LEAST else math.inf
        if self.config.skip_spikes and loss > self.config.skip_spikes * usual:
            return f"loss {loss:.4g} is above {self.config.skip_spikes:g} times the median, {usual:.4g}"
        self.losses.append(loss)
        return ""

    def _leave_out(self, reason: str) -> None:
        """Go on without the step, but for its place."""
        step = self.state.step + 1
        this = [recent for recent in self._recent if recent[0] == step]
        losses = self.accelerator.gather(torch.stack([loss for _, _, loss in this]).float()[None])
        worst = int(losses.nan_to_num(math.inf, math.inf, math.inf).argmax())
        process, micro = divmod(worst, len(this))
        self._report(f"step {step}: {reason}; left out, worst in the batch of {self._samples(this[micro][1], process)}")
        self._recent = [recent for recent in self._recent if recent[0] != step]
        self.engine.leave_out()
        with warnings.catch_warnings(action="ignore"):  # The scheduler misses an optimizer step before its own.
            self.scheduler.step()
        self.state.step = step

    def _samples(self, draw: int, process: int) -> str:
        count = self.config.batch_size
        return "the data" if self.loader is None else self.loader.describe(draw + process * count, count)

    def _check_finite(self) -> None:
        """Refuse to go on, or to save, with what a loss that is not finite has left.

        Raises UsageError: the first step whose loss was not finite, in any process, or that spoiled the weights.
        """
        recent, self._recent = self._recent, []
        if not recent:
            return
        wrong = torch.stack([~loss.isfinite().all() for _, _, loss in recent]).float()
        spoiled = ~torch.stack([held.isfinite().all() for held in self.engine.held()]).all()
        flags = self.accelerator.gather(torch.cat([wrong, spoiled[None].float()])[None])
        if not flags.any():
            return
        # Column by column: the first batch, and the process that had it. Spoiled weights alone count as the last one.
        batch, process = divmod(int(flags.T.flatten().argmax()), len(flags))
        step, draw, _ = recent[min(batch, len(recent) - 1)]
        raise UsageError(
            f"training: the loss or the weights are not finite at step {step}, in the batch of "
            f"{self._samples(draw, process)}; the last checkpoint is kept; accepted: a lower --learning_rate, "
            "--max_grad_norm 1, or --skip_nonfinite True"
        )

    def _samples_now(self) -> bool:
        every = self.config.diffusion_sample_freq
        return self.config.objective == "diffusion" and every > 0 and self.state.step % every == 0

    def _sampled_errors(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Errors of whole action chunks sampled on a training batch; its noise is not taken from training's."""
        seed = (self.config.seed * 1_000_003 + self.state.step) * 4096 + self.accelerator.process_index
        self.module.eval()
        with self.accelerator.autocast():
            errors = self.engine.plain.sampled_errors(batch, seed % 2**63)
        self.module.train()
        return errors

    def _logs_now(self) -> bool:
        step = self.state.step
        return step % self.config.wandb_log_freq == 0 or step in (1, self.config.max_steps)

    def _saves_now(self) -> bool:
        return self.state.step % self.config.save_freq == 0 or self.state.step in self.config.extra_save_steps

    def _validates_now(self) -> bool:
        return self.validate is not None and self.state.step % self.config.val_freq == 0

    def _stop_agreed(self, stop: StopRequest) -> int:
        """Signal that asked a process to stop, or 0; several processes ask each other only at log lines."""
        if self.accelerator.num_processes == 1:
            return stop.requested
        if not self._logs_now():
            return 0
        flag = torch.tensor([float(stop.requested)], device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max().item())

    def _run_validation(self) -> None:
        assert self.validate is not None
        self.module.eval()
        with self.average.applied() if self.average is not None else nullcontext():
            values = {f"val/{name}": value for name, value in self.validate().items()}
        self.module.train()
        self.log.write(self.state.step, values)
        self._report("validation " + " ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def _write_log(self, clock: float, progress: Progress, task: TaskID) -> float:
        values = self._averages.pop(self.accelerator)
        now = time.perf_counter()
        values["learning_rate"] = float(self.scheduler.get_last_lr()[0])
        values |= self._pace(now - clock)
        self.log.write(self.state.step, values)
        shown = ("loss", "action_loss", "align_loss")
        info = "  ".join(f"{name} {values[name]:.4f}" for name in shown if name in values)
        progress.update(task, info=info)
        if not self._console.is_terminal:
            self._report(f"step {self.state.step}/{self.config.max_steps}  {info}  ({values['seconds']:.1f} s)")
        return now

    def _pace(self, seconds: float) -> dict[str, float]:
        """Time, throughput and memory since the last log line; the rest takes as long a step as those steps."""
        config, steps = self.config, self.state.step - self._logged_at
        self._logged_at = self.state.step
        samples = steps * config.batch_size * config.grad_accumulation_steps * self.accelerator.num_processes
        return {
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "seconds_left": seconds / steps * (config.max_steps - self.state.step),
            "memory_gb": used_memory(self.accelerator.device) / 1e9,
        }

    def _report(self, line: str) -> None:
        if self.accelerator.is_main_process:
            self._console.print(line, highlight=False, soft_wrap=True)

    def _progress(self) -> Progress:
        hidden = not (self.accelerator.is_main_process and self._console.is_terminal)
        return progress_bar(self._console, hidden=hidden)
