"""Rules about experts that belong to languages. Reads like a list."""

from collections.abc import Iterator

from nemotron.data.config import MIXED, SourceConfig, leaves
from nemotron.errors import Finding
from nemotron.recipe.read import Idle
from nemotron.train.config import RunConfig, TextConfig
from nemotron.train.schedule import plan_training


def impossible(config: RunConfig) -> Iterator[Finding]:
    """Yield the values that contradict each other, in every stage."""
    experts = config.model.language_experts
    if experts is None:
        return
    if config.parallel.pp != 1:
        yield Finding(
            "parallel.pp",
            "cannot share a gate of model.language_experts yet; use 1.",
            config.parallel.pp,
        )
    if not isinstance(config, TextConfig):
        return
    names = ", ".join(experts.languages)
    if config.data.language_of == "source":
        for source in _sources(config):
            if source.language is None:
                yield Finding(
                    "data.sources",
                    f"has {source.name} without language; give it one of {names}, or {MIXED}.",
                )
            elif source.language not in (*experts.languages, MIXED):
                yield Finding(
                    "data.sources",
                    f"has {source.name} with language = {source.language}, which is none of "
                    f"model.language_experts.languages = {names}, nor {MIXED}.",
                )
    elif config.loss.lid_oracle_steps:
        yield Finding(
            "loss.lid_oracle_steps",
            "needs to know languages; set data.language_of: source.",
            config.loss.lid_oracle_steps,
        )
    steps = plan_training(config).num_steps
    if config.loss.lid_oracle_steps >= steps:
        yield Finding(
            "loss.lid_oracle_steps",
            f"is not below the {steps} steps of the run, which would never use the gate; lower it.",
            config.loss.lid_oracle_steps,
        )


def idle(config: RunConfig) -> Iterator[Idle]:
    """Yield keys that nothing reads."""
    without = config.model.language_experts is None
    keys = ["loss.lid_coeff", "loss.lid_oracle_steps", "data.language_of"]
    yield Idle(keys, without, "model.language_experts is absent")
    unread = getattr(config.data, "language_of", "none") == "none"
    yield Idle(["loss.lid_coeff"], unread, "data.language_of = none")


def _sources(config: TextConfig) -> Iterator[SourceConfig]:
    """Yield every source of every phase."""
    blends = [config.data.blend, *(p.blend for p in config.phases if p.blend is not None)]
    for blend in blends:
        yield from (leaf.source for leaf in leaves(blend))
