"""Which programs do not take a model, as the command says it."""

from pathlib import Path

import pytest

from nemotron import cli
from nemotron.hf.readers import limits
from tests.support.models import build_config

SMOKE = str(Path(__file__).parents[2] / "recipes/tiny/smoke.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ([], None),
        (["model.moe_intermediate_size=30"], "transformers: experts of a width that 8 does not"),
        (["model.vocab_size=4097"], "llama.cpp: vocab_size = 4097 is no multiple of 8"),
        (["model.hybrid_override_pattern=MEME"], "llama.cpp: the pattern lacks M or * layers"),
        (
            ["model.hybrid_override_pattern=M-*-", "model.intermediate_size=40"],
            "llama.cpp: the patterns have both E and - layers",
        ),
        (["model.mtp_hybrid_override_pattern=EE"], "llama.cpp: the pattern of multi-token"),
        (["model.use_conv_bias=false"], "llama.cpp: use_conv_bias = false"),
        (
            ["model.n_group=4", "model.topk_group=1", "model.num_experts_per_tok=1"],
            "every other program: groups of experts that it scores in another way (n_group)",
        ),
    ],
)
def test_recipe_check_says_which_programs_an_export_is_not_for(
    change: list[str], words: str | None, capsys: pytest.CaptureFixture
):
    assert cli.run(["recipe", "check", SMOKE, *change]) == 0
    first, *notes = capsys.readouterr().out.splitlines()
    assert "valid" in first
    assert len(notes) == (words is not None)
    assert words is None or notes[0].startswith(f"note: an export is not for {words}")


@pytest.mark.parametrize(("pattern", "words"), [("ME*-", "both E and -"), ("*E*", "lacks M or *")])
def test_layers_that_llama_cpp_does_not_combine_are_named(pattern: str, words: str):
    config = build_config(hybrid_override_pattern=pattern)
    assert any(words in str(limit) for limit in limits(config))


def test_transformers_fails_on_such_experts_and_takes_them_as_the_note_says(exported: Path):
    transformers = pytest.importorskip("transformers")
    import torch

    ids = torch.tensor([[5, 17, 300]])
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        assert load(exported, experts_implementation="eager")(ids).logits.isfinite().all()
        with pytest.raises(RuntimeError, match=r"16 bytes|multiple|align|strides"):
            load(exported)(ids)
