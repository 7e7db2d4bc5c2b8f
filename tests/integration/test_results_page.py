"""The page of evaluation results, as a file and in a real browser (headless Chromium, where there is one)."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from experiments.report.html import Line, Rate, line_chart
from experiments.robot.libero.results.page import build_page, main
from experiments.robot.libero.rollouts.episode import write_video
from tests.helpers.episode_results import episode_results, write_episodes
from tests.helpers.programs import run_program

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
PROBE = Path(__file__).parents[1] / "helpers" / "results_page_probe.html"
EVIL = 'pick up the <b>milk</b> & "run" <script>alert(1)</script>'


def write_run(folder: Path, outcomes: dict[int, str], kinds: dict[int, str] | None = None) -> Path:
    """A run folder: for each task a letter an episode: s success, f failure, e error."""
    results = [
        episode_results(letters, task, task=EVIL if task == 1 else f"task {task}", kind=(kinds or {}).get(task))
        for task, letters in outcomes.items()
    ]
    identity = {"seed": 7, "checkpoint_hash": folder.name}
    return write_episodes(folder, itertools.chain.from_iterable(results), identity)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "a b", {1: "sffs", 2: "ssss", 10: "ffff"}),
        write_run(tmp_path / "rocket", {1: "ssss", 2: "ssse", 10: "sssf"}),
    ]


def text_of(page: str) -> str:
    """What a reader sees."""
    words: list[str] = []

    class Reader(HTMLParser):
        hidden = 0

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.hidden += tag in ("style", "script")

        def handle_endtag(self, tag: str) -> None:
            self.hidden -= tag in ("style", "script")

        def handle_data(self, data: str) -> None:
            if not self.hidden:
                words.append(data)

    Reader().feed(page)
    return " ".join(" ".join(words).split())


def test_numbers_come_from_the_result_files(runs: list[Path], tmp_path: Path) -> None:
    build_page(runs, tmp_path / "index.html", "A title & more")
    page = (tmp_path / "index.html").read_text()
    text = text_of(page)
    assert "A title & more" in text and "2 runs, 24 episodes, libero_goal" in text
    assert "50.0% 95% interval 25 to 75%" in text and "6 of 12 solved" in text
    assert "90.9% 95% interval 62 to 98%" in text and "10 of 11 solved" in text
    # Of the 11 episodes that both completed, rocket alone solved five and none was solved by the other alone.
    assert re.search(r"a b rocket 11 0 5 \+45\.5 0\.0625 no difference shown", text)
    assert "boom" in text and EVIL in text
    assert "checkpoint_hash a b rocket" in text
    assert "None were saved" in text and "Kinds of perturbation" not in text


def test_the_page_is_one_file_that_asks_nobody(runs: list[Path], tmp_path: Path) -> None:
    build_page(runs, tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in page
    addresses = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", page)
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)


def test_videos_of_failures_come_first_and_stale_ones_are_left_out(runs: list[Path], tmp_path: Path) -> None:
    for name in ("task02--init00--success", "task01--init01--failure", "task10--init00--success", "notes"):
        file = runs[0] / "videos" / f"libero_goal--{name}.mp4"
        file.parent.mkdir(exist_ok=True)
        file.touch()
    build_page(runs, tmp_path / "pages" / "index.html")
    page = (tmp_path / "pages" / "index.html").read_text()
    shown = re.findall(r'<video src="([^"#]+)', page)
    assert shown == [
        "../a%20b/videos/libero_goal--task01--init01--failure.mp4",
        "../a%20b/videos/libero_goal--task02--init00--success.mp4",
    ]


def test_kinds_of_perturbation_have_a_table_with_both_averages(tmp_path: Path) -> None:
    kinds = {0: "camera", 1: "noise", 2: "noise", 3: "noise"}
    run = write_run(tmp_path / "plus", {0: "s", 1: "f", 2: "f", 3: "s"}, kinds=kinds)
    build_page([run], tmp_path / "index.html")
    text = text_of((tmp_path / "index.html").read_text())
    assert "camera 100% 1/1 noise 33% 1/3 all episodes 50% 2/4 mean of 2 kinds 66.7%" in text


def test_runs_of_errors_alone_have_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "broken", {1: "ee"})
    lines = (run / "episodes.jsonl").read_text()
    (run / "episodes.jsonl").write_text(lines + lines.replace("libero_goal", "libero_10"))
    build_page([run], tmp_path / "index.html")
    assert "no completed episodes" in (tmp_path / "index.html").read_text()


def test_the_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run) for run in runs]) == 0
    assert (tmp_path / "index.html").is_file() and "page: " in capsys.readouterr().out
    assert main([str(runs[0])]) == 0 and (runs[0] / "index.html").is_file()
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no episodes*.jsonl in this folder" in capsys.readouterr().err


def test_a_bar_in_words_and_a_chart() -> None:
    assert Rate(None, 0, 1, 0, 0).label == "no completed episodes"
    assert Rate(0.5, 0.1, 0.9, 1, 2).label == "50.0%, 95% interval 10 to 90%, 1 of 2"
    lines = [Line("loss <1>", [0, 50, 100], [2.0, float("nan"), 1.0]), Line("other", [0, 100], [3.0, 0.5], series=1)]
    chart = str(line_chart(lines, title="losses", x_label="step", y_label="L1"))
    assert "loss &lt;1&gt;" in chart and chart.count("<polyline") == 2
    first = re.findall(r'points="([^"]+)"', chart)[0].split()
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in first)
    assert x0 < x1 and y0 < y1  # The picture's y axis points down.
    assert line_chart([], title="empty", x_label="", y_label="")


def browse(page: Path, folder: Path) -> tuple[dict[str, Any], str]:
    """What the probe found in a headless browser, and what the browser's console says."""
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium found (apt-get install chromium, or CHROMIUM=path)")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"]
    command += [f"--user-data-dir={folder}", "--enable-logging=stderr", "--virtual-time-budget=8000", "--dump-dom"]
    run = run_program([*command, page.as_uri()])
    match = re.search(r'<pre id="probe">(.*?)</pre>', run.stdout, re.DOTALL)
    assert match is not None, run.stderr[-2000:]
    console = "\n".join(line for line in run.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), console


def test_in_a_browser(runs: list[Path], tmp_path: Path) -> None:
    import numpy as np

    video = runs[0] / "videos" / "libero_goal--task01--init01--failure.mp4"
    video.parent.mkdir()
    write_video(video, [np.full((64, 128, 3), 40 * number, np.uint8) for number in range(5)], 10)
    page = tmp_path / "index.html"
    build_page(runs, page)
    page.write_text(page.read_text().replace("</body>", PROBE.read_text() + "</body>"))
    found, console = browse(page, tmp_path / "profile")
    assert console == ""
    assert found["before"] == ["1", "2", "10"]
    assert (found["falling"], found["rising"], found["state"]) == (["10", "2", "1"], ["1", "2", "10"], "ascending")
    assert found["by_rate"] == ["2", "1", "10"] and found["other_state"] is None
    width, height, filled, interval = found["bar"]
    assert width > 80 and height > 8
    assert filled == pytest.approx(1.0, abs=0.02)  # The first row is task 2 now: 4 of 4.
    assert interval == pytest.approx(0.4899, abs=0.02)  # Wilson: 51 to 100%.
    assert found["filtered"] == ["error"]
    assert len(set(found["grounds"])) == 2
    ready, video_width, error = found["video"]
    assert error is None and (ready == 0 or video_width == 128)
    assert found["overflow"] <= 0
