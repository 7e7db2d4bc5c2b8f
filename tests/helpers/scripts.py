"""Shell scripts for tests of what other scripts start."""

from __future__ import annotations

from pathlib import Path


def write_script(path: Path, body: str) -> None:
    """Write an executable script, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
