"""Stage 4: one small model, same seed and documents: a CPU in float32 against the GPU.

Loss and every gradient, as the error in norm, relative. In bfloat16 experts are given in turn on
both sides, since another choice by one rounding is not an error. With torch's backends alone beside
it, so that a wrong kernel can be distinguished from a wrong model.
"""

from contextlib import nullcontext

import numpy as np
import torch
from share import balanced_experts, torch_alone
from stage import Stage, parser
from torch import Tensor

from nemotron.data.batch import Batch, Row, pack
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.ops.apply import apply
from nemotron.ops.config import OpsConfig
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums

EXPECTED = {"fp32": 1e-4, "bf16": 5e-2}
TOKENS, EOD = 256, 3

CONFIG = {
    "vocab_size": 1024, "hidden_size": 256, "hybrid_override_pattern": "MEM*EMEM*E",
    "initializer_range": 0.06, "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 2,
    "ssm_state_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192,
    "moe_shared_expert_intermediate_size": 256, "moe_latent_size": 128,
    "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E",
}  # fmt: skip
TINY = {
    "vocab_size": 64, "hidden_size": 32, "mamba_num_heads": 2, "mamba_head_dim": 16, "n_groups": 2,
    "ssm_state_size": 16, "num_attention_heads": 2, "head_dim": 16, "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 32, "moe_latent_size": 16,
    "hybrid_override_pattern": "ME*E",
}  # fmt: skip


def main() -> None:
    stage = Stage("model", parser(__doc__).parse_args())
    torch.set_num_threads(1 if stage.tiny else 4)
    config = ModelConfig.model_validate(CONFIG | (TINY if stage.tiny else {}))
    batch = _batch(config, 64 if stage.tiny else TOKENS)
    cpu = torch.device("cpu")
    # torch's own operations: kernels of the CPU wait for each other, and other stages run now
    plain, narrow = torch_alone(cpu, torch.float32), torch_alone(cpu)
    expected = {
        "fp32": gradients(config, batch, cpu, None, balanced=False, ops=plain),
        "bf16": gradients(config, batch, cpu, None, balanced=True, ops=plain),
    }
    rounded = gradients(config, batch, cpu, torch.bfloat16, balanced=True, ops=narrow)
    usual = {"fp32": {}, "bf16": errors_of(rounded, expected["bf16"])}
    for backends in ("auto", "torch"):
        for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
            case = f"{name} {backends}"
            ops = None
            if backends == "torch":
                ops = torch_alone(stage.device, dtype or torch.float32)
            with stage.attempt(case):
                found = gradients(
                    config, batch, stage.device, dtype, balanced=name == "bf16", ops=ops
                )
                _compare(stage, case, found, expected[name], EXPECTED[name], usual[name])


def _batch(config: ModelConfig, tokens: int) -> Batch:
    """Return two rows of several documents."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(2):
        drawn = random.integers(4, config.vocab_size, tokens + 1)
        drawn[random.choice(tokens, 5, replace=False)] = EOD
        rows.append(Row(drawn))
    return pack(rows, tokens, EOD, mask_eod_loss=False).look_ahead(2)


def gradients(
    config: ModelConfig,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    balanced: bool,
    ops: OpsConfig | None = None,
) -> dict[str, Tensor]:
    """Return the loss and every gradient, on the CPU in float32."""
    model = HybridLM(config)
    apply(model, ops or OpsConfig())
    model.init_weights(1)
    model.to(device).compute_dtype = dtype
    objective = PretrainObjective(
        Auxiliary(LossConfig(moe_aux_loss_coeff=1e-2), len(batch.ahead), bool(config.moe_layers))
    )
    with balanced_experts() if balanced else nullcontext():
        sums, _ = compute_sums(objective, model, batch.to(device))
        loss = objective.combine(sums, objective.counts(batch))
        loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return (
        {"loss": loss.detach(), **named}
        if device.type == "cpu"
        else {
            name: tensor.float().cpu() for name, tensor in {"loss": loss.detach(), **named}.items()
        }
    )


def errors_of(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Return the error in norm of each tensor, relative."""
    return {
        name: ((found[name].float() - t).norm() / t.norm().clamp_min(1e-30)).item()
        for name, t in true.items()
        if name in found
    }


def _compare(
    stage: Stage,
    case: str,
    found: dict[str, Tensor],
    true: dict[str, Tensor],
    expected: float,
    usual: dict[str, float],
) -> None:
    """Emit the errors; one is too large above what is expected and twice what the CPU makes."""
    missing, errors = sorted(found.keys() ^ true.keys()), errors_of(found, true)
    worst = sorted(errors, key=lambda name: -_order(errors[name]))[:3]
    limits = {name: max(expected, 2 * usual.get(name, 0.0)) for name in errors}
    above = [name for name, error in errors.items() if not error <= limits[name]]
    stage.emit(
        case,
        loss=round(found["loss"].item(), 6),
        loss_error=errors["loss"],
        worst={name: f"{errors[name]:.1e}" for name in worst},
        usual={name: f"{usual[name]:.1e}" for name in worst if name in usual},
        median_error=sorted(errors.values(), key=_order)[len(errors) // 2],
        above=sorted(above, key=lambda name: -_order(errors[name]))[:4],
        of=len(errors),
        flag="WRONG" if above or missing else "",
        **({"missing": missing[:3]} if missing else {}),
    )


def _order(error: float) -> float:
    """Sort what is not a number as the worst."""
    return error if error == error else float("inf")


if __name__ == "__main__":
    main()
