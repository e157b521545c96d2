"""From a calibrated model to the scales of its layers: by a preset, or by a search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from nemotron.errors import UserError
from nemotron.hf.read_scales import read_like
from nemotron.precision.scales import StoredFormat
from nemotron.precision.static import ModelScales
from nemotron.quantize.calibrate import Observed, calibrate
from nemotron.quantize.groups import FORMATS, Cost, Group, find_groups
from nemotron.quantize.presets import (
    EVERY,
    QuantizationPreset,
    WeightObserver,
    assign,
    find_input_observer,
    find_observer,
    find_preset,
    quantizable,
)
from nemotron.quantize.scales import model_scales
from nemotron.quantize.search import Found, search
from nemotron.quantize.sensitivity import SCORES, Score, Scores
from nemotron.quantize.subject import Subject

SEARCHED = QuantizationPreset("formats found by a search", dict.fromkeys(EVERY, "fp8"))


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    preset: str | None = None
    bits: float | None = None
    """Of each weight of the linear layers, for a search; in place of a preset."""
    like: Path | None = None
    """Quantized folder with the formats and scales; in place of both."""
    keep: Sequence[str] = ()
    """Patterns of layers that stay in bfloat16."""
    weights: str | None = None
    cache: bool | None = None
    """Whether keys and values are in FP8; None: as the preset says."""
    rows: int = 128
    """Of training text, for calibration."""
    score: str = "fisher"
    score_rows: int = 32
    """Of training text, for the search."""
    cost: str = "weights"
    """What the bits of a search are a mean over."""
    inputs: str = "max"
    """How far the fixed scales of inputs reach."""
    every_expert: bool = False
    """Whether calibration lets every expert read all tokens."""

    def __post_init__(self) -> None:
        if [self.preset, self.bits, self.like].count(None) != 2:
            raise UserError(
                "the formats are missing, or given twice; give --preset NAME, --bits NUMBER or "
                "--like FOLDER."
            )
        observes = self.weights or self.inputs != "max" or self.every_expert
        if self.like is not None and (self.keep or observes or self.cache is not None):
            raise UserError(
                "contradict --like; leave them out.",
                key="--keep, --weights, --inputs, --every-expert and --kv-cache",
            )
        if self.score not in get_args(Score):
            known = ", ".join(get_args(Score))
            raise UserError(f"is unknown; use one of {known}.", key="--score", value=self.score)
        if self.cost not in get_args(Cost):
            known = ", ".join(get_args(Cost))
            raise UserError(f"is unknown; use one of {known}.", key="--cost", value=self.cost)
        find_observer(self.weights, self.base)
        find_input_observer(self.inputs)

    @property
    def base(self) -> QuantizationPreset:
        """The preset, or the rules that a search starts from."""
        return SEARCHED if self.preset is None else find_preset(self.preset)

    @property
    def observer(self) -> WeightObserver:
        """How the scales of NVFP4 weights are found; a search takes those of smallest error."""
        default = "mse" if self.preset is None else self.weights
        return find_observer(self.weights or default, self.base)

    @property
    def has_cache(self) -> bool:
        """Whether keys and values are in FP8."""
        return self.base.cache if self.cache is None else self.cache


@dataclass(frozen=True)
class Decision:
    """Formats and scales of a model."""

    table: Mapping[str, StoredFormat]
    scales: ModelScales
    observed: Observed
    found: Found | None = None
    scores: Scores | None = None


def decide(subject: Subject, wanted: Wanted) -> Decision:
    """Calibrate a model, and choose the formats and scales of its layers.

    Raises:
        UserError: when the model does not fit the preset, or no choice the budget.
    """
    if wanted.like is not None:
        scales = read_like(wanted.like, subject.model, "--like")
        return Decision(_formats(subject, scales), scales, Observed())
    base = wanted.base
    table = assign(subject.model, base, wanted.keep)  # what does not fit is found before any work
    _check_table(table, wanted)
    observed = calibrate(
        subject.model,
        subject.rows(wanted.rows),
        find_input_observer(wanted.inputs),
        every_expert=wanted.every_expert,
    )
    if wanted.bits is None:
        scales = _scales(subject, table, observed, wanted)
        return Decision(table, scales, observed)
    groups = [
        group
        for group in find_groups(subject.model, "active" if wanted.cost == "active" else "weights")
        if any(layer in table for layer in group.layers)
    ]
    scores = _score(subject, groups, observed, wanted)
    found = search(groups, scores, wanted.bits)
    scales = _scales(subject, found.table, observed, wanted)
    return Decision(found.table, scales, observed, found, scores)


def _check_table(table: Mapping[str, StoredFormat], wanted: Wanted) -> None:
    """Check that something is quantized, and that the scales of weights are those of something.

    Raises:
        UserError: when an option leaves nothing to be done, or has no effect.
    """
    if not table:
        rule = "keeps every layer that would be quantized; give fewer patterns."
        raise UserError(rule, key="--keep", value=" ".join(wanted.keep) or None)
    if wanted.bits is None and wanted.weights is not None and "nvfp4" not in table.values():
        rule = "has no effect, because no layer is in NVFP4; leave it out."
        raise UserError(rule, key="--weights", value=wanted.weights)


def _formats(subject: Subject, scales: ModelScales) -> dict[str, StoredFormat]:
    found: dict[str, StoredFormat] = {}
    for name in quantizable(subject.model):
        own = scales.linears.get(name) or scales.linears.get(f"{name}.0.up_proj")
        if own is not None:
            found[name] = own.format
    return found


def _scales(
    subject: Subject, table: Mapping[str, StoredFormat], observed: Observed, wanted: Wanted
) -> ModelScales:
    return model_scales(subject.model, table, observed, wanted.observer, cache=wanted.has_cache)


def _score(subject: Subject, groups: Sequence[Group], observed: Observed, wanted: Wanted) -> Scores:
    choices = {}
    for format in FORMATS:
        able = [group for group in groups if format in group.formats]
        layers: dict[str, StoredFormat] = {
            layer: format for group in able for layer in group.layers
        }
        choices[format] = model_scales(subject.model, layers, observed, wanted.observer)
    score: Score = "kl" if wanted.score == "kl" else "fisher"
    return SCORES[score](subject.model, groups, choices, list(subject.rows(wanted.score_rows)))
