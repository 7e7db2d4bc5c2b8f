"""The code that ran: package versions, and the commit of the checkout. Imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rocket-vla", "torch", "transformers", "timm", "peft", "accelerate", "numpy", "mujoco", "robosuite")


def package_version(name: str) -> str | None:
    """Version of an installed distribution; None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Python, the machine's kind, and the versions of the packages that influence numbers."""
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    versions = ((name, package_version(name)) for name in PACKAGES)
    return machine | {name: version for name, version in versions if version is not None}


def code_version() -> dict[str, object]:
    """Commit of the checkout, and whether tracked files differ from it; {} outside of a git checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit, "changed": changed}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
