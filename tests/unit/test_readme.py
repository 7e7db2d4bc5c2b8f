"""README.md and docs/: every path, make target, script and flag that they name must exist."""

from __future__ import annotations

import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.programs import run_program

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs").glob("*.md")}
PAGES |= {"README.md": README, "benchmarks/README.md": (ROOT / "benchmarks" / "README.md").read_text()}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a reader brings along or a run creates, as opposed to files of the repository.
OUTSIDE = ("/", "../", "runs", "runs/", "datasets/", "data/", "demo/", ".venv", "facebook/", "openvla/")
FOLDERS = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._")
# Scripts whose flags belong to a subcommand.
SUBCOMMANDS = {
    "experiments.reproduce": ("list", "run", "report", "confirm"),
    "vla-scripts/analyze.py": (
        *("cka", "gradients", "projectors", "cone", "depth", "static", "theorem", "readout", "reach"),
    ),
    "experiments.robot.libero.results": ("report", "compare", "merge", "page"),
    "patches": ("apply", "check", "revert"),
}


def shell_commands(page: str) -> list[list[str]]:
    """The commands of a page's bash blocks, split into words, without comments."""
    commands = []
    for language, body in FENCE.findall(PAGES[page]):
        if language == "bash":
            lines = body.replace("\\\n", " ").splitlines()
            commands += [words for line in lines if (words := shlex.split(line, comments=True))]
    return commands


def entry_point(words: list[str]) -> tuple[str, ...] | None:
    """Arguments that start the same program under this Python: ("script.py",), ("script.py", "subcommand") or ("-m",
    "module"); None for others."""
    if "python" in words:
        start = words.index("python") + 1
        if words[start].startswith("-") and words[start] != "-m":
            return None
        length = 2 if words[start] == "-m" else 1
        following = words[start + length : start + length + 1]
        if following and following[0] in SUBCOMMANDS.get(words[start + length - 1], ()):
            length += 1
        return tuple(words[start : start + length])
    if words[:2] == ["accelerate", "launch"]:
        return (next(word for word in words if word.endswith(".py")),)
    return None


def python_commands(page: str) -> list[tuple[tuple[str, ...], list[str]]]:
    """(entry point, flags) of each Python program of this repository that a page starts."""
    found = []
    for words in shell_commands(page):
        program = entry_point(words)
        if program is not None and not program[0].startswith(OUTSIDE) and program[1:2] != ("pip",):
            arguments = words[words.index(program[-1]) + 1 :]
            found.append((program, [word.split("=")[0] for word in arguments if word.startswith("--")]))
    return found


def programs() -> list[tuple[str, ...]]:
    """Every program that some page starts."""
    return sorted({program for page in PAGES for program, _ in python_commands(page)})


@cache
def accepted_flags(program: tuple[str, ...]) -> frozenset[str]:
    """The flags in what `program --help` prints."""
    done = run_program([sys.executable, *program, "--help"], cwd=ROOT)
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


def named_paths(page: str) -> list[str]:
    """Paths in running text: link targets, and words in back quotes that look like a file or folder in here."""
    prose = FENCE.sub("", PAGES[page])
    if page == "docs/upstream.md":
        prose = re.sub(r"^\|[^|]*", "", prose, flags=re.MULTILINE)  # the first column of its tables is upstream's
    links = [target for target in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in target]
    quoted = [
        word for code in re.findall(r"`([^`\n]+)`", prose) for word in code.split() if re.fullmatch(r"[\w./-]+", word)
    ]
    if page == "README.md":
        files = [word for word in quoted if "/" in word or re.search(r"\.(py|sh|md|toml|png|json|jsonl)$", word)]
        return [path.split("#")[0] for path in links + files if not path.startswith(OUTSIDE)]
    return [word for word in quoted if word.startswith(FOLDERS)]


def test_the_readers_below_find_something() -> None:
    assert len(tree_paths()) > 10 and len(named_paths("README.md")) >= 1
    commands = python_commands("README.md")
    assert len(commands) >= 2 and any(flags for _, flags in commands)


def every_path() -> list[tuple[str, str]]:
    """(page, path) of every path that a page names."""
    named = {(page, path) for page in PAGES for path in named_paths(page) if not path.startswith(OUTSIDE)}
    return sorted(named | {("README.md", path) for path in tree_paths()})


@pytest.mark.parametrize(("page", "path"), every_path())
def test_path_exists(page: str, path: str) -> None:
    assert (ROOT / path).exists(), f"{page} names {path}, which does not exist"


def test_readme_lists_every_page() -> None:
    assert [page for page in sorted(PAGES) if page != "README.md" and f"({page})" not in README] == []


@pytest.mark.parametrize("page", sorted(page for page in PAGES if page.startswith("docs/")))
def test_page_opens_with_its_command(page: str) -> None:
    opening = PAGES[page].split("\n## ")[0]
    assert [language for language, _ in FENCE.findall(opening)][:1] == ["bash"]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", FENCE.sub("", PAGES[page]))
    here = (ROOT / page).parent
    missing = [name for name in targets if "://" not in name and not (here / name.split("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("page", sorted(PAGES))
def test_make_targets_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for line in re.findall(r"^([a-z][a-z -]*):", makefile, re.MULTILINE) for name in line.split()}
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(re.findall(r"`[^`]+`", FENCE.sub("", PAGES[page])))))
    named |= {words[1] for words in shell_commands(page) if words[0] == "make" and len(words) > 1}
    assert named or page != "README.md", "README.md names no make target"
    assert named <= targets


@pytest.mark.parametrize("program", programs(), ids=" ".join)
def test_commands_use_known_flags(program: tuple[str, ...]) -> None:
    used = {flag for page in PAGES for other, flags in python_commands(page) if other == program for flag in flags}
    assert used <= accepted_flags(program)


def test_flags_in_the_text_belong_to_some_command() -> None:
    prose = FENCE.sub("", README)
    named = {flag for code in re.findall(r"`([^`\n]+)`", prose) for flag in re.findall(r"--[a-z0-9_]+", code)}
    known = frozenset().union(*(accepted_flags(program) for program in programs()))
    assert named <= known
