"""Lines of a program's output that a user should not be shown."""

from __future__ import annotations

import re


def noise(text: str) -> list[str]:
    """Lines that warn of something, draw a bar, or were said before."""
    lines = [line for line in text.splitlines() if line.strip()]
    repeated = [line for number, line in enumerate(lines) if line in lines[:number]]
    return repeated + [line for line in lines if re.search(r"warn|deprecat|\d(it/s|s/it)\b", line, re.IGNORECASE)]
