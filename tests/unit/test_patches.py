"""The injection into an OpenVLA-OFT checkout: exact, repeatable, reversible, and refused where it does not fit."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("libcst")

from patches import checkout as checkout_module
from patches.__main__ import main
from patches.checkout import JOIN, PACKAGE, SCRIPT, STATE, Checkout
from patches.rewrite import inject
from tests.helpers.programs import run_program

STAND_IN = Path(__file__).resolve().parents[1] / "helpers" / "openvla_oft_stand_in.py"
# A real checkout may be given; the tests below then run on a copy of its script too.
REAL = os.environ.get("OPENVLA_OFT_CHECKOUT")


@pytest.fixture(params=["stand-in", "stand-in with CRLF", "real"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with an unmodified, executable script."""
    source = STAND_IN.read_bytes()
    if request.param == "real":
        if not REAL:
            pytest.skip("OPENVLA_OFT_CHECKOUT names no checkout of OpenVLA-OFT")
        source = (Path(REAL) / SCRIPT).read_bytes()
    return make_root(tmp_path, source.replace(b"\n", b"\r\n") if "CRLF" in request.param else source)


def make_root(folder: Path, source: bytes) -> Path:
    script = folder / "checkout" / SCRIPT
    script.parent.mkdir(parents=True)
    script.write_bytes(source)
    script.chmod(0o755)
    return folder / "checkout"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make_root(tmp_path, STAND_IN.read_bytes())


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and mode of all files, and nothing of all folders."""
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mode) if path.is_file() else (b"", 0)
        for path in root.rglob("*")
    }


def test_apply_check_revert(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(root)
    assert main(["check", str(root)]) == 1
    assert contents(root) == before
    assert main(["apply", str(root)]) == 0
    assert main(["check", str(root)]) == 0
    after = contents(root)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {SCRIPT}
    assert after[SCRIPT][1] == before[SCRIPT][1]
    assert {JOIN, PACKAGE, f"{PACKAGE}/alignment.py", STATE} <= set(after)
    for name, (content, _) in after.items():
        if name.endswith(".py"):
            compile(content, name, "exec")
    if b"\r\n" in before[SCRIPT][0]:
        assert after[SCRIPT][0].count(b"\n") == after[SCRIPT][0].count(b"\r\n")

    assert main(["apply", str(root)]) == 0
    assert contents(root) == after
    assert main(["revert", str(root)]) == 0
    assert contents(root) == before
    assert main(["revert", str(root)]) == 0
    assert "error" not in capsys.readouterr().err


def test_only_what_is_injected_differs(root: Path) -> None:
    before = (root / SCRIPT).read_bytes().decode()
    after = inject((root / SCRIPT).read_bytes()).decode()
    words = r"\(AlignFlags\)|, \*, rocket\b|, rocket=rocket\b"
    injected = re.compile(
        r"#? ?(ROCKET:|rocket\b|\*,|from rocket|check_flags|trainable_params \+= rocket|loss, metrics = rocket)"
    )

    def rest(text: str) -> list[str]:
        lines = [re.sub(words, "", line) for line in text.splitlines()]
        return [line for line in lines if line.strip() and not injected.match(line.strip())]

    assert rest(after) == rest(before) == [line for line in before.splitlines() if line.strip()]
    assert 20 <= after.count("\n") - before.count("\n") <= 40


def test_revert_removes_what_python_compiled(plain: Path) -> None:
    before = contents(plain)
    main(["apply", str(plain)])
    for folder, name in ((PACKAGE, "alignment"), (f"{PACKAGE}/teacher", "base"), ("vla-scripts", "rocket_join")):
        (plain / folder / "__pycache__").mkdir()
        (plain / folder / "__pycache__" / f"{name}.cpython-311.pyc").write_bytes(b"compiled")
    assert main(["check", str(plain)]) == 0
    assert main(["revert", str(plain)]) == 0
    assert contents(plain) == before


BREAKS = [
    ("def run_forward_pass(", "def forward_pass(", "no function run_forward_pass"),
    ("def run_validation(", "def validate(", "no function run_validation"),
    ("class FinetuneConfig", "class Config", "no class FinetuneConfig"),
    ("@dataclass\n", "", "no dataclass"),
    ("vla = wrap_ddp(vla, 0", "vla = wrap(vla, 0", "no line in finetune that wraps vla"),
    ("output = vla(", "output = policy(", "calls of vla"),
    ("return loss, metrics", "return loss", "no loss and metrics returned"),
    ("action_head--", "head--", "action_head--"),
    ("AdamW(trainable_params,", "AdamW(vla.parameters(),", "optimizer"),
    ('{"loss_value": deque', '{"value": deque', "recent metrics"),
    ("processor = SimpleNamespace", "other = SimpleNamespace", "no variable processor"),
    ("NUM_PATCHES = ", "rocket = 1\n    NUM_PATCHES = ", "is in use"),
    ("    save_training_checkpoint(", "    print(", "no call of save_training_checkpoint"),
    ("log_step,\n    vla,\n    action_head,\n", "*rest,\n", "other than plain parameters"),
    ("def wrap_ddp", "run_validation(1, 2)\n\n\ndef wrap_ddp", "a call of run_validation outside"),
    ("import os\n", "import os(\n", "not readable as Python"),
]


@pytest.mark.parametrize(("old", "new", "reason"), BREAKS, ids=[reason for _, _, reason in BREAKS])
@pytest.mark.parametrize("command", ["apply", "check"])
def test_a_missing_place_is_refused(
    plain: Path, capsys: pytest.CaptureFixture[str], command: str, old: str, new: str, reason: str
) -> None:
    text = (plain / SCRIPT).read_text()
    assert old in text
    (plain / SCRIPT).write_text(text.replace(old, new))
    before = contents(plain)
    assert main([command, str(plain)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert SCRIPT in message and reason in message and "accepted" in message
    assert contents(plain) == before


def test_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", [SCRIPT, JOIN, f"{PACKAGE}/alignment.py", f"{PACKAGE}/mine.py"])
@pytest.mark.parametrize("command", ["apply", "check", "revert"])
def test_what_was_edited_later_is_not_overwritten(
    plain: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    main(["apply", str(plain)])
    with (plain / name).open("a") as file:
        file.write("\nMINE = True\n")
    before = contents(plain)
    assert main([command, str(plain)]) == 2
    message = capsys.readouterr().err
    assert name in message and message.count("\n") == 1
    assert contents(plain) == before


def test_files_in_the_way_are_not_overwritten(plain: Path) -> None:
    (plain / PACKAGE).mkdir()
    (plain / PACKAGE / "__init__.py").write_text("")
    before = contents(plain)
    assert main(["apply", str(plain)]) == 2
    assert contents(plain) == before


def test_a_script_restored_by_hand_is_injected_again(plain: Path) -> None:
    """As after `git checkout` of a newer upstream script."""
    main(["apply", str(plain)])
    newer = STAND_IN.read_text().replace("import os\n", "import os  # newer\n").encode()
    (plain / SCRIPT).write_bytes(newer)
    assert main(["check", str(plain)]) == 1
    assert main(["apply", str(plain)]) == 0
    assert main(["revert", str(plain)]) == 0
    assert (plain / SCRIPT).read_bytes() == newer
    assert not (plain / STATE).exists() and not (plain / JOIN).exists()


def test_an_older_version_is_brought_up_to_date(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(plain)
    ours = checkout_module._own_files()
    older = {**ours, JOIN: ours[JOIN] + b"# older\n", f"{PACKAGE}/dropped.py": b"# dropped since\n"}
    with monkeypatch.context() as patch:
        patch.setattr(checkout_module, "_own_files", lambda: older)
        main(["apply", str(plain)])
    assert Checkout(plain).state == "outdated"
    assert main(["check", str(plain)]) == 1
    assert main(["apply", str(plain)]) == 0
    assert Checkout(plain).state == "applied"
    assert not (plain / PACKAGE / "dropped.py").exists()
    assert main(["revert", str(plain)]) == 0
    assert contents(plain) == before


@pytest.mark.parametrize("writes", [1, 2, 3, 8, -1])
def test_a_run_cut_off_leaves_the_script_whole(plain: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    before = contents(plain)
    allowed = writes if writes >= 0 else len(checkout_module._own_files()) + 2
    write, done = Checkout._write, []

    def cut_off(self: Checkout, name: str, content: bytes) -> None:
        if len(done) == allowed:
            raise KeyboardInterrupt
        done.append(name)
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Checkout, "_write", cut_off)
        with pytest.raises(KeyboardInterrupt):
            Checkout(plain).apply()
    assert (plain / SCRIPT).read_bytes() == before[SCRIPT][0]
    again = plain.with_name("again")
    shutil.copytree(plain, again)
    assert main(["apply", str(again)]) == 0 and main(["check", str(again)]) == 0
    assert main(["revert", str(again)]) == 0
    assert contents(again) == before
    if allowed > 1:  # before that there is no record, hence nothing known to take out
        assert main(["revert", str(plain)]) == 0
        assert contents(plain) == before


def test_it_runs_from_inside_a_checkout(plain: Path, repo_root: Path) -> None:
    """There Python would find that checkout's `prismatic` first."""

    (plain / "prismatic").mkdir()
    (plain / "prismatic" / "__init__.py").write_text("raise ImportError('the wrong prismatic')\n")
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    command = [sys.executable, "-m", "patches", "check", "."]
    done = run_program(command, cwd=plain, env=environment)
    assert done.returncode == 1, done.stderr
