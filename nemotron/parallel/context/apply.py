"""Putting the layers that share rows in the place of those that hold them whole."""

from collections.abc import Callable

from nemotron.model.attention import Attention
from nemotron.model.hybrid import HybridLM
from nemotron.model.mamba2 import Mamba2, TokenMixing
from nemotron.parallel.collectives import Group
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.context.attention import ContextAttention
from nemotron.parallel.context.head_exchange import HeadExchange
from nemotron.parallel.context.state_passing import StatePassing

MIXING: dict[str, Callable[[Group], TokenMixing]] = {
    "state_passing": StatePassing,
    "all_to_all": HeadExchange,
}
"""What `parallel.mamba_context` names."""


def apply_context(model: HybridLM, group: Group, config: ParallelConfig) -> None:
    """Let the ranks of the group share rows, each with the tokens that `layout.shard` gives it."""
    mix, core = MIXING[config.mamba_context](group), ContextAttention(group)
    for module in model.modules():
        if isinstance(module, Mamba2):
            module.mix = mix
        elif isinstance(module, Attention):
            module.core = core
