"""The progress bar of every command that takes long."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(console: Console | None = None, *, hidden: bool = False) -> Progress:
    """A bar on `console` (default: standard error); its tasks have a field `info`, shown at the end of the line."""
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    console = console or Console(stderr=True)
    return Progress(*columns, TextColumn("{task.fields[info]}"), console=console, disable=hidden)
