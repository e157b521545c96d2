"""The stages of training that a recipe can name, each with its class and its rules."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemotron.errors import Finding
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.correct.config import CorrectConfig
from nemotron.posttrain.preference.config import DpoConfig
from nemotron.posttrain.sft_config import DistillConfig, SftConfig
from nemotron.recipe import correct, distill, dpo, pretrain, rl, sft
from nemotron.recipe.read import Idle
from nemotron.train.config import PretrainConfig, RunConfig

if TYPE_CHECKING:
    from nemotron.train.setup import Stage as TrainedStage

DEFAULT = "pretrain"
"""Stage of a recipe that names none."""


@dataclass(frozen=True)
class Stage:
    """What a recipe of one stage consists of, and which rules it has beside those of all."""

    recipe: type[RunConfig]
    impossible: Callable[[Any], Iterator[Finding]] = lambda _: iter(())
    """Yields the values of a recipe that contradict each other."""
    idle: Callable[[Any], Iterator[Idle]] = lambda _: iter(())
    """Yields keys that nothing reads; raises UserError for a bad schedule."""
    trained: "Callable[[], TrainedStage] | None" = None
    """Returns what trains such a recipe. It imports PyTorch, which reading a recipe does not."""


def _pretraining() -> "TrainedStage":
    from nemotron.train.pretraining import Pretraining

    return Pretraining()


def _finetuning() -> "TrainedStage":
    from nemotron.posttrain.sft import Finetuning

    return Finetuning()


def _distillation() -> "TrainedStage":
    from nemotron.posttrain.distill import Distillation

    return Distillation()


def _preference() -> "TrainedStage":
    from nemotron.posttrain.preference.stage import PreferenceOptimization

    return PreferenceOptimization()


def _reinforcement() -> "TrainedStage":
    from nemotron.posttrain.stage import Reinforcement

    return Reinforcement()


def _correction() -> "TrainedStage":
    from nemotron.posttrain.correct.stage import Correction

    return Correction()


STAGES = {
    "pretrain": Stage(PretrainConfig, pretrain.impossible, pretrain.idle, _pretraining),
    "sft": Stage(SftConfig, sft.impossible, sft.idle, _finetuning),
    "distill": Stage(DistillConfig, distill.impossible, sft.idle, _distillation),
    "dpo": Stage(DpoConfig, dpo.impossible, dpo.idle, _preference),
    "rl": Stage(RlConfig, rl.impossible, rl.idle, _reinforcement),
    "correct": Stage(CorrectConfig, correct.impossible, correct.idle, _correction),
}
