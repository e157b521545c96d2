"""What a layer remembers between calls while text is generated."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.model.config import ModelConfig


@dataclass
class MambaState:
    """State of one Mamba-2 layer: the last convolution inputs and the state-space state.

    `conv` holds the last W-1 inputs before the activation; `ssm` is float32 even in a bf16 model,
    as serving engines keep it.
    """

    conv: Float[Tensor, "B W C"]
    ssm: Float[Tensor, "B H P N"]


class AttentionState:
    """Keys and values of one attention layer; the buffers grow by doubling."""

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._length = 0

    def append(
        self, k: Float[Tensor, "B T Hkv Dh"], v: Float[Tensor, "B T Hkv Dh"]
    ) -> tuple[Float[Tensor, "B S Hkv Dh"], Float[Tensor, "B S Hkv Dh"]]:
        """Add the newest keys and values and return all of them, as views."""
        end = self._length + k.shape[1]
        if self._buffers is None or end > self._buffers[0].shape[1]:
            self._grow(k, end)
        assert self._buffers is not None
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer[:, self._length : end] = new
        self._length = end
        keys, values = self._buffers
        return keys[:, :end], values[:, :end]

    def _grow(self, k: Tensor, length: int) -> None:
        capacity = max(64, 1 << (length - 1).bit_length())
        grown = tuple(k.new_zeros(k.shape[0], capacity, *k.shape[2:]) for _ in range(2))
        if self._buffers is not None:
            for new, old in zip(grown, self._buffers, strict=True):
                new[:, : self._length] = old[:, : self._length]
        self._buffers = (grown[0], grown[1])


class Cache:
    """The states of all layers for a batch of rows that are continued together.

    `start[b]` is the position at which row b begins: rows of unequal length are padded on the
    left, and nothing before `start` reaches attention, convolution or state.
    """

    def __init__(
        self, config: ModelConfig, start: Int[Tensor, " B"], dtype: torch.dtype = torch.float32
    ) -> None:
        batch, device = start.shape[0], start.device
        self.start = start
        self.last_start = int(start.max())
        self.length = 0
        self.layers: list[MambaState | AttentionState | None] = []
        for letter in config.hybrid_override_pattern:
            if letter == "M":
                conv = torch.zeros(
                    batch, config.conv_kernel - 1, config.conv_channels, dtype=dtype, device=device
                )
                heads, channels = config.mamba_num_heads, config.mamba_head_dim
                ssm = torch.zeros(
                    batch,
                    heads,
                    channels,
                    config.ssm_state_size,
                    dtype=torch.promote_types(dtype, torch.float32),
                    device=device,
                )
                self.layers.append(MambaState(conv, ssm))
            else:
                self.layers.append(AttentionState() if letter == "*" else None)

    @property
    def padded(self) -> bool:
        """Whether any row has padding before its text."""
        return self.last_start > 0

    def documents(self, num_tokens: int) -> Int[Tensor, "B T"] | None:
        """Return document ids for the next tokens while some row has not begun, else None.

        Padding is document 0 and a text that begins among these tokens document 1, so that the
        state carried into them (always document 0's) is dropped at its first token.
        """
        if not self.padded or self.length > self.last_start:
            return None
        position = torch.arange(
            self.length, self.length + num_tokens, device=self.start.device
        ).expand(self.start.shape[0], -1)
        start = self.start[:, None]
        return ((position >= start) & (start >= self.length)).to(torch.int32)
