"""How well a model solves held-out tasks, by environment and by budget of reasoning."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemotron.device import find_device
from nemotron.errors import UserError
from nemotron.files import write_json
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.rollout import Rollout, Sampler
from nemotron.posttrain.tasks import Tasks
from nemotron.posttrain.verify import Verifiers
from nemotron.precision.apply import DTYPES
from nemotron.train.setup import check_end_of_text


@dataclass(frozen=True)
class Result:
    """The likeliest answers to the tasks of one environment."""

    environment: str
    budget: int | None
    """Tokens after which reasoning was closed; None: never."""
    tasks: int
    """Tasks whose answer was judged."""
    reward: float
    """Mean of the judged answers; NaN without one."""
    error: float
    """Standard error of that mean."""
    answer_tokens: float
    """Mean length, reasoning included."""
    truncated: float
    """Share of the answers that reached the largest length."""
    verifier_faults: int

    def __str__(self) -> str:
        budget = "" if self.budget is None else f"budget {self.budget:>5}  "
        faults = f"  {self.verifier_faults} verifier faults" if self.verifier_faults else ""
        return (
            f"{self.environment:<16} {budget}reward {self.reward:.3f} ± {self.error:.3f}  "
            f"{self.tasks} tasks  {self.answer_tokens:.1f} tokens  "
            f"{self.truncated:.1%} truncated{faults}"
        )


def evaluate(
    model: HybridLM,
    config: RlConfig,
    budgets: Sequence[int],
    *,
    out: Path | None = None,
    plot: Path | None = None,
) -> list[Result]:
    """Answer the held-out tasks of a recipe, once for each budget, and print the mean rewards.

    `out` gets them as JSON, `plot` a curve over the budgets as SVG.

    Raises:
        UserError: when an environment cannot run here, or the model's end of text is not that of
            the answers, or there is nothing to plot with.
    """
    check_plot(plot, budgets)
    model = model.to(find_device(config.device)).requires_grad_(False)
    model.compute_dtype = DTYPES[config.precision.compute]
    results: list[Result] = []
    limits: Sequence[int | None] = budgets or [config.rollout.reasoning_budget]
    for budget in limits:
        found = summarize(_answer(model, _with_budget(config, budget)), budget)
        print(*found, sep="\n", flush=True)
        results += found
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"results": [dataclasses.asdict(result) for result in results]})
    if plot is not None:
        draw(results, plot)
    return results


def summarize(rollouts: Sequence[Rollout], budget: int | None) -> list[Result]:
    """Return a result for each environment."""
    results = []
    for name in dict.fromkeys(rollout.task.environment for rollout in rollouts):
        own = [rollout for rollout in rollouts if rollout.task.environment == name]
        rewards = [r.verdict.reward for r in own if r.verdict.error is None]
        mean = float(np.mean(rewards)) if rewards else math.nan
        deviation = float(np.std(rewards, ddof=1)) if len(rewards) > 1 else 0.0
        results.append(
            Result(
                environment=name,
                budget=budget,
                tasks=len(rewards),
                reward=mean,
                error=deviation / math.sqrt(max(1, len(rewards))),
                answer_tokens=float(np.mean([len(r.tokens) for r in own])),
                truncated=float(np.mean([r.is_truncated for r in own])),
                verifier_faults=len(own) - len(rewards),
            )
        )
    return results


def check_plot(plot: Path | None, budgets: Sequence[int]) -> None:
    """Raise UserError when a curve is asked for that cannot be drawn."""
    if plot is None:
        return
    if len(budgets) < 2:
        raise UserError("--plot draws reward over budgets; give --budget at least twice.")
    try:
        import matplotlib.figure  # noqa: F401 - only whether it is there
    except ImportError:
        raise UserError(
            "--plot needs matplotlib; install it with: pip install matplotlib."
        ) from None


def draw(results: Sequence[Result], path: Path) -> None:
    """Write reward over budget, a line with its standard error for each environment."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(result.environment for result in results):
        own = sorted(
            (r for r in results if r.environment == name), key=lambda result: result.budget or 0
        )
        budgets = [result.budget or 0 for result in own]
        rewards, errors = [r.reward for r in own], [r.error for r in own]
        axes.errorbar(budgets, rewards, errors, marker="o", capsize=3, label=name)
    axes.set(xlabel="budget of reasoning in tokens", ylabel="mean reward", ylim=(-0.02, 1.02))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg")


def _answer(model: HybridLM, config: RlConfig) -> list[Rollout]:
    tasks = Tasks(config)
    check_end_of_text(config, tasks.tokenizer, is_chat=tasks.is_chat)
    with Verifiers(config.rollout.verify_workers, tasks.options) as verifiers:
        sampler = Sampler(config.rollout, tasks, verifiers)
        return sampler.evaluate(model, list(enumerate(tasks.held_out())))


def _with_budget(config: RlConfig, budget: int | None) -> RlConfig:
    rollout = config.rollout.model_copy(update={"reasoning_budget": budget})
    return config.model_copy(update={"rollout": rollout})
