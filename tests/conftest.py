"""Settings and fixtures of all tests: one thread per process, no network, the golden reference data."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Set before NumPy and torch are imported anywhere, since they read these once. Reference tolerances assume few threads,
# several test processes share the cores, and no test may depend on a model hub.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "Agg",
    "PYTHONFAULTHANDLER": "1",  # what has to be killed, or crashes, prints its stacks
}.items():
    os.environ.setdefault(_name, _value)

ROOT = Path(__file__).resolve().parents[1]
FULL_GOLDEN = ROOT.parent / "shared" / "golden"
GOLDEN_SUBSET = ROOT / "tests" / "golden"


_reporter: pytest.TerminalReporter | None = None


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    global _reporter
    _reporter = config.pluginmanager.get_plugin("terminalreporter")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failure when it happens: a run that is stopped never comes to its summary."""
    if report.failed and _reporter is not None:
        name = f"{report.nodeid} ({report.when}, {report.duration:.0f} s)"
        _reporter.write_line(f"\n{name}\n{report.longreprtext[-3000:]}")


class GoldenSubset(type(Path())):  # type: ignore[misc]  # the concrete class differs by platform
    """The folder of reference data kept in the repository: reaching for a file that is not in it skips the test.

    `folder / name` is the access that checks; the complete data are about 26 MB and live outside the repository.
    """

    def __truediv__(self, key: str) -> GoldenSubset:
        path = super().__truediv__(key)
        if not path.exists():
            pytest.skip(f"{path.relative_to(GOLDEN_SUBSET)} is not in the subset tests/golden of the reference data")
        return path


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the reference outputs: `$GOLDEN_DIR`, else shared/golden beside the checkout, else the subset here."""
    chosen = os.environ.get("GOLDEN_DIR")
    if chosen and Path(chosen).resolve() != GOLDEN_SUBSET:
        folder = Path(chosen).resolve()
        if not folder.is_dir():
            pytest.fail(f"GOLDEN_DIR={chosen}: no such folder")
        return folder
    if not chosen and FULL_GOLDEN.is_dir():
        return FULL_GOLDEN
    if not GOLDEN_SUBSET.is_dir():
        pytest.skip("no reference data: neither shared/golden beside the checkout nor tests/golden")
    return GoldenSubset(GOLDEN_SUBSET)


@pytest.fixture(scope="session")
def openvla_checkpoint(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the component files that upstream's training saved, of the L1 and the diffusion head."""
    folder = tmp_path_factory.mktemp("openvla") / "checkpoint"
    shutil.copytree((golden_dir / "openvla_tiny" / "model.safetensors").parent, folder)
    shutil.copytree(golden_dir / "finetuned_ckpt_files", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def l1_checkpoint(openvla_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the L1 head alone."""
    diffusion = shutil.ignore_patterns("noisy_action_projector--*")
    return Path(shutil.copytree(openvla_checkpoint, tmp_path_factory.mktemp("l1") / "checkpoint", ignore=diffusion))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout's top folder."""
    return ROOT
