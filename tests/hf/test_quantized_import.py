"""Import of quantized folders as others write them, and of forged ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron.checkpoint.read import read_model
from nemotron.errors import UserError
from nemotron.hf.export import export
from nemotron.hf.folder import read_folder
from nemotron.hf.import_ import import_
from nemotron.hf.names import disk_parameters
from nemotron.hf.quantized.assignment import Quantized
from nemotron.hf.quantized.rules import is_simple
from nemotron.hf.shards import INDEX
from tests.support.quantized import WIDTHS, scales_of, scales_of_all

EXPERT = "backbone.layers.1.mixer.experts.2.up_proj"
MAMBA = "backbone.layers.0.mixer.in_proj"
MIXER = "backbone.layers.3.mixer"
CACHE = {f"{MIXER}.k_proj.k_scale": torch.tensor(0.25), f"{MIXER}.v_proj.v_scale": torch.ones(())}


def as_super(layer: str) -> str | None:
    if layer.startswith("mtp."):
        return None
    if ".experts." in layer:
        return "nvfp4"
    return "fp8" if layer.endswith(("in_proj", "out_proj", "fc1_latent_proj")) else None


def as_nano(layer: str) -> str | None:
    return "nvfp4" if "experts" in layer or layer.startswith("backbone.layers.0") else None


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    home = tmp_path_factory.mktemp("aligned")
    return make_run(home / "run", **WIDTHS, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def weights(aligned: Path) -> dict[str, Tensor]:
    config, masters = read_model(aligned)
    return {p.name: p.part_of(masters[p.source]) for p in disk_parameters(config)}


class Folder:
    """A quantized folder in one file, whose content tests change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / INDEX).unlink()
        (self.file,) = path.glob("*.safetensors")
        self.file = self.file.rename(path / "model.safetensors")
        self.tensors = load_file(self.file)
        self.config = json.loads((path / "config.json").read_text())

    @property
    def declared(self) -> dict[str, Any]:  # Any: JSON
        return self.config["quantization_config"]

    def save(self) -> Path:
        save_file(self.tensors, self.file, metadata={"format": "pt"})
        (self.path / "config.json").write_text(json.dumps(self.config))
        return self.path


@pytest.fixture
def write(aligned: Path, weights: dict[str, Tensor], tmp_path: Path) -> Callable[..., Folder]:
    """Return a function that exports the model with these layers quantized."""

    def export_as(layout: str, choose: Callable = as_super, cache: dict = CACHE) -> Folder:
        out = tmp_path / "out"
        quantized = Quantized(scales_of_all(weights, choose), cache, layout)
        assert export(aligned, out, quantized=quantized, check=False) == 0
        return Folder(out)

    return export_as


def test_a_folder_as_super_was_released_is_read(write: Callable, aligned: Path, tmp_path: Path):
    """`quantization_config` names every layer; nothing is left out, and inputs have [1] scales."""
    folder = write("modelopt")
    expected = read_folder(folder.path)
    folder.declared["ignore"] = []
    folder.declared["producer"] = {"name": "modelopt", "version": "0.43.0.dev63+g449e700f9"}
    for name, tensor in folder.tensors.items():
        if name.endswith("input_scale"):
            folder.tensors[name] = tensor.reshape(1)
    (folder.path / "hf_quant_config.json").write_text(
        json.dumps(
            {
                "producer": folder.declared["producer"],
                "quantization": {
                    "quant_algo": "MIXED_PRECISION",
                    "kv_cache_quant_algo": "FP8",
                    "quantized_layers": folder.declared["quantized_layers"],
                },
            }
        )
    )
    found = read_folder(folder.save())
    assert all(torch.equal(found.weights[k], w) for k, w in expected.weights.items())
    assert "12 in NVFP4" in found.notes[-1]
    assert import_(folder.path, tmp_path / "again") == 0
    _, imported = read_model(tmp_path / "again")
    assert all(torch.equal(imported[k], w) for k, w in expected.weights.items())
    assert export(tmp_path / "again", tmp_path / "plain", check=False) == 0


def test_a_folder_as_nano_was_released_is_read(write: Callable):
    """Only `hf_quant_config.json` declares; the router is float32, not named; no cache scales."""
    folder = write("modelopt", as_nano, {})
    expected = read_folder(folder.path)
    left_out = [
        name
        for name in folder.config.pop("quantization_config")["ignore"]
        if not name.endswith(".gate")
    ]
    for name in folder.tensors:
        if name.endswith(".gate.weight"):
            folder.tensors[name] = folder.tensors[name].float()
    described = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
    described["exclude_modules"] = left_out
    producer = {"name": "modelopt", "version": "0.29.0"}
    (folder.path / "hf_quant_config.json").write_text(
        json.dumps({"producer": producer, "quantization": described})
    )
    found = read_folder(folder.save())
    assert all(torch.equal(found.weights[k], w) for k, w in expected.weights.items())


def test_weights_alone_in_fp8_by_channel_are_read(write: Callable, weights: dict[str, Tensor]):
    folder = write("compressed-tensors")
    group = next(g for g in folder.declared["config_groups"].values() if "float" in g["format"])
    group["weights"]["strategy"], group["input_activations"] = "channel", None
    for name in [name for name in folder.tensors if name.endswith(".input_scale")]:
        del folder.tensors[name]
        layer = name.removesuffix(".input_scale")
        rows = weights[f"{layer}.weight"].abs().amax(1, keepdim=True) / 448
        rows = rows.bfloat16()
        codes = (weights[f"{layer}.weight"] / rows.float()).clamp(-448, 448)
        folder.tensors[f"{layer}.weight"] = codes.to(torch.float8_e4m3fn)
        folder.tensors[f"{layer}.weight_scale"] = rows
    codes = folder.tensors[f"{MAMBA}.weight"].float()
    found = read_folder(folder.save()).weights[f"{MAMBA}.weight"]
    assert torch.equal(found, codes * folder.tensors[f"{MAMBA}.weight_scale"].float())


def change(folder: Folder, what: str) -> None:
    tensors = folder.tensors
    match what:
        case "missing":
            del tensors[f"{EXPERT}.weight_scale_2"]
        case "blocks":
            tensors[f"{EXPERT}.weight_scale"] = tensors[f"{EXPERT}.weight_scale"][:, :1].clone()
        case "codes":
            tensors[f"{EXPERT}.weight"] = tensors[f"{EXPERT}.weight"][:, :-1].clone()
        case "vector":
            tensors[f"{EXPERT}.weight_scale_2"] = torch.ones(2)
        case "integer":
            tensors[f"{MAMBA}.weight_scale"] = torch.ones((), dtype=torch.int32)
        case "nan":
            tensors[f"{EXPERT}.weight_scale_2"] = torch.tensor(float("nan"))
        case "nan block":
            tensors[f"{EXPERT}.weight_scale"].view(torch.uint8)[3, 1] = 0x7F
        case "negative":
            tensors[f"{MAMBA}.weight_scale"] = torch.tensor(-1.0)
        case "infinite input":
            tensors[f"{MAMBA}.input_scale"] = torch.tensor(float("inf"))
        case "nan codes":
            tensors[f"{MAMBA}.weight"].view(torch.uint8)[5, 7] = 0xFF
        case "cache":
            tensors[f"{MIXER}.k_proj.k_scale"] = torch.zeros(())
        case "half a cache":
            del tensors[f"{MIXER}.v_proj.v_scale"]
        case "more":
            tensors["backbone.layers.0.mixer.in_proj.bias_scale"] = torch.ones(())
        case "not quantized":
            tensors[f"{MAMBA}.weight"] = tensors[f"{MAMBA}.weight"].bfloat16()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", ["1 tensors are missing", f"{EXPERT}.weight_scale_2"]),
        ("blocks", [f"{EXPERT}.weight_scale has shape [16, 1] instead of [16, 2]"]),
        ("codes", [f"{EXPERT}.weight has shape [16, 15] instead of [16, 16]"]),
        ("vector", [f"{EXPERT}.weight_scale_2 is F32 [2]", "[] or [1]"]),
        ("integer", [f"{MAMBA}.weight_scale is I32 []"]),
        ("nan", [f"{EXPERT}.weight_scale_2 is nan; a scale must be a positive number"]),
        ("nan block", [f"{EXPERT}.weight_scale holds NaN"]),
        ("negative", [f"{MAMBA}.weight_scale is -1.0"]),
        ("infinite input", [f"{MAMBA}.input_scale is inf"]),
        ("nan codes", [f"{MAMBA}.weight holds NaN"]),
        ("cache", [f"{MIXER}.k_proj.k_scale is 0.0"]),
        ("half a cache", [f"{MIXER}.v_proj.v_scale is missing"]),
        ("more", ["bias_scale"]),
        ("not quantized", [f"{MAMBA} is declared as FP8, but its tensors are not quantized"]),
    ],
)
def test_forged_tensors_are_refused_in_one_sentence(
    write: Callable, tmp_path: Path, what: str, words: list[str]
):
    folder = write("modelopt")
    change(folder, what)
    with pytest.raises(UserError) as refused:
        import_(folder.save(), tmp_path / "run")
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert str(folder.path) in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        ("modelopt", {"quant_algo": "W4A8_AWQ"}, ["quant_algo = W4A8_AWQ", "known are FP8"]),
        ("modelopt", {"quant_algo": "FP8"}, ["declare different layers as quantized"]),
        ("modelopt", {"quantized_layers": {}}, ["quantized_layers must name layers"]),
        ("modelopt", {"quantized_layers": {"x": 3}}, ["quantized_layers.x must be a JSON object"]),
        ("modelopt", {"quantized_layers": {"x": {"quant_algo": "FP8"}}}, ["different layers"]),
        ("modelopt", {"ignore": "lm_head"}, ["ignore must be a list"]),
        ("modelopt", {"ignore": [MAMBA]}, ["different layers"]),
        ("modelopt", {"kv_cache_scheme": {"num_bits": 4}}, ["kv_cache_scheme", "8 bits"]),
        ("modelopt", {"quant_method": "gptq"}, ["quant_method = gptq", "bfloat16"]),
        ("modelopt", {"quant_method": None}, ["quant_method", "bfloat16"]),
        ("compressed-tensors", {"config_groups": {}}, ["config_groups must hold groups"]),
        ("compressed-tensors", {"config_groups": {"a": 1}}, ["config_groups.a must be"]),
        (
            "compressed-tensors",
            {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}},
            ["config_groups.a.weights", "known are FP8"],
        ),
        ("compressed-tensors", {"transform_config": {"a": 1}}, ["transform_config is not"]),
        ("compressed-tensors", {"ignore": ["re:.*in_proj$"]}, [MAMBA, "declared as not quantized"]),
    ],
)
def test_declarations_that_cannot_be_read_are_refused(
    write: Callable, tmp_path: Path, layout: str, changes: dict, words: list[str]
):
    folder = write(layout)
    folder.declared.update(changes)
    with pytest.raises(UserError) as refused:
        import_(folder.save(), tmp_path / "run")
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert not (tmp_path / "run").exists()


def test_patterns_of_strangers_that_could_match_forever_are_not_matched(write: Callable):
    assert not is_simple(r"(a+)+$")
    assert not is_simple(r"(.*)*x")
    assert not is_simple(".*" * 5)
    assert is_simple(r"(backbone|model)\.layers\.(0|12)\.mixer\.experts\.\d+\.\w+$")
    folder = write("compressed-tensors")
    expected = read_folder(folder.path).weights
    folder.declared["ignore"] = [r"re:((\w|\.)+)+!"]
    found = read_folder(folder.save())
    assert all(torch.equal(found.weights[k], w) for k, w in expected.items())
    assert "1 patterns of layers were not read" in found.notes[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, w: s.pop(f"{MIXER}.q_proj"), ["q_proj, k_proj and v_proj", "one format"]),
        (
            lambda s, w: s.update({f"{MIXER}.q_proj": scales_of(w[f"{MIXER}.q_proj"], "fp8")}),
            ["q_proj, k_proj and v_proj"],
        ),
        (lambda s, w: s.update({EXPERT: scales_of(w[EXPERT], "nvfp4")}), ["have one format"]),
        (lambda s, w: s.update({"lm_heat": s[EXPERT]}), ["lm_heat is not a linear layer"]),
        (
            lambda s, w: s.update({"backbone.layers.1.mixer.gate": s[EXPERT]}),
            ["gate is not a linear layer"],
        ),
        (lambda s, w: s.update({EXPERT: s[MAMBA]}), []),
    ],
)
def test_an_export_that_engines_could_not_read_is_refused(
    aligned: Path, weights: dict[str, Tensor], tmp_path: Path, change: Callable, words: list[str]
):
    by_layer = {name.removesuffix(".weight"): weight for name, weight in weights.items()}
    scales = scales_of_all(weights, lambda layer: "fp8" if "proj" in layer else None)
    change(scales, by_layer)
    out = tmp_path / "out"
    if not words:  # a scale of another layer with the same form is one that fits
        assert export(aligned, out, quantized=Quantized(scales), check=False) == 0
        return
    with pytest.raises(UserError) as refused:
        export(aligned, out, quantized=Quantized(scales))
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert not out.exists()
