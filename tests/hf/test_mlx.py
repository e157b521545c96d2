"""A second opinion on exports: Apple's mlx-lm, which shares no code with transformers or us."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nemotron.hf.export import export
from nemotron.loading import load_with_tokenizer

pytestmark = pytest.mark.slow
NEW_TOKENS = 4
TEXT = "def read(self, path):\n    return open(path).read()\n# To be, or not to be"


@pytest.mark.parametrize("changes", [{}, {"moe_latent_size": None, "n_groups": 1}])
def test_logits_and_greedy_tokens_are_those_of_mlx_lm(
    make_run: Callable[..., Path], tmp_path: Path, changes: dict
):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    folder = tmp_path / "export"
    assert export(make_run(tmp_path / "run", **changes), folder, check=False) == 0
    model, tokenizer = load_with_tokenizer(folder)
    theirs, _ = utils.load_model(folder)
    theirs.set_dtype(mx.float32)
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 15
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            ours = model.logits(model(torch.tensor([ids])))[0]
        found = torch.from_numpy(np.array(theirs(mx.array([ids]))[0]))
        # float32 in another order of sums; logits reach several units
        assert (found - ours).abs().max() < 1e-4 * ours.abs().max()
        assert found[-1].argmax() == ours[-1].argmax()
        ids.append(int(ours[-1].argmax()))
