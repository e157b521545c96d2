"""The figures of correction: what they draw is what was measured."""

import json
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.models import build
from tests.support.pages import ROOT


def imported(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        return __import__(name)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return imported("draw_correction")


def test_masks_are_drawn_in_order_with_the_mean_of_the_seeds(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = {"masked-50": [0.2, 0.4], "unmasked": [0.1, 0.1], "masked": [0.5, 0.7], "soft": [1, 1]}
    lines = [
        json.dumps({"arm": arm, "seed": seed, "correction_f0.5": value})
        for arm, values in found.items()
        for seed, value in enumerate(values)
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    line = tool.mask_line(tmp_path)
    assert line.series.x.tolist() == [0, 0.2, 0.5]
    assert line.series.y.tolist() == pytest.approx([0.1, 0.6, 0.3])
    assert line.errors.tolist() == pytest.approx([0, 0.1, 0.1])
    out = tmp_path / "masks.svg"
    monkeypatch.setattr("sys.argv", ["draw", str(out), "--masks", str(tmp_path)])
    tool.main()
    assert tool.TITLES["masks"][0] in out.read_text()


def test_bits_and_gate_are_those_of_the_model(tool: ModuleType):
    model = build(
        hybrid_override_pattern="ME*E",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        num_nextn_predict_layers=0,
        mtp_hybrid_override_pattern=None,
        language_experts={"languages": ["yue", "en"]},
    )
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    bits = tool.bits_of(model, ids)
    assert np.isnan(bits[0])
    with torch.no_grad():
        loss = F.cross_entropy(model.logits(model(ids))[0, :-1], ids[0, 1:], reduction="none")
    np.testing.assert_allclose(bits[1:], loss.numpy() / np.log(2))
    shares = tool.gate_of(model, ids)
    np.testing.assert_allclose(shares.sum(1), 1)
    # the model is causal, and so is what its gate reads
    np.testing.assert_allclose(tool.gate_of(model, ids[:, :4]), shares[:4])
    assert not np.allclose(shares[0], shares[1:])


def test_turns_are_where_the_language_changes():
    tool = imported("two_languages")
    text, turns = tool.switching("aa bb " * 60, "cc dd " * 60, random.Random(3))
    letters = [set(tool.permuted("cd")), set("ab")]
    assert len(turns) > 2
    for (begin, language), (end, other) in zip(turns, [*turns[1:], (len(text), None)], strict=True):
        assert other != language
        assert not set(text[begin:end]) & (letters[language] - letters[1 - language])
