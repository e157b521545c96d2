"""What operations see of a model: the sizes of the released ones, and of small ones for CPUs.

Bounds, tuning and what is compiled without a GPU take them from here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """How many rows of how many tokens."""

    rows: int
    tokens: int

    @property
    def all(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Size:
    """One layer of each kind, on one device of a group that shares the experts."""

    name: str
    hidden: int
    heads: int
    head_dim: int
    groups: int
    state: int
    query_heads: int
    key_heads: int
    attention_dim: int
    experts: int
    """Held here."""
    all_experts: int
    copies: int
    """Of each token, among the experts held here on average."""
    expert_input: int
    expert_width: int
    shared_width: int
    vocab: int
    usual: Rows
    """Rows of a step."""
    checked: Rows
    """Rows whose results are compared with the reference in float64."""

    @property
    def inner(self) -> int:
        """Channels of the scan."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution."""
        return self.inner + 2 * self.groups * self.state

    @property
    def projected(self) -> int:
        """Columns of in_proj: the gate, the channels and a time step for each head."""
        return self.inner + self.channels + self.heads


_RELEASED, _PROXY, _PART = Rows(2, 4096), Rows(1, 2048), Rows(2, 150)
_MIXERS = (256, 16, 32, 4, 64, 8, 2, 32)
_TINY = (64, 4, 16, 2, 16, 4, 2, 16, 4, 32, 2, 64, 32, 64, 512)
_NANO = (2688, 64, 64, 8, 128, 32, 2, 128, 16, 128, 6, 2688, 1856, 3712, 131072)
_SUPER = (4096, 128, 64, 8, 128, 32, 2, 128, 64, 512, 22, 1024, 2688, 5376, 131072)

SIZES = {
    size.name: size
    for size in (
        Size("nano-proxy", *_MIXERS, 16, 16, 4, 256, 256, 512, 4096, _PROXY, _PART),
        Size("super-proxy", *_MIXERS, 64, 64, 8, 64, 192, 512, 4096, _PROXY, _PART),
        Size("nano", *_NANO, _RELEASED, Rows(2, 128)),
        Size("super", *_SUPER, _RELEASED, Rows(2, 128)),
        Size("tiny", *_TINY, Rows(2, 64), Rows(2, 32)),
    )
}
"""Nano and Super as each of 8 GPUs holds them, and their proxies of docs/benchmarks.md."""
