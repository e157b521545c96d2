"""Which parameters of a built model are trained."""

from nemotron.model.hybrid import HybridLM
from nemotron.train.config import TuneConfig
from nemotron.train.optimizer import kind_of


def apply_tuning(model: HybridLM, config: TuneConfig) -> None:
    """Freeze parts of a whole model, before it is laid out over ranks."""
    for name, parameter in model.named_parameters():
        if kind_of(name, model.config) in config.freeze:
            parameter.requires_grad_(False)
