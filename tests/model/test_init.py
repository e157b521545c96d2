import math

import pytest
import torch

from nemotron.model.hybrid import HybridLM
from tests.support.models import build_config


def initial(seed: int = 3, **changes: object) -> dict[str, torch.Tensor]:
    model = HybridLM(build_config(**changes))
    model.init_weights(seed)
    return model.state_dict()


LARGE = {
    "hidden_size": 160,
    "vocab_size": 500,
    "mamba_num_heads": 60,
    "intermediate_size": 200,
    "initializer_range": 0.0173,
}


def test_each_group_of_parameters_has_its_distribution():
    narrow = ("out_proj", "o_proj", "down_proj", "fc2_latent_proj")
    outputs = 0.0173 / math.sqrt(5)  # five layers, those of the prediction block not counted
    for name, tensor in initial(**LARGE).items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "D" or (leaf == "weight" and tensor.ndim == 1):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif leaf == "e_score_correction_bias":
            assert not tensor.any(), name
        elif leaf == "A_log":
            assert 1 <= tensor.exp().min() < 4
            assert 12 < tensor.exp().max() <= 16
        elif leaf == "dt_bias":
            step = torch.nn.functional.softplus(tensor)
            assert 0.001 * 0.999 <= step.min() < 0.003
            assert 0.03 < step.max() <= 0.1 * 1.001
            assert abs(step.log().mean() - math.log(0.01)) < 4 * math.log(100) / math.sqrt(12 * 60)
        elif "conv1d" in name:
            assert tensor.abs().max() <= 0.5
            assert abs(tensor.std() - 1 / math.sqrt(12)) < 0.03
        else:
            expected = outputs if any(part in name for part in narrow) else 0.0173
            # four standard errors of a standard deviation
            assert abs(tensor.std() / expected - 1) < 4 / math.sqrt(2 * tensor.numel()), name
            assert abs(tensor.mean()) < 5 * expected / math.sqrt(tensor.numel()), name


def test_a_tensor_depends_on_the_seed_and_its_name_alone():
    whole, other = initial(), initial(seed=4)
    shorter = initial(hybrid_override_pattern="ME*-M", num_nextn_predict_layers=0,
                      mtp_hybrid_override_pattern=None)  # fmt: skip
    for name, tensor in shorter.items():
        assert torch.equal(tensor, whole[name]), name
    drawn = [n for n, t in whole.items() if t.std() > 0]
    assert not any(torch.equal(whole[name], other[name]) for name in drawn)
    flat = torch.cat([whole[name].flatten() for name in drawn])
    # independent draws: hardly any value occurs twice
    assert flat.unique().numel() > 0.99 * flat.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_built_without_memory_is_the_same_once_it_has_some(dtype: torch.dtype):
    with torch.device("meta"):
        model = HybridLM(build_config())
    assert all(parameter.is_meta for parameter in model.parameters())
    model = model.to_empty(device="cpu").to(dtype)
    model.init_weights(3)
    for name, tensor in initial().items():
        assert torch.equal(model.state_dict()[name].to(torch.float32), tensor), name
