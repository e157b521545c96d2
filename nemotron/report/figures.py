"""Which figures of metrics.jsonl a report draws together, and under which names."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Source:
    """Keys of one kind of record."""

    kind: str
    pattern: str
    label: str
    """Name of the line; `\\1` is the group of the pattern."""


@dataclass(frozen=True)
class Figure:
    """What one chart shows of a run; of several runs, each key has a chart of its own."""

    title: str
    sources: tuple[Source, ...]
    unit: str = ""
    scale: str = "linear"
    has_marks: bool = False
    """Whether events are drawn."""


@dataclass(frozen=True)
class Group:
    """A section of the report."""

    name: str
    title: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Key:
    """A key that a figure draws, and the name of its line."""

    kind: str
    name: str
    label: str


def _train(pattern: str, label: str) -> Source:
    return Source(TRAIN, pattern, label)


def _validation(pattern: str, label: str) -> Source:
    return Source(VALIDATION, pattern, label)


LOSS = Group(
    "loss",
    "Loss",
    (
        Figure(
            "Next token",
            (_train("loss/main", "training"), _validation("validation/loss", "validation")),
            "nats per token",
            has_marks=True,
        ),
        Figure("Validation by domain", (_validation("validation/([^/]+)/loss", r"\1"),), "nats"),
        Figure(
            "Bits per byte of held-out text",
            (
                _validation("validation/bits_per_byte", "all"),
                _validation("validation/([^/]+)/bits_per_byte", r"\1"),
            ),
        ),
        Figure("Multi-token prediction", (_train(r"loss/mtp_(\d+)", r"depth \1"),), "nats"),
        Figure("Balance loss of the routers", (_train("loss/(aux)", "balance"),)),
        Figure("All terms, as they are minimized", (_train("loss/total", "total"),)),
        Figure("Gate over languages", (_train("loss/lid", "cross entropy"),), "nats"),
        Figure("Other terms", (_train("loss/(.+)", r"\1"),)),
    ),
)
REWARD = Group(
    "reward",
    "Rewards and answers",
    (
        Figure(
            "Reward",
            (
                _train("rl/reward", "training"),
                _validation("validation/reward", "validation"),
            ),
            has_marks=True,
        ),
        Figure("Reward by environment", (_train("rl/reward/(.+)", r"\1"),)),
        Figure("Validation reward", (_validation("validation/([^/]+)/reward", r"\1"),)),
        Figure("Length of answers", (_train("rl/answer_tokens", "mean"),), "tokens"),
        Figure(
            "Answers without a lesson",
            (
                _train("rl/(groups_without_signal)", "groups without signal"),
                _train("rl/(truncated)", "truncated"),
            ),
            "share",
        ),
        Figure("Divergence of rollout and trainer", (_train("rl/gen_kl_error", "k3"),), "nats"),
        Figure(
            "Mean probability ratio of rollout and trainer",
            (_train("rl/token_mult_prob_error", "1 if both agree"),),
        ),
        Figure("Entropy of the policy", (_train("rl/approx_entropy", "estimate"),), "nats"),
        Figure("Masked and faulty answers", (_train("rl/(masked|verifier_faults)", r"\1"),)),
        Figure("Time of a rollout batch", (_train("rl/(.+)_s", r"\1"),), "s"),
        Figure("Other figures of the answers", (_train("rl/(.+)", r"\1"),), scale="auto"),
    ),
)
SUITES = Group(
    "suites",
    "Suites",
    (
        Figure("Mean reward", (_validation("suites/([^/]+)/reward", r"\1"),)),
        Figure("Standard error of the reward", (_validation("suites/([^/]+)/error", r"\1"),)),
        Figure("pass@k", (_validation(r"suites/([^/]+)/pass@(\d+)", r"\1 @\2"),)),
        Figure("Most frequent answer", (_validation("suites/([^/]+)/majority", r"\1"),)),
        Figure("Length of answers", (_validation("suites/([^/]+)/answer_tokens", r"\1"),)),
        Figure("Truncated answers", (_validation("suites/([^/]+)/truncated", r"\1"),), "share"),
        Figure(
            "Answers that could not be judged",
            (_validation("suites/([^/]+)/verifier_faults", r"\1"),),
        ),
    ),
)
CORRECTION = Group(
    "correction",
    "Correction",
    (
        Figure(
            "Error rate of held-out pairs",
            (
                _validation("validation/source_error_rate", "first candidate"),
                _validation("validation/selected_error_rate", "chosen"),
                _validation("validation/error_rate", "answer"),
            ),
            "edits per token",
        ),
        Figure("Detection of wrong tokens", (_validation("validation/detection_f1", "F1"),)),
        Figure("Threshold", (_validation("validation/threshold", "log-probability"),)),
        Figure("Right durations", (_validation("validation/duration_accuracy", "share"),)),
        Figure("Pairs left out so far", (_train("correct/(infeasible|too_long)", r"\1"),)),
    ),
)
LANGUAGES = Group(
    "languages",
    "Languages",
    (
        Figure(
            "Load of each language's experts",
            (_train(r"moe/(.+)/load_(?!max_over_mean$|entropy$)(.+)", r"\1 \2"),),
            "share",
        ),
    ),
)
OPTIMIZATION = Group(
    "optimization",
    "Optimization",
    (
        Figure("Learning rate", (_train("lr", "learning rate"),)),
        Figure(
            "Gradient norm, before clipping",
            (_train("grad_norm/total", "total"),),
            scale="auto",
            has_marks=True,
        ),
        Figure("Gradient norm by kind", (_train("grad_norm/(.+)", r"\1"),), scale="auto"),
        Figure("Clipping", (_train("clip_coef", "factor on gradients"),)),
        Figure("Skipped steps so far", (_train("skipped_steps", "skipped"),)),
    ),
)
SPEED = Group(
    "speed",
    "Speed and memory",
    (
        Figure("Throughput", (_train("perf/tokens_per_s", "tokens per second"),)),
        Figure("Model FLOPs utilization", (_train("perf/mfu", "MFU"),)),
        Figure("Time of a step", (_train("perf/(.+)_s", r"\1"),), "s", "auto"),
        Figure("Memory", (_train("mem/(.+)_gib", r"\1"),), "GiB"),
        Figure("Ranks", (_train("ranks/(.+)", r"\1"),), scale="auto"),
    ),
)
DATA = Group(
    "data",
    "Data",
    (
        Figure("Tokens read, by source", (_train("data/tokens/(.+)", r"\1"),)),
        Figure("Other figures of the data", (_train("data/(?!tokens$)(.+)", r"\1"),)),
    ),
)
GROUPS = (LOSS, CORRECTION, LANGUAGES, REWARD, SUITES, OPTIMIZATION, SPEED, DATA)

DRAWN_ELSEWHERE = re.compile("(moe|precision)/.*|data/tokens|validation/(.+/)?perplexity")
"""Keys that are heat maps, the x axis, or a function of another key."""


def claim(figure: Figure, keys: dict[str, list[str]]) -> list[Key]:
    """Take the keys of a figure out of those that are left, by kind; returns them."""
    found = []
    for source in figure.sources:
        for name in [*keys[source.kind]]:
            if (match := re.fullmatch(source.pattern, name)) is not None:
                keys[source.kind].remove(name)
                found.append(Key(source.kind, name, match.expand(source.label)))
    return found


def left_over(keys: dict[str, list[str]]) -> list[Key]:
    """Return the keys that no figure took."""
    return [
        Key(kind, name, name)
        for kind, names in keys.items()
        for name in names
        if not DRAWN_ELSEWHERE.fullmatch(name)
    ]


def union(lists: Iterable[Sequence[str]]) -> list[str]:
    """Return every name once, in the order of the first list, then of the others."""
    return [*dict.fromkeys(name for names in lists for name in names)]
