"""From a checked recipe to jobs: one for each length of row in each phase."""

from dataclasses import dataclass

from nemotron.errors import Finding, UserError
from nemotron.model.config import LAYER_KINDS
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.dims import ParallelDims, resolve_dims
from nemotron.plan.hardware import Hardware
from nemotron.plan.job import Job
from nemotron.plan.throughput import FITTED, ON_CPU, Constants, predict, stated_efficiency
from nemotron.plan.work import flops_by_format
from nemotron.train.config import RunConfig
from nemotron.train.layout import findings
from nemotron.train.schedule import TrainingPlan


@dataclass(frozen=True)
class Stretch:
    """Steps of one phase whose rows have one length."""

    phase: str
    seq_len: int
    rows: int
    steps: float

    @property
    def tokens(self) -> float:
        """Tokens of all its steps."""
        return self.steps * self.rows * self.seq_len


def stretches_of(plan: TrainingPlan) -> list[Stretch]:
    """Return the run's stretches in order."""
    found = []
    for phase in plan.timeline.phases:
        shares = sum(length.share for length in phase.lengths)
        for length in phase.lengths:
            rows = phase.tokens_per_step // length.seq_len
            steps = phase.num_steps * length.share / shares
            found.append(Stretch(phase.name, length.seq_len, rows, steps))
    return found


def main_stretch(stretches: list[Stretch]) -> Stretch:
    """Return the stretch with most tokens: what is shown where one must stand for all."""
    return max(stretches, key=lambda stretch: stretch.tokens)


@dataclass(frozen=True)
class Setting:
    """All of a recipe that the cost depends on, but its layout, read once."""

    config: RunConfig
    hardware: Hardware
    training: TrainingPlan
    stretches: tuple[Stretch, ...]
    formats: dict[int, tuple[tuple[str, float], ...]]
    """FLOPs of a token by number format, for each length of row."""

    def job(
        self,
        stretch: Stretch,
        dims: ParallelDims,
        *,
        micro_batch: int | None = None,
        recompute: frozenset[str] | None = None,
    ) -> Job:
        """Return the job of a stretch in a layout."""
        config, parallel = self.config, self.config.parallel
        if recompute is None:
            kinds = filter(config.recomputes, LAYER_KINDS.values())
            recompute = frozenset(kinds) | config.recomputed_operations
        return Job(
            model=config.model,
            dims=dims,
            hardware=self.hardware,
            seq_len=stretch.seq_len,
            rows=stretch.rows,
            micro_batch=config.rows_at_once(stretch.seq_len, micro_batch),
            formats=self.formats[stretch.seq_len],
            depths=config.num_depths,
            recompute=recompute,
            compute_bytes=4 if config.precision.compute == "fp32" else 2,
            reduce_bytes=4 if parallel.reduce_dtype == "fp32" else 2,
            reshard_after_forward=parallel.reshard_after_forward,
            sync_every_micro_batch=parallel.sync_every_micro_batch,
            dispatch=_dispatch(parallel),
            mamba_context=parallel.mamba_context,
            pipeline=parallel.pipeline,
            scan="chunked" if self.hardware.name == "cpu" else "mamba_ssm",
        )

    def violations(self, dims: ParallelDims, micro_batch: int | None = None) -> list[Finding]:
        """Return every rule that a layout breaks, with the nearest valid value."""
        return findings(self.config, self.training, dims, micro_batch)


def _dispatch(parallel: ParallelConfig) -> str:
    """Return the dispatcher in the words of `Job`: a token is sent once to each rank."""
    return "all_gather" if parallel.expert_dispatch == "all_gather" else "per_rank"


def read_setting(config: RunConfig, training: TrainingPlan, hardware: Hardware) -> Setting:
    """Read from a recipe what its cost depends on.

    Raises:
        UserError: when the recipe's lengths or its rules of precision do not fit.
    """
    stretches = stretches_of(training)
    formats = {
        length: tuple(
            flops_by_format(config.model, config.precision, length, config.num_depths).items()
        )
        for length in {stretch.seq_len for stretch in stretches}
    }
    return Setting(config, hardware, training, tuple(stretches), formats)


def layout_of(setting: Setting, world: int) -> tuple[ParallelDims, list[Finding]]:
    """Return the recipe's layout for so many processes, and every rule that it breaks.

    Sizes that do not make up that number are the first of them; `dp_shard: auto` is then rounded
    down, so that the other rules can still be looked at.
    """
    config = setting.config.parallel
    try:
        dims, found = resolve_dims(config, world), []
    except UserError as error:
        others = config.pp * config.dp_replicate * config.cp * config.tp
        shard = max(1, world // others) if config.dp_shard == "auto" else config.dp_shard
        sizes = (config.pp, config.dp_replicate, shard, config.cp, config.tp, config.ep)
        dims, found = ParallelDims(*sizes), [error.finding]
    return dims, found + setting.violations(dims)


def constants_for(hardware: Hardware, efficiency: float | None) -> Constants:
    """Return the constants of time: fitted, guessed for a processor, or the stated efficiency."""
    if efficiency is not None:
        return stated_efficiency(efficiency)
    return ON_CPU if hardware.name == "cpu" else FITTED


def seconds_of(
    setting: Setting, dims: ParallelDims, constants: Constants
) -> dict[str, tuple[float, float]]:
    """Return tokens and seconds of each phase."""
    found: dict[str, tuple[float, float]] = {}
    for stretch in setting.stretches:
        tokens, seconds = found.get(stretch.phase, (0.0, 0.0))
        step = predict(setting.job(stretch, dims), constants).step
        found[stretch.phase] = (tokens + stretch.tokens, seconds + stretch.steps * step)
    return found
