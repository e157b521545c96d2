"""What is written down about an optimizer step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from nemotron.model.router import Router
from nemotron.run.metrics import Record
from nemotron.train.loss import StepSums
from nemotron.train.optimizer import GradientNorms
from nemotron.train.reliability.progress import Stopwatch
from nemotron.train.state import Skip


@dataclass(frozen=True)
class StepResult:
    """What came out of one optimizer step; sums and norms are still on the device."""

    counts: Float[Tensor, " terms"]
    """Divisors of the objective's terms."""
    tokens: int
    """Tokens of all ranks' rows."""
    seq_len: int
    """Tokens in a row."""
    sums: StepSums
    norms: GradientNorms
    loss: float
    grad_norm: float
    clip: float
    lr: float
    skip: Skip | None
    spike: bool
    stop: bool
    """Whether the run ends here because a rank was asked to."""
    watch: Stopwatch
    """Its seconds, as all that is still on the device, are waited for when they are read."""

    def values(self, routers: Mapping[str, Router], peak_tokens_per_s: float) -> Record:
        """Return the step's metrics; reading them waits for the device.

        A utilization above 1 is not true, so it is None: the peak was measured while other programs
        slowed the device down.
        """
        parts = self.watch.seconds
        step_s = sum(parts.values())
        speed = self.tokens / step_s
        utilization = speed / peak_tokens_per_s
        return {
            "loss/total": self.loss,
            **self.sums.values(self.counts),
            "lr": self.lr,
            "grad_norm/total": self.grad_norm,
            **{f"grad_norm/{kind}": norm for kind, norm in self.norms.by_kind().items()},
            "clip_coef": self.clip,
            **expert_values(routers, self.sums.load),
            "perf/tokens_per_s": speed,
            "perf/mfu": utilization if utilization <= 1 else None,
            "perf/step_s": step_s,
            **{f"perf/{part}_s": seconds for part, seconds in parts.items()},
        }

    def events(self) -> list[str]:
        """Return a sentence for whatever was out of the ordinary."""
        if self.skip is not None:
            broken = [k for k, norm in self.norms.by_kind().items() if not math.isfinite(norm)]
            where = f" (gradients of {', '.join(broken)})" if broken else ""
            values = f": {self.loss:.4f}, {self.grad_norm:.4f}" if self.skip is Skip.SPIKE else ""
            return [f"skipped the update: {self.skip.value}{values}{where}"]
        return [f"loss spike: {self.loss:.4f}"] if self.spike else []


def expert_values(routers: Mapping[str, Router], load: Mapping[str, Tensor]) -> dict[str, float]:
    """Return load and bias of each router; `load` is the tokens per expert of the whole step.

    Of a layer that another stage of a pipeline holds, the bias is not known here.
    """
    values: dict[str, float] = {}
    for layer, counts in load.items():
        tokens = counts.tolist()
        if not sum(tokens):  # the objective does not run this layer
            continue
        mean = sum(tokens) / len(tokens)
        shares = [count / sum(tokens) for count in tokens if count]
        entropy = -sum(share * math.log(share) for share in shares)
        name = f"moe/{layer.removeprefix('backbone.')}"
        values[f"{name}/load_max_over_mean"] = max(tokens) / mean
        values[f"{name}/load_entropy"] = entropy / math.log(len(tokens)) if len(tokens) > 1 else 1.0
        values[f"{name}/experts_unused"] = tokens.count(0)
        if layer in routers:
            names = routers[layer].group_names
            size = len(tokens) // max(1, len(names))
            for number, language in enumerate(names):
                own = sum(tokens[number * size : (number + 1) * size])
                values[f"{name}/load_{language}"] = own / sum(tokens)
            bias = routers[layer].e_score_correction_bias
            values[f"{name}/bias_min"] = bias.min().item()
            values[f"{name}/bias_max"] = bias.max().item()
    return values


def expert_tables(
    routers: Mapping[str, Router], load: Mapping[str, Tensor]
) -> dict[str, dict[str, list[float]]]:
    """Return `load`, tokens of a step, and `bias` of each expert, by mixture layer.

    Of a layer that another stage of a pipeline holds, the bias is left out.
    """
    tables: dict[str, dict[str, list[float]]] = {}
    for layer, counts in load.items():
        table = tables[layer.removeprefix("backbone.")] = {"load": counts.tolist()}
        if layer in routers:
            table["bias"] = routers[layer].e_score_correction_bias.tolist()
    return tables
