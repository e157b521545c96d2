"""From a checked recipe to jobs: one for each length of row in each phase."""

from dataclasses import dataclass

from nemotron.errors import Finding, UserError
from nemotron.model.config import LAYER_KINDS
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.dims import ParallelDims, resolve_dims, violations
from nemotron.plan.hardware import Hardware
from nemotron.plan.job import Job
from nemotron.plan.throughput import FITTED, ON_CPU, Constants, predict, stated_efficiency
from nemotron.plan.work import flops_by_format
from nemotron.train.config import PretrainConfig
from nemotron.train.schedule import plan_training


@dataclass(frozen=True)
class Part:
    """Steps of one phase whose rows have one length."""

    phase: str
    seq_len: int
    rows: int
    steps: float

    @property
    def tokens(self) -> float:
        """Tokens of all its steps."""
        return self.steps * self.rows * self.seq_len


def parts_of(config: PretrainConfig) -> list[Part]:
    """Return the run's parts in order.

    Raises:
        UserError: when the recipe's lengths do not fit each other.
    """
    found = []
    for phase in plan_training(config).timeline.phases:
        shares = sum(length.share for length in phase.lengths)
        for length in phase.lengths:
            rows = phase.tokens_per_step // length.seq_len
            steps = phase.num_steps * length.share / shares
            found.append(Part(phase.name, length.seq_len, rows, steps))
    return found


def main_part(parts: list[Part]) -> Part:
    """Return the part with most tokens: what is shown where one must stand for all."""
    return max(parts, key=lambda part: part.tokens)


@dataclass(frozen=True)
class Setting:
    """All of a recipe that the cost depends on, but its layout, read once."""

    config: PretrainConfig
    hardware: Hardware
    parts: tuple[Part, ...]
    formats: dict[int, tuple[tuple[str, float], ...]]
    """FLOPs of a token by number format, for each length of row."""

    @property
    def depths(self) -> int:
        """Depths of multi-token prediction that are trained."""
        return self.config.loss.mtp_num_depths if self.config.model.mtp_pattern else 0

    def job(
        self,
        part: Part,
        dims: ParallelDims,
        *,
        micro_batch: int | None = None,
        recompute: frozenset[str] | None = None,
    ) -> Job:
        """Return the job of a part in a layout."""
        config, parallel = self.config, self.config.parallel
        if recompute is None:
            recompute = frozenset(filter(config.recomputes, LAYER_KINDS.values()))
        return Job(
            model=config.model,
            dims=dims,
            hardware=self.hardware,
            seq_len=part.seq_len,
            rows=part.rows,
            micro_batch=config.rows_at_once(part.seq_len, micro_batch),
            formats=self.formats[part.seq_len],
            depths=self.depths,
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
        found: list[Finding] = []
        for part in self.parts:
            found += violations(
                dims,
                self.config.model,
                self.config.parallel,
                seq_len=part.seq_len,
                rows_per_step=part.rows,
                micro_batch=self.config.rows_at_once(part.seq_len, micro_batch),
            )
        return list(dict.fromkeys(found))


def _dispatch(parallel: ParallelConfig) -> str:
    """Return the dispatcher in the words of `Job`: a token is sent once to each rank."""
    return "all_gather" if parallel.expert_dispatch == "all_gather" else "per_rank"


def read_setting(config: PretrainConfig, hardware: Hardware) -> Setting:
    """Read from a recipe what its cost depends on.

    Raises:
        UserError: when the recipe's lengths or its rules of precision do not fit.
    """
    parts = parts_of(config)
    depths = config.loss.mtp_num_depths if config.model.mtp_pattern else 0
    formats = {
        length: tuple(flops_by_format(config.model, config.precision, length, depths).items())
        for length in {part.seq_len for part in parts}
    }
    return Setting(config, hardware, tuple(parts), formats)


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
    for part in setting.parts:
        tokens, seconds = found.get(part.phase, (0.0, 0.0))
        step = predict(setting.job(part, dims), constants).step
        found[part.phase] = (tokens + part.tokens, seconds + part.steps * step)
    return found
