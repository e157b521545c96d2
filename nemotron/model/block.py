"""One layer of the stack: a norm, one mixer, and the residual around them."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, noop_context_fn

from nemotron.model.attention import Attention
from nemotron.model.config import ModelConfig
from nemotron.model.linear import MLP, RMSNorm
from nemotron.model.mamba2 import Mamba2
from nemotron.model.moe import MoE
from nemotron.model.router import Choice, RoutingStats
from nemotron.model.state import AttentionState, MambaState


class Block(nn.Module):
    """hidden + mixer(norm(hidden)), with the mixer that the pattern's letter names.

    With `recompute`, backward computes the activations again instead of keeping them.
    """

    def __init__(self, config: ModelConfig, letter: str) -> None:
        super().__init__()
        self.letter = letter
        self.recompute = False
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer: nn.Module
        if letter == "M":
            self.mixer = Mamba2(config)
        elif letter == "*":
            self.mixer = Attention(config)
        elif letter == "E":
            self.mixer = MoE(config)
        else:
            assert letter == "-", letter
            assert config.intermediate_size is not None
            self.mixer = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: MambaState | AttentionState | None = None,
        stats_name: str | None = None,
        padding: Bool[Tensor, "B S"] | None = None,
        choice: Choice | None = None,
        is_again: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], RoutingStats | None]:
        """Apply the layer; the second result is the router's statistics if they were asked for.

        They leave out the tokens of the whole rows that are `padding`. `choice` is for routers.
        """
        if self.recompute and not is_again and torch.is_grad_enabled():
            # statistics are a result, so the second run does not count again; nor does it choose
            # experts again, since another choice would send other tokens to other ranks
            inputs = (hidden, seq_idx, state, stats_name, padding, choice, True)
            contexts = _keep_choices if self.letter == "E" else noop_context_fn
            return checkpoint(
                Block.forward, self, *inputs, use_reentrant=False, context_fn=contexts
            )
        x, stats = self.norm(hidden), None
        if self.letter in "M*":
            y = self.mixer(x, seq_idx, state)
        elif isinstance(self.mixer, MoE):
            y, stats = self.mixer(x, stats_name, padding, choice)
        else:
            # a stand-in for decoding
            y = self.mixer(x, choice) if self.letter == "E" else self.mixer(x)
        return hidden + y, stats


class _Choices(TorchDispatchMode):
    """Keeps what `topk` chose, and gives it again when the same is computed a second time.

    torch's selective checkpoints count every operation; gathering sharded weights adds some.
    """

    def __init__(self, kept: list[Any], *, again: bool) -> None:
        super().__init__()
        self._kept, self._again = kept, again

    def __enter__(self) -> "_Choices":
        self._next = iter(self._kept)
        return super().__enter__()

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if operation is not torch.ops.aten.topk.default:
            return operation(*arguments, **(keywords or {}))
        if self._again:
            return next(self._next)
        result = operation(*arguments, **(keywords or {}))
        self._kept.append(result)
        return result


def _keep_choices() -> tuple[_Choices, _Choices]:
    kept: list[Any] = []
    return _Choices(kept, again=False), _Choices(kept, again=True)
