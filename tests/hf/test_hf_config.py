"""config.json as others read it, and all that others write."""

import json
import math
from typing import Any

import pytest

from nemotron.errors import UserError
from nemotron.hf.config import from_hf, to_hf
from nemotron.model.config import ModelConfig

MODEL = {
    "vocab_size": 400,
    "hidden_size": 24,
    "hybrid_override_pattern": "MEM*E-M",
    "mamba_num_heads": 6,
    "mamba_head_dim": 7,
    "n_groups": 3,
    "ssm_state_size": 5,
    "conv_kernel": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 9,
    "moe_shared_expert_intermediate_size": 13,
    "moe_latent_size": 11,
    "n_group": 2,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "layer_norm_epsilon": 1e-6,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
    "eos_token_id": 11,
}
CONFIG = ModelConfig(**MODEL)
KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
LIST = [KINDS[letter] for letter in "MEM*E-M"]
NEWER = {"mamba": "linear_attention", "attention": "full_attention"}


def changed(**changes: Any) -> dict:
    """Return what we write with some keys changed; `...` removes one."""
    values = to_hf(CONFIG) | changes
    return {key: value for key, value in values.items() if value is not ...}


def read(**changes: Any) -> ModelConfig:
    return from_hf(changed(**changes), "config.json").model


def refusal(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(**changes)
    message = str(caught.value)
    assert message.startswith("config.json")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        MODEL | {"num_nextn_predict_layers": 0, "mtp_hybrid_override_pattern": None},
        MODEL | {"moe_latent_size": None, "time_step_limit": (0.001, math.inf)},
        MODEL | {"time_step_limit": (0.01, 0.5), "tie_word_embeddings": True},
        MODEL | {"hybrid_override_pattern": "M*-", "use_conv_bias": False}
        | {"num_nextn_predict_layers": 0, "mtp_hybrid_override_pattern": None},
    ],
)  # fmt: skip
def test_what_is_written_is_read_back(model: dict):
    config = ModelConfig(**model)
    values = json.loads(json.dumps(to_hf(config), allow_nan=False))
    read = from_hf(values, "config.json")
    assert not read.notes
    kinds = config.hybrid_override_pattern + config.mtp_pattern
    unused = {"num_hidden_layers"}
    if "E" not in kinds:
        unused |= {"n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"}
        unused |= {"moe_shared_expert_intermediate_size", "routed_scaling_factor"}
        unused |= {"moe_latent_size", "n_group", "topk_group"}
    assert read.model.model_dump(exclude=unused) == config.model_dump(exclude=unused)


def test_the_pattern_is_written_as_every_reader_knows_it():
    values = to_hf(CONFIG)
    assert values["hybrid_override_pattern"] == "MEM*E-M"
    assert not [key for key in values if key.endswith("layers_block_type")]
    assert values["num_hidden_layers"] == 7
    assert values["mtp_hybrid_override_pattern"] == "*E"
    assert values["num_nextn_predict_layers"] == 1


def test_a_clamp_of_the_time_step_is_written_only_where_there_is_one():
    assert "time_step_limit" not in to_hf(CONFIG)
    clamped = ModelConfig(**(MODEL | {"time_step_limit": (0.001, math.inf)}))
    assert to_hf(clamped)["time_step_limit"] == [0.001, 1e30]


def test_a_model_without_experts_writes_no_key_of_theirs():
    dense = {"hybrid_override_pattern": "M-*", "num_nextn_predict_layers": 0}
    values = to_hf(ModelConfig(**(MODEL | dense | {"mtp_hybrid_override_pattern": None})))
    # llama.cpp takes a model for a mixture of experts when this key is there
    assert "num_experts_per_tok" not in values
    assert "mtp_hybrid_override_pattern" not in values
    assert values["num_nextn_predict_layers"] == 0


def test_transformers_understands_what_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(CONFIG)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.NemotronHConfig
    assert theirs.hybrid_override_pattern == "MEM*E-M"
    assert theirs.mtp_hybrid_override_pattern == "*E"
    assert theirs.time_step_limit == (0.0, math.inf)
    same = set(MODEL) - {"hybrid_override_pattern", "mtp_hybrid_override_pattern"}
    assert {key: getattr(theirs, key) for key in same} == {key: MODEL[key] for key in same}
    assert str(theirs.dtype) == "torch.bfloat16"


# What SGLang's configuration class, vLLM's model and llama.cpp's converter look up without default.
@pytest.mark.parametrize(
    "key",
    [
        "architectures", "hybrid_override_pattern", "num_hidden_layers", "mamba_n_groups",
        "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "head_dim",
        "num_key_value_heads", "max_position_embeddings", "layer_norm_epsilon",
        "tie_word_embeddings", "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size",
        "conv_kernel", "chunk_size", "use_conv_bias", "use_bias", "mlp_bias", "attention_bias",
        "mamba_hidden_act", "mlp_hidden_act", "n_routed_experts", "n_shared_experts",
        "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
        "moe_latent_size", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
        "num_nextn_predict_layers", "mamba_ssm_cache_dtype",
    ],
)  # fmt: skip
def test_a_reader_finds_its_key(key: str):
    assert key in to_hf(CONFIG)


@pytest.mark.parametrize("newer", [False, True])
def test_lists_are_read_with_older_and_newer_names(newer: bool):
    lists = {}
    for key, pattern in (("layers_block_type", "MEM*E-M"), ("mtp_layers_block_type", "*E")):
        kinds = [KINDS[letter] for letter in pattern]
        lists[key] = [NEWER.get(kind, kind) for kind in kinds] if newer else kinds
    without = dict.fromkeys(("hybrid_override_pattern", "mtp_hybrid_override_pattern"), ...)
    assert read(**lists, **without, num_hidden_layers=...) == read(num_hidden_layers=...)


@pytest.mark.parametrize("absent", [..., None])
def test_strings_are_read_where_lists_are_absent_or_null(absent: Any):
    config = read(layers_block_type=absent, mtp_layers_block_type=absent)
    assert (config.hybrid_override_pattern, config.mtp_pattern) == ("MEM*E-M", "*E")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (..., (0.0, math.inf)),
        (None, (0.0, math.inf)),
        ([0.0, math.inf], (0.0, math.inf)),
        ([0, 1e30], (0.0, math.inf)),
        ([0.0, {"__float__": "Infinity"}], (0.0, math.inf)),
        ([0.001, {"__float__": "Infinity"}], (0.001, math.inf)),
        ([0.002, 0.5], (0.002, 0.5)),
    ],
)
def test_the_time_step_limit_is_read_in_every_form(limit: Any, expected: tuple[float, float]):
    assert read(time_step_limit=limit).time_step_limit == expected


def test_either_name_of_the_epsilon_is_read():
    assert read(layer_norm_epsilon=...).layer_norm_epsilon == 1e-6
    assert read(norm_eps=...).layer_norm_epsilon == 1e-6
    assert read(norm_eps=..., layer_norm_epsilon=...).layer_norm_epsilon == 1e-5


@pytest.mark.parametrize("key", ["norm_eps", "rms_norm_eps"])
def test_other_names_of_the_epsilon_must_agree(key: str):
    found = {key: 3e-6, "layer_norm_epsilon": ..., "norm_eps": ...} | {key: 3e-6}
    assert read(**found).layer_norm_epsilon == 3e-6
    assert f"{key} = 3e-06 differs from layer_norm_epsilon = 1e-06" in refusal(**{key: 3e-6})


def test_the_older_name_of_the_head_dimension_is_read():
    assert read(head_dim=..., attention_head_dim=8) == read()
    assert "attention_head_dim = 9 differs from head_dim = 8" in refusal(attention_head_dim=9)
    result = from_hf(changed(head_dim=..., attention_head_dim=8, rms_norm_eps=1e-6), "config.json")
    assert not result.notes


class ReadOnly:
    """A configuration class like NVIDIA's, in which the list of layer kinds has no setter."""

    def __init__(self, **values: Any) -> None:
        for key, value in values.items():
            setattr(self, key, value)

    @property
    def layers_block_type(self) -> list[str]:
        return [KINDS[letter] for letter in self.hybrid_override_pattern]

    mtp_layers_block_type = layers_block_type


def test_a_class_that_sets_every_key_as_an_attribute_takes_the_file():
    theirs = ReadOnly(**to_hf(CONFIG))
    assert theirs.layers_block_type == [KINDS[letter] for letter in "MEM*E-M"]
    assert theirs.mamba_n_groups == theirs.n_groups == 3


GROUPS = {"n_group": 3, "topk_group": 1, "num_experts_per_tok": 1}


def test_groups_of_experts_that_readers_score_in_another_way_are_refused():
    message = refusal(**GROUPS)
    assert "n_group = 3 is computed in another way by transformers" in message
    assert "num_experts_per_tok / topk_group = 1; only 2 gives the same" in message
    assert read(**GROUPS | {"num_experts_per_tok": 2}).n_group == 3  # each group by its two best
    assert read(**GROUPS | {"topk_group": 3, "num_experts_per_tok": 3}).n_group == 3  # all of them


def test_a_multi_token_prediction_block_that_is_not_stored_is_not_expected():
    config = read(num_nextn_predict_layers=0)
    assert config.mtp_pattern == ""


def test_remote_code_and_unknown_keys_are_named_and_ignored():
    auto_map = {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}
    result = from_hf(changed(auto_map=auto_map, expand=2, rope_theta=1e4, colour=7), "config.json")
    assert result.model == CONFIG.model_copy(update={"num_hidden_layers": 7})
    assert [note.split(":")[0] for note in result.notes] == [
        "auto_map names remote code, which was ignored and not executed",
        "keys not used",
    ]
    assert result.notes[1] == "keys not used: colour"


def test_the_first_of_several_ends_of_text_is_the_model_s():
    result = from_hf(changed(eos_token_id=[2, 11]), "config.json")
    assert result.model.eos_token_id == 2
    assert result.stop_ids == (2, 11)
    assert not result.notes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ["model_type = llama", "nemotron_h"]),
        ({"attention_bias": True}, ["attention_bias = true", "has only false"]),
        ({"mamba_proj_bias": True}, ["mamba_proj_bias"]),
        ({"use_bias": True}, ["use_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"mlp_hidden_act": "silu"}, ["mlp_hidden_act = silu", "relu2"]),
        ({"mamba_hidden_act": "gelu"}, ["mamba_hidden_act = gelu", "silu"]),
        ({"n_shared_experts": 2}, ["n_shared_experts = 2", "only 1"]),
        ({"sliding_window": 128}, ["sliding_window = 128"]),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, ["packed", "bfloat16"]),
        ({"quantization": {"group_size": 64, "bits": 4}}, ["quantization says", "packed"]),
        (
            {"hybrid_override_pattern": "MEM*E-E", "layers_block_type": LIST},
            ["differ", "MEM*E-E", "MEM*E-M"],
        ),
        ({"hybrid_override_pattern": ..., "layers_block_type": ...}, ["absent"]),
        ({"layers_block_type": ["mamba", "rwkv"]}, ["'rwkv'", "linear_attention"]),
        ({"layers_block_type": "mamba"}, ["layers_block_type", "list"]),
        ({"hybrid_override_pattern": "MXM", "layers_block_type": ...}, ["'X'", "position 1"]),
        ({"num_hidden_layers": 9}, ["num_hidden_layers = 9", "7 letters"]),
        (
            {"mtp_hybrid_override_pattern": ..., "mtp_layers_block_type": ...},
            ["num_nextn_predict_layers = 1", "absent"],
        ),
        (
            {"num_key_value_heads": ..., "head_dim": None},
            ["num_key_value_heads, head_dim", "absent"],
        ),
        ({"routed_scaling_factor": ...}, ["routed_scaling_factor", "absent"]),
        ({"norm_eps": 1e-5}, ["norm_eps", "layer_norm_epsilon"]),
        ({"time_step_limit": [0.1]}, ["time_step_limit", "two numbers"]),
        ({"time_step_limit": [{"__int__": 3}, 1.0]}, ["time_step_limit", "two numbers"]),
        ({"time_step_limit": [0.5, 0.1]}, ["time_step_limit"]),
        ({"vocab_size": "many"}, ["vocab_size", "integer"]),
        ({"num_experts_per_tok": 99}, ["num_experts_per_tok = 99"]),
        ({"eos_token_id": 100000}, ["eos_token_id"]),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_in_one_sentence(changes: dict, words: list[str]):
    message = refusal(**changes)
    assert all(word in message for word in words), message
