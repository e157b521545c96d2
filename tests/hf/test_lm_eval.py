"""A second opinion on exports: lm-eval's own backend scores and continues texts alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.data.tokenizer import Tokenizer
from nemotron.hf.export import export
from nemotron.loading import load_with_tokenizer
from nemotron.model.hybrid import HybridLM

pytestmark = pytest.mark.slow
NEW_TOKENS = 5
ROWS = [
    {"text": "def read(self, path):", "choices": ["return open(path)", "to be, or not to be"]},
    {"text": "To be, or", "choices": ["not to be", "a file of 12 bytes", "import os"]},
]
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "go_on": {
        "output_type": "generate_until",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "bypass"}],
    },
}


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")}
    for name, task in TASKS.items():
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": data}
        common |= {"test_split": "test", "doc_to_text": "{{text}}"}
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))


def log_likelihood(model: HybridLM, tokenizer: Tokenizer, text: str, more: str) -> float:
    start, ids = len(tokenizer.encode(text)), tokenizer.encode(text + more)
    with torch.no_grad():
        logprobs = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
    return logprobs[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None]).sum().item()


def go_on(model: HybridLM, tokenizer: Tokenizer, text: str) -> str:
    ids = tokenizer.encode(text)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    return tokenizer.decode(ids[-NEW_TOKENS:], skip_specials=True)


@pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports
def test_choices_and_continuations_are_those_of_lm_eval(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="lm-eval is not installed")
    backend = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval[hf] is missing")
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "export"
    assert export(make_run(tmp_path / "run"), folder, check=False) == 0
    write_tasks(tmp_path / "tasks")
    model, tokenizer = load_with_tokenizer(folder)
    theirs = backend.HFLM(
        str(folder), device="cpu", dtype="float32", batch_size=2, experts_implementation="eager"
    )
    for module in theirs.model.modules():
        if hasattr(module, "time_step_limit"):  # transformers clamps it to 0.001 or more
            module.time_step_limit = model.config.time_step_limit
    tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = evaluator.simple_evaluate(
        theirs, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0
    )["samples"]
    for row, chosen, continued in zip(ROWS, found["choose"], found["go_on"], strict=True):
        expected = [
            log_likelihood(model, tokenizer, row["text"], f" {more}") for more in row["choices"]
        ]
        # sums of a few float32 log-probabilities by two implementations
        scores = [score for score, _ in chosen["filtered_resps"]]
        assert scores == pytest.approx(expected, rel=0, abs=1e-4)
        assert chosen["acc"] == (expected.index(max(expected)) == 0)
        assert continued["filtered_resps"] == [go_on(model, tokenizer, row["text"])]
