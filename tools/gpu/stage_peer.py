"""Stage 7: transformers' NemotronH on the same share, weights, tokens and balance, in bfloat16.

With mamba-ssm's Triton kernels where they can be imported. Its fused path for training needs the
CUDA package causal-conv1d, so the convolution is torch's, or the project's kernel in its place. Its
weights are bfloat16, without float32 masters: its optimizer moves half as many bytes as ours.
"""

import importlib.metadata
import statistics
import types
from typing import TYPE_CHECKING, Any

import torch
from mamba_kernels import searches, shorten_search
from share import ROWS, balanced_experts, build, random_batch, share, tokens_of, turns
from stage import Stage, data_sheet, parser
from torch import Tensor

from nemotron.data.batch import NO_LABEL
from nemotron.model.config import ModelConfig
from nemotron.model.flops import training_flops_per_token
from nemotron.ops.causal_conv1d import causal_conv1d
from nemotron.sol.clock import repeat
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LR = 1e-4
SETTINGS = (("grouped_mm", "ours"), ("grouped_mm", "torch"), ("eager", "ours"))
"""How experts are computed, and whose convolution."""


def main() -> None:
    stage = Stage("peer", parser(__doc__).parse_args())
    with stage.attempt("peer"), balanced_experts():
        _run(stage)


def _run(stage: Stage) -> None:
    from transformers.models.nemotron_h import modeling_nemotron_h as theirs

    shorten_search()
    scan = "mamba-ssm" if searches() else "torch"
    own_conv = theirs.causal_conv1d_fn
    # without the package causal-conv1d the fused path of mamba-ssm raises
    theirs.mamba2_split_conv1d_scan_combined = lambda *_, **__: None
    config, tokens = share(stage.tiny).model, tokens_of(stage.tiny)
    loss, model = _same_weights(stage, config, theirs)
    ids = [random_batch(config, ROWS, tokens, seed).input_ids.to(stage.device) for seed in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    flops = training_flops_per_token(config, tokens, 0) * ROWS * tokens
    is_first = True
    for experts, conv in SETTINGS:
        case = f"experts {experts}, conv {conv}, scan {scan}"
        if stage.left() < 8 and not stage.tiny:
            stage.emit(case, skipped="no time left")
            continue
        theirs.causal_conv1d_fn = _our_conv if conv == "ours" else own_conv
        model.set_experts_implementation(experts)
        if is_first and scan != "torch":
            with stage.attempt(case):
                model(ids[0][:, :128], use_cache=False).logits.float().sum().backward()
                scan = ""
            if scan:
                # its kernels failed: what it does without them
                scan, theirs.mamba2_chunk_scan = "torch", theirs.mamba2_chunk_scan.__wrapped__
            else:
                scan = "mamba-ssm"
            case = f"experts {experts}, conv {conv}, scan {scan}"
        with stage.attempt(case):
            found = _time(stage, model, optimizer, ids)
            if is_first:
                found |= {"loss": round(found["loss"], 4), "our_loss": round(loss, 4)}
            else:
                del found["loss"]
            is_first = False
            stage.emit(
                case,
                **found,
                tokens_per_s=round(ROWS * tokens / found["ms"] * 1e3),
                mfu=round(flops / found["ms"] * 1e3 / data_sheet(stage.device).flops, 4),
                transformers=importlib.metadata.version("transformers"),
            )


def _time(
    stage: Stage, model: "PreTrainedModel", optimizer: torch.optim.Optimizer, ids: list[Tensor]
) -> dict[str, Any]:
    """Return the loss before any step, and the median times of a step."""
    with torch.no_grad():
        loss = model(ids[0], labels=ids[0], use_cache=False).loss.item()

    def once(number: int) -> list[float]:
        tokens = ids[number % len(ids)]
        optimizer.zero_grad()
        marks = [stage.clock.mark()]
        found = model(tokens, labels=tokens, use_cache=False).loss
        marks.append(stage.clock.mark())
        found.backward()
        marks.append(stage.clock.mark())
        optimizer.step()
        return stage.clock.milliseconds([*marks, stage.clock.mark()])

    once(0)
    stage.clock.begin_peak()
    times = repeat(once, seconds=min(3.0, stage.left() / 4), at_most=8)
    return {
        "ms": round(statistics.median(sum(t) for t in times), 2),
        **{
            f"{name}_ms": round(statistics.median(t[i] for t in times), 2)
            for i, name in enumerate(("forward", "backward", "optimizer"))
        },
        "peak_gib": round(stage.clock.peak_gib(), 2),
        "loss": loss,
        "repetitions": len(times),
    }


def _same_weights(
    stage: Stage, config: ModelConfig, theirs: types.ModuleType
) -> tuple[float, "PreTrainedModel"]:
    """Return our loss on the first tokens, and their model with our weights."""
    ours = build(config, stage.device, torch.bfloat16)
    batch = random_batch(config, ROWS, tokens_of(stage.tiny), 0)
    batch.labels[:, -1] = NO_LABEL  # transformers gives the last token none
    with torch.no_grad():
        objective = PretrainObjective(Auxiliary(LossConfig(moe_aux_loss_coeff=0.0), num_depths=0))
        sums, _ = compute_sums(objective, ours, batch.to(stage.device))
        loss = objective.combine(sums, objective.counts(batch)).item()
    values: dict[str, Any] = config.model_dump(exclude_none=True)
    values.pop("time_step_limit")
    with stage.device:
        model = theirs.NemotronHForCausalLM(theirs.NemotronHConfig(**values, dtype="bfloat16"))
    model.to(torch.bfloat16)
    weights = {n.replace("backbone.", "model."): t for n, t in ours.state_dict().items()}
    model.load_state_dict(weights)
    del ours, weights
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = config.time_step_limit
        if isinstance(module, theirs.NemotronHTopkRouter):
            module.forward = types.MethodType(_balanced, module)
    return loss, model.train()


def _balanced(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Route as transformers does, to experts in turn."""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    logits = torch.nn.functional.linear(hidden.float(), router.weight.float())
    experts = turns(hidden.shape[0], router.weight.shape[0], router.top_k, hidden.device)
    weights = logits.sigmoid().gather(1, experts)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return logits, weights * router.routed_scaling_factor, experts


def _our_conv(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """Convolve with the project's operation; channels come first and go first."""
    y = causal_conv1d(hidden.transpose(1, 2), weight, bias, activation=activation is not None)
    return y.transpose(1, 2)


if __name__ == "__main__":
    main()
