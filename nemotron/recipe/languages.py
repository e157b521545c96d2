"""Rules about experts that belong to languages. Reads like a list."""

import itertools
from collections.abc import Iterator, Sequence

from nemotron.data.alphabets import SCRIPTS, shared
from nemotron.data.config import MIXED, SourceConfig, leaves
from nemotron.errors import Finding
from nemotron.train.config import RunConfig, TextConfig
from nemotron.train.schedule import plan_training


def impossible(config: RunConfig, languages: Sequence[str]) -> Iterator[Finding]:
    """Yield the values that contradict each other, in every stage with experts of languages."""
    if config.parallel.pp != 1:
        yield Finding(
            "parallel.pp",
            "cannot share a gate of model.language_experts yet; use 1.",
            config.parallel.pp,
        )
    if not isinstance(config, TextConfig):
        return
    names = ", ".join(languages)
    if config.data.language_of == "source":
        for source in _sources(config):
            if source.language is None:
                yield Finding(
                    "data.sources",
                    f"has {source.name} without language; give it one of {names}, or {MIXED}.",
                )
            elif source.language not in (*languages, MIXED):
                yield Finding(
                    "data.sources",
                    f"has {source.name} with language = {source.language}, which is none of "
                    f"model.language_experts.languages = {names}, nor {MIXED}.",
                )
    elif config.data.language_of == "script":
        yield from _scripts(languages)
    elif config.loss.lid_oracle_steps:
        yield Finding(
            "loss.lid_oracle_steps",
            "needs to know languages; set data.language_of: source, or script.",
            config.loss.lid_oracle_steps,
        )
    steps = plan_training(config).num_steps
    if config.loss.lid_oracle_steps >= steps:
        yield Finding(
            "loss.lid_oracle_steps",
            f"is not below the {steps} steps of the run, which would never use the gate; lower it.",
            config.loss.lid_oracle_steps,
        )


def _scripts(languages: Sequence[str]) -> Iterator[Finding]:
    """Yield languages that scripts cannot part."""
    for name in languages:
        if name not in SCRIPTS:
            rule = (
                f"cannot say which tokens are {name}; use source, or one of {', '.join(SCRIPTS)}."
            )
            yield Finding("data.language_of", rule, "script")
            return
    for one, other in itertools.combinations(languages, 2):
        if common := shared(one, other):
            yield Finding(
                "data.language_of",
                f"cannot part {one} from {other}, which share the script {common[0]}; use source.",
                "script",
            )


def _sources(config: TextConfig) -> Iterator[SourceConfig]:
    """Yield every source of every phase."""
    blends = [config.data.blend, *(p.blend for p in config.phases if p.blend is not None)]
    for blend in blends:
        yield from (leaf.source for leaf in leaves(blend))
