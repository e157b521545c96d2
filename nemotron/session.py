"""Training from Python, for a notebook or a script: one process and no run folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from nemotron.data.tokenizer import Tokenizer
from nemotron.device import find_device, matmul_peak
from nemotron.errors import UserError
from nemotron.loading import read_initial
from nemotron.model.hybrid import HybridLM
from nemotron.parallel.runtime import Launch, Ranks
from nemotron.precision.apply import DTYPES
from nemotron.recipe.load import load_recipe
from nemotron.train.config import TextConfig
from nemotron.train.initial import load_initial
from nemotron.train.layout import check_layout
from nemotron.train.pretraining import build_trainer, open_data, validate
from nemotron.train.record import StepResult
from nemotron.train.schedule import plan_training


class Session:
    """A recipe's model, data and trainer, ready for the first step.

    No run is written; to keep checkpoints and metrics, run `nemotron train`.
    """

    def __init__(self, recipe: str | Path, overrides: Sequence[str] = ()) -> None:
        """Build everything that a recipe describes.

        `recipe` is a file, or the name of a recipe that ships with the package; `overrides` are
        texts such as `schedule.total_steps=30`.

        Raises:
            UserError: when the recipe, the data or the machine does not allow the run.
        """
        if Launch.of_this_process() is not None:
            raise UserError("a Session trains in one process; use nemotron train under torchrun.")
        self.config: TextConfig = load_recipe(recipe, overrides).text
        """The checked recipe."""
        plan = plan_training(self.config)
        check_layout(self.config, plan, 1)
        device = find_device(self.config.device)
        self.data = open_data(self.config, plan)
        """Text to train on and to evaluate on."""
        self.data.check_length()
        peak = matmul_peak(device, DTYPES[self.config.precision.compute])
        self.trainer = build_trainer(self.config, plan, self.data, device, peak, Ranks())
        """The trainer, whose `update` does one step on a batch."""
        if self.config.init_from is not None:
            init, seed = self.config.init_from, self.config.seed
            load_initial(self.trainer.local, init, read_initial, seed=seed)

    @property
    def model(self) -> HybridLM:
        """The model in training."""
        return self.trainer.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data."""
        return self.data.tokenizer

    def steps(self, number: int | None = None) -> Iterator[StepResult]:
        """Do the next steps, as many or to the end of the schedule, and yield each one's result."""
        trainer = self.trainer
        done, end = trainer.state.step, trainer.plan.num_steps
        for step in range(done, end if number is None else min(done + number, end)):
            trainer.quantization.begin(step, 0)
            yield trainer.update(step, trainer.batches.take(step))

    def evaluate(self) -> dict[str, float]:
        """Return loss, perplexity and bits per byte of the held-out text, by domain and overall.

        The metrics of the tasks in `evaluation.suites` follow.

        Raises:
            UserError: when a task is unknown or cannot run here.
        """
        found = validate(self.trainer, self.data)
        if not self.config.evaluation.suites.names:
            return found
        from nemotron.posttrain.suites.training import examined

        return found | examined(self.trainer, self.tokenizer)
