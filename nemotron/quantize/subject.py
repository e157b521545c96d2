"""The model that is quantized, with the text that it is calibrated on and compared on."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

from nemotron.data.batch import Batch
from nemotron.evaluate.agreement import Agreement, agreement, pooled
from nemotron.evaluate.command import Text, open_text
from nemotron.model.hybrid import HybridLM


class Subject:
    """A model in two copies: `before` stays unchanged, `model` is quantized in place."""

    def __init__(
        self, path: Path, recipe: Path | None, overrides: Sequence[str], device: str
    ) -> None:
        """Read the model, and open the text of the recipe, or of the model's own run.

        Raises:
            UserError: when there is no model or no held-out text, or the recipe's tokenizer is
                another than the model's.
        """
        self._held_out, _ = open_text(path, Text(recipe, overrides), device)
        self.model: HybridLM = self._held_out.model.requires_grad_(requires_grad=False)
        self.before: HybridLM = copy.deepcopy(self.model)

    def rows(self, number: int) -> Iterator[Batch]:
        """Yield that many rows of the training text, as many at once as a micro-batch has."""
        data, config = self._held_out.data, self._held_out.config
        step, left = 0, number
        while left > 0:
            batch = data.batch(step).map(itemgetter(slice(left)))
            batch = batch if data.config.reset_documents else replace(batch, seq_idx=None)
            yield from batch.split(config.rows_at_once(batch.input_ids.shape[1]))
            step, left = step + 1, left - batch.input_ids.shape[0]

    def compare(self) -> dict[str, Agreement]:
        """Return what quantization changes on held-out text, by domain and over `all`."""
        found = {
            domain: agreement(self.model, self.before, self._held_out.batches(domain))
            for domain in self._held_out.data.validation_domains
        }
        return found | {"all": pooled(found.values())}
