"""Command lines: a user's mistake is one line on standard error and exit code 2."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from prismatic.util import cli
from prismatic.util.errors import UsageError


@dataclass
class Config:
    vla_path: str = "model"  # A folder
    layers: str = "1,2"  # A comma list
    use_film: bool = False  # A switch
    learning_rate: float = 5e-4  # Above 0
    resume_step: int | None = None  # A step

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UsageError(f"--learning_rate: {self.learning_rate} found; accepted: a number above 0")


def test_values_reach_the_dataclass() -> None:
    config = cli.parse(Config, ["--layers", "2,4,-1", "--use_film", "True", "--resume_step", "3"])
    assert (config.layers, config.use_film, config.resume_step) == ("2,4,-1", True, 3)


def test_a_layer_list_may_start_with_a_minus() -> None:
    assert cli.parse(Config, ["--layers", "-1"]).layers == "-1"


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--learning_rate", "fast"], "--learning_rate"),
        (["--learning_rate", "-1"], "--learning_rate"),
        (["--use_film", "maybe"], "--use_film"),
        (["--resume_step", "1.5"], "--resume_step"),
        (["--use_flim", "True"], "did you mean --use_film?"),
        (["--config_path", "/does/not/exist.yaml"], "--config_path"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(
    argv: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.run(Config, lambda config: 0, argv)
    message = capsys.readouterr().err
    assert leaving.value.code == 2
    assert message.count("\n") == 1
    assert message.startswith("error: ")
    assert flag in message


def test_the_exit_code_is_mains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.run(Config, lambda config: 3, [])
    assert leaving.value.code == 3


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
