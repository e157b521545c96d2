"""Writes an exported folder as a GGUF file in float32, as llama.cpp's converter does.

Names come from the `gguf` package's tables, values from `config.json` and the safetensors files
alone. The block of multi-token prediction, `*E`, becomes one more block with both, if asked for.
Source: ggml-org/llama.cpp, conversion/nemotron.py (`NemotronHModel`).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

EXPERT = re.compile(r"(backbone\.layers\.\d+)\.mixer\.experts\.(\d+)\.(up|down)_proj\.weight")
CONTEXT = 1024
DRAFTS = re.compile(r"mtp\.layers\.([01])\.(.+)")
OF_DRAFTS = {
    "0.eh_proj.weight": gguf.MODEL_TENSOR.NEXTN_EH_PROJ,
    "0.enorm.weight": gguf.MODEL_TENSOR.NEXTN_ENORM,
    "0.hnorm.weight": gguf.MODEL_TENSOR.NEXTN_HNORM,
    "1.norm.weight": gguf.MODEL_TENSOR.ATTN_POST_NORM,
    "1.final_layernorm.weight": gguf.MODEL_TENSOR.NEXTN_SHARED_HEAD_NORM,
}
"""Tensors of the block that other blocks lack."""


def write_gguf(folder: Path, path: Path, *, drafts: bool = False) -> None:
    """Write the exported `folder` into the file `path`."""
    config = json.loads((folder / "config.json").read_text())
    # the layers of each block, the last of which is that of drafts
    config["blocks"] = [*config["hybrid_override_pattern"], *(["*E"] if drafts else [])]
    kind = gguf.MODEL_ARCH.NEMOTRON_H
    if "num_experts_per_tok" in config:
        kind = gguf.MODEL_ARCH.NEMOTRON_H_MOE
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    _add_shapes(writer, config)
    if drafts:
        writer.add_nextn_predict_layers(1)
    if kind == gguf.MODEL_ARCH.NEMOTRON_H_MOE:
        _add_experts(writer, config)
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    names = gguf.get_tensor_name_map(kind, len(config["blocks"]))
    for name, tensor in _tensors(folder, config, drafts):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        found = name if name.startswith("blk.") else found
        assert found is not None, f"llama.cpp has no tensor {name}"
        writer.add_tensor(found, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shapes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:  # Any: JSON
    blocks = config["blocks"]
    wide = "moe_intermediate_size" if "E" in blocks else "intermediate_size"
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(len(blocks))
    writer.add_context_length(CONTEXT)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length([config[wide] * bool({*kind} & {*"E-"}) for kind in blocks])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv([config["num_key_value_heads"] * ("*" in kind) for kind in blocks])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_scaling_finetuned(False)
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_state_size(config["ssm_state_size"])
    writer.add_ssm_group_count(config["n_groups"])
    writer.add_ssm_inner_size(config["mamba_num_heads"] * config["mamba_head_dim"])
    writer.add_ssm_time_step_rank(config["mamba_num_heads"])


def _add_experts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_group_count(config["n_group"])
    if config.get("moe_latent_size") is not None:
        writer.add_moe_latent_size(config["moe_latent_size"])


def _add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]
) -> None:
    model = tokenizer["model"]
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = {index: token for token, index in model["vocab"].items()} | added
    names = [tokens.get(index, f"[PAD{index}]") for index in range(config["vocab_size"])]
    kinds = [
        gguf.TokenType.CONTROL if i in added else gguf.TokenType.NORMAL for i in range(len(names))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _tensors(folder: Path, config: dict[str, Any], drafts: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield names that the tables know, and float32 values in llama.cpp's layout."""
    experts: dict[str, dict[int, Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, stored in load_file(file).items():
            if of_drafts := DRAFTS.fullmatch(name):
                if not drafts:
                    continue
                if kind := OF_DRAFTS.get(f"{of_drafts[1]}.{of_drafts[2]}"):
                    block = gguf.TENSOR_NAMES[kind].format(bid=len(config["blocks"]) - 1)
                    yield f"{block}.weight", stored.float()
                    continue
                name = f"backbone.layers.{len(config['blocks']) - 1}.{of_drafts[2]}"
            if found := EXPERT.fullmatch(name):
                layer = found[1].replace("backbone", "model")
                merged = f"{layer}.mlp.experts.{found[3]}_proj.weight"
                experts.setdefault(merged, {})[int(found[2])] = stored.float()
            else:
                yield _converted(name, stored.float(), config)
    for merged, matrices in experts.items():
        yield merged, torch.stack([matrices[index] for index in range(len(matrices))])


def _converted(name: str, tensor: Tensor, config: dict[str, Any]) -> tuple[str, Tensor]:
    if name.endswith("mixer.A_log"):
        return name, -tensor.exp()[:, None]
    if name.endswith("mixer.D"):
        return name, tensor[:, None]
    if name.endswith("mixer.norm.weight"):
        return name, tensor.reshape(config["n_groups"], -1)
    if name.endswith("conv1d.weight"):
        return name, tensor.squeeze(1)
    renamed = name.replace("dt_bias", "dt.bias").replace("_correction_bias", "_correction.bias")
    return renamed, tensor
