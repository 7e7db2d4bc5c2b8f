"""Commands run side by side: real processes, their logs, their results."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from experiments.reproduce import jobs
from experiments.reproduce.jobs import Chain, Job, JobFailed, JobRunner, logged_arguments


def _writes(path: Path, text: str = "done") -> tuple[str, ...]:
    return ("-c", f"print('working'); open({str(path)!r}, 'a').write({text!r})")


@pytest.fixture
def runner(tmp_path: Path) -> JobRunner:
    return JobRunner(tmp_path / "logs", Console(file=io.StringIO()))


def test_runs_jobs_and_keeps_their_logs(runner: JobRunner, tmp_path: Path) -> None:
    jobs = [Job(name, _writes(tmp_path / name), tmp_path / name) for name in ("one", "two", "three")]
    runner.run(jobs, parallel=2)
    assert all((tmp_path / job.name).read_text() == "done" for job in jobs)
    log = (tmp_path / "logs" / "one.log").read_text().splitlines()
    assert log[0].startswith("$ ") and log[1] == "working"
    assert set(runner.seconds) == {"one", "two", "three"}
    assert logged_arguments(tmp_path / "logs" / "one.log") == jobs[0].arguments
    assert logged_arguments(tmp_path / "logs" / "four.log") == ()


def test_a_job_whose_result_exists_is_skipped(runner: JobRunner, tmp_path: Path) -> None:
    job = Job("once", _writes(tmp_path / "result"), tmp_path / "result")
    runner.run([job], parallel=1)
    runner.run([job], parallel=1)
    assert (tmp_path / "result").read_text() == "done"


def test_a_failed_job_names_its_log_and_shows_its_end(runner: JobRunner, tmp_path: Path) -> None:
    job = Job("broken", ("-c", "import sys; print('the reason'); sys.exit(5)"), tmp_path / "never")
    with pytest.raises(JobFailed, match=r"broken ended with code 5(?s:.*)the reason"):
        runner.run([job], parallel=1)


def test_a_refused_flag_is_shown_in_one_line(runner: JobRunner, tmp_path: Path) -> None:
    job = Job("refused", ("-c", "import sys; print('loading'); sys.exit('error: --x: 3 found')"), tmp_path / "never")
    with pytest.raises(JobFailed) as caught:
        runner.run([job], parallel=1)
    assert str(caught.value).splitlines()[1:] == ["error: --x: 3 found"]


def test_without_a_terminal_no_line_is_printed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that says nothing new for a while is not repeated; what it says next is shown."""
    monkeypatch.setattr(jobs, "PLAIN_REPORT_SECONDS", 0.02)
    shown, result = io.StringIO(), tmp_path / "result"
    words = "".join(f"print({word!r}, flush=True); time.sleep(1); " for word in ("first", "second"))
    code = f"import pathlib, time; {words}pathlib.Path({str(result)!r}).touch()"
    JobRunner(tmp_path / "logs", Console(file=shown)).run([Job("slow", ("-c", code), result)], parallel=1)
    lines = shown.getvalue().splitlines()
    assert lines[:2] == ["  slow: first", "  slow: second"] and len(lines) == 3
    assert lines[2].startswith("slow: done in ")


def test_a_job_without_its_result_has_failed(runner: JobRunner, tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="ended with code 0"):
        runner.run([Job("empty", ("-c", "pass"), tmp_path / "never")], parallel=1)


def test_a_failing_chain_ends_alone(runner: JobRunner, tmp_path: Path) -> None:
    finished: list[str] = []
    broken = Job("broken", ("-c", "raise SystemExit(1)"), tmp_path / "never")
    chains = [
        Chain((broken, Job("after", _writes(tmp_path / "after"), tmp_path / "after")), lambda: finished.append("bad")),
        Chain((Job("well", _writes(tmp_path / "well"), tmp_path / "well"),), lambda: finished.append("good")),
    ]
    failures = runner.run_chains(chains, parallel=1)
    assert [str(failure).split()[0] for failure in failures] == ["broken"]
    assert finished == ["good"] and not (tmp_path / "after").exists()


def test_nothing_starts_after_a_failure_unless_asked(runner: JobRunner, tmp_path: Path) -> None:
    broken = Job("broken", ("-c", "raise SystemExit(1)"), tmp_path / "never")
    later = Job("later", _writes(tmp_path / "later"), tmp_path / "later")
    with pytest.raises(JobFailed, match="broken"):
        runner.run([broken, later], parallel=1)
    assert not (tmp_path / "later").exists()


def test_an_interruption_starts_nothing_that_waits(
    runner: JobRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the running commands; the chains behind them must not start in their place."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    slow = ("-c", f"import time; open({str(tmp_path / 'started')!r}, 'w'); time.sleep(60)")
    chains = [Chain((Job("quick", _writes(tmp_path / "quick"), tmp_path / "quick"),), interrupted)]
    chains += [Chain((Job("slow", slow, tmp_path / "never"),))]
    chains += [Chain((Job(f"later{n}", _writes(tmp_path / f"later{n}"), tmp_path / f"later{n}"),)) for n in range(3)]
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner.run_chains(chains, parallel=1)
    assert time.monotonic() - begun < 30
    assert not list(tmp_path.glob("later*"))


def test_a_result_that_is_there_may_be_unfinished(runner: JobRunner, tmp_path: Path) -> None:
    result = tmp_path / "result"
    result.write_text("half")
    job = Job("again", _writes(result, "done"), result, lambda path: path.read_text().endswith("done"))
    runner.run([job], parallel=1)
    runner.run([job], parallel=1)
    assert result.read_text() == "halfdone"
