"""The job that the worked numbers are about, and its variations."""

from dataclasses import replace
from typing import Any

from nemotron.parallel.dims import ParallelDims
from nemotron.plan.hardware import SYSTEMS
from nemotron.plan.job import Job
from nemotron.plan.published import models

EVERYTHING = frozenset({"mamba", "attention", "moe", "mlp"})


def super_job(dims: ParallelDims, **changes: Any) -> Job:
    """Super in rows of 8,192 on H100, all recomputed, a row at a time."""
    job = Job(
        model=models()["Super"],
        dims=dims,
        hardware=SYSTEMS["h100"],
        seq_len=8192,
        rows=3072,
        micro_batch=1,
        formats=(("bf16", 85.4e9),),
        recompute=EVERYTHING,
    )
    return replace(job, **changes)
