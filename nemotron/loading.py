"""Reading a model from wherever one lies: a run, a checkpoint, or an exported folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.hf.folder import is_exported
from nemotron.hf.hub import find_folder
from nemotron.hf.read_scales import read_scales
from nemotron.hf.tokenizer_files import (
    CHAT_TEMPLATE,
    TOKENIZER,
    check_tokenizer,
    read_kept_files,
    read_stop_ids,
)
from nemotron.hf.weights import read_weights
from nemotron.model.build import build_around
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.ops.apply import apply as apply_ops
from nemotron.ops.config import OpsConfig
from nemotron.precision.static import attach
from nemotron.recipe.explain import explain
from nemotron.recipe.read import read_yaml
from nemotron.run.files import RunFiles
from nemotron.train.config import RunConfig
from nemotron.train.initial import InitialModel


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ops: OpsConfig | None = None,
) -> HybridLM:
    """Return the model of a run, a checkpoint, an exported folder, or a name on the Hub.

    That of a quantized folder has the decoded weights, and rounds inputs, keys and values by the
    fixed scales there.

    `dtype` is that of activations and matrix products; the weights themselves stay float32. `ops`
    names the backends of the operations; by default the fastest are used. Use the model as
    `model.logits(model(input_ids))`.

    Raises:
        UserError: when there is no model, its files are damaged, or a backend is missing.
    """
    path = find_folder(path)
    config, weights = read_weights(path)
    model = build_around(config, weights)
    apply_ops(model, ops or OpsConfig())
    model.compute_dtype = dtype
    attach_scales(model.to(device), path)
    return model


def attach_scales(model: HybridLM, path: Path) -> None:
    """Make a model that was read from a quantized folder round its inputs as engines do."""
    if is_exported(path) and (scales := read_scales(path)) is not None:
        attach(model, scales)


def load_with_tokenizer(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ops: OpsConfig | None = None,
) -> tuple[HybridLM, Tokenizer]:
    """Return the model, as `load` does, and the tokenizer that lies with it.

    Raises:
        UserError: when one of them is absent or damaged, or a backend is missing.
    """
    path = find_folder(path)
    model = load(path, device, dtype, ops)
    if is_exported(path):
        home = path / TOKENIZER
    elif (run := RunFiles.around(path)) is not None:
        home = run.tokenizer
    else:
        raise UserError(
            "is not inside a run, so its tokenizer is unknown; give a run's folder.",
            where=str(path),
        )
    return model, Tokenizer(check_tokenizer(home, model.config.vocab_size))


def fix_language(model: HybridLM, language: str | None) -> None:
    """Let a language choose the experts of all tokens, in place of the gate.

    Raises:
        UserError: when the model has no experts by language, or none of this one.
    """
    if language is None:
        return
    if model.language is None:
        rule = "chooses nothing: the model has no experts by language; leave it out."
        raise UserError(rule, key="--language", value=language)
    if language not in model.language.names:
        rule = f"is none of the model's languages; use {' or '.join(model.language.names)}."
        raise UserError(rule, key="--language", value=language)
    model.language.fixed = model.language.names.index(language)


@dataclass(frozen=True)
class ChatFiles:
    """What lies with a model that has learned conversations."""

    template: str | None = None
    """None if the model brings no chat template."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens at which its generation stops."""


def read_chat_files(path: Path) -> ChatFiles:
    """Return the chat template and the stop tokens that lie with a run or an exported folder.

    Raises:
        UserError: when one of the files is damaged, or not a regular file of the folder.
    """
    path = find_folder(path)
    run = None if is_exported(path) else RunFiles.around(path)
    folder = path if run is None else run.companions
    template = read_kept_files(folder)[0].get(CHAT_TEMPLATE)
    return ChatFiles(
        None if template is None else template.decode(errors="replace"),
        frozenset(i for i in read_stop_ids(folder) if i >= 0),
    )


def stop_ids(path: str | Path, config: ModelConfig) -> frozenset[int]:
    """Return the tokens that end a text of the model at `path`, whose configuration is given.

    A chat model has several: the end of a text, and that of a turn.

    Raises:
        UserError: when the files beside the model are damaged.
    """
    path = find_folder(path)
    run = None if is_exported(path) else RunFiles.around(path)
    found = read_stop_ids(path if run is None else run.companions)
    return frozenset({config.eos_token_id, *(i for i in found if 0 <= i < config.vocab_size)})


class _OpsOfRecipe(BaseModel):
    """A recipe of which nothing else is read."""

    ops: OpsConfig = OpsConfig()


def recipe_ops(path: Path) -> OpsConfig:
    """Return the backends that the recipe of a run names; an exported folder names none.

    Raises:
        UserError: when the recipe cannot be read.
    """
    path = find_folder(path)
    run = RunFiles.around(path)
    if is_exported(path) or run is None or not run.recipe.is_file():
        return OpsConfig()
    document = read_yaml(run.recipe)
    try:
        return _OpsOfRecipe.model_validate(document.values).ops
    except ValidationError as error:
        found = explain(error, RunConfig, document.places, str(run.recipe))
        raise UserError.of(found) from error


def read_initial(place: str) -> InitialModel:
    """Return what `init_from` names: weights, and the small files that lie beside them.

    Raises:
        UserError: when the model is missing, or its files are damaged.
    """
    path = find_folder(place)
    config, weights = read_weights(path)
    run = None if is_exported(path) else RunFiles.around(path)
    tokenizer = path / TOKENIZER if run is None else run.tokenizer
    if not tokenizer.exists():
        return InitialModel(config, weights)
    companions, _ = read_kept_files(path if run is None else run.companions)
    own = Tokenizer(check_tokenizer(tokenizer, config.vocab_size))
    return InitialModel(config, weights, own, companions)
