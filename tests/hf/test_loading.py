from pathlib import Path

import pytest
import torch

import nemotron
from nemotron.errors import UserError
from nemotron.loading import load, load_with_tokenizer, read_weights

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
    with pytest.raises(UserError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no complete checkpoint"):
        load(tmp_path)
