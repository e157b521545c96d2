"""`config.json`: written for every reader of NemotronH, read in all its published variants."""

import math
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from nemotron.errors import RuleBroken, UserError, show_value
from nemotron.model.config import LAYER_KINDS, ModelConfig

Values = dict[str, Any]  # Any: whatever a config.json holds

ALWAYS = (
    "vocab_size",
    "hidden_size",
    "max_position_embeddings",
    "layer_norm_epsilon",
    "initializer_range",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
MAMBA = (
    "mamba_num_heads",
    "mamba_head_dim",
    "n_groups",
    "ssm_state_size",
    "conv_kernel",
    "use_conv_bias",
    "chunk_size",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
)
ATTENTION = ("num_attention_heads", "num_key_value_heads", "head_dim")
EXPERTS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)
COPIED = (*ALWAYS, *MAMBA, *ATTENTION, *EXPERTS)
"""Keys that mean the same, under the same name, in our configuration."""

FIXED: Values = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "sliding_window": None,
}
"""What the architecture has no choice in: written for readers, demanded when read."""

FIXED_EXPERTS: Values = {"n_shared_experts": 1}
"""The same for mixture layers; vLLM multiplies the shared expert's width by this number."""

HINTS: Values = {
    "residual_in_fp32": False,
    "mamba_ssm_cache_dtype": "float32",
    "use_cache": True,
    "use_mamba_kernels": True,
    "num_logits_to_keep": 1,
    "rescale_prenorm_residual": True,
}
"""Written for readers; no value of theirs changes the mathematics."""

UNUSED = frozenset(HINTS) | {
    "_name_or_path",
    "architectures",
    "dtype",
    "expand",
    "moe_shared_expert_overlap",
    "output_router_logits",
    "partial_rotary_factor",
    "rope_theta",
    "torch_dtype",
    "transformers_version",
}
"""Keys of published files that nothing in the model depends on."""

UNCLAMPED = (0.0, math.inf)
NO_LIMIT = 1e9
"""A time-step limit from here on means none: JSON has no infinity, some write a huge number."""

HUGE = 1e30
"""What we write for an infinite upper limit beside a lower one, because JSON has no infinity."""

OLDER_KEYS = {"attention_head_dim": "head_dim"}
"""Older names of our keys."""

EPSILONS = ("layer_norm_epsilon", "norm_eps", "rms_norm_eps")
"""Names of the norms' epsilon, which published configurations use."""

GROUP_EXPERTS = 2
"""Experts whose scores make that of a group, for every reader of this layout."""

NEWER_NAMES = {"linear_attention": "M", "full_attention": "*"}
LETTERS = {name: letter for letter, name in LAYER_KINDS.items()} | NEWER_NAMES


def to_hf(config: ModelConfig) -> Values:
    """Return the content of `config.json`.

    Only the pattern strings say which layer is where: every reader knows them, while the lists of
    layer kinds are read-only properties in NVIDIA's published class and in vLLM up to 0.18, which
    fail on them. `time_step_limit` is left out unless it clamps.
    """
    pattern, mtp = config.hybrid_override_pattern, config.mtp_pattern
    values: Values = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": len(pattern),
        "hybrid_override_pattern": pattern,
        "mamba_n_groups": config.n_groups,  # SGLang's name of n_groups
        "norm_eps": config.layer_norm_epsilon,
        # the published files hold a width even where no layer uses it
        "intermediate_size": config.intermediate_size or config.moe_intermediate_size,
        "num_nextn_predict_layers": 1 if mtp else 0,
    }
    values |= {key: getattr(config, key) for key in (*ALWAYS, *MAMBA, *ATTENTION)}
    values |= FIXED | HINTS
    if "E" in pattern + mtp:
        values |= {key: getattr(config, key) for key in EXPERTS}
        values |= FIXED_EXPERTS | {"moe_shared_expert_overlap": False}
    if mtp:
        values["mtp_hybrid_override_pattern"] = mtp
    if config.time_step_limit != UNCLAMPED:
        low, high = config.time_step_limit
        values["time_step_limit"] = [low, min(high, HUGE)]
    return values


@dataclass(frozen=True)
class HFConfig:
    """What a `config.json` means to us, and what in it was passed over, one clause each."""

    model: ModelConfig
    notes: tuple[str, ...]
    stop_ids: tuple[int, ...]
    """Every end of text; the model's own is the first."""


def from_hf(values: Values, where: str) -> HFConfig:
    """Read the content of a `config.json`; `where` names the file in messages.

    Raises:
        UserError: when it is another architecture, or asks for what the model cannot do.
    """
    read = _Reader(values, where)
    if values.get("model_type") != "nemotron_h":
        raise read.refuse("model_type", "is another architecture; only nemotron_h can be read")
    if packed := {"quantization_config", "quantization"} & set(values):
        rule = "says that the weights are packed; use the bfloat16 checkpoint of this model."
        raise UserError(rule, key=packed.pop(), where=where)
    pattern = read.pattern("hybrid_override_pattern", "layers_block_type")
    if pattern is None:
        rule = "is absent, and so is layers_block_type; give one of them."
        raise UserError(rule, key="hybrid_override_pattern", where=where)
    mtp = None
    if blocks := values.get("num_nextn_predict_layers") or 0:
        mtp = read.pattern("mtp_hybrid_override_pattern", "mtp_layers_block_type")
        if mtp is None:
            raise UserError(
                "needs mtp_hybrid_override_pattern or mtp_layers_block_type, which are absent.",
                key="num_nextn_predict_layers",
                value=blocks,
                where=where,
            )
        if blocks != 1:
            read.notes.append(
                f"num_nextn_predict_layers = {blocks} is read as one block that depths share"
            )
    kinds = pattern + (mtp or "")
    read.check_fixed(FIXED | (FIXED_EXPERTS if "E" in kinds else {}))
    if values.get("residual_in_fp32"):
        read.notes.append("residual_in_fp32 is ignored: residuals have the compute dtype")
    model = read.build(
        read.dimensions(kinds)
        | {"hybrid_override_pattern": pattern, "num_hidden_layers": values.get("num_hidden_layers")}
        | {"num_nextn_predict_layers": 1 if mtp else 0, "mtp_hybrid_override_pattern": mtp}
        | {"layer_norm_epsilon": read.epsilon(), "time_step_limit": read.time_step_limit()}
        | {"eos_token_id": read.eos_token_id()}
    )
    check_readable(model, where)
    read.note_unknown_keys()
    return HFConfig(model, tuple(read.notes), tuple(read.ends))


def groups_differ(config: ModelConfig) -> bool:
    """Say whether readers of `config.json` score groups of experts in another way."""
    best = config.num_experts_per_tok // config.topk_group
    is_limited = bool(config.moe_layers) and config.topk_group < config.n_group
    return is_limited and best != GROUP_EXPERTS


def check_readable(config: ModelConfig, where: str = "") -> None:
    """Check that those who read `config.json` compute what this model does.

    They score a group of experts by its two best; Megatron-LM, and the model, by its best
    `num_experts_per_tok / topk_group`.

    Raises:
        UserError: when a token could go to other experts.
    """
    if config.language_experts is not None:
        raise UserError(
            "chooses experts by language, which has no counterpart in transformers; such a model "
            "cannot be exported.",
            key="model.language_experts",
        )
    if config.num_candidates > 1 or config.edit_heads:
        raise UserError(
            "reads several candidates or predicts edits, which has no counterpart in transformers; "
            "nemotron export --trunk-only leaves that out.",
            key="model.correction",
        )
    if groups_differ(config):
        best = config.num_experts_per_tok // config.topk_group
        raise UserError(
            f"is computed in another way by transformers and other readers of this layout: they "
            f"score a group by its {GROUP_EXPERTS} best experts, this model by num_experts_per_tok "
            f"/ topk_group = {best}; only {GROUP_EXPERTS} gives the same.",
            key="n_group" if where else "model.n_group",
            value=config.n_group,
            where=where,
        )


class _Reader:
    """One `config.json` that is read: its values, its name in messages, notes about ignored keys.

    The methods raise a `UserError` that names file and key when a value is impossible.
    """

    def __init__(self, values: Values, where: str) -> None:
        self.values, self.where = values, where
        self.notes: list[str] = []
        self.ends: list[int] = []
        for older, key in OLDER_KEYS.items():
            if (value := values.get(older)) is not None:
                if values.get(key) not in (None, value):
                    raise self.refuse(older, f"differs from {key} = {values[key]}")
                self.values = self.values | {key: value}

    def refuse(self, key: str, rule: str) -> UserError:
        return UserError(f"{rule}.", key=key, value=self.values.get(key), where=self.where)

    def pattern(self, string_key: str, list_key: str) -> str | None:
        """Return the layer letters from the form that the file has; two forms must agree."""
        string, kinds = self.values.get(string_key), self.values.get(list_key)
        if not isinstance(string, str | None):
            raise self.refuse(string_key, "must be a text of layer letters")
        if kinds is None:
            return string
        if not isinstance(kinds, list):
            raise self.refuse(list_key, "must be a list of layer kinds")
        for kind in kinds:
            if not isinstance(kind, str) or kind not in LETTERS:
                rule = f"holds {kind!r}; known are {', '.join(LETTERS)}."
                raise UserError(rule, key=list_key, where=self.where)
        letters = "".join(LETTERS[kind] for kind in kinds)
        if string not in (None, letters):
            raise self.refuse(string_key, f"differs from {list_key}, which means {letters}")
        return letters

    def check_fixed(self, fixed: Values) -> None:
        """Refuse a value that the architecture has no layer for."""
        for key, value in fixed.items():
            if key in self.values and self.values[key] != value:
                raise self.refuse(key, f"is not supported; the model has only {show_value(value)}")

    def dimensions(self, kinds: str) -> Values:
        """Return the copied keys; the file must have those without a safe default."""
        needed = ["vocab_size", "hidden_size"]
        if "M" in kinds:
            needed += MAMBA[: MAMBA.index("use_conv_bias")]
        if "*" in kinds:
            needed += ATTENTION
        if "E" in kinds:
            needed += EXPERTS[: EXPERTS.index("moe_latent_size")]
            needed.append("routed_scaling_factor")
        if "-" in kinds:
            needed.append("intermediate_size")
        if absent := [key for key in needed if self.values.get(key) is None]:
            rule = "is absent; the layers need it."
            raise UserError(rule, key=", ".join(absent), where=self.where)
        found = {k: self.values[k] for k in COPIED if self.values.get(k) is not None}
        if "-" in kinds:
            found["intermediate_size"] = self.values["intermediate_size"]
        return found

    def epsilon(self) -> float:
        """Return the epsilon of the norms, which has several names."""
        found = [name for name in EPSILONS if self.values.get(name) is not None]
        for name in found[1:]:
            if self.values[name] != (value := self.values[found[0]]):
                raise self.refuse(name, f"differs from {found[0]} = {value}")
        return self.values[found[0]] if found else 1e-5

    def time_step_limit(self) -> tuple[float, float]:
        """Return the clamp on the time step; absent, infinite and huge mean none."""
        limit = self.values.get("time_step_limit")
        if limit is None:
            return UNCLAMPED
        try:
            low, high = map(_number, limit)
        except (TypeError, ValueError, KeyError):
            raise self.refuse("time_step_limit", "must be two numbers") from None
        return low, math.inf if high >= NO_LIMIT else high

    def eos_token_id(self) -> int:
        """Return the end-of-text token, the first one if the file lists several."""
        eos = self.values.get("eos_token_id", 2)
        self.ends = eos if isinstance(eos, list) and eos else [eos]
        if not all(type(end) is int for end in self.ends):
            raise self.refuse("eos_token_id", "must be a token or a list of them")
        return self.ends[0]

    def build(self, values: Values) -> ModelConfig:
        """Return the validated configuration."""
        try:
            return ModelConfig.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            broken = first.get("ctx", {}).get("error")
            if isinstance(broken, RuleBroken):
                raise UserError.of(replace(broken.finding, where=self.where), ".") from None
            rule = first["msg"].replace("Input should", "must") + "."
            raise UserError(rule, key=key, value=first["input"], where=self.where) from None

    def note_unknown_keys(self) -> None:
        """Note which keys are ignored; remote code gets a sentence of its own."""
        if "auto_map" in self.values:
            self.notes.append("auto_map names remote code, which was ignored and not executed")
        known = {*to_hf_keys(), *UNUSED, *OLDER_KEYS, *EPSILONS, "auto_map"}
        if unknown := sorted(set(self.values) - known):
            self.notes.append(f"keys not used: {', '.join(unknown)}")


def to_hf_keys() -> frozenset[str]:
    """Return every key that `to_hf` may write."""
    pattern = {"hybrid_override_pattern", "layers_block_type", "num_hidden_layers"}
    mtp = {"num_nextn_predict_layers", "mtp_hybrid_override_pattern", "mtp_layers_block_type"}
    others = {"model_type", "norm_eps", "mamba_n_groups", "intermediate_size", "time_step_limit"}
    return frozenset({*COPIED, *FIXED, *FIXED_EXPERTS, *pattern, *mtp, *others})


def _number(value: object) -> float:
    """Read a number, also as transformers 5 writes infinity: {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        value = value["__float__"]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(value)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(value) from None
