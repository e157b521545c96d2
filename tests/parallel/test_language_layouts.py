"""Experts by language in layouts: the losses of one process, and what a run says of languages."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.cli import run
from nemotron.parallel.runtime import Ranks
from nemotron.run.metrics import read_metrics
from nemotron.train.config import PretrainConfig
from nemotron.train.pretraining import open_data, text_batches
from nemotron.train.schedule import plan_training
from tests.support.cases import further
from tests.support.fine_tuning import write_recipe
from tests.support.layout_model import MODEL
from tests.support.layout_run import run_steps
from tests.support.pool import Pool
from tests.support.prepared import write_prepared
from tests.support.same_run import assert_same_run

pytestmark = pytest.mark.distributed

BILINGUAL = {
    **MODEL,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "mtp_hybrid_override_pattern": None,
    "language_experts": {"languages": ["low", "up"], "linear": True},
}


@pytest.fixture(scope="module")
def bilingual(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("languages")
    low = [f"the river {n} runs to the sea " * 3 for n in range(60)]
    texts = {"low": low, "up": [text.upper() for text in low]}
    texts["both"] = [a + b for a, b in zip(texts["low"], texts["up"], strict=True)]
    sources = [
        {
            "name": name,
            "path": str(write_prepared(own, folder / name, validation_fraction=0.1)),
            "language": "mixed" if name == "both" else name,
        }
        for name, own in texts.items()
    ]
    return values | {
        "output": str(folder / "runs"),
        "model": BILINGUAL,
        "data": values["data"] | {"sources": sources, "language_of": "source"},
        "loss": {"moe_aux_loss_coeff": 1e-2, "lid_oracle_steps": 2},
    }


@pytest.mark.parametrize(
    "layout", [further({}), {"ep": 2}, further({"tp": 2}), further({"cp": 2})], ids=str
)
def test_losses_are_those_of_one_process(
    pair: Pool, bilingual: dict[str, Any], layout: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    alone = run_steps(bilingual, 3)
    found = pair.run(run_steps, bilingual | {"parallel": layout}, 3)[0]
    assert alone.terms[0]["loss/lid"] > 0
    for step in range(3):
        assert found.terms[step] == pytest.approx(alone.terms[step], rel=1e-3)
    assert found.grad_norms[0] == pytest.approx(alone.grad_norms[0], rel=1e-4)


def test_a_run_learns_languages_and_logs_the_load_of_each(
    bilingual: dict[str, Any], tmp_path: Path
) -> None:
    values = bilingual | {
        "name": "two",
        "schedule": {"peak": 1e-2, "total_steps": 30, "kind": "constant"},
    }
    recipe = write_recipe(tmp_path / "two.yaml", values)
    assert run(["train", str(recipe)]) == 0
    lines = [x for x in read_metrics(tmp_path_of(values) / "metrics.jsonl") if x["kind"] == "train"]
    assert lines[-1]["loss/lid"] < 0.5 * lines[0]["loss/lid"]
    loads = [value for key, value in lines[-1].items() if key.endswith("/load_low")]
    assert loads
    assert all(0.2 < load < 0.8 for load in loads)


def test_scripts_label_tokens_in_the_batches_of_a_run(bilingual: dict[str, Any]) -> None:
    experts = {"languages": ["ru", "en"]}
    values = bilingual | {
        "model": BILINGUAL | {"language_experts": experts},
        "data": bilingual["data"] | {"language_of": "script"},
        "schedule": {"peak": 1e-2, "total_steps": 3, "kind": "constant"},
    }
    config = PretrainConfig.model_validate(values)
    plan = plan_training(config)
    data = open_data(config, plan)
    batch = text_batches(config, plan, data, torch.device("cpu"), Ranks()).take(2)
    assert batch.languages is not None
    assert not batch.languages_decide
    for token, number in zip(batch.input_ids[0].tolist(), batch.languages[0].tolist(), strict=True):
        has_letters = any(map(str.isalpha, data.tokenizer.decode([token])))
        is_text = token not in data.tokenizer.special_ids
        assert number == (1 if has_letters and is_text else -1)


def tmp_path_of(values: dict[str, Any]) -> Path:
    return Path(values["output"]) / values["name"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": {"lid_oracle_steps": 30}}, "is not below the 30 steps of the run"),
        ({"parallel": {"pp": 2}}, "cannot share a gate of model.language_experts yet"),
        ({"sources": {"low": None}}, "has low without language; give it one of low, up"),
        ({"sources": {"low": "down"}}, "has low with language = down, which is none of"),
        ({"language_of": "script"}, "data.language_of = script cannot say which tokens are low"),
        ({"model": MODEL}, "has no effect because model.language_experts is absent"),
    ],
)
def test_a_mistake_is_one_sentence(
    bilingual: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    changes: dict[str, Any],
    said: str,
) -> None:
    values = bilingual | {"name": "bad"}
    for key, given in changes.items():
        if key == "language_of":
            values["data"] = values["data"] | {key: given}
        elif key == "sources":
            own = [s | {"language": given.get(s["name"], s["language"])} for s in
                   values["data"]["sources"]]  # fmt: skip
            values["data"] = values["data"] | {"sources": own}
        else:
            values[key] = given
    capsys.readouterr()
    assert run(["train", str(write_recipe(tmp_path / "bad.yaml", values))]) == 2
    assert said in capsys.readouterr().err


def test_a_stopped_run_resumes_to_the_same_bits_across_the_oracle_steps(
    bilingual: dict[str, Any], tmp_path: Path
) -> None:
    runs = []
    for name, stops in (("whole", ()), ("parts", ("--stop-at", "1"))):
        values = bilingual | {
            "name": name,
            "schedule": {"peak": 1e-2, "total_steps": 4, "kind": "constant"},
        }
        recipe = str(write_recipe(tmp_path / f"{name}.yaml", values))
        assert run(["train", recipe, *stops]) == (75 if stops else 0)
        if stops:
            assert run(["train", recipe, "--resume"]) == 0
        runs.append(tmp_path_of(values))
    assert_same_run(*runs)
