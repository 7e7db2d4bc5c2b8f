"""README.md: every path, make target, script and flag that it names must exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a reader brings along or a run creates, as opposed to files of the repository.
OUTSIDE = ("/", "../", "runs", "runs/", "datasets/", "data/", ".venv", "facebook/", "openvla/")


def shell_commands() -> list[list[str]]:
    """The commands of the README's bash blocks, split into words, without comments."""
    commands = []
    for language, body in FENCE.findall(README):
        if language == "bash":
            lines = body.replace("\\\n", " ").splitlines()
            commands += [words for line in lines if (words := shlex.split(line, comments=True))]
    return commands


def entry_point(words: list[str]) -> tuple[str, ...] | None:
    """Arguments that start the same program under this Python: ("script.py",) or ("-m", "module"); None for others."""
    if "python" in words:
        start = words.index("python") + 1
        return tuple(words[start : start + 2]) if words[start] == "-m" else (words[start],)
    if words[:2] == ["accelerate", "launch"]:
        return (next(word for word in words if word.endswith(".py")),)
    return None


def python_commands() -> list[tuple[tuple[str, ...], list[str]]]:
    """(entry point, flags) of each Python program that the README starts."""
    found = []
    for words in shell_commands():
        program = entry_point(words)
        if program is not None:
            arguments = words[words.index(program[-1]) + 1 :]
            found.append((program, [word.split("=")[0] for word in arguments if word.startswith("--")]))
    return found


@cache
def accepted_flags(program: tuple[str, ...]) -> frozenset[str]:
    """The flags in what `program --help` prints."""
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{' '.join(program)} --help failed: {done.stderr[-2000:]}"
    return frozenset(re.findall(r"--[A-Za-z_][\w.-]*", done.stdout))


def tree_paths() -> list[str]:
    """Full paths of the entries of the annotated tree."""
    body = next(body for language, body in FENCE.findall(README) if language == "text" and "rocket_align/" in body)
    paths, parents = [], {0: ""}
    for line in filter(str.strip, body.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        path = parents[depth] + line.split()[0]
        parents[depth + 1] = path
        paths.append(path)
    return paths


def named_paths() -> list[str]:
    """Paths in running text: link targets, and words in back quotes that look like a file or folder in here."""
    prose = FENCE.sub("", README)
    links = [target for target in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in target]
    quoted = [
        word for code in re.findall(r"`([^`\n]+)`", prose) for word in code.split() if re.fullmatch(r"[\w./-]+", word)
    ]
    files = [word for word in quoted if "/" in word or re.search(r"\.(py|sh|md|toml|png|json|jsonl)$", word)]
    return [path.split("#")[0] for path in links + files if not path.startswith(OUTSIDE)]


def test_the_readers_below_find_something() -> None:
    assert len(tree_paths()) > 10 and len(named_paths()) >= 1
    assert len(python_commands()) >= 2 and any(flags for _, flags in python_commands())


@pytest.mark.parametrize("path", sorted(set(tree_paths() + named_paths())))
def test_path_exists(path: str) -> None:
    assert (ROOT / path).exists(), f"README.md names {path}, which does not exist"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for line in re.findall(r"^([a-z][a-z -]*):", makefile, re.MULTILINE) for name in line.split()}
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(re.findall(r"`[^`]+`", FENCE.sub("", README)))))
    named |= {words[1] for words in shell_commands() if words[0] == "make" and len(words) > 1}
    assert named, "README.md names no make target"
    assert named <= targets


@pytest.mark.parametrize("program", sorted({program for program, _ in python_commands()}), ids=" ".join)
def test_commands_use_known_flags(program: tuple[str, ...]) -> None:
    used = {flag for other, flags in python_commands() if other == program for flag in flags}
    assert used <= accepted_flags(program)


def test_flags_in_the_text_belong_to_some_command() -> None:
    prose = FENCE.sub("", README)
    named = {flag for code in re.findall(r"`([^`\n]+)`", prose) for flag in re.findall(r"--[a-z_]+", code)}
    known = frozenset().union(*(accepted_flags(program) for program, _ in python_commands()))
    assert named <= known
