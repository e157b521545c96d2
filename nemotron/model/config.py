"""The architecture's numbers, under the names of Hugging Face's NemotronH configuration."""

import math
from typing import Annotated, Literal

from pydantic import AllowInfNan, Field, model_validator

from nemotron.divisors import divisors, nearest
from nemotron.errors import RuleBroken
from nemotron.section import Section

MTP_DEPTHS = 2
"""Depths of multi-token prediction that Nemotron 3 is trained with, by one shared block."""
LAYER_KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
"""Letters of a layer pattern and what they stand for; one mixer per layer."""
MAX_SIZE = 2**31
"""Bound of every dimension."""
MAX_LAYERS = 100_000
MAX_TENSOR = 2**50
"""Bound of the elements of a matrix, or of all experts' matrices of a layer."""


EditHead = Literal["duration", "edit", "candidate"]
"""What is predicted of a token of a candidate, and `candidate`: of the candidate as a whole."""


class CorrectionConfig(Section):
    """What text correction adds to a model."""

    candidates: int = Field(1, ge=1, le=16)
    """Tokens that are read side by side at each place; with 1 nothing is added for them."""
    heads: Annotated[tuple[EditHead, ...], Field(strict=False)] = ()
    """Predictions of how a candidate must be changed."""


class LanguageExpertsConfig(Section):
    """Groups of experts that each belong to a language."""

    languages: Annotated[tuple[str, ...], Field(strict=False, min_length=2)]
    """Names, one for each of `n_group` groups."""
    soft: bool = True
    """Whether experts are weighted by the gate's probability of their language."""
    linear: bool = False
    """Whether a matrix for each language changes the last hidden state."""


class ModelConfig(Section):
    """Every dimension of one hybrid model. Defaults are those that all Nemotron 3 sizes share."""

    vocab_size: int = Field(gt=0)
    """Entries of the vocabulary, rows of the embedding and of the head."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    hybrid_override_pattern: str
    """One letter a layer: M Mamba-2, * attention, E mixture of experts, - dense MLP."""
    num_hidden_layers: int | None = Field(None, gt=0)
    """Number of layers; only a check, because the pattern already says it."""
    max_position_embeddings: int = Field(262144, gt=0)
    """Longest row that the model is meant for, in tokens."""
    layer_norm_epsilon: float = Field(1e-5, gt=0)
    """Added to the mean square in every normalization."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of initial weights; those into the residual have it over sqrt(layers)."""
    tie_word_embeddings: bool = False
    """Whether the head uses the embedding's matrix."""

    mamba_num_heads: int = Field(64, gt=0)
    """Heads of a Mamba-2 mixer; its inner width is heads times head dimension."""
    mamba_head_dim: int = Field(64, gt=0)
    """Channels of a Mamba-2 head."""
    n_groups: int = Field(8, gt=0)
    """Groups that share B and C, and over which the gated norm is taken."""
    ssm_state_size: int = Field(128, gt=0)
    """Length of the state kept for each channel."""
    conv_kernel: int = Field(4, ge=2)
    """Width of the causal convolution: inputs that each output reads."""
    use_conv_bias: bool = True
    """Whether the convolution has a bias."""
    chunk_size: int = Field(128, gt=0)
    """Chunk length of the scan as published; kernels may choose another, only rounding changes."""
    time_step_min: float = Field(1e-3, gt=0)
    """Smallest time step at initialization."""
    time_step_max: float = Field(0.1, gt=0)
    """Largest time step at initialization."""
    time_step_floor: float = Field(1e-4, gt=0)
    """Floor of the time step at initialization."""
    time_step_limit: Annotated[
        tuple[Annotated[float, AllowInfNan(True)], Annotated[float, AllowInfNan(True)]],
        Field(strict=False),
    ] = (0.0, math.inf)
    """Range to which the time step is clamped while running; (0, inf) does not clamp."""

    num_attention_heads: int = Field(32, gt=0)
    """Query heads."""
    num_key_value_heads: int = Field(2, gt=0)
    """Key and value heads, each shared by a group of query heads."""
    head_dim: int = Field(128, gt=0)
    """Channels of an attention head."""

    intermediate_size: int | None = Field(None, gt=0)
    """Width of a dense MLP; needed when the pattern has a `-` layer."""

    n_routed_experts: int = Field(128, gt=0)
    """Experts of a mixture layer."""
    num_experts_per_tok: int = Field(6, gt=0)
    """Experts that each token is sent to."""
    moe_intermediate_size: int = Field(1856, gt=0)
    """Width of a routed expert."""
    moe_shared_expert_intermediate_size: int = Field(3712, gt=0)
    """Width of the expert that sees every token."""
    moe_latent_size: int | None = Field(None, gt=0)
    """Width in which the routed experts work (LatentMoE); absent: the hidden size."""
    n_group: int = Field(1, gt=0)
    """Groups of experts for group-limited routing."""
    topk_group: int = Field(1, gt=0)
    """Groups of experts a token may use."""
    norm_topk_prob: bool = True
    """Whether the chosen experts' weights are divided by their sum."""
    routed_scaling_factor: float = Field(1.0, gt=0)
    """Factor on the chosen experts' weights."""

    num_nextn_predict_layers: int = Field(0, ge=0, le=1)
    """Multi-token-prediction blocks stored: 0 or 1 (the one block is shared over all depths)."""
    mtp_hybrid_override_pattern: str | None = None
    """Layer pattern of the multi-token-prediction block, `*E` in the released models."""

    pad_token_id: int = Field(0, ge=0)
    """Padding token, written to the exported configuration."""
    bos_token_id: int = Field(1, ge=0)
    """Beginning-of-text token, written to the exported configuration."""
    eos_token_id: int = Field(2, ge=0)
    """End-of-text token: stops generation."""
    correction: CorrectionConfig | None = None
    """Several candidates at each place, and heads that judge them; absent: none."""

    @property
    def mamba_inner_size(self) -> int:
        """Inner width of a Mamba-2 mixer: heads x head dimension, never `expand` x hidden."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels that pass the convolution: x, B and C."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def expert_input_size(self) -> int:
        """Width that a routed expert reads and writes: the latent's, or the hidden size."""
        return self.moe_latent_size or self.hidden_size

    language_experts: LanguageExpertsConfig | None = None
    """Experts by language; absent: none."""

    @property
    def num_candidates(self) -> int:
        """Tokens that are read side by side at each place."""
        return 1 if self.correction is None else self.correction.candidates

    @property
    def edit_heads(self) -> tuple[EditHead, ...]:
        """Predictions about candidates."""
        return () if self.correction is None else tuple(dict.fromkeys(self.correction.heads))

    @property
    def mtp_pattern(self) -> str:
        """Pattern of the multi-token-prediction block; empty when there is none."""
        return (self.mtp_hybrid_override_pattern or "") if self.num_nextn_predict_layers else ""

    @property
    def moe_layers(self) -> list[str]:
        """Names of the mixture layers in the whole model, those of the prediction block last."""
        stacks = {
            "backbone.layers": self.hybrid_override_pattern,
            "mtp.layers": self.mtp_pattern,
        }
        return [
            f"{stack}.{index}"
            for stack, pattern in stacks.items()
            for index, letter in enumerate(pattern)
            if letter == "E"
        ]

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        for key in ("hybrid_override_pattern", "mtp_hybrid_override_pattern"):
            pattern = getattr(self, key)
            if pattern is None:
                continue
            if not pattern:
                raise RuleBroken(key, "is empty; write one letter of M * E - for each layer")
            for position, letter in enumerate(pattern):
                if letter not in LAYER_KINDS:
                    raise RuleBroken(
                        key,
                        f"has the letter {letter!r} at position {position}; "
                        f"allowed are M * E - (Mamba, attention, experts, MLP)",
                    )
        pattern = self.hybrid_override_pattern
        if set(pattern) == {"-"}:
            raise RuleBroken(
                "hybrid_override_pattern",
                "mixes no tokens; add at least one M or * layer",
                pattern,
            )
        if self.num_hidden_layers not in (None, len(pattern)):
            raise RuleBroken(
                "num_hidden_layers",
                f"but hybrid_override_pattern has {len(pattern)} letters; make them equal or leave "
                f"num_hidden_layers out",
                self.num_hidden_layers,
            )
        if self.num_nextn_predict_layers and not self.mtp_hybrid_override_pattern:
            raise RuleBroken(
                "num_nextn_predict_layers",
                "needs mtp_hybrid_override_pattern, for example '*E'",
                self.num_nextn_predict_layers,
            )
        if self.mtp_hybrid_override_pattern and set(self.mtp_hybrid_override_pattern) - set("*E"):
            raise RuleBroken(
                "mtp_hybrid_override_pattern",
                "may hold only * and E, the layers that readers of the checkpoint support",
                self.mtp_hybrid_override_pattern,
            )
        if "-" in pattern and self.intermediate_size is None:
            raise RuleBroken(
                "hybrid_override_pattern", "has a - layer but intermediate_size is absent"
            )
        self._check_languages()
        self._check_sizes()
        self._divides("num_key_value_heads", "num_attention_heads")
        self._divides("n_groups", "mamba_num_heads")
        self._divides("n_group", "n_routed_experts")
        self._at_most("num_experts_per_tok", "n_routed_experts")
        self._at_most("topk_group", "n_group")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise RuleBroken(
                "num_experts_per_tok",
                f"is more than the {reachable} experts that topk_group = {self.topk_group} of "
                f"n_group = {self.n_group} leave",
                self.num_experts_per_tok,
            )
        if self.num_experts_per_tok % self.topk_group:
            raise RuleBroken(
                "topk_group",
                f"does not divide num_experts_per_tok = {self.num_experts_per_tok}",
                self.topk_group,
            )
        low, high = self.time_step_limit
        if math.isnan(low) or math.isnan(high) or not 0 <= low < high:
            raise RuleBroken(
                "time_step_limit", "must be two numbers, 0 <= first < second", [low, high]
            )
        self._at_most("time_step_min", "time_step_max")
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if (value := getattr(self, key)) >= self.vocab_size:
                raise RuleBroken(key, f"is outside vocab_size = {self.vocab_size}", value)
        return self

    def _check_languages(self) -> None:
        if self.language_experts is None:
            return
        count = len(self.language_experts.languages)
        if len(set(self.language_experts.languages)) != count:
            raise RuleBroken("language_experts", "names a language twice; give each one name")
        if "E" not in self.hybrid_override_pattern:
            raise RuleBroken("language_experts", "needs an E layer, which the pattern lacks")
        if self.n_group != count:
            rule = f"is not the number of languages of language_experts; write {count}"
            raise RuleBroken("n_group", rule, self.n_group)
        if self.topk_group != 1:
            rule = "but a token has one language of language_experts; write 1"
            raise RuleBroken("topk_group", rule, self.topk_group)
        if self.mtp_pattern:
            rule = "does not work beside language_experts yet; write 0"
            raise RuleBroken("num_nextn_predict_layers", rule, self.num_nextn_predict_layers)

    def _check_sizes(self) -> None:
        """Refuse what no machine holds before anything counts up to it."""
        for key in type(self).model_fields:
            value = getattr(self, key)
            if isinstance(value, int) and value >= MAX_SIZE:
                raise RuleBroken(key, "is too large; dimensions stay below 2^31", value)
        layers = len(self.hybrid_override_pattern)
        if layers > MAX_LAYERS:
            rule = f"has {layers} letters; write at most 100,000"
            raise RuleBroken("hybrid_override_pattern", rule)
        expert = self.n_routed_experts * self.moe_intermediate_size
        inner = self.mamba_num_heads * self.mamba_head_dim
        heads = self.num_attention_heads * self.head_dim
        states = self.n_groups * self.ssm_state_size
        dense = max(self.intermediate_size or 0, self.moe_shared_expert_intermediate_size)
        # twice the width: what a multi-token-prediction block reads
        width = max(self.vocab_size, expert, inner, states, heads, dense, 2 * self.hidden_size)
        if max(self.hidden_size, self.moe_latent_size or 0) * width > MAX_TENSOR:
            rule = "makes a tensor of over 2^50 numbers; lower it"
            raise RuleBroken("hidden_size", rule, self.hidden_size)

    def _divides(self, small: str, large: str) -> None:
        a, b = getattr(self, small), getattr(self, large)
        if b % a:
            near = nearest(a, divisors(b))
            raise RuleBroken(small, f"does not divide {large} = {b}; {near} would", a)

    def _at_most(self, small: str, large: str) -> None:
        a, b = getattr(self, small), getattr(self, large)
        if a > b:
            raise RuleBroken(small, f"is more than {large} = {b}", a)
