"""The model that a student learns from, and its hidden states as a part of each batch."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemotron.checkpoint.read import read_model
from nemotron.data.batch import Batch, Batches
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.hf.folder import is_exported, read_folder
from nemotron.hf.tokenizer_files import TOKENIZER, check_tokenizer
from nemotron.model.build import build_around
from nemotron.model.hybrid import HybridLM
from nemotron.ops.apply import apply as apply_ops
from nemotron.posttrain.sft_config import DistillConfig
from nemotron.precision.apply import DTYPES
from nemotron.run.files import RunFiles

HIDDEN = "teacher_hidden"
"""Name in `Batch.extras`: what the teacher's head gets, [B, T, its hidden size]."""


def load_teacher(config: DistillConfig, tokenizer: Tokenizer, device: torch.device) -> HybridLM:
    """Return the teacher of a run, frozen, in the compute dtype.

    Raises:
        UserError: when there is none, or it has another vocabulary than the student.
    """
    path = Path(config.teacher)
    if not path.exists():
        raise UserError(
            "does not exist; give a run, checkpoint or export.", key="teacher", value=str(path)
        )
    if is_exported(path):
        loaded = read_folder(path)
        own, weights, home = loaded.config, loaded.weights, path / TOKENIZER
    else:
        own, weights = read_model(path)
        run = RunFiles.around(path)
        home = run.tokenizer if run is not None else path / TOKENIZER
    if own.vocab_size != config.model.vocab_size:
        raise UserError(
            f"has a vocabulary of {own.vocab_size}, but model.vocab_size = "
            f"{config.model.vocab_size}; give a teacher with the student's tokenizer.",
            key="teacher",
            value=str(path),
        )
    if home.is_file():
        theirs = Tokenizer(check_tokenizer(home, own.vocab_size))
        if theirs.hash != tokenizer.hash:
            raise UserError(
                f"has another tokenizer than data.tokenizer = {config.data.tokenizer}; give a "
                "teacher with the student's tokenizer.",
                key="teacher",
                value=str(path),
            )
    teacher = build_around(own, weights)
    apply_ops(teacher, config.ops)
    teacher.compute_dtype = DTYPES[config.precision.compute]
    return teacher.to(device).requires_grad_(False)


class TaughtBatches:
    """Another source's batches, each with the teacher's hidden states."""

    def __init__(
        self, batches: Batches, teacher: HybridLM, config: DistillConfig, device: torch.device
    ) -> None:
        self._batches, self._teacher = batches, teacher
        self._config, self._device = config, device

    @torch.no_grad()
    def take(self, step: int) -> Batch:
        """Return the rows of a step, read by the teacher as many at once as by the student."""
        batch = self._batches.take(step)
        at_once = self._config.rows_at_once(batch.input_ids.shape[1])
        parts = [micro.to(self._device) for micro in batch.split(at_once)]
        hidden = torch.cat([self._teacher(part.input_ids, part.seq_idx) for part in parts])
        return replace(batch, extras={**batch.extras, HIDDEN: hidden})

    def state(self) -> dict[str, Any]:  # Any: nested JSON
        """Return the state of the other source: the teacher has none."""
        return self._batches.state()

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Restore the other source.

        Raises:
            UserError: as it does.
        """
        self._batches.restore(saved, step)

    def metrics(self, step: int) -> dict[str, float]:
        """Return the figures of the other source."""
        return self._batches.metrics(step)
