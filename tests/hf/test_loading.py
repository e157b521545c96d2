import shutil
from pathlib import Path

import pytest
import torch

import nemotron
from nemotron import cli
from nemotron.errors import UserError
from nemotron.hf.weights import read_weights
from nemotron.loading import load, load_with_tokenizer, recipe_ops
from nemotron.model.mamba2 import Mamba2
from nemotron.ops.config import OpsConfig

IDS = torch.tensor([[5, 17, 300, 2, 9]])


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/step-00000010"])
def test_a_run_and_its_parts_give_the_same_model(run: Path, part: str):
    model = nemotron.load(run / part)
    with torch.no_grad():
        logits = model.logits(model(IDS))
    assert logits.shape == (1, 5, 4096)
    assert logits.dtype == torch.float32
    config, weights = read_weights(run)
    assert config == model.config
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    assert load_with_tokenizer(run / part)[1].decode([300]) != ""


def test_an_exported_folder_is_the_run_in_bfloat16(run: Path, exported: Path):
    model, ours = load(exported), load(run)
    rounded = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16().float()
        for name, tensor in ours.state_dict().items()
    }
    assert all(torch.equal(t, rounded[name]) for name, t in model.state_dict().items())
    tokenizers = [load_with_tokenizer(path)[1] for path in (run, exported)]
    assert tokenizers[0].hash == tokenizers[1].hash


def test_the_dtype_is_that_of_activations(exported: Path):
    model = load(exported, dtype=torch.bfloat16)
    assert model(IDS).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_a_loaded_model_can_be_trained(exported: Path):
    model = load(exported)
    model(IDS).sum().backward()
    assert model.backbone.embeddings.weight.grad is not None


def test_a_path_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no complete checkpoint"):
        load(tmp_path)


def run_with_ops(run: Path, copied: Path, **ops: str) -> Path:
    shutil.copytree(run, copied)
    lines = [f"  {name}: {backend}\n" for name, backend in ops.items()]
    with (copied / "recipe.yaml").open("a") as recipe:
        recipe.write("".join(["ops:\n", *lines]))
    return copied


def test_the_backends_of_a_recipe_are_read_from_anywhere_in_its_run(run: Path, tmp_path: Path):
    assert recipe_ops(run) == recipe_ops(tmp_path) == OpsConfig()
    copied = run_with_ops(run, tmp_path / "run", ssd="reference")
    for part in ("", "checkpoints", "checkpoints/step-00000010"):
        assert recipe_ops(copied / part) == OpsConfig(ssd="reference")
    model = nemotron.load(copied, ops=recipe_ops(copied))
    assert {m.ssd.pinned for m in model.modules() if isinstance(m, Mamba2)} == {"reference"}
    wrong = run_with_ops(run, tmp_path / "wrong", sdd="reference")
    with pytest.raises(UserError, match=r"recipe\.yaml:\d+: ops\.sdd is unknown"):
        recipe_ops(wrong)


def test_generate_uses_the_backends_of_the_recipe(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    copied = run_with_ops(run, tmp_path / "run", attention="varlen")
    command = ["generate", str(copied), "--prompt", "a", "--max-new-tokens", "2", "--device", "cpu"]
    assert cli.run(command) == 2
    assert "ops.attention = varlen runs on cuda, not on cpu" in capsys.readouterr().err
    assert cli.run([*command, "--no-recipe-ops"]) == 0


def test_generation_gives_a_trained_model_s_probabilities(
    run: Path, exported: Path, capsys: pytest.CaptureFixture
):
    sizes = ["--length", "30", "--rows", "2", "--new-tokens", "8", "--device", "cpu"]
    for path in (run, exported):
        assert cli.run(["check-parity", str(path), *sizes]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:4] for line in lines[1:]] == [
            ["30", "2", kind, "1.000000"] for kind in ("greedy", "sampled")
        ]
