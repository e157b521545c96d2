"""Models beside the trained one that stay as they are: a teacher, and a reference of a policy."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron.data.batch import Batch, Batches
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError, within
from nemotron.hf.folder import is_exported
from nemotron.hf.hub import find_folder
from nemotron.hf.tokenizer_files import TOKENIZER, check_tokenizer
from nemotron.hf.weights import read_weights
from nemotron.model.build import build_around
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.ops.apply import apply as apply_ops
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.contents import KEY, Contents, check_contents, model_contents
from nemotron.posttrain.sft_config import DistillConfig
from nemotron.precision.apply import DTYPES
from nemotron.run.files import RunFiles
from nemotron.train.config import RunConfig

HIDDEN = "teacher_hidden"
"""Name in `Batch.extras`: what the teacher's head gets, [B, T, its hidden size]."""


def load_teacher(
    config: DistillConfig | RlConfig, tokenizer: Tokenizer, device: torch.device
) -> HybridLM:
    """Return the teacher of a run, frozen, in the compute dtype.

    Raises:
        UserError: when there is none, or it has another vocabulary than the student.
    """
    assert config.teacher is not None
    with within("teacher"):
        path = find_folder(config.teacher)
        own, weights = read_weights(path)
    if own.vocab_size != config.model.vocab_size:
        raise UserError(
            f"has a vocabulary of {own.vocab_size}, but model.vocab_size = "
            f"{config.model.vocab_size}; give a teacher with the student's tokenizer.",
            key="teacher",
            value=str(path),
        )
    if not knows_tokens(path, own, tokenizer):
        raise UserError(
            f"has another tokenizer than data.tokenizer = {config.data.tokenizer}; give a "
            "teacher with the student's tokenizer.",
            key="teacher",
            value=str(path),
        )
    return _freeze(own, weights, config, device)


def knows_tokens(path: Path, own: ModelConfig, tokenizer: Tokenizer) -> bool:
    """Say whether a model was trained with this tokenizer, as far as one lies beside it."""
    run = None if is_exported(path) else RunFiles.around(path)
    home = path / TOKENIZER if run is None else run.tokenizer
    if not home.is_file():
        return True
    return Tokenizer(check_tokenizer(home, own.vocab_size)).hash == tokenizer.hash


def load_reference(config: RlConfig, device: torch.device) -> HybridLM | None:
    """Return the weights that a run began with, frozen; None if nothing is compared with them.

    Raises:
        UserError: when `init_from` names no model.
    """
    if not config.policy.kl_coefficient:
        return None
    assert config.init_from is not None, "a rule of the recipe"
    with within("init_from"):
        own, weights = read_weights(find_folder(config.init_from))
    return _freeze(own, weights, config, device)


def _freeze(
    own: ModelConfig, weights: dict[str, Tensor], config: RunConfig, device: torch.device
) -> HybridLM:
    """Return a model that computes as the recipe says, and learns nothing."""
    model = build_around(own, weights)
    apply_ops(model, config.ops)
    model.compute_dtype = DTYPES[config.precision.compute]
    return model.to(device).requires_grad_(False)


class TaughtBatches:
    """Another source's batches, each with the teacher's hidden states."""

    def __init__(
        self,
        batches: Batches,
        teacher: HybridLM,
        config: DistillConfig,
        device: torch.device,
        contents: Contents,
    ) -> None:
        """`contents` are the hashes of what else the student learns under."""
        self._batches, self._teacher = batches, teacher
        self._config, self._device = config, device
        self._contents = model_contents("teacher", config.teacher, teacher) | contents

    @torch.no_grad()
    def take(self, step: int) -> Batch:
        """Return the rows of a step, read by the teacher as many at once as by the student."""
        batch = self._batches.take(step)
        at_once = self._config.rows_at_once(batch.input_ids.shape[1])
        parts = [micro.to(self._device) for micro in batch.split(at_once)]
        hidden = torch.cat([self._teacher(part.input_ids, part.seq_idx) for part in parts])
        return replace(batch, extras={**batch.extras, HIDDEN: hidden})

    def state(self) -> dict[str, Any]:  # Any: nested JSON
        """Return the state of the other source, and what identifies the teacher and the scales."""
        return {**self._batches.state(), KEY: self._contents}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Restore the other source.

        Raises:
            UserError: as it does, and when the teacher or a scale has changed.
        """
        check_contents(saved, self._contents, step)
        self._batches.restore({k: v for k, v in saved.items() if k != KEY}, step)

    def metrics(self, step: int) -> dict[str, float]:
        """Return the figures of the other source."""
        return self._batches.metrics(step)
