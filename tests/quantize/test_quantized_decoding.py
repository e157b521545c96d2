"""The form of a model that decodes computes by fixed scales, too."""

import pytest
import torch

from nemotron.generate.decode_layers import PackedLinear, decode_view
from nemotron.precision.static import attach, store_weights
from nemotron.quantize.calibrate import calibrate
from nemotron.quantize.presets import PRESETS, assign
from nemotron.quantize.scales import model_scales
from tests.quantize.test_calibration import LAYER, batches, small
from tests.support.models import tokens


@pytest.mark.parametrize("preset", ["nvfp4", "fp8_conservative", "super_nvfp4"])
@pytest.mark.parametrize("pack", [False, True])
def test_a_model_that_decodes_rounds_what_the_quantized_one_rounds(preset: str, pack: bool):
    model, chosen = small(), PRESETS[preset]
    scales = model_scales(
        model, assign(model, chosen), calibrate(model, batches()), cache=chosen.cache
    )
    store_weights(model, scales)
    ids = tokens(1, 4, seed=9)
    with torch.no_grad():
        plain = model(ids)
        attach(model, scales)
        wanted = model(ids)
        view = decode_view(model, pack=pack)
        found = view(ids)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain, wanted, rtol=1e-3, atol=1e-4)
    latent = view.get_submodule(f"{LAYER}.3.mixer")
    is_packed = isinstance(latent.up_proj, PackedLinear)
    assert is_packed == (pack and f"{LAYER}.3.mixer.up_proj" not in scales.linears)
