"""From rules to a table: which format each linear layer computes in, and why."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nemotron.errors import UserError
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
are no linear layers of this table and are never quantized."""
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
                f"precision.rules.{number} decides no layer ({_why(rule, num_blocks)}); remove it, "
                "or correct its conditions or its place among the rules."
            )
    return table


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
