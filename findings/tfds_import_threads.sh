#!/usr/bin/env bash
# Package: etils 1.15.0 with tensorflow-datasets 4.9.10 (and rich 15.0.0).
# Expected: while a module is imported, other threads import what they need as always.
# What happens: etils.epy.lazy_imports, under which tensorflow_datasets does some of its imports, replaces builtins.__import__
#   for all threads. A relative import in another thread then ends in ValueError: Relative import statements not supported, and
#   a function that it imports from a module is a LazyModule, which cannot be called. A progress display of rich imports
#   relatively as it draws: the thread that draws ends with that error if tensorflow_datasets is imported beside it.
#   It is a matter of timing: the second part starts ten times, and lets Python change threads more often than by default.
# Why it matters here: data sets of RLDS are read and written beside progress displays, and tensorflow_datasets is imported late.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet etils==1.15.0 tensorflow-datasets==4.9.10 rich==15.0.0
cat > "$work/lazy.py" <<'PY'
import multiprocessing
import sys
import threading

from etils import epy

raised = []


def attempt(call):
    try:
        call()
        raised.append("fine")
    except Exception as error:
        raised.append(f"{type(error).__name__}: {error}")


def absolute():
    from os.path import join

    join("a", "b")


def work():
    attempt(multiprocessing.get_logger)  # It imports .util at each call.
    attempt(absolute)


def in_thread():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


in_thread()
with epy.lazy_imports():
    in_thread()
print(f"without lazy_imports in the main thread: {raised[:2]}")
print(f"within it: {raised[2:]}")
good = raised[:2] == ["fine", "fine"] and "Relative import" in raised[2] and "not callable" in raised[3]
sys.exit(0 if good else 1)
PY
cat > "$work/display.py" <<'PY'
import io
import sys
import threading

from rich.console import Console
from rich.progress import Progress

sys.setswitchinterval(1e-6)
raised = []
threading.excepthook = lambda args: raised.append(f"{args.exc_type.__name__}: {args.exc_value}")
console = Console(file=io.StringIO(), force_terminal=True)
with Progress(console=console, refresh_per_second=1e6) as progress:
    progress.add_task("reading", total=None)
    import tensorflow_datasets

assert tensorflow_datasets.__version__.startswith("4.9.10")
print(raised[0] if raised else "fine")
PY
"$work/venv/bin/python" "$work/lazy.py"
for _ in {1..10}; do "$work/venv/bin/python" "$work/display.py" 2>> "$work/errors" || { tail -20 "$work/errors"; exit 1; }; done > "$work/seen"
sort "$work/seen" | uniq -c
count=$(grep -c "ValueError: Relative import statements not supported" "$work/seen" || true)
echo "seen: rich's display ended $count of 10 times"
[ "$count" -gt 0 ]
