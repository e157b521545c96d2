from pathlib import Path

import pytest
import torch

from nemotron.hf.formats import MAMBA_FP32, RELEASED, DiskTensor
from nemotron.hf.names import disk_parameters, disk_tensors
from nemotron.model.config import ModelConfig

NANO = {
    "vocab_size": 131072,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "routed_scaling_factor": 2.5,
}
MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
SUPER = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
    "EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    "mamba_num_heads": 128,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "moe_intermediate_size": 2688,
    "moe_shared_expert_intermediate_size": 5376,
    "moe_latent_size": 1024,
    "routed_scaling_factor": 5.0,
    **MTP,
}
ULTRA = SUPER | {
    "hidden_size": 8192,
    "hybrid_override_pattern": "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*"
    "EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "mamba_num_heads": 256,
    "num_attention_heads": 64,
    "moe_intermediate_size": 5120,
    "moe_shared_expert_intermediate_size": 10240,
    "moe_latent_size": 2048,
}


# Tensors, elements and bytes of the published checkpoints, where someone counted them.
@pytest.mark.parametrize(
    ("model", "count", "elements", "total_size"),
    [
        pytest.param(NANO, 6_243, 31_577_940_288, None, id="nano"),
        pytest.param(NANO | MTP, 6_513, 32_913_266_240, None, id="lightning"),
        pytest.param(SUPER, 42_683, 123_611_033_088, 247_222_108_160, id="super"),
        pytest.param(ULTRA, 51_023, None, 1_121_049_257_984, id="ultra"),
    ],
)
def test_tensors_are_counted_as_in_the_released_checkpoints(
    model: dict, count: int, elements: int | None, total_size: int | None
):
    tensors = disk_tensors(disk_parameters(ModelConfig(**model)))
    assert len({tensor.name for tensor in tensors}) == len(tensors) == count
    assert elements in (None, sum(torch.Size(tensor.shape).numel() for tensor in tensors))
    assert total_size in (None, sum(tensor.num_bytes for tensor in tensors))


@pytest.fixture(scope="module")
def released_super() -> dict[str, DiskTensor]:
    return {tensor.name: tensor for tensor in disk_tensors(disk_parameters(ModelConfig(**SUPER)))}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("backbone.embeddings.weight", (131072, 4096)),
        ("backbone.layers.0.mixer.in_proj.weight", (18560, 4096)),
        ("backbone.layers.0.mixer.conv1d.weight", (10240, 1, 4)),
        ("backbone.layers.0.mixer.A_log", (128,)),
        ("backbone.layers.0.mixer.norm.weight", (8192,)),
        ("backbone.layers.7.mixer.k_proj.weight", (256, 4096)),
        ("backbone.layers.1.mixer.gate.weight", (512, 4096)),
        ("backbone.layers.1.mixer.fc1_latent_proj.weight", (1024, 4096)),
        ("backbone.layers.1.mixer.experts.511.up_proj.weight", (2688, 1024)),
        ("backbone.layers.1.mixer.experts.0.down_proj.weight", (1024, 2688)),
        ("backbone.layers.1.mixer.shared_experts.down_proj.weight", (4096, 5376)),
        ("backbone.norm_f.weight", (4096,)),
        ("lm_head.weight", (131072, 4096)),
        ("mtp.layers.0.eh_proj.weight", (4096, 8192)),
        ("mtp.layers.0.enorm.weight", (4096,)),
        ("mtp.layers.0.mixer.o_proj.weight", (4096, 4096)),
        ("mtp.layers.1.mixer.experts.7.up_proj.weight", (2688, 1024)),
        ("mtp.layers.1.final_layernorm.weight", (4096,)),
    ],
)
def test_super_has_this_tensor(
    released_super: dict[str, DiskTensor], name: str, shape: tuple[int, ...]
):
    assert released_super[name].shape == shape
    assert released_super[name].dtype == torch.bfloat16


def test_only_the_router_bias_is_float32_unless_the_mamba_vectors_are_asked_for():
    choices = {"released": RELEASED, "mamba": MAMBA_FP32}
    wide: dict[str, set[str]] = {name: set() for name in choices}
    for name, leaves in wide.items():
        formats = choices[name]
        for tensor in disk_tensors(disk_parameters(ModelConfig(**NANO), formats)):
            if tensor.dtype == torch.float32:
                leaves.add(tensor.name.rsplit(".", 1)[-1])
    assert wide["released"] == {"e_score_correction_bias"}
    assert wide["mamba"] == {"e_score_correction_bias", "A_log", "D", "dt_bias"}


def test_names_are_those_that_transformers_writes(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    from safetensors import safe_open

    values = {
        "vocab_size": 31,
        "hidden_size": 12,
        "hybrid_override_pattern": "ME*-",
        "mamba_num_heads": 4,
        "mamba_head_dim": 5,
        "n_groups": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 7,
        "n_routed_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 6,
        "moe_shared_expert_intermediate_size": 8,
        "moe_latent_size": 10,
    }
    config = transformers.NemotronHConfig(**values)
    transformers.NemotronHForCausalLM(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {t.name: t.shape for t in disk_tensors(disk_parameters(ModelConfig(**values)))} == theirs
