"""Whether a recipe's layout over processes is possible, before anything starts."""

from nemotron.errors import UserError
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.dims import Finding, ParallelDims, resolve_dims, violations
from nemotron.train.config import PretrainConfig
from nemotron.train.course import Course


def findings(config: PretrainConfig, course: Course, dims: ParallelDims) -> list[Finding]:
    """Return every rule that the layout breaks in any phase, each once, with what is right."""
    found: list[Finding] = []
    for phase in course.timeline.phases:
        for length in phase.lengths:
            found += violations(
                dims,
                config.model,
                config.parallel,
                seq_len=length.seq_len,
                rows_per_step=phase.tokens_per_step // length.seq_len,
                micro_batch=config.rows_at_once(length.seq_len),
            )
    return list(dict.fromkeys(found))


def least_world(config: ParallelConfig) -> int:
    """Return the fewest processes that the sizes of a recipe ask for."""
    others = config.pp * config.dp_replicate * config.cp * config.tp
    return others if config.dp_shard == "auto" else others * config.dp_shard


def check_layout(config: PretrainConfig, course: Course, world: int) -> ParallelDims:
    """Return the sizes of the mesh for so many processes.

    Raises:
        UserError: for the first rule that they break, and how many others there are.
    """
    dims = resolve_dims(config.parallel, world)
    found = findings(config, course, dims)
    if found:
        (key, problem), *others = found
        more = f" ({len(others)} more: `nemotron plan` lists them)" if others else ""
        raise UserError(f"{key} {problem}{more}")
    return dims
