"""Scripts as modules; their folder's name, vla-scripts, is no module name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parents[2] / "vla-scripts"


def load_script(name: str) -> ModuleType:
    """Execute a script under a name of its own, without running its main."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_finetune_script() -> ModuleType:
    """vla-scripts/finetune.py as a module."""
    return load_script("finetune")
