"""What a run begins with, when `init_from` names a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nemotron.checkpoint.read import read_model
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError, within
from nemotron.model.adapter import is_adapter
from nemotron.model.build import shapes
from nemotron.model.config import ModelConfig
from nemotron.model.init import ADDED, draw
from nemotron.parallel.local import LocalModel
from nemotron.parallel.runtime import Ranks
from nemotron.run.folder import RunFolder
from nemotron.run.log import RunLog
from nemotron.train.agreement import check_agreement, facts_of_weights


@dataclass(frozen=True)
class InitialModel:
    """A model that a run begins with, and what lies beside its weights."""

    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer | None = None
    companions: Mapping[str, bytes] = field(default_factory=dict)
    """Small files by name, such as a chat template; an export brings them along."""


ReadModel = Callable[[str], InitialModel]


def read_checkpoint(place: str) -> InitialModel:
    """Return the model of a run or a checkpoint."""
    return InitialModel(*read_model(Path(place)))


def keep_companions(
    initial: InitialModel, tokenizer: Tokenizer, folder: RunFolder, log: RunLog
) -> None:
    """Let the companions of the first weights travel on, if they are about the same tokens."""
    if initial.tokenizer is None:
        return
    if initial.tokenizer.gives_ids_of(tokenizer):
        folder.write_companions(initial.companions)
    else:
        log.info(
            "warning: init_from: the tokenizer there is another one than data.tokenizer, so the "
            "weights know other tokens; its chat template and special tokens are left out"
        )


def load_initial(
    local: LocalModel, path: str, read: ReadModel, ranks: Ranks | None = None, *, seed: int = 0
) -> InitialModel:
    """Start from saved weights; every tensor must be there, with its shape, and no other.

    `seed` is that of adapters, and of what correction adds to a model without it; they begin anew.

    Raises:
        UserError: when they are not those of the recipe, or not those of another rank.
    """
    initial = read_fitting(local.config, path, read)
    weights = initial.weights
    if ranks is not None and ranks.world > 1:
        check_agreement(facts_of_weights(weights), ranks)

    def value(name: str, shape: torch.Size, experts: range | None) -> Tensor:
        if is_adapter(name):
            return local.first_value(name, shape, seed, weights)
        if name not in weights:  # text correction adds it to a model that has none
            return draw(name, shape, local.config, seed)
        return weights[name] if experts is None else weights[name][experts.start : experts.stop]

    local.fill(value)
    return initial


def read_fitting(
    config: ModelConfig, path: str, read: ReadModel, *, key: str = "init_from"
) -> InitialModel:
    """Read saved weights, which must be those of a model of this configuration.

    `key` is the key of the recipe that names them.

    Raises:
        UserError: when a tensor is absent, has another shape or is not in the model.
    """
    with within(key):
        initial = read(path)
    saved_config, weights = initial.config, initial.weights
    own = shapes(config)
    problems = [
        f"{name} is absent" for name in own if name not in weights and not name.startswith(ADDED)
    ]
    problems += [f"{name} is not in the model" for name in weights if name not in own]
    problems += [
        f"{name} has shape {list(weights[name].shape)} instead of {list(shape)}"
        for name, shape in own.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        old, new = saved_config.model_dump(), config.model_dump()
        keys = [f"model.{key} = {old[key]} there" for key in old if old[key] != new[key]]
        raise UserError(
            f"has weights that do not fit the recipe ({', '.join(keys)}): "
            f"{'; '.join(problems[:10])}.",
            key=key,
            value=Path(path),
        )
    return initial
