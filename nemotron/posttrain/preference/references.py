"""All log-probabilities that a run needs of its reference: those of its rows, and held-out ones."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nemotron.data.batch import Batch
from nemotron.data.loader import TrainingData
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError, within
from nemotron.hf.hub import find_folder
from nemotron.hf.weights import read_weights
from nemotron.model.adapter import is_adapter
from nemotron.parallel.local import LocalModel
from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.contents import Contents, weights_contents
from nemotron.posttrain.preference.config import DpoConfig
from nemotron.posttrain.preference.reference import Stored, compute
from nemotron.posttrain.teacher import knows_tokens
from nemotron.train.agreement import check_agreement
from nemotron.train.initial import InitialModel, read_fitting


@dataclass(frozen=True)
class Reference:
    """The model that the policy is compared with."""

    contents: Contents
    weights: dict[str, Tensor]


@dataclass
class References:
    """What is stored of a reference, by source and length of row, and by held-out domain."""

    train: dict[tuple[str, int], Stored] = field(default_factory=dict)
    held_out: dict[str, Stored] = field(default_factory=dict)

    @property
    def digests(self) -> dict[str, str]:
        """Hashes of the log-probabilities, by what they belong to."""
        named = {f"{name} in rows of {n}": s for (name, n), s in self.train.items()}
        held_out = {f"{name}, held out": stored for name, stored in self.held_out.items()}
        return {f"reference: {name}": s.digest for name, s in {**named, **held_out}.items()}


def read_reference(config: DpoConfig, tokenizer: Tokenizer) -> Reference:
    """Return the reference of a run.

    Raises:
        UserError: when there is none, or it does not fit the model or knows other tokens.
    """
    key = "reference" if config.reference is not None else "init_from"
    place = config.reference or config.init_from
    assert place is not None, "a rule of the recipe"
    with within(key):
        path = find_folder(place)

    def read(_: str) -> InitialModel:
        return InitialModel(*read_weights(path))

    found = read_fitting(config.model, place, read, key=key)
    if not knows_tokens(path, found.config, tokenizer):
        raise UserError(
            f"has another tokenizer than data.tokenizer = {config.data.tokenizer}; give a "
            "reference with the tokenizer of the policy.",
            key=key,
            value=place,
        )
    return Reference(weights_contents(key, place, found.weights), found.weights)


def collect(
    found: References,
    config: DpoConfig,
    data: TrainingData,
    reference: Reference,
    local: LocalModel,
    ranks: Ranks,
) -> None:
    """Open what is stored of the rows of a run, and compute what is missing, with its layout.

    The model has the reference's weights afterwards if anything was missing.

    Raises:
        UserError: when ranks have other values.
    """
    cache = Path(config.data.cache).absolute()
    own = _own_identity(config, reference)
    missing: list[Callable[[], None]] = []

    def need(stored: Stored, rows: Sequence[int], read: Callable[[Sequence[int]], Batch]) -> None:
        everyone = ranks.gather([row for row in rows if not stored.rows[row]])
        lacking = sorted({row for part in everyone for row in part})
        seq_len = read(rows[:1]).labels.shape[1] if lacking else 1
        at_once = config.rows_at_once(seq_len)
        if lacking:
            missing.append(lambda: compute(stored, lacking, read, local, ranks, at_once=at_once))
            missing.append(stored.save)

    for (name, seq_len), rows in _rows_read(data, data.timeline.num_steps).items():
        tokens, source = data.tokens[name], data.mixtures.sources[name, seq_len]
        identity = [*own, tokens.identity, seq_len]
        stored = Stored.open(cache, identity, tokens.train.num_tokens, source.num_rows)
        found.train[name, seq_len] = stored
        need(stored, rows, partial(data.planned, name, seq_len))
    for domain in data.validation_domains:
        stream = data.held_out[domain]
        held_out = range(data.num_held_out(domain, tokens=config.evaluation.tokens))
        identity = [*own, stream.identity(), config.data.seq_len]
        stored = Stored.open(cache, identity, stream.num_tokens, len(held_out))
        found.held_out[domain] = stored
        need(stored, held_out, partial(data.planned_held_out, domain))
    if missing:
        _fill(local, reference, config.seed)
        for work in missing:
            work()
    check_agreement(found.digests, ranks)


def _own_identity(config: DpoConfig, reference: Reference) -> list[object]:
    """Return what all values depend on: the weights, packing, and how a model computes."""
    precision = config.precision
    return [
        *reference.contents.values(),
        config.data.packing.model_dump(),
        precision.compute,
        json.dumps(precision.model_dump(mode="json"), sort_keys=True),
    ]


def _rows_read(data: TrainingData, num_steps: int) -> dict[tuple[str, int], list[int]]:
    """Return the rows of each source that any step reads."""
    found: dict[tuple[str, int], set[int]] = {}
    for step in range(num_steps):
        for sample in data.sample_ids(step):
            found.setdefault((sample.source, sample.seq_len), set()).add(sample.sample)
    return {key: sorted(rows) for key, rows in found.items()}


@torch.no_grad()
def _fill(local: LocalModel, reference: Reference, seed: int) -> None:
    """Give a model the weights of the reference; adapters begin anew, which changes nothing."""
    weights = reference.weights

    def value(name: str, shape: torch.Size, experts: range | None) -> Tensor:
        if is_adapter(name):
            return local.first_value(name, shape, seed, weights)
        return weights[name] if experts is None else weights[name][experts.start : experts.stop]

    local.fill(value)
