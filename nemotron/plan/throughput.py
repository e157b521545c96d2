"""Seconds of a step: arithmetic, memory traffic, exchanges that are waited for, and the bubble."""

from dataclasses import dataclass
from typing import NamedTuple

from nemotron.plan.communication import traffic
from nemotron.plan.job import Job
from nemotron.plan.memory import activation_bytes, saved_bytes

HIDDEN_LINK_EFFICIENCY = 0.75
"""Share of the nominal bandwidth of what runs beside the computation; the usual 70-80 %."""


class Constants(NamedTuple):
    """The fitted constants of the time model (`calibration.py`): a factor for each of `terms`."""

    gemm: float
    """Seconds of the products as a multiple of FLOPs / peak: 1 / efficiency."""
    passes: float
    """Times that what a block keeps moves between memory and processor in a step."""
    waiting: float
    """Seconds of the exchanges that are waited for, as a multiple of bytes / bandwidth."""
    per_layer: float
    """Seconds lost for each layer and micro-batch: launches, synchronisation, small products."""


FITTED = Constants(gemm=1.25, passes=23.52, waiting=0.6775, per_layer=2.438e-3)
"""What `calibration.fit` gives; a test fits again."""
ON_CPU = Constants(gemm=2.0, passes=0.0, waiting=2.0, per_layer=1e-4)
"""A guess: nothing was published for processors; the peak is measured where the plan is made."""


def stated_efficiency(efficiency: float) -> Constants:
    """Return the constants of a model with one number: products at this share of the peak."""
    return Constants(1 / efficiency, 0.0, 1 / HIDDEN_LINK_EFFICIENCY, 0.0)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step by what takes them, on the busiest stage."""

    job: Job
    arithmetic: float
    memory_traffic: float
    exchanges: float
    overhead: float
    beside: float
    """Traffic beside the computation; counts where it takes longer than that."""
    bubble: float
    """Share of the step in which a rank waits for its pipeline to fill and to drain."""

    @property
    def busy(self) -> float:
        """Seconds of all that one rank does or waits for in turn, without the bubble."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """The seconds of `busy` by what takes them."""
        return {
            "arithmetic": self.arithmetic,
            "memory traffic": self.memory_traffic,
            "exchanges": self.exchanges,
            "per layer": self.overhead,
        }

    @property
    def step(self) -> float:
        """Seconds of one step."""
        return max(self.busy, self.beside) / (1 - self.bubble)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second on all accelerators."""
        return self.job.rows * self.job.seq_len / self.step

    @property
    def per_accelerator(self) -> float:
        """Tokens per second on one accelerator."""
        return self.tokens_per_second / self.job.dims.world

    @property
    def utilisation(self) -> float:
        """FLOPs that the model needs, as a share of the bf16 peak."""
        return self.per_accelerator * self.job.flops_per_token / self.job.hardware.peak("bf16")

    @property
    def bound(self) -> str:
        """What takes most of the step."""
        if self.beside > self.busy:
            return "weights and gradients"
        return max(self.parts, key=lambda name: self.parts[name])


def terms(job: Job) -> tuple[float, float, float, float]:
    """Return the seconds of a step without bubble if nothing were lost: what constants multiply."""
    dims, hardware = job.dims, job.hardware
    tokens = job.tokens * job.micro_batches * job.stage_share / dims.tp
    arithmetic = sum(flops / hardware.peak(name) for name, flops in job.formats)
    again = 1 + job.recomputed_share
    moved = _moved_per_token(job) / hardware.bandwidth
    waited = sum(item.seconds(job) for item in traffic(job) if not item.hidden)
    passes = sum(job.passes.values()) * job.stage_share * job.micro_batches * again
    return tokens * arithmetic * again, tokens * moved, waited, passes


def _moved_per_token(job: Job) -> float:
    """Return what all blocks keep for a token; of what is computed again, a third more."""
    moved = 0.0
    for letter, count in job.passes.items():
        kept = activation_bytes(job.model, letter, width=job.compute_bytes)
        again = kept if job.recomputes(letter) else saved_bytes(job, letter)
        moved += count * (kept + again / 3)
    return moved


def predict(job: Job, constants: Constants = FITTED) -> Prediction:
    """Return the seconds of a step."""
    arithmetic, moved, waited, layers = terms(job)
    beside = sum(item.seconds(job) for item in traffic(job) if item.hidden)
    fill = (job.dims.pp - 1) / job.pipeline.stages_per_rank
    return Prediction(
        job,
        arithmetic=arithmetic * constants.gemm,
        memory_traffic=moved * constants.passes,
        exchanges=waited * constants.waiting,
        overhead=layers * constants.per_layer,
        beside=beside / HIDDEN_LINK_EFFICIENCY,
        bubble=fill / (job.micro_batches + fill),
    )
