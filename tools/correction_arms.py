"""What is trained for the figures of docs/correction.md: data, arms, and what is compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TRAIN = 5000
"""Pairs; 5 % of them are held out, for the threshold of `soft`."""
TEST = 600
"""Pairs that no run trains on, made from other sentences of the same grammar."""

Measure = Literal["parallel", "ar", "bits"]


@dataclass(frozen=True)
class Arm:
    """A training, as a recipe with settings, and how its result is measured."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()
    measure: Measure | None = "parallel"
    """By `nemotron correct` and `nemotron score`, with or without --ar; by the held-out loss of the
    run; or not at all, because others go on from it."""
    data: str = "pairs"
    """Which of `DATA` it trains on."""
    needs: str | None = None
    """Arm whose run of the same seed `init_from` names."""


@dataclass(frozen=True)
class Figure:
    """A measure of a comparison, and under which name its results hold it."""

    title: str
    key: str
    other: str | None = None
    """The key of the arm without, where it is another."""


@dataclass(frozen=True)
class Comparison:
    """Two arms that differ in one thing."""

    name: str
    question: str
    without: str
    with_: str
    figures: tuple[Figure, ...]
    more: tuple[str, ...] = ()
    """Further arms, which are drawn and have no line in the table."""


def length(steps: int, decay: int) -> tuple[str, ...]:
    """Return the settings of a schedule."""
    lengths = (f"total_steps={steps}", "warmup_steps=20", f"decay_steps={decay}")
    return tuple(f"schedule.{length}" for length in lengths)


SMALL = ("batch.global_tokens=512", "batch.micro_batch=2")
PAIRS_SIZE = (*length(400, 130), *SMALL)
WAYS_SIZE = length(1000, 300)
"""Of runs that go on from a model of the language; token by token, it copies from step 350 on."""
ALL_HELD_OUT = "evaluation.tokens=138240"
"""More than what any source of texts holds out, so that arms are measured on the same rows."""
TEXTS_SIZE = (*length(200, 70), "batch.global_tokens=1920", "batch.micro_batch=8", ALL_HELD_OUT)
SWITCHED_SIZE = (*length(200, 70), *SMALL, ALL_HELD_OUT)

ARMS = (
    Arm("unmasked", "tag", ("correct.mask_rate=0", *PAIRS_SIZE)),
    Arm("masked-10", "tag", ("correct.mask_rate=0.1", *PAIRS_SIZE)),
    Arm("masked", "tag", PAIRS_SIZE),
    Arm("masked-30", "tag", ("correct.mask_rate=0.3", *PAIRS_SIZE)),
    Arm("masked-50", "tag", ("correct.mask_rate=0.5", *PAIRS_SIZE)),
    Arm("nbest", "nbest", PAIRS_SIZE),
    Arm("ctc", "ctc", PAIRS_SIZE),
    Arm("soft", "soft", ("correct.first_steps=280", *PAIRS_SIZE)),
    Arm("base", "base", (*length(200, 60), *SMALL), None),
    Arm("one-pass", "tag", WAYS_SIZE, needs="base"),
    Arm("written", "sft", WAYS_SIZE, "ar", needs="base"),
    Arm("ungated", "ungated", TEXTS_SIZE, "bits", "languages"),
    Arm("gated", "languages", TEXTS_SIZE, "bits", "languages"),
    Arm("monolingual", "monolingual", SWITCHED_SIZE, "bits", "switched"),
    Arm("injected", "codeswitch", SWITCHED_SIZE, "bits", "switched"),
    Arm("duration", "duration", PAIRS_SIZE),
)

WER = Figure("WER", "answer_wer")
CER = Figure("CER", "answer_cer")
F05 = Figure("correction F0.5", "correction_f0.5")
F1 = Figure("detection F1", "detection_f1")
PRECISION = Figure("precision", "correction_precision")
RECALL = Figure("recall", "correction_recall")
BETTER = Figure("sentences made better", "sentences_better")
WORSE = Figure("sentences made worse", "sentences_worse")


def bits(source: str, title: str) -> Figure:
    """Return the measure of a language model on the held-out text of a source."""
    return Figure(f"bits a byte, {title}", f"validation/{source}/bits_per_byte")


COMPARISONS = (
    Comparison(
        "masks",
        "right tokens hidden (`correct.mask_rate` 0 or 0.2)",
        "unmasked",
        "masked",
        (CER, F05, WORSE),
        ("masked-10", "masked-30", "masked-50"),
    ),
    Comparison("candidates", "1 or 4 candidates", "masked", "nbest", (CER, F05)),
    Comparison(
        "soft",
        "plain CTC, or detection with constrained CTC (`ctc.yaml`, `soft.yaml`)",
        "ctc",
        "soft",
        (CER, F05, F1),
    ),
    Comparison(
        "rewriting",
        "`soft.yaml`: the chosen tokens, or what is made of them",
        "soft",
        "soft",
        (Figure("CER", "answer_cer", "selected_cer"),),
    ),
    Comparison(
        "experts",
        "experts without or with languages (`ungated.yaml`, `languages.yaml`)",
        "ungated",
        "gated",
        (bits("a", "language a"), bits("b", "language b"), bits("both", "text that switches")),
    ),
    Comparison(
        "injection",
        "text without or with made sentences that switch (`monolingual.yaml`, `codeswitch.yaml`)",
        "monolingual",
        "injected",
        (
            bits("mixed", "real text that switches"),
            bits("cantonese", "Cantonese"),
            bits("english", "English"),
        ),
    ),
    Comparison(
        "ways",
        "token by token or in one pass, from the same trunk (`sft.yaml`, `tag.yaml`)",
        "written",
        "one-pass",
        (WER, CER, F05, PRECISION, RECALL, BETTER, WORSE),
    ),
    Comparison(
        "durations",
        "`duration.yaml`: the chosen candidate, or what is made of it",
        "duration",
        "duration",
        (
            Figure("CER", "answer_cer", "selected_cer"),
            Figure(
                "right durations; without: of one for each token",
                "validation/duration_accuracy",
                "duration_one",
            ),
        ),
    ),
)

NOISE = "--language grammar --out"
PAIRS = "data pairs data/correct/pairs.jsonl --tokenizer data/correct --hold-out 0.05 --workers 1"
TEXTS = " ".join(f"data/languages/{name}.jsonl" for name in ("a", "b", "both"))
SWITCHED = "data/yue/text.jsonl data/yue/cs.jsonl data/yue/mixed.jsonl data/en/text.jsonl"

DATA = {
    "pairs": {
        "data/correct/text.jsonl": f"data demo grammar --number {TRAIN} --out data/correct",
        "data/test/text.jsonl": f"data demo grammar --number {TEST} --seed 2 --out data/test",
        "data/correct/tokenizer.json": "data characters data/correct/text.jsonl"
        " --out data/correct/tokenizer.json",
        "data/correct/pairs.jsonl": "data noise data/correct/text.jsonl"
        f" {NOISE} data/correct/pairs.jsonl",
        "data/test/pairs.jsonl": "data noise data/test/text.jsonl --seed 2"
        f" {NOISE} data/test/pairs.jsonl",
        "data/correct/pairs1": f"{PAIRS} --candidates 1 --out data/correct/pairs1",
        "data/correct/pairs4": f"{PAIRS} --candidates 4 --out data/correct/pairs4",
        "data/correct/chats": f"{PAIRS} --candidates 1 --as chat --out data/correct/chats",
    },
    "languages": {
        "data/languages/both.jsonl": "two_languages --out data/languages",
        "data/languages/tokenizer.json": f"data characters {TEXTS}"
        " --out data/languages/tokenizer.json",
    },
    "switched": {
        "data/yue/text.jsonl": "data demo yue --number 20000 --out data/yue",
        "data/en/text.jsonl": "data demo en --number 20000 --out data/en",
        "data/yue/cs.jsonl": "data codeswitch data/yue/text.jsonl --lexicon cedict"
        " --languages yue,en --per-sentence 1 --out data/yue/cs.jsonl",
        "data/yue/tokenizer.json": f"data characters {SWITCHED} --vocab-size 4096"
        " --out data/yue/tokenizer.json",
    },
}
"""What each command of `nemotron` makes, and the command; `two_languages` is a tool, and the text
that switches needs the packages of the extra `correct`."""


def arms_of(comparisons: Sequence[Comparison]) -> list[Arm]:
    """Return the arms of comparisons, each after the one that it needs."""
    names = {name for each in comparisons for name in (each.without, each.with_, *each.more)}
    names |= {arm.needs for arm in ARMS if arm.name in names and arm.needs}
    return [arm for arm in ARMS if arm.name in names]
