"""Evaluating a model from anywhere on the held-out text of a recipe."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron.checkpoint.manifest import code_version
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.evaluate.against import deltas
from nemotron.evaluate.agreement import agreement
from nemotron.evaluate.held_out import HeldOut
from nemotron.evaluate.model import Evaluated
from nemotron.evaluate.sample_file import check_folder
from nemotron.evaluate.suites import Plan, run_suites
from nemotron.exit_codes import DONE
from nemotron.files import write_json
from nemotron.hf.folder import is_exported
from nemotron.hf.hub import find_folder
from nemotron.loading import attach_scales, fix_language, read_initial
from nemotron.outputs import check_new
from nemotron.posttrain.suites.definition import PERPLEXITY
from nemotron.recipe.load import OF_TEXT, Recipe, load_recipe
from nemotron.run.files import RunFiles
from nemotron.terminal import print_text

REFERENCE = "reference.jsonl"
"""Answers of the model that another one is compared with."""
OF_TRAINING = {
    *("model", "init_from", "tune", "optimizer", "schedule", "parallel", "recompute"),
    *("nonfinite_limit", "checkpoint", "logging", "profile", "name", "output", "device"),
}
"""Keys of a recipe that change neither its text nor what a trained model says of it."""
COLUMNS = ("loss", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Text:
    """Held-out text of a recipe."""

    recipe: Path | None = None
    """None: that of the model's own run."""
    overrides: Sequence[str] = ()


def evaluate(
    model: Path,
    text: Text,
    *,
    out: Path | None = None,
    device: str = "auto",
    language: str | None = None,
) -> int:
    """Print what a model loses on held-out text, by domain; returns the exit code.

    `out` is a file of JSON; `language` chooses the experts of all tokens.

    Raises:
        UserError: when there is no model or no held-out text, or the recipe's tokenizer is another
            than the model's.
    """
    if out is not None:
        check_new(out, "--out")
    held_out, loaded = open_text(model, text, device)
    fix_language(held_out.model, language)
    metrics = held_out.metrics()
    _print(metrics, held_out.data.validation_domains)
    if out is not None:
        facts = {"model": str(model), "recipe": str(loaded.path), "version": code_version()}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {**facts, "metrics": metrics})
        print_text(f"written to {out}")
    return DONE


@dataclass(frozen=True)
class Wanted:
    """An evaluation on suites, or of one model against another."""

    plan: Plan
    text: Text = field(default_factory=Text)
    against: Path | None = None
    """Model that the other one is compared with."""
    out: Path | None = None
    """Folder for all answers and the results."""
    resume: bool = False
    device: str = "auto"


def evaluate_suites(model: Path, wanted: Wanted) -> int:
    """Print results of a model, and what changes against another; returns the exit code.

    Raises:
        UserError: when a model, suite or text is unfit, or the folder cannot be written.
    """
    plan, out, against = wanted.plan, wanted.out, wanted.against
    if out is not None:
        check_folder(out, resume=wanted.resume)
    if against is not None and not find_folder(against).exists():
        rule = "does not exist; give a run, checkpoint or export."
        raise UserError(rule, key="--against", value=against)
    found: dict[str, Any] = {}  # Any: JSON
    with_text = PERPLEXITY in plan.suites or (against is not None and _has_text(model, wanted))
    text = open_text(model, wanted.text, wanted.device)[0] if with_text else None
    asks = any(name != PERPLEXITY for name in plan.suites)
    if asks:
        loaded = Evaluated.load(model, wanted.device, plan.asking)
        outcome = run_suites(loaded, plan, out)
        found |= outcome.as_json()
    if text is not None:
        found[PERPLEXITY] = text.metrics()
        _print(found[PERPLEXITY], text.data.validation_domains)
    if against is not None:
        print_text(f"against {against}:")
        found["against"] = {"model": str(against)}
        reference = Evaluated.load(against, wanted.device, plan.asking)
        if asks:
            changes = deltas(outcome.samples, run_suites(reference, plan, out, REFERENCE).samples)
            print_text("\n".join(map(str, changes)))
            found["against"]["deltas"] = [dataclasses.asdict(change) for change in changes]
        if text is not None:
            _refuse_other_tokenizer(against, reference.prompts.tokenizer, text)
            near = agreement(text.model, reference.model, text.batches())
            print_text(str(near))
            found["against"]["agreement"] = dataclasses.asdict(near)
    if out is not None:
        out.mkdir(exist_ok=True)
        facts = {"model": str(model), "version": code_version()}
        write_json(out / "results.json", {**facts, **found})
        print_text(f"written to {out}")
    return DONE


def open_text(model: Path, text: Text, device: str) -> tuple[HeldOut, Recipe]:
    """Return the held-out text, with the model's weights, and the recipe that names it.

    Raises:
        UserError: when one of them is absent, or they do not belong together, or an override is of
            the model, which is as it was trained.
    """
    for override in text.overrides:
        key = override.partition("=")[0].strip()
        if key.partition(".")[0] in OF_TRAINING:
            rule = "has no effect on a trained model; override the text alone, as data.seq_len=512."
            raise UserError(rule, where="command line", key=key)
    place = find_folder(model)
    loaded = load_recipe(text.recipe or _own_recipe(place, model), text.overrides)
    if text.recipe is None and loaded.config.stage not in OF_TEXT:
        rule = (
            f"is a run of stage {loaded.config.stage}, whose recipe names no text of its own; give "
            "one of stage pretrain or sft: --recipe FILE."
        )
        raise UserError(rule, where=str(model))
    found = read_initial(str(place))
    held_out = HeldOut(loaded.text, device, found.config)
    if found.tokenizer is not None:
        _refuse_other_tokenizer(model, found.tokenizer, held_out, loaded.text.data.tokenizer)
    held_out.model.load_state_dict(found.weights)
    attach_scales(held_out.model, place)
    return held_out, loaded


def _has_text(model: Path, wanted: Wanted) -> bool:
    """Say whether a recipe of text is known: given, or that of the model's own run."""
    if wanted.text.recipe is not None or not wanted.plan.suites:
        return True
    place = find_folder(model)
    run = None if is_exported(place) else RunFiles.around(place)
    if run is None or not run.recipe.is_file():
        return False
    return load_recipe(run.path, ()).config.stage in OF_TEXT


def _refuse_other_tokenizer(
    model: Path, tokenizer: Tokenizer, held_out: HeldOut, named: str | None = None
) -> None:
    if _names(tokenizer) != _names(held_out.data.tokenizer):
        raise UserError(
            f"is not the tokenizer of {model}, so its tokens mean something else; name a recipe "
            "with that model's data.tokenizer.",
            key="data.tokenizer",
            value=named or held_out.data.config.tokenizer,
        )


def _own_recipe(place: Path, model: Path) -> Path:
    if not place.exists():
        raise UserError(
            "does not exist; give a run, checkpoint or export.", where=str(place.absolute())
        )
    run = None if is_exported(place) else RunFiles.around(place)
    if run is None or not run.recipe.is_file():
        raise UserError(
            "brings no recipe, which names the text; give one: --recipe FILE.", where=str(model)
        )
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
