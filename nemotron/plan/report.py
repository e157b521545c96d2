"""All numbers that the command prints for one recipe on one system."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from nemotron.errors import Finding
from nemotron.model.parameters import by_kind, count_parameters
from nemotron.parallel.dims import ParallelDims
from nemotron.plan.build import Setting, Stretch, main_stretch, seconds_of
from nemotron.plan.calibration import error
from nemotron.plan.communication import Traffic, traffic
from nemotron.plan.memory import Memory, memory
from nemotron.plan.published import ROWS, Published
from nemotron.plan.search import Found
from nemotron.plan.throughput import FITTED, Constants, Prediction, predict
from nemotron.plan.trace import Kept

DAY = 86400.0


@dataclass(frozen=True)
class Cost:
    """Time that a stretch of training takes."""

    phase: str
    tokens: float
    days: float
    accelerator_hours: float


@dataclass(frozen=True)
class LayoutReport:
    """The cost of one layout, in the stretch of the run that has most tokens."""

    dims: ParallelDims
    memory: Memory
    """Of the stretch that needs most."""
    traffic: list[Traffic]
    prediction: Prediction
    costs: list[Cost]


@dataclass(frozen=True)
class Report:
    """The plan: what every layout has in common, and the cost of the recipe's layout if valid."""

    setting: Setting
    world: int
    stretch: Stretch
    violations: list[Finding]
    layout: LayoutReport | None
    compared: Published
    found: Found | None = None
    kept: list[Kept] | None = None

    @property
    def fits(self) -> bool:
        """Whether the recipe's layout is valid and fits into memory."""
        return self.layout is not None and (
            self.layout.memory.total <= self.setting.hardware.memory
        )


def describe_layout(
    setting: Setting, dims: ParallelDims, constants: Constants, tokens: float | None
) -> LayoutReport:
    """Compute the cost of a valid layout; `tokens` replace the length of the run."""
    job = setting.job(main_stretch(list(setting.stretches)), dims)
    prediction = predict(job, constants)
    if tokens is not None:
        spans = {f"{tokens:.3g} tokens": (tokens, tokens / prediction.tokens_per_second)}
    else:
        spans = seconds_of(setting, dims, constants)
    costs = [
        Cost(name, count, seconds / DAY, seconds * dims.world / 3600)
        for name, (count, seconds) in spans.items()
    ]
    needs = [memory(setting.job(stretch, dims)) for stretch in setting.stretches]
    fullest = max(needs, key=lambda need: need.total)
    return LayoutReport(dims, fullest, traffic(job), prediction, costs)


def nearest_published(setting: Setting, flops_per_token: float) -> Published:
    """Return the row most like the plan: in work of a token first, then in system and format."""
    format_ = max(setting.formats[setting.stretches[0].seq_len], key=lambda item: item[1])[0]

    def distance(row: Published) -> float:
        job = row.job
        apart = abs(math.log(job.flops_per_token / flops_per_token))
        apart += 0.5 * (row.system != setting.hardware.name)
        apart += 0.2 * (max(job.formats, key=lambda item: item[1])[0] != format_)
        return apart + 0.1 * row.held_out

    return min(ROWS, key=distance)


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as a tree of plain values."""
    setting, model = report.setting, report.setting.config.model
    count = count_parameters(model)
    tree: dict[str, Any] = {
        "hardware": asdict(setting.hardware),
        "accelerators": report.world,
        "parameters": {
            "total": count.total,
            "active": count.active,
            "by_kind": by_kind(model),
        },
        "flops_per_token": {
            str(stretch.seq_len): dict(setting.formats[stretch.seq_len])
            for stretch in setting.stretches
        },
        "violations": [
            {"key": found.key, "problem": str(replace(found, key=""))}
            for found in report.violations
        ],
        "fits": report.fits,
        "compared": {
            "row": report.compared.title,
            "source": report.compared.source,
            "published": report.compared.tokens_per_second,
            "error": error(report.compared, FITTED),
        },
    }
    if (layout := report.layout) is not None:
        tree["layout"] = {
            "dims": asdict(layout.dims),
            "memory": {"bytes": layout.memory.terms, "total": layout.memory.total},
            "traffic": [asdict(item) for item in layout.traffic],
            "throughput": _throughput(layout.prediction),
            "phases": [asdict(cost) for cost in layout.costs],
        }
    if (found := report.found) is not None:
        tree["search"] = {
            "legal": found.legal,
            "fitting": found.fitting,
            "best": [
                {
                    "overrides": candidate.overrides,
                    "dims": asdict(candidate.prediction.job.dims),
                    "bytes": candidate.bytes,
                    "throughput": _throughput(candidate.prediction),
                }
                for candidate in found.best
            ],
        }
    if report.kept is not None:
        tree["kept_for_backward"] = [asdict(item) for item in report.kept]
    return tree


def _throughput(prediction: Prediction) -> dict[str, Any]:
    return {
        "tokens_per_second": prediction.tokens_per_second,
        "per_accelerator": prediction.per_accelerator,
        "step_seconds": prediction.step,
        "seconds": prediction.parts | {"beside": prediction.beside},
        "bubble": prediction.bubble,
        "bound": prediction.bound,
        "utilisation": prediction.utilisation,
    }
