"""The weights of a model, wherever it lies: in a run, a checkpoint or a folder of Hugging Face."""

from pathlib import Path

from torch import Tensor

from nemotron.checkpoint.read import read_model
from nemotron.errors import UserError
from nemotron.hf.folder import is_exported, read_folder
from nemotron.model.config import ModelConfig


def read_weights(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return configuration and float32 weights, under the names of `HybridLM.state_dict()`.

    Raises:
        UserError: when the model is missing, or its files are damaged.
    """
    if not path.exists():
        raise UserError(
            "does not exist; give a run, checkpoint or export.", where=str(path.absolute())
        )
    if is_exported(path):
        loaded = read_folder(path)
        return loaded.config, loaded.weights
    return read_model(path)
