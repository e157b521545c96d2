"""What a step needs of a model and of a cache: weights laid out for it, and where states lie."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 64
"""Outputs whose weights lie side by side."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """Weights of a product, or of one for each expert, in blocks of outputs.

    A block is read from its beginning to its end for all rows of a step. Outputs that fill up the
    last block have the weight 0.
    """

    blocks: Float[Tensor, "*experts blocks I 64"]
    num_outputs: int

    @classmethod
    def of(cls, weight: Float[Tensor, "*experts O I"], dtype: torch.dtype) -> "Matrix":
        """Lay out a weight in a number format."""
        *experts, outputs, inputs = weight.shape
        whole = torch.zeros(*experts, -(-outputs // BLOCK) * BLOCK, inputs, dtype=dtype)
        whole[..., :outputs, :] = weight.detach()
        return cls(whole.unflatten(-2, (-1, BLOCK)).mT.contiguous(), outputs)

    @property
    def num_inputs(self) -> int:
        """Inputs of the product."""
        return self.blocks.shape[-2]

    @property
    def num_blocks(self) -> int:
        """Blocks of one product."""
        return self.blocks.shape[-3]

    def dense(self) -> Float[Tensor, "*experts O I"]:
        """Return a copy in the usual layout."""
        return self.blocks.mT.flatten(-3, -2)[..., : self.num_outputs, :]


@dataclass(frozen=True, eq=False)
class MambaWeights:
    """A Mamba-2 layer; `kernel` is transposed, `decay` is -exp(A_log). Vectors are float32."""

    norm: Float[Tensor, " D"]
    in_proj: Matrix
    kernel: Float[Tensor, "W C"]
    bias: Float[Tensor, " C"] | None
    decay: Float[Tensor, " H"]
    skip: Float[Tensor, " H"]
    dt_bias: Float[Tensor, " H"]
    limits: tuple[float, float]
    gate_norm: Float[Tensor, " I"]
    out_proj: Matrix
    num_groups: int
    state_size: int
    eps: float
    gate_eps: float


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """An attention layer; `qkv_proj` has the outputs of queries, keys and values."""

    norm: Float[Tensor, " D"]
    qkv_proj: Matrix
    o_proj: Matrix
    num_queries: int
    num_keys: int
    head_size: int
    eps: float


@dataclass(frozen=True, eq=False)
class ExpertsWeights:
    """A mixture layer; the router's matrix and bias are float32."""

    norm: Float[Tensor, " D"]
    router: Matrix
    router_bias: Float[Tensor, " E"]
    top_k: int
    normalize: bool
    scaling: float
    up: Matrix
    down: Matrix
    shared_up: Matrix
    shared_down: Matrix
    to_latent: Matrix | None
    from_latent: Matrix | None
    eps: float


@dataclass(frozen=True, eq=False)
class DenseWeights:
    """A squared-ReLU feed-forward layer."""

    norm: Float[Tensor, " D"]
    up: Matrix
    down: Matrix
    eps: float


@dataclass(frozen=True, eq=False)
class JoinWeights:
    """How a multi-token-prediction block joins embeddings and hidden states: norms, a product."""

    embedding_norm: Float[Tensor, " D"]
    hidden_norm: Float[Tensor, " D"]
    proj: Matrix
    """Reads both, the embedding first."""
    eps: float


LayerWeights = MambaWeights | AttentionWeights | ExpertsWeights | DenseWeights


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers from the embedding to the final norm, for activations of a dtype.

    With a `join`, the first layer reads embeddings and what a step brings as `hidden`.
    """

    embeddings: Float[Tensor, "V D"]
    layers: tuple[LayerWeights, ...]
    final_norm: Float[Tensor, " D"]
    eps: float
    dtype: torch.dtype
    join: JoinWeights | None = None

    @property
    def last_state(self) -> int:
        """The last layer that remembers tokens; -1 without one."""
        numbers = range(len(self.layers) - 1, -1, -1)
        kinds = (MambaWeights, AttentionWeights)
        return next((k for k in numbers if isinstance(self.layers[k], kinds)), -1)

    @property
    def empty(self) -> Float[Tensor, " 0"]:
        """A tensor of the stack's dtype and device, by which a backend is chosen."""
        return self.final_norm.new_empty(0, dtype=self.dtype)


@dataclass(eq=False, slots=True)
class MambaPlace:
    """The states of one Mamba-2 layer, of all slots; changed in place."""

    conv: Float[Tensor, "slots W C"]
    ssm: Float[Tensor, "slots H P N"]


@dataclass(eq=False, slots=True)
class KeysPlace:
    """Keys and values of one attention layer, in blocks; changed in place."""

    keys: Float[Tensor, "blocks size Hkv Dh"]
    values: Float[Tensor, "blocks size Hkv Dh"]


@dataclass(eq=False)
class Step:
    """A call: some tokens of each of several texts, which go on where their slots stand.

    With `keeps_inputs`, `advance` must follow, which brings the Mamba-2 states to those after the
    first of these tokens, at least one of each text; `kept` is what it needs.
    """

    tokens: Int[Tensor, "B T"]
    slots: Int[Tensor, " B"]
    lengths: Int[Tensor, " B"]
    """Tokens of each text before the call."""
    tables: Int[Tensor, "B blocks"]
    """The blocks of keys and values of each text; those after its end may be any."""
    places: tuple[MambaPlace | KeysPlace | None, ...]
    keeps_inputs: bool = False
    hidden: Float[Tensor, "B T D"] | None = None
    """What is joined with the embeddings, if the stack has a `join`; else what is read for them."""
    skipped: int = 0
    """Places at the beginning of each text that hold no keys and values; counted in `lengths`."""
    only_last: bool = False
    """Whether the hidden states of the last token of each text are all that is returned."""
    has_experts: bool = False
    """Whether the experts that are chosen are asked for."""
    kept: list[Float[Tensor, "..."] | None] = field(default_factory=list)
    """What a backend keeps: inputs of the convolutions, and the time steps'."""
    chosen: list[Int[Tensor, "M K"]] = field(default_factory=list)
    """The experts of every token in each mixture layer, if they are asked for."""
