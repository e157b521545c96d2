"""What a server has done, in the text format of Prometheus."""

from collections import Counter
from collections.abc import Iterator

from nemotron.generate.acceptance import Acceptance
from nemotron.generate.engine import Engine
from nemotron.serve.worker import Worker

BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Upper bounds of the histograms of seconds."""


class Histogram:
    """Counts of seconds up to each bound."""

    def __init__(self) -> None:
        self.counts, self.count, self.sum = [0] * len(BOUNDS_S), 0, 0.0

    def add(self, seconds: float) -> None:
        self.count, self.sum = self.count + 1, self.sum + seconds
        for index, bound in enumerate(BOUNDS_S):
            self.counts[index] += seconds <= bound

    def lines(self, name: str) -> Iterator[str]:
        for bound, count in zip(BOUNDS_S, self.counts, strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {self.count}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {self.count}"


class Metrics:
    """Counts requests and tokens; asyncio alone writes here."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """By path and status."""
        self.tokens: Counter[str] = Counter()
        """`prompt` and `generated`."""
        self.canceled = 0
        self.open_answers = 0
        self.first_token = Histogram()
        self.duration = Histogram()

    def count_leave(self) -> None:
        """Count a client that did not wait for the end of its answer."""
        self.canceled += 1

    def text(self, worker: Worker) -> str:
        """Return all metrics."""
        lines: list[str] = []

        def add(name: str, kind: str, meaning: str, samples: Iterator[str] | int) -> None:
            name = f"nemotron_{name}"
            lines.extend([f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"])
            lines.extend([f"{name} {samples}"] if isinstance(samples, int) else samples)

        counted = self.requests.items()
        add(
            *("requests_total", "counter", "Requests by path and status."),
            (f'nemotron_requests_total{{path="{p}",status="{s}"}} {n}' for (p, s), n in counted),
        )
        for kind in ("prompt", "generated"):
            add(f"{kind}_tokens_total", "counter", f"Tokens, {kind}.", self.tokens[kind])
        add("canceled_total", "counter", "Requests whose client went away.", self.canceled)
        add("open_answers", "gauge", "Answers that are written or wait.", self.open_answers)
        for name, (kind, meaning, value) in _engine_values(worker.engine).items():
            add(name, kind, meaning, value)
        for name, meaning, histogram in (
            ("first_token_seconds", "Time to the first token.", self.first_token),
            ("request_seconds", "Time to the end of an answered request.", self.duration),
        ):
            add(name, "histogram", meaning, histogram.lines(f"nemotron_{name}"))
        return "\n".join(lines) + "\n"


def _engine_values(engine: Engine) -> dict[str, tuple[str, str, int]]:
    cache, scheduler = engine.cache, engine.scheduler
    used = sum(map(len, cache.tables))
    drafts = Acceptance() if engine.speculator is None else engine.speculator.acceptance
    return {
        "slots": ("gauge", "Slots for answers.", len(cache.lengths)),
        "slots_free": ("gauge", "Slots without an answer.", cache.num_free_slots),
        "blocks_of_answers": ("gauge", "Key-value blocks that answers refer to.", used),
        "answers_running": ("gauge", "Answers with a slot.", len(scheduler.running)),
        "answers_waiting": ("gauge", "Answers that wait for a slot.", len(scheduler.waiting)),
        "preemptions_total": ("counter", "Answers that lost their slot.", scheduler.num_preempted),
        "draft_tokens_total": ("counter", "Guesses at tokens.", drafts.num_drafts),
        "accepted_tokens_total": (
            "counter",
            "Guesses that were right.",
            drafts.num_accepted,
        ),
    }
