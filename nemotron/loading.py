"""Reading a model from wherever one lies: a run, a checkpoint, or an exported folder."""

from pathlib import Path

import torch
from torch import Tensor

from nemotron.checkpoint.read import read_model
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.hf.build import build_around
from nemotron.hf.folder import is_exported, read_folder
from nemotron.hf.import_ import check_tokenizer
from nemotron.hf.tokenizer_files import TOKENIZER
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.run.files import RunFiles


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HybridLM:
    """Return the model of a run, a checkpoint or an exported folder.

    `dtype` is that of activations and matrix products; the weights themselves stay float32. Use it
    as `model.logits(model(input_ids))`.

    Raises:
        UserError: when there is no model, or its files are damaged.
    """
    config, weights = read_weights(Path(path))
    model = build_around(config, weights)
    model.compute_dtype = dtype
    return model.to(device)


def load_with_tokenizer(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[HybridLM, Tokenizer]:
    """Return the model and the tokenizer that lies with it.

    Raises:
        UserError: when one of them is absent or damaged.
    """
    model, path = load(path, device, dtype), Path(path)
    if is_exported(path):
        home = path / TOKENIZER
    elif (run := RunFiles.around(path)) is not None:
        home = run.tokenizer
    else:
        raise UserError(
            f"{path} is not inside a run, so its tokenizer is unknown; give a run's folder."
        )
    return model, Tokenizer(check_tokenizer(home, model.config.vocab_size))


def read_weights(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return configuration and float32 weights, under the names of `HybridLM.state_dict()`.

    Raises:
        UserError: when there is no model, or its files are damaged.
    """
    if not path.exists():
        raise UserError(f"{path.absolute()} does not exist; give a run, checkpoint or export.")
    if is_exported(path):
        loaded = read_folder(path)
        return loaded.config, loaded.weights
    return read_model(path)
