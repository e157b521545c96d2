"""What a person sees, on every kind of terminal, and on none."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nemotron.run.panel import Curve, Progress
from nemotron.run.screen import Screen

TRAIN = {
    "kind": "train",
    "step": 7,
    "data/tokens": 7000,
    "loss/main": 5.4321,
    "loss/mtp_1": 6.1,
    "loss/aux": 1.02,
    "lr": 3e-4,
    "grad_norm/total": 1.25,
    "clip_coef": 0.8,
    "skipped_steps": 2,
    "moe/layers.1/load_max_over_mean": 1.5,
    "moe/layers.3/load_max_over_mean": 2.5,
    "moe/layers.3/experts_unused": 1,
    "perf/tokens_per_s": 12345.6,
    "perf/mfu": 0.341,
    "perf/step_s": 0.91,
    "perf/data_s": 0.01,
    "perf/forward_backward_s": 0.8,
    "perf/optimizer_s": 0.1,
    "mem/rss_gib": 1.5,
}
VALIDATION = {
    "kind": "validation",
    "step": 7,
    "validation/loss": 5.5,
    "validation/bits_per_byte": 2.25,
    "validation/code/bits_per_byte": 1.75,
}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_step_is_one_aligned_line():
    progress = Progress("run", 1000)
    lines = []
    for step in (7, 812):
        progress.update(TRAIN | {"step": step})
        lines.append(progress.line())
    assert lines[0].startswith("step    7/1000  loss 5.4321  lr 3.00e-04  grad    1.250")
    assert "12,346 tok/s  mfu 34.1%" in lines[0]
    assert lines[0].index("loss") == lines[1].index("loss")
    assert "\n" not in lines[0]


def test_a_narrow_terminal_gets_what_matters_in_its_width():
    progress = Progress("run", 1000)
    progress.update(TRAIN)
    line = progress.line(columns=40)
    assert len(line) <= 40
    assert "loss 5.4321" in line


@pytest.mark.parametrize("width", [40, 60, 120])
def test_the_panel_fits_its_width_and_shows_the_run(width):
    progress = Progress("run", 1000)
    progress.update(TRAIN)
    progress.update(VALIDATION)
    progress.info("saved step-00000007")
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(progress.render())
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    words = " ".join(text.replace("│", " ").split())
    for part in ("5.4321", "2.250", "skipped 2", "12,346", "2.50", "saved step-00000007"):
        assert part in words, part


def test_the_panel_has_time_tokens_last_save_and_a_curve_as_wide_as_the_terminal():
    progress = Progress("run", 1000)
    for step in range(300):
        progress.update(TRAIN | {"step": step, "loss/main": 9.0 - step / 50})
    progress.info("saved step-00000299 in 0.1 s")
    widths = []
    for width in (60, 160):
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=True, color_system=None)
        console.print(progress.render())
        words = " ".join(out.getvalue().replace("│", " ").split())
        assert "elapsed 0:00:0" in words
        assert "7,000 tokens last save step-00000299" in words
        widths.append(sum(bar in "▁▂▃▄▅▆▇█" for bar in out.getvalue()))
    assert widths[0] < 50 < 120 < widths[1]
    falling = Curve([float(9 - i) for i in range(9)]).bars(4)
    assert (falling[0], falling[-1]) == ("█", "▁")


def test_the_panel_names_the_part_of_the_schedule():
    progress = Progress("run", 1000, {6: "long decay"}.__getitem__)
    for records in ([], [TRAIN]):  # nothing yet, then the seventh step
        for record in records:
            progress.update(record)
        out = io.StringIO()
        Console(file=out, width=80, color_system=None).print(progress.render())
        assert ("lr 3.00e-04  long decay  gradient norm" in out.getvalue()) == bool(records)


def test_the_curve_stays_short_and_plain_curves_are_flat():
    progress = Progress("run", 10**6)
    for step in range(20_000):
        progress.update({"kind": "train", "step": step, "loss/main": 1.0})
    assert len(progress.curve) <= 4097
    assert set(Curve(progress.curve).bars(10)) == {"▁"}
    assert Curve([]).bars(10) == ""


def test_lines_and_panels_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for stream, panel in ((Terminal(), False), (io.StringIO(), True)):
        screen = Screen(stream, panel=panel)
        screen.start("run", 10)
        screen.show(TRAIN)
        screen.close()
        assert ("╭" in stream.getvalue()) is panel
        assert ("step  7/10" in stream.getvalue()) is not panel


def test_a_value_that_is_not_finite_is_shown_and_does_not_raise():
    progress = Progress("run", 10)
    progress.update(TRAIN | {"loss/main": None, "perf/mfu": None})
    assert "nan" in progress.line()
    Console(file=io.StringIO(), width=60).print(progress.render())


def test_a_terminal_gets_a_panel_and_a_dumb_one_plain_lines(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    outputs = {}
    for kind in ("xterm-256color", "dumb"):
        monkeypatch.setenv("TERM", kind)
        screen = Screen(stream := Terminal())
        screen.start("run", 10)
        screen.show(TRAIN)
        screen.close()
        outputs[kind] = stream.getvalue()
    assert "╭" in outputs["xterm-256color"]
    assert "\x1b" not in outputs["dumb"]
    assert "step  7/10" in outputs["dumb"]


def test_the_log_has_what_was_said_before_it_was_opened_and_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "canary-0123456789")
    screen = Screen(io.StringIO())
    screen.info("early")
    screen.open_log(tmp_path / "log.txt")
    screen.start("run", 10)
    screen.show(TRAIN)
    screen.info("uses canary-0123456789")
    screen.close()
    log = (tmp_path / "log.txt").read_text()
    assert "early" in log
    assert "loss 5.4321" in log
    assert "uses ***" in log


def test_messages_of_the_lower_packages_are_told():
    import logging

    screen = Screen(stream := io.StringIO())
    logging.getLogger("nemotron.data.prepare").info("tokenized %s", "code")
    screen.close()
    logging.getLogger("nemotron.data.prepare").info("unheard")
    assert stream.getvalue() == "tokenized code\n"


TALKATIVE = """
import sys
from nemotron.run.screen import Screen
screen = Screen()
screen.start("run", 10)
for step in range(1, 200):
    screen.show({"kind": "train", "step": step, "loss/main": 1.0})
screen.info("caf\\u00e9 \\u2603")
screen.close()
print("reached the end", file=sys.stderr)
"""


def talk(shell: str, **environment: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    return subprocess.run(
        ["bash", "-c", shell, sys.executable, TALKATIVE],
        env=os.environ | {"PYTHONPATH": str(root)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_reader_that_goes_away_does_not_stop_the_run():
    done = talk('"$0" -c "$1" | head -n 1; exit "${PIPESTATUS[0]}"')
    assert done.returncode == 0, done.stderr
    assert done.stderr == "reached the end\n"


def test_a_closed_stdout_does_not_stop_the_run():
    done = talk('"$0" -c "$1" >&-')
    assert done.returncode == 0, done.stderr
    assert done.stderr == "reached the end\n"


def test_a_locale_without_the_letters_does_not_stop_the_run():
    done = talk('"$0" -c "$1"', LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "caf? ?" in done.stdout
