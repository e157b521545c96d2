"""The display of a step: one aligned line, or a panel for a terminal."""

import datetime
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel as Box
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nemotron.run.metrics import Record

SMOOTHING = 0.95
"""Weight of the past in the smoothed loss of the panel."""
EVENTS_SHOWN = 5
NARROW = 60
"""Columns below which a line is shortened to what matters most."""


BARS = "▁▂▃▄▅▆▇█"
CURVE_POINTS = 4096
"""Losses that the curve remembers; then every second one is left out, again and again."""


class Curve:
    """Values over time as one row of bars, as wide as there is room."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.bars(options.max_width))

    def bars(self, width: int) -> str:
        """Return bars for the means of `width` stretches, fewer where values are few."""
        count, width = len(self._values), min(width, len(self._values))
        cuts = [i * count // width for i in range(width + 1)] if width else []
        parts = [self._values[a:b] for a, b in itertools.pairwise(cuts)]
        means = [sum(part) / len(part) for part in parts]
        low, high = min(means, default=0.0), max(means, default=0.0)
        scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
        return "".join(BARS[round((mean - low) * scale)] for mean in means)


class Progress:
    """The state of a run as its records show it, for display only."""

    def __init__(
        self, title: str, num_steps: int, part: Callable[[int], str] = lambda step: ""
    ) -> None:
        """`part` names the part of the schedule in which a step is, counted from 0."""
        self.title, self.num_steps, self._part = title, num_steps, part
        self.train: Record = {}
        self.validation: Record = {}
        self.suites: Record = {}
        self.smoothed: float | None = None
        self.best: float | None = None
        self.eta_s: float | None = None
        self.events: list[str] = []
        self.saved = ""
        self.curve: list[float] = []
        self._every = 1
        self._num_losses = 0
        self._begin = time.monotonic()
        self._step_s: float | None = None

    def update(self, record: Record) -> None:
        """Take in one line of metrics.jsonl."""
        if record["kind"] == "validation":
            self.validation = record
        if record["kind"] == "suites":
            self.suites = record
        if record["kind"] != "train":
            return
        self.train = record
        loss, step_s = _number(record, "loss/main"), _number(record, "perf/step_s")
        if loss is not None:
            past = loss if self.smoothed is None else self.smoothed
            self.smoothed = SMOOTHING * past + (1 - SMOOTHING) * loss
            self.best = loss if self.best is None else min(self.best, loss)
            self._remember(loss)
        if step_s is not None:
            past = step_s if self._step_s is None else self._step_s
            self._step_s = 0.8 * past + 0.2 * step_s
            self.eta_s = self._step_s * (self.num_steps - int(record["step"] or 0))

    def info(self, text: str) -> None:
        """Remember an event."""
        self.events = [*self.events[-(EVENTS_SHOWN - 1) :], text]
        if text.startswith("saved step-"):
            self.saved = text.split()[1]

    def _remember(self, loss: float) -> None:
        """Add a loss to the curve, which stays short however long the run is."""
        if math.isfinite(loss) and self._num_losses % self._every == 0:
            self.curve.append(loss)
        self._num_losses += 1
        if len(self.curve) > CURVE_POINTS:
            self.curve, self._every = self.curve[::2], self._every * 2

    def line(self, columns: int | None = None) -> str:
        """Return the newest step as one line; `columns` is the width of a terminal."""
        record, width = self.train, len(str(self.num_steps))
        parts = [
            f"step {record['step']:>{width}}/{self.num_steps}",
            _part(record, "loss/main", "loss {:.4f}"),
            _part(record, "rl/reward", "reward {:.3f}"),
            _part(record, "lr", "lr {:.2e}"),
            f"eta {_duration(self.eta_s)}",
        ]
        details = [
            _part(record, "grad_norm/total", "grad {:8.3f}"),
            _part(record, "perf/tokens_per_s", "{:>9,.0f} tok/s"),
            _part(record, "perf/mfu", "mfu {:5.1%}", unknown="mfu     ?"),
            _part(record, "perf/step_s", "{:7.2f} s"),
            _part(record, "mem/rss_gib", "{:6.2f} GiB"),
        ]
        if columns is None or columns >= NARROW:
            parts[-1:-1] = details
        return "  ".join(part for part in parts if part)[:columns]

    def render(self) -> RenderableType:
        """Return the panel."""
        rows = Table.grid(padding=(0, 1), expand=True)
        rows.add_column(style="bold", no_wrap=True, width=9)
        rows.add_column(overflow="fold")
        for name, content in (*self._progress(), *self._losses(), *self._figures()):
            rows.add_row(name, content)
        for event in self.events:
            rows.add_row("", Text(event, style="dim"))
        return Box(Group(rows), title=self.title, title_align="left")

    def _step(self) -> int:
        return int(self.train.get("step") or 0)

    def _progress(self) -> Iterator[tuple[str, RenderableType]]:
        """Yield how far the run is, and its losses as a curve."""
        step = self._step()
        share = step / max(self.num_steps, 1)
        yield "step", f"{step:,}/{self.num_steps:,} ({share:.0%})  eta {_duration(self.eta_s)}"
        yield "", ProgressBar(total=self.num_steps, completed=step)
        yield (
            "run",
            _join(
                f"elapsed {_duration(time.monotonic() - self._begin)}",
                _part(self.train, "data/tokens", "{:,.0f} tokens"),
                f"last save {self.saved}" if self.saved else "",
            ),
        )
        if len(self.curve) > 1:
            yield "", Curve(self.curve)

    def _losses(self) -> Iterator[tuple[str, RenderableType]]:
        """Yield what is learned: losses, rewards, suites."""
        train, validation = self.train, self.validation
        yield (
            "loss",
            _join(
                _part(train, "loss/main", "{:.4f}"),
                f"smoothed {self.smoothed:.4f}" if self.smoothed is not None else "",
                f"best {self.best:.4f}" if self.best is not None else "",
                _part(validation, "validation/loss", "validation {:.4f}"),
                _part(validation, "validation/bits_per_byte", "= {:.3f} bits/byte"),
            ),
        )
        if "rl/reward" in train:
            yield (
                "reward",
                _join(
                    _part(train, "rl/reward", "{:.3f}"),
                    _part(validation, "validation/reward", "validation {:.3f}"),
                    _part(train, "rl/answer_tokens", "{:.0f} tokens an answer"),
                    _part(train, "rl/groups_without_signal", "{:.0%} of prompts without signal"),
                ),
            )
        if self.suites:
            yield "suites", f"{suites_text(self.suites)}  (step {self.suites['step']})"
        mtp = [_part(train, name, "{:.4f}") for name in train if name.startswith("loss/mtp_")]
        if mtp or "loss/aux" in train:
            name = "mtp" if mtp else "balance"
            yield name, _join(*mtp, _part(train, "loss/aux", "balance loss {:.4f}"))

    def _figures(self) -> Iterator[tuple[str, RenderableType]]:
        """Yield the update, the speed, the memory and the load of the experts."""
        train, step = self.train, self._step()
        yield (
            "update",
            _join(
                _part(train, "lr", "lr {:.2e}"),
                self._part(step - 1) if step else "",
                _part(train, "grad_norm/total", "gradient norm {:.3f}"),
                _part(train, "clip_coef", "clip x{:.2f}"),
                _part(train, "skipped_steps", "skipped {:.0f}"),
            ),
        )
        yield (
            "speed",
            _join(
                _part(train, "perf/tokens_per_s", "{:,.0f} tokens/s"),
                _part(train, "perf/mfu", "MFU {:.1%}", unknown="MFU ?"),
                _part(train, "perf/step_s", "{:.2f} s a step:"),
                _part(train, "perf/data_s", "data {:.2f}"),
                _part(train, "perf/forward_backward_s", "forward+backward {:.2f}"),
                _part(train, "perf/optimizer_s", "optimizer {:.2f}"),
            ),
        )
        yield (
            "memory",
            _join(
                _part(train, "mem/rss_gib", "{:.2f} GiB"),
                _part(train, "mem/peak_gib", "peak {:.2f}"),
                _part(train, "mem/gpu_peak_gib", "GPU peak {:.2f}"),
            ),
        )
        if experts := self._expert_load():
            yield "experts", experts

    def _expert_load(self) -> str:
        ending = "/load_max_over_mean"
        loads = {
            name.removeprefix("moe/").removesuffix(ending): value
            for name in self.train
            if name.endswith(ending) and (value := _number(self.train, name)) is not None
        }
        if not loads:
            return ""
        worst = max(loads, key=lambda layer: loads[layer])
        unused = sum(
            _number(self.train, name) or 0.0
            for name in self.train
            if name.endswith("/experts_unused")
        )
        return _join(
            f"busiest / mean {loads[worst]:.2f} ({worst})",
            f"mean of layers {sum(loads.values()) / len(loads):.2f}",
            f"unused {unused:.0f}",
        )


def suites_text(record: Record) -> str:
    """Return the mean rewards of suites, and how many answers could not be judged."""
    rewards = {
        name.removeprefix("suites/").removesuffix("/reward"): _number(record, name)
        for name in record
        if name.startswith("suites/") and name.endswith("/reward")
    }
    faults = sum(_number(record, n) or 0.0 for n in record if n.endswith("/verifier_faults"))
    found = [f"{name} {value:.3f}" for name, value in rewards.items() if value is not None]
    return _join(*found, f"{faults:.0f} verifier faults" if faults else "")


def _number(record: Record, name: str) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else None


def _part(record: Record, name: str, form: str, unknown: str | None = None) -> str:
    """Format one value; absent is empty, null (not finite) is said, or shown as `unknown`."""
    if name not in record:
        return ""
    value = _number(record, name)
    if unknown is not None and (value is None or not math.isfinite(value)):
        return unknown
    return form.format(float("nan") if value is None else value)


def _join(*parts: str) -> str:
    return "  ".join(part for part in parts if part)


def _duration(seconds: float | None) -> str:
    if seconds is None or seconds > datetime.timedelta.max.total_seconds() / 2:
        return "-"
    return str(datetime.timedelta(seconds=round(seconds)))
