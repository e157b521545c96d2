"""Router replay: the trainer uses the experts that the engine chose for each token.

A rounding that differs between engine and trainer may choose another expert, which changes a
probability far more than the rounding itself.
Source: NVIDIA-NeMo/RL and prime-rl replay the numbers of the experts; the gate weighs them anew.
"""

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from nemotron.model.router import Routing, routers
from nemotron.posttrain.config import RlConfig

UNKNOWN = -1
"""Stands for the experts of a token that no layer has read."""
_FEW = 255
"""Experts up to this number fit into bytes, whose largest value then stands for `UNKNOWN`."""


@dataclass(frozen=True)
class Experts:
    """How a model's choices are written: a byte for each, or two where experts are many."""

    layers: int
    """Mixture layers of the backbone."""
    top_k: int
    num_experts: int

    @classmethod
    def of(cls, config: RlConfig) -> "Experts | None":
        """Return the form for a recipe's model; None if nothing is replayed."""
        model = config.model
        layers = model.hybrid_override_pattern.count("E")
        if not layers or not config.rollout.router_replay:
            return None
        return cls(layers, model.num_experts_per_tok, model.n_routed_experts)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in memory, before they are written as text."""
        return self.layers * self.top_k * self._dtype.itemsize

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype("u1") if self.num_experts <= _FEW else np.dtype("<i2")

    def check(self, text: str, num_tokens: int) -> None:
        """Check the choices of a text of so many tokens; there may be none.

        Raises:
            ValueError: when they are not of this model, or of another number of tokens.
        """
        if text and len(self.decode(text)) != num_tokens - 1:
            raise ValueError("the experts are not those of all tokens but the last")

    def encode(self, experts: Int[Tensor, "tokens layers K"]) -> str:
        """Return choices as base64 of their bytes, token after token."""
        return base64.b64encode(experts.numpy().astype(self._dtype).tobytes()).decode()

    def decode(self, text: str) -> Int[Tensor, "tokens layers K"]:
        """Return what `encode` wrote, as int16.

        Raises:
            ValueError: when it is not of this model.
        """
        found = np.frombuffer(base64.b64decode(text, validate=True), self._dtype)
        choices = found.astype(np.int16)
        if self._dtype.itemsize == 1:
            choices[found == _FEW] = UNKNOWN
        if choices.size and not UNKNOWN <= choices.min() <= choices.max() < self.num_experts:
            raise ValueError(f"an expert is not among the model's {self.num_experts}")
        return torch.from_numpy(choices.reshape(-1, self.layers, self.top_k))


@contextmanager
def own_choices(model: nn.Module) -> Iterator[list[Bool[Tensor, " M"]]]:
    """Note for each mixture layer of a pass which tokens its router would have sent elsewhere."""
    layers: list[Bool[Tensor, " M"]] = []

    def note(module: nn.Module, inputs: object, routing: Routing) -> None:
        if routing.own is not None:
            ordered = routing.own.sort(-1).values != routing.experts.sort(-1).values
            layers.append(ordered.any(-1))

    handles = [router.register_forward_hook(note) for router in routers(model).values()]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Differences:
    """Tokens whose experts were replayed, and what their routers would have chosen now."""

    tokens: int = 0
    differing_tokens: int = 0
    """Those with another choice in at least one layer."""
    choices: int = 0
    """Tokens times layers."""
    differing_choices: int = 0

    @classmethod
    def of(
        cls, experts: Int[Tensor, "B T layers K"], layers: Sequence[Bool[Tensor, " M"]]
    ) -> "Differences":
        """Count in one pass, given what was replayed and what `own_choices` noted."""
        known = int((experts[..., 0, 0] != UNKNOWN).sum())
        differ = torch.stack(list(layers), dim=1)
        return cls(known, int(differ.any(1).sum()), known * len(layers), int(differ.sum()))

    def __add__(self, other: "Differences") -> "Differences":
        return Differences(
            self.tokens + other.tokens,
            self.differing_tokens + other.differing_tokens,
            self.choices + other.choices,
            self.differing_choices + other.differing_choices,
        )

    def metrics(self) -> dict[str, float]:
        """Return the shares that differ, of tokens and of single choices."""
        return {
            "rl/replay_tokens_differ": self.differing_tokens / max(self.tokens, 1),
            "rl/replay_choices_differ": self.differing_choices / max(self.choices, 1),
        }


def describe(config: RlConfig) -> list[str]:
    """Return a line about the memory of the replayed experts, if there are any."""
    experts = Experts.of(config)
    if experts is None:
        return []
    answers = config.rollout.num_prompts_per_step * config.rollout.num_generations_per_prompt
    length = config.data.seq_len
    stored = answers * length * experts.token_bytes * 4 / 3
    used = config.rows_at_once(length) * length * experts.layers * experts.top_k * 2
    return [
        f"router replay: {experts.token_bytes} bytes a token; a rollout batch holds at most "
        f"{stored / 2**20:.1f} MiB as text on each rank, a micro-batch {used / 2**20:.2f} MiB on "
        "its device"
    ]
