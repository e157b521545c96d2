"""A model on the held-out text of a recipe: loss, perplexity and bits per byte, by domain."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nemotron.data.batch import Batch
from nemotron.device import find_device
from nemotron.errors import UserError
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.parallel.runtime import Ranks
from nemotron.train.build import build_local
from nemotron.train.config import TextConfig
from nemotron.train.pretraining import open_data
from nemotron.train.schedule import plan_training
from nemotron.train.validation import evaluate


class HeldOut:
    """Held-out text, and a model whose weights the caller fills in."""

    def __init__(self, config: TextConfig, device: str, model: ModelConfig | None = None) -> None:
        """Open the text of a recipe, and build its model or the given one.

        Raises:
            UserError: when the text is unfit for the model, or none of it is held out.
        """
        self.config = _in_one_process(config, model or config.model)
        """The recipe, for one process and without adapters."""
        self.data = open_data(self.config, plan_training(config))
        if not self.data.validation_domains:
            raise UserError(
                "holds nothing out, and data.validation is empty; set one of them.",
                key="data.validation_fraction",
                value=config.data.validation_fraction,
            )
        self._ranks = Ranks()
        self._local = build_local(self.config, find_device(device), self._ranks)

    @property
    def model(self) -> HybridLM:
        """The model, without weights until they are copied into it."""
        return self._local.models[0]

    def batches(self, domain: str | None = None) -> Iterator[Batch]:
        """Yield the rows on which `metrics` are computed, of one domain or of all."""
        config, resets = self.config, self.data.config.reset_documents
        tokens, rows = config.evaluation.tokens, config.batch.micro_batch
        for name in [domain] if domain else self.data.validation_domains:
            for held_out in self.data.validation(name, tokens=tokens, rows=rows):
                batch = held_out.batch
                yield batch if resets else replace(batch, seq_idx=None)

    def metrics(self) -> dict[str, float]:
        """Return what the trainer logs of a validation, under the same names."""
        return evaluate(
            self._local,
            self.data,
            self._ranks,
            tokens=self.config.evaluation.tokens,
            rows=self.config.batch.micro_batch,
        )


def _in_one_process(config: TextConfig, model: ModelConfig) -> TextConfig:
    """Return the recipe without layout and adapters, which weights have merged."""
    changes: dict[str, Any] = {"model": model}  # Any: sections of a recipe
    for section in ("parallel", "tune"):
        if section in type(config).model_fields:
            changes[section] = (
                type(config).model_fields[section].get_default(call_default_factory=True)
            )
    return config.model_copy(update=changes)
