"""What of a run is in a checkpoint, under which names."""

import torch
from torch import Tensor

from nemotron.checkpoint.read import MODEL_PREFIX
from nemotron.parallel.apply import LocalModel, local_of
from nemotron.precision.apply import Quantization
from nemotron.train.optimizer import Optimizer

RNG = "rng.cpu"


def snapshot(
    local: LocalModel, optimizer: Optimizer, quantization: Quantization
) -> dict[str, Tensor]:
    """Return every tensor that a resume needs, sharing its memory, as what is here of the whole."""
    moments = optimizer.tensors()
    tensors = {
        f"{MODEL_PREFIX}{name}": local.pieces(name, local_of(parameter))
        for name, parameter in local.parameters().items()
    }
    tensors |= {f"{MODEL_PREFIX}{name}": buffer for name, buffer in local.buffers().items()}
    for key in ("exp_avg", "exp_avg_sq"):
        for name, moment in moments[key].items():
            tensors[f"optimizer.{key}.{name}"] = local.pieces(name, moment)
    tensors |= {f"optimizer.step.{name}": step for name, step in moments["step"].items()}
    return tensors | quantization.tensors() | {RNG: torch.get_rng_state()}
