"""Command lines: a user's mistake is one line on standard error and exit code 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from prismatic.util import cli
from prismatic.util.errors import UsageError
from prismatic.util.flags import limited


@dataclass
class Optimizer:
    rate: float = limited(0.1, above=0)  # Above 0


@dataclass
class Config:
    vla_path: str = "model"  # A folder
    layers: str = "1,2"  # A comma list
    use_film: bool = False  # A switch
    learning_rate: float = limited(5e-4, above=0)  # Of the peak
    resume_step: int | None = None  # A step
    note: str | None = None  # A text
    out: Path = Path("out")  # A folder
    suites: tuple[str, ...] = ()  # Texts
    steps: list[int] = field(default_factory=list)  # Numbers
    labels: dict[str, str] = field(default_factory=dict)  # Texts by text
    optimizer: Optimizer = field(default_factory=Optimizer)


def test_values_reach_the_dataclass() -> None:
    words = "--layers 2,4,-1 --use_film True --resume_step=3 --optimizer.rate 2 --steps 7,8"
    config = cli.parse(Config, words.split())
    assert (config.layers, config.use_film, config.resume_step) == ("2,4,-1", True, 3)
    assert (config.optimizer, config.steps) == (Optimizer(2.0), [7, 8])


@pytest.mark.parametrize("text", ["-1", "-1,-3", "-x", "a=b", "", "--other"])
def test_a_value_may_look_like_a_flag(text: str) -> None:
    assert cli.parse(Config, ["--layers", text]).layers == cli.parse(Config, [f"--layers={text}"]).layers == text


TYPED = "007 1.50 1_0 0x10 1e3 12:30 2024-01-01 off yes True null ~ None @x `x %x *x &x !x #x [x] {x} 'x' - a:b .inf"


@pytest.mark.parametrize("text", [*TYPED.split(), "include_x", "", " x ", "a: b", "x #y", "[a", "| x"])
def test_text_arrives_as_it_was_typed(text: str) -> None:
    config = cli.parse(Config, ["--vla_path", text, "--note", text, "--out", text])
    assert (config.vla_path, config.note, config.out) == (text, text, Path(text))


def test_texts_in_lists_and_mappings_arrive_as_typed() -> None:
    for words in ("007,1.50,off", "[007, 1.50, off]"):
        assert cli.parse(Config, ["--suites", words]).suites == ("007", "1.50", "off")
    assert cli.parse(Config, ["--labels", "{007: 1.50, off: 12:30}"]).labels == {"007": "1.50", "off": "12:30"}


def test_an_optional_number_may_be_none() -> None:
    steps = [cli.parse(Config, ["--resume_step", text]).resume_step for text in ("None", "null", "010")]
    assert steps == [None, None, 10]


FILES = {
    "yaml": """vla_path: 007\nnote: 'null'\nout: 1e3\nsuites: [007, off]\nsteps: [1, 2]\nlabels: {on: 1.50}
layers: [1, 2]\nuse_film: true\nlearning_rate: 1e-3\nresume_step: null\noptimizer: {rate: 2}""",
    "json": """{"vla_path": "007", "note": "null", "out": "1e3", "suites": ["007", "off"], "steps": [1, 2],
\t"layers": [1, 2], "labels": {"on": "1.50"}, "use_film": true, "learning_rate": 1e-3,
"resume_step": null, "optimizer": {"rate": 2}}""",
    "toml": """vla_path = "007"\nnote = "null"\nout = "1e3"\nsuites = ["007", "off"]\nsteps = [1, 2]\nlayers = [1, 2]
use_film = true\nlearning_rate = 1e-3\n[labels]\non = "1.50"\n[optimizer]\nrate = 2""",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_configuration_file_gives_text_as_typed(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"flags.{kind}").write_text(FILES[kind])
    expected = Config(
        "007", "1,2", True, 1e-3, None, "null", Path("1e3"), ("007", "off"), [1, 2], {"on": "1.50"}, Optimizer(2.0)
    )
    assert cli.parse(Config, ["--config_path", str(tmp_path / f"flags.{kind}")]) == expected


def test_flags_win_over_the_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text("note: ~\nlayers:\noptimizer:\n  rate: 3\nsteps: [5]\n")
    config = cli.parse(Config, ["--config_path", str(tmp_path / "flags.yaml"), "--optimizer.rate", "4"])
    assert (config.note, config.layers, config.optimizer.rate, config.steps) == (None, "", 4.0, [5])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rate", "fast"], "--learning_rate: 'fast' found; accepted: a number"),
        (["--learning_rate", "-1"], "--learning_rate: -1.0 found; accepted: above 0"),
        (["--use_film", "maybe"], "--use_film: 'maybe' found; accepted: True or False"),
        (["--resume_step", "1.5"], "--resume_step: '1.5' found; accepted: a whole number"),
        (["--steps", "1,x"], "--steps: 'x' found; accepted: a whole number"),
        (["--labels", "x"], "--labels: 'x' found; accepted: a mapping, as in {name: value}"),
        (["--use_flim", "True"], "--use_flim: unknown flag (did you mean --use_film?); --help lists all of them"),
        (["train"], "train: unknown flag; --help lists all of them"),
        (["--layers"], "--layers: no value given; accepted: --layers VALUE"),
        (["--layers", "--use_film", "True"], "--layers: no value given; accepted: --layers VALUE"),
        (["--config_path", "/does/not/exist.yaml"], "--config_path: /does/not/exist.yaml cannot be read"),
        (["--config_path", "unknown.yaml"], "--config_path: layer: unknown flag (did you mean --layers?)"),
        (["--config_path", "broken.yaml"], "--config_path: broken.yaml is not valid"),
        (["--config_path", "list.yaml"], "--config_path: list.yaml holds no flags"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("unknown", "layer: 1"), ("broken", "a: [1"), ("list", "- a")):
        (tmp_path / f"{name}.yaml").write_text(content)
    with pytest.raises(SystemExit) as leaving:
        cli.run(Config, lambda config: 0, argv)
    written = capsys.readouterr().err
    assert leaving.value.code == 2
    assert written.startswith(f"error: {message}") and written.count("\n") == 1


def test_the_exit_code_is_mains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.run(Config, lambda config: 3, [])
    assert leaving.value.code == 3


def test_a_mistake_is_one_line_whatever_it_quotes() -> None:
    assert str(UsageError("--x: no model: first\nsecond\r\nthird\n")) == "--x: no model: first second third"


def test_a_defect_keeps_its_traceback() -> None:
    def broken(config: Config) -> int:
        raise ValueError("a defect of ours")

    with pytest.raises(ValueError, match="a defect of ours"):
        cli.run(Config, broken, [])


def test_a_mistake_or_an_interruption_becomes_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    @cli.exit_code
    def main(error: type[BaseException] | None) -> None:
        if error:
            raise error("--out: no such folder")

    assert [main(None), main(UsageError), main(KeyboardInterrupt)] == [0, 2, 130]
    assert capsys.readouterr().err == "error: --out: no such folder\ninterrupted\n"
