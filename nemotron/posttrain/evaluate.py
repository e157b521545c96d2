"""How well a model solves the held-out tasks of a recipe, by budget of reasoning."""

from collections.abc import Sequence
from pathlib import Path

from nemotron.device import find_device
from nemotron.errors import UserError
from nemotron.files import write_json
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.answering import Answerer
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.rollout import answering
from nemotron.posttrain.suites.budgets import write_curve
from nemotron.posttrain.suites.examine import examine
from nemotron.posttrain.suites.results import Result, summarize
from nemotron.posttrain.tasks import Tasks, held_out_drawing, held_out_items
from nemotron.precision.apply import DTYPES
from nemotron.train.setup import check_end_of_text


def evaluate(
    model: HybridLM,
    config: RlConfig,
    budgets: Sequence[int],
    *,
    out: Path | None = None,
    plot: Path | None = None,
) -> list[Result]:
    """Give the likeliest answers to the held-out tasks of a recipe, once for each budget.

    Prints the mean rewards; `out` gets them as JSON, `plot` a curve over the budgets as SVG.

    Raises:
        UserError: when an environment cannot run here, the model's end of text is not that of the
            answers, or there is nothing to plot.
    """
    if plot is not None and len(budgets) < 2:
        rule = "draws reward over budgets; give --budget at least twice."
        raise UserError(rule, key="--plot")
    model = model.to(find_device(config.device)).requires_grad_(False)
    model.compute_dtype = DTYPES[config.precision.compute]
    results: list[Result] = []
    limits: Sequence[int | None] = budgets or [config.rollout.reasoning_budget]
    for budget in limits:
        found = _results(model, _with_budget(config, budget), budget)
        print(*found, sep="\n", flush=True)
        results += found
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"results": [result.as_json() for result in results]})
    if plot is not None:
        write_curve(results, plot)
    return results


def _results(model: HybridLM, config: RlConfig, budget: int | None) -> list[Result]:
    tasks = Tasks(config)
    check_end_of_text(config, tasks.tokenizer, is_chat=tasks.is_chat)
    how = answering(config.rollout, tasks)
    drawing = held_out_drawing(config, budget)
    with tasks.verifiers() as verifiers:
        answerer = Answerer(model, tasks.prompts, how)
        return summarize(examine(answerer, verifiers, held_out_items(tasks), drawing))


def _with_budget(config: RlConfig, budget: int | None) -> RlConfig:
    rollout = config.rollout.model_copy(update={"reasoning_budget": budget})
    return config.model_copy(update={"rollout": rollout})
