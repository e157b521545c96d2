"""Counts of parameters by kind, computed from the dimensions without building a model."""

from collections import Counter
from dataclasses import dataclass

from nemotron.model.config import LAYER_KINDS, ModelConfig


@dataclass(frozen=True)
class Split:
    """Parameters of a part of the model, by how tensor and expert parallelism cut them."""

    cut: int = 0
    """Cut over the ranks of tp."""
    whole: int = 0
    """The same on all ranks of tp."""
    experts: int = 0
    """Routed experts, cut over the ranks of ep."""

    def __add__(self, other: "Split") -> "Split":
        return Split(self.cut + other.cut, self.whole + other.whole, self.experts + other.experts)

    def __mul__(self, times: int) -> "Split":
        return Split(self.cut * times, self.whole * times, self.experts * times)

    @property
    def dense(self) -> int:
        """All but the routed experts."""
        return self.cut + self.whole

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.experts

    def dense_on_rank(self, tp: int) -> float:
        """Return the dense parameters that one rank of tp computes with."""
        return self.cut / tp + self.whole


def layer_kinds(model: ModelConfig, letter: str) -> dict[str, int]:
    """Return the parameters of one layer by the kinds under which gradient norms are reported."""
    h = model.hidden_size
    if letter == "M":
        inner, channels = model.mamba_inner_size, model.conv_channels
        per_channel = model.conv_kernel + model.use_conv_bias
        projections = h * (inner + channels + model.mamba_num_heads) + inner * h
        own = channels * per_channel + 3 * model.mamba_num_heads + inner
        return {"mamba": h + projections + own}
    if letter == "*":
        heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
        return {"attention": h + h * model.head_dim * heads}
    if letter == "-":
        return {"mlp": h + 2 * h * (model.intermediate_size or 0)}
    experts = model.n_routed_experts * 2 * model.expert_input_size * model.moe_intermediate_size
    kinds = {
        "router": h + model.n_routed_experts * h,
        "experts": experts,
        "shared": 2 * h * model.moe_shared_expert_intermediate_size,
    }
    if model.moe_latent_size is not None:
        kinds["latent"] = 2 * h * model.moe_latent_size
    return kinds


def layer_split(model: ModelConfig, letter: str, tp: int = 1) -> Split:
    """Return how a layer is cut; key-value heads that tp outnumbers are on every rank."""
    kinds, h = layer_kinds(model, letter), model.hidden_size
    if letter == "E":
        whole = kinds["router"] + kinds.get("latent", 0)
        return Split(kinds["shared"], whole, kinds["experts"])
    whole = h  # the norm before the mixer
    if letter == "*" and tp > model.num_key_value_heads:
        whole += 2 * h * model.num_key_value_heads * model.head_dim
    return Split(sum(kinds.values()) - whole, whole)


def by_kind(model: ModelConfig) -> dict[str, int]:
    """Return the parameters of the whole model by kind, the largest first.

    The kinds are those of the gradient norms; `mtp` is the multi-token-prediction block.
    """
    h = model.hidden_size
    counts: Counter[str] = Counter()
    for letter in model.hybrid_override_pattern:
        counts.update(layer_kinds(model, letter))
    counts["embed"] = model.vocab_size * h
    counts["head"] = h + (0 if model.tie_word_embeddings else model.vocab_size * h)
    if added := correction_parameters(model):
        counts["correction"] = added
    if added := language_parameters(model):
        counts["language"] = added
    if model.mtp_pattern:
        counts["mtp"] = mtp_split(model).total
    return dict(counts.most_common())


def correction_parameters(model: ModelConfig) -> int:
    """Return what candidates and edit heads add, which is whole on every rank of tp."""
    return _candidate_net(model) + _edit_heads(model)


def language_parameters(model: ModelConfig) -> int:
    """Return the gate over languages and the linear experts, which are whole on every rank."""
    if model.language_experts is None:
        return 0
    h, count = model.hidden_size, len(model.language_experts.languages)
    return count * h + (count * h * h if model.language_experts.linear else 0)


def _candidate_net(model: ModelConfig) -> int:
    count = model.num_candidates
    return count * model.hidden_size**2 if count > 1 else 0


def _edit_heads(model: ModelConfig) -> int:
    h, heads = model.hidden_size, model.edit_heads
    widths = [model.num_candidates if head == "candidate" else 1 for head in heads]
    joined = 2 * h * h if set(heads) - {"candidate"} else 0
    return joined + sum(h * h + h * width for width in widths)


def mtp_split(model: ModelConfig, tp: int = 1) -> Split:
    """Return the multi-token-prediction block: its layers, the joining matrix and three norms."""
    if not model.mtp_pattern:
        return Split()
    own = Split(whole=2 * model.hidden_size**2 + 3 * model.hidden_size)
    return sum((layer_split(model, letter, tp) for letter in model.mtp_pattern), own)


def embedding_split(model: ModelConfig) -> Split:
    """Return the embedding, what joins candidates, and what belongs to languages."""
    return Split(
        cut=model.vocab_size * model.hidden_size,
        whole=_candidate_net(model) + language_parameters(model),
    )


def head_split(model: ModelConfig) -> Split:
    """Return head, final norm and edit heads; a tied head counts here, too, as a copy."""
    whole = model.hidden_size + _edit_heads(model)
    return Split(cut=model.vocab_size * model.hidden_size, whole=whole)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model; the multi-token-prediction block is counted apart."""

    total: int
    active: int
    """Those that one token meets: of the routed experts only the chosen ones."""
    mtp: int

    @property
    def line(self) -> str:
        """The counts in words."""
        mtp = f" + {self.mtp:,} for multi-token prediction" if self.mtp else ""
        return f"{self.total:,} parameters, {self.active:,} active{mtp}"


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of a model."""
    kinds = by_kind(model)
    mtp, experts = kinds.get("mtp", 0), kinds.get("experts", 0)
    total = sum(kinds.values()) - mtp
    used = experts // model.n_routed_experts * model.num_experts_per_tok
    return ParameterCount(total, total - experts + used, mtp)


def kind_name(letter: str) -> str:
    """Return the kind of a layer by its letter in the pattern."""
    return LAYER_KINDS[letter]
