"""Evaluating a model from anywhere on the held-out text of a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron.checkpoint.manifest import code_version
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.evaluate.held_out import HeldOut
from nemotron.exit_codes import DONE
from nemotron.files import write_json
from nemotron.hf.folder import is_exported
from nemotron.hf.hub import find_folder
from nemotron.loading import attach_scales, read_initial
from nemotron.recipe.load import load_recipe
from nemotron.run.files import RunFiles
from nemotron.terminal import print_text

COLUMNS = ("loss", "perplexity", "bits_per_byte")


def evaluate(
    model: Path,
    recipe: Path | None,
    overrides: Sequence[str] = (),
    *,
    out: Path | None = None,
    device: str = "auto",
) -> int:
    """Print what a model loses on held-out text, by domain; returns the exit code.

    Without a recipe the text is that of the model's own run. `out` is a file of JSON.

    Raises:
        UserError: when there is no model or no held-out text, or the recipe's tokenizer is another
            than the model's.
    """
    if out is not None and (out.exists() or not out.parent.is_dir()):
        raise UserError(
            "exists already, or its folder does not; name a new file in a folder that exists.",
            key="--out",
            value=out,
        )
    opened = open_model(model, recipe, overrides, device)
    held_out = opened.held_out
    metrics = held_out.metrics()
    _print(metrics, held_out.data.validation_domains)
    if out is not None:
        facts = {"model": str(model), "recipe": str(opened.recipe), "version": code_version()}
        write_json(out, {**facts, "metrics": metrics})
        print_text(f"written to {out}")
    return DONE


@dataclass(frozen=True)
class OpenedModel:
    """A model with the held-out text that it is measured on."""

    place: Path
    recipe: Path
    held_out: HeldOut
    """With the model's weights."""


def open_model(
    model: Path, recipe: Path | None, overrides: Sequence[str], device: str
) -> OpenedModel:
    """Read a model and open the text of a recipe, or of the model's own run.

    Raises:
        UserError: when there is no model or no held-out text, or the recipe's tokenizer is another
            than the model's.
    """
    place = find_folder(model)
    loaded = load_recipe(recipe or _own_recipe(place, model), overrides)
    found = read_initial(str(place))
    held_out = HeldOut(loaded.text, device, found.config)
    if found.tokenizer is not None and _names(found.tokenizer) != _names(held_out.data.tokenizer):
        raise UserError(
            f"is not the tokenizer of {model}, so its tokens mean something else; name a recipe "
            "with that model's data.tokenizer.",
            key="data.tokenizer",
            value=loaded.text.data.tokenizer,
        )
    held_out.model.load_state_dict(found.weights)
    attach_scales(held_out.model, place)
    return OpenedModel(place, loaded.path, held_out)


def _own_recipe(place: Path, model: Path) -> Path:
    if not place.exists():
        raise UserError(f"{place.absolute()} does not exist; give a run, checkpoint or export.")
    run = None if is_exported(place) else RunFiles.around(place)
    if run is None or not run.recipe.is_file():
        raise UserError(f"{model} brings no recipe, which names the text; give one: --recipe FILE.")
    return run.path


def _names(tokenizer: Tokenizer) -> list[str | None]:
    return [tokenizer.token(index) for index in range(tokenizer.vocab_size)]


def _print(metrics: dict[str, float], domains: Sequence[str]) -> None:
    width = max(map(len, ("all", *domains)))
    print_text("  ".join([" " * width, *(f"{name.replace('_', ' '):>13}" for name in COLUMNS)]))
    for domain in (*domains, "all"):
        start = "validation" if domain == "all" else f"validation/{domain}"
        values = (metrics.get(f"{start}/{name}") for name in COLUMNS)
        cells = (" " * 12 + "-" if value is None else f"{value:13.4f}" for value in values)
        print_text("  ".join([f"{domain:<{width}}", *cells]))
