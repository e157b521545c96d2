"""The rows of a step that this rank reads, with the targets that it needs, ahead of time."""

from dataclasses import replace

from nemotron.data.batch import Batch
from nemotron.data.config import DataConfig
from nemotron.data.loader import TrainingData, rows_of_rank
from nemotron.data.prefetch import Prefetcher
from nemotron.parallel.apply import LocalModel


class OwnRows:
    """Answers for one step after the other, or for any; there is nothing to save."""

    def __init__(
        self,
        config: DataConfig,
        data: TrainingData,
        local: LocalModel,
        *,
        num_steps: int,
        num_depths: int,
        pin: bool,
    ) -> None:
        """Read targets for `num_depths` tokens beyond the next, and no step from `num_steps` on."""
        self._config, self._data, self._local, self._depths = config, data, local, num_depths
        self._ahead = Prefetcher(
            self._read, depth=config.prefetch_steps, num_steps=num_steps, pin=pin
        )

    def take(self, step: int) -> Batch:
        """Return the rows of a step; whatever was wrong with reading them is raised here."""
        return self._ahead.take(step)

    def _read(self, step: int) -> Batch:
        share, mesh = slice(None), self._local.mesh
        if mesh is not None:
            num_rows = self._data.num_rows(step)
            share = rows_of_rank(num_rows, self._local.batch_rank, mesh.dims.batch)
        batch = self._data.batch(step, share)
        if not self._config.reset_documents:
            batch = replace(batch, seq_idx=None)
        return batch.look_ahead(self._depths)
