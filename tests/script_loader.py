"""The fine-tuning script as a module; its folder's name, vla-scripts, is no module name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

SCRIPT = Path(__file__).resolve().parents[1] / "vla-scripts" / "finetune.py"


def load_finetune_script() -> ModuleType:
    """Execute the script under a name of its own, without running its main."""
    spec = importlib.util.spec_from_file_location("finetune_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
