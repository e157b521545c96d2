"""The best valid layouts for a number of accelerators."""

from collections.abc import Iterator
from dataclasses import dataclass

from nemotron.divisors import divisors
from nemotron.model.config import LAYER_KINDS
from nemotron.ops.config import RECOMPUTED
from nemotron.parallel.dims import ParallelDims
from nemotron.plan.build import Setting, main_stretch
from nemotron.plan.job import Job
from nemotron.plan.memory import memory
from nemotron.plan.throughput import Constants, Prediction, predict

MOST_STAGES, MOST_ROWS = 16, 8
"""Pipeline stages and rows of a micro-batch that are tried at most."""
LONG_ROW = 8192
"""Tokens of a row on one rank below which sharing the row further is not tried."""
CHEAP: frozenset[str] = frozenset(RECOMPUTED)
"""What `selective` recomputes."""


@dataclass(frozen=True)
class Candidate:
    """A layout that is valid and fits into memory."""

    prediction: Prediction
    bytes: float
    """Memory of the fullest rank, over all lengths of row."""
    micro_batch: int
    """As in the recipe, in rows of `data.seq_len`."""

    @property
    def overrides(self) -> str:
        """The layout as one writes it behind a recipe."""
        job, dims = self.prediction.job, self.prediction.job.dims
        shown = [
            f"parallel.{axis}={getattr(dims, axis)}"
            for axis in ("pp", "dp_replicate", "cp", "tp", "ep")
            if getattr(dims, axis) > 1
        ]
        return " ".join([*shown, f"batch.micro_batch={self.micro_batch}", _recompute(job)])


def _recompute(job: Job) -> str:
    kinds = {LAYER_KINDS[letter] for letter in job.layers}
    chosen = sorted(job.recompute & kinds)
    if kinds <= job.recompute:
        return "recompute=block"
    chosen += ["selective"] if job.recompute >= CHEAP else []
    if len(chosen) < 2:
        return f"recompute={chosen[0] if chosen else 'none'}"
    return f"'recompute=[{', '.join(chosen)}]'"


@dataclass(frozen=True)
class Found:
    """What a search looked at, and the best, fastest first."""

    legal: int
    fitting: int
    best: list[Candidate]
    least_bytes: float
    """Memory of the valid layout that needs least."""


def search(setting: Setting, world: int, constants: Constants, keep: int = 10) -> Found:
    """Try every valid layout; those that do not fit into memory are dropped.

    Not tried are more than 16 stages, micro-batches of more than 8 rows, rows cut below 8,192
    tokens by `cp`, and what leaves the fast link with `tp`.
    """
    stretch = main_stretch(list(setting.stretches))
    longest = max(setting.stretches, key=lambda p: p.seq_len)
    found: dict[tuple[object, ...], Candidate] = {}
    legal, fitting, least = 0, 0, float("inf")
    for dims, micro_batch in _layouts(setting, world):
        legal += 1
        for recompute in _choices(setting):
            job = setting.job(longest, dims, micro_batch=micro_batch, recompute=recompute)
            needed = memory(job).total
            least = min(least, needed)
            if needed > setting.hardware.memory:
                continue
            if stretch is not longest:
                job = setting.job(stretch, dims, micro_batch=micro_batch, recompute=recompute)
            fitting += 1
            candidate = Candidate(predict(job, constants), needed, micro_batch)
            # of layouts that differ in dp_replicate alone, the best is enough
            key = (dims.pp, dims.cp, dims.tp, dims.ep, micro_batch)
            found[key] = min(candidate, found.get(key, candidate), key=_rank)
            break  # recomputing more is only slower
    return Found(legal, fitting, sorted(found.values(), key=_rank)[:keep], least)


def _rank(candidate: Candidate) -> tuple[float, float]:
    return -candidate.prediction.tokens_per_second, candidate.bytes


def _choices(setting: Setting) -> Iterator[frozenset[str]]:
    """Yield what is recomputed, from nothing to everything; the mixtures keep most."""
    pattern = setting.config.model.hybrid_override_pattern
    kinds = frozenset(LAYER_KINDS[letter] for letter in pattern)
    seen = []
    for names in ((), ("moe", "mlp"), ("moe", "mlp", "mamba")):
        chosen = frozenset(names) & kinds
        if chosen not in seen:
            seen.append(chosen)
            yield chosen
            if chosen != kinds:
                yield chosen | CHEAP
    if kinds not in seen:
        yield kinds


def _layouts(setting: Setting, world: int) -> Iterator[tuple[ParallelDims, int]]:
    """Yield every layout and micro-batch that breaks no rule."""
    model, stretches = setting.config.model, setting.stretches
    rows = min(stretch.rows for stretch in stretches)
    usual = setting.config.batch.global_tokens // setting.config.data.seq_len
    longest = max(stretch.seq_len for stretch in stretches)
    experts = divisors(model.n_routed_experts) if _has_experts(setting) else [1]
    within = [tp for tp in divisors(world) if tp <= setting.hardware.domain]
    widths = [tp for tp in within if not setting.violations(ParallelDims(tp=tp), 1)]
    for tp in widths:
        for pp in divisors(world // tp):
            if pp > MOST_STAGES or setting.violations(ParallelDims(pp=pp), 1):
                continue
            for cp in divisors(world // (tp * pp)):
                if cp > 1 and longest // cp < LONG_ROW:
                    continue
                for shard in divisors(world // (tp * pp * cp)):
                    replicas = world // (tp * pp * cp * shard)
                    if rows % (replicas * shard):
                        continue
                    own = max(1, usual // (replicas * shard))
                    for ep in experts:
                        if (shard * cp * tp) % ep:
                            continue
                        dims = ParallelDims(pp, replicas, shard, cp, tp, ep)
                        if setting.violations(dims, 1):
                            continue
                        for size in divisors(own):
                            if size <= MOST_ROWS and not setting.violations(dims, size):
                                yield dims, size


def _has_experts(setting: Setting) -> bool:
    model = setting.config.model
    return "E" in model.hybrid_override_pattern + model.mtp_pattern
