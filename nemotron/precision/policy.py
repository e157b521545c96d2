"""From rules to a table: the format of each linear layer, why, and the backend of its products."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from nemotron.errors import UserError
from nemotron.precision.backends import choose, format_call
from nemotron.precision.config import PrecisionConfig, PrecisionRule

KINDS = {
    "in_proj": "mamba.in_proj",
    "out_proj": "mamba.out_proj",
    "q_proj": "attention.q_proj",
    "k_proj": "attention.k_proj",
    "v_proj": "attention.v_proj",
    "o_proj": "attention.o_proj",
    "experts": "moe.experts",
    "shared_experts.up_proj": "moe.shared_experts",
    "shared_experts.down_proj": "moe.shared_experts",
    "fc1_latent_proj": "moe.latent",
    "fc2_latent_proj": "moe.latent",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
"""Kind of a layer by its name inside a mixer. Router, embedding, head, norms, convolution and scan
are not linear layers of this table and are never quantized."""
SUPER_TAIL = 14 / 88
"""Share of the last blocks that Super keeps in bfloat16."""


@dataclass(frozen=True)
class Preset:
    """Rules, and the format of everything that they leave."""

    rules: tuple[PrecisionRule, ...]
    default: str


def _rule(format: str, **conditions: object) -> PrecisionRule:
    return PrecisionRule.model_validate({"format": format, **conditions})


SUPER = Preset(
    (
        _rule("bf16", name="mtp.*"),
        _rule("bf16", tail=SUPER_TAIL),
        _rule("bf16", kind="attention.*"),
        _rule("bf16", kind="moe.latent"),
        _rule("mxfp8", kind="mamba.out_proj"),
    ),
    "nvfp4",
)
PRESETS = {
    "bf16": Preset((), "bf16"),
    "fp8_delayed": Preset((), "fp8_delayed"),
    "fp8_current": Preset(
        (_rule("bf16", last_block=1), _rule("bf16", tail_blocks=2)), "fp8_current"
    ),
    "fp8_block": Preset((_rule("bf16", last_block=1), _rule("bf16", tail_blocks=2)), "fp8_block"),
    "mxfp8": Preset((), "mxfp8"),
    "nvfp4": SUPER,
    "nvfp4_super": SUPER,
    "nvfp4_all": Preset((), "nvfp4"),
}
"""Published assignments of formats.

Sources: Super's technical report, section 2.2; NVIDIA-NeMo/Megatron-Bridge: training/
mixed_precision.py (two blocks at either end for FP8) and perf_recipes/nemotronh/te_quant.cfg.
"""


@dataclass(frozen=True)
class Assignment:
    """What one linear layer computes in."""

    module: str
    kind: str
    format: str
    reason: str
    backend: str = ""
    """What computes its products; empty where they are not quantized."""


def kind_of(module: str) -> str | None:
    """Return the kind of a linear layer by its name, or None for what is none of the table."""
    match = re.search(r"\.mixer\.(.+)$", module)
    return KINDS.get(match[1]) if match else None


def resolve(
    modules: Sequence[str], num_blocks: int, config: PrecisionConfig, preset: str
) -> list[Assignment]:
    """Return the assignment of every linear layer among the named modules, in order.

    Raises:
        UserError: when a rule of the recipe decides nothing.
    """
    rules = [*config.rules, *PRESETS[preset].rules]
    table, used = [], set()
    for module in modules:
        kind = kind_of(module)
        if kind is None:
            continue
        match = re.match(r"backbone\.layers\.(\d+)\.", module)
        block = int(match[1]) if match else None
        for rule in rules:
            if _fits(rule, module, kind, block, num_blocks):
                table.append(Assignment(module, kind, rule.format, _why(rule, num_blocks)))
                used.add(id(rule))
                break
        else:
            default = PRESETS[preset].default
            table.append(Assignment(module, kind, default, f"default of {preset}"))
    for number, rule in enumerate(config.rules):
        if id(rule) not in used:
            raise UserError(
                f"decides no layer ({_why(rule, num_blocks)}); remove it, or correct its "
                "conditions or its place among the rules.",
                key=f"precision.rules.{number}",
            )
    return table


def assign(
    model: nn.Module, config: PrecisionConfig, preset: str, device: torch.device | None = None
) -> list[Assignment]:
    """Return the table of a model, which may lie on the meta device.

    Backends are those for `device`, or for where a run of this machine would be.

    Raises:
        UserError: when a rule decides nothing, or a named backend is not fit for a layer.
    """
    layers = model.get_submodule("backbone.layers")
    assert isinstance(layers, nn.ModuleList)
    where = device_of(model) if device is None else device
    return [
        with_backend(line, config, model.get_submodule(line.module), where)
        for line in resolve(linear_layers(model), len(layers), config, preset)
    ]


def device_of(model: nn.Module) -> torch.device:
    """Return where a model lies, or would lie if it is not built yet."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device


def linear_layers(model: nn.Module) -> Sequence[str]:
    """Return the names of all modules that a format can be given to."""
    return [name for name, _ in model.named_modules() if kind_of(name) is not None]


def with_backend(
    line: Assignment,
    config: PrecisionConfig,
    module: nn.Module,
    device: torch.device,
    *,
    is_split: bool = False,
) -> Assignment:
    """Choose what computes a line's products; `is_split` as in `format_call`."""
    if line.format == "bf16":
        return line
    shape = next(module.parameters(recurse=False)).shape
    call = format_call(line.format, device, shape, is_split=is_split)
    return replace(line, backend=choose(config.backend, call, line.module).name)


def summarize(table: Sequence[Assignment]) -> list[str]:
    """Return a line for each format and kind: how many layers it has, why, and by which backend."""
    counts = Counter((line.format, line.kind, line.reason, line.backend) for line in table)
    return [
        f"{format:<11} {kind} x {n}: {why}" + (f" ({backend})" if backend else "")
        for (format, kind, why, backend), n in counts.items()
    ]


def tail_blocks(share: float, num_blocks: int) -> int:
    """Return how many blocks at the end a share is."""
    return round(share * num_blocks)


def _fits(rule: PrecisionRule, module: str, kind: str, block: int | None, num_blocks: int) -> bool:
    if rule.kind is not None and not fnmatchcase(kind, rule.kind):
        return False
    if rule.name is not None and not fnmatchcase(module, rule.name):
        return False
    if block is None:
        return not rule.is_of_blocks
    first = max(rule.first_block or 0, num_blocks - _tail(rule, num_blocks))
    return first <= block <= (num_blocks if rule.last_block is None else rule.last_block)


def _tail(rule: PrecisionRule, num_blocks: int) -> int:
    """Return how many blocks at the end a rule allows."""
    by_share = num_blocks if rule.tail is None else tail_blocks(rule.tail, num_blocks)
    return min(by_share, num_blocks if rule.tail_blocks is None else rule.tail_blocks)


def _why(rule: PrecisionRule, num_blocks: int) -> str:
    parts = []
    if rule.kind is not None:
        parts.append(f"kind {rule.kind}")
    if rule.name is not None:
        parts.append(f"name {rule.name}")
    if rule.tail is not None or rule.tail_blocks is not None:
        parts.append(f"last {_tail(rule, num_blocks)} of {num_blocks} blocks")
    if rule.first_block is not None or rule.last_block is not None:
        last = num_blocks - 1 if rule.last_block is None else rule.last_block
        parts.append(f"blocks {rule.first_block or 0} to {last}")
    return ", ".join(parts)
