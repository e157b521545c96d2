"""lm-eval's own backend on an export, and our adapter for lm-eval: both give the same numbers."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.cli import run
from nemotron.data.chat.template import TEMPLATE
from nemotron.data.tokenizer import Tokenizer
from nemotron.hf.export import export
from nemotron.loading import load_with_tokenizer
from nemotron.model.hybrid import HybridLM

evaluator = pytest.importorskip("lm_eval.evaluator", reason="lm-eval is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of lm-eval and what it imports
]
NEW_TOKENS, LONGEST = 5, 64
ROWS = [
    {"text": "def read(self, path):", "choices": ["return open(path)", "to be, or not to be"]},
    {"text": "To be, or", "choices": ["not to be", "a file of 12 bytes", "import os"]},
    {"text": "It was said again and again. " * 20 + "And", "choices": ["then", "yes, again", "x"]},
    {"text": "The end</s>", "choices": ["of it", "of", "of it"]},
]
UNTIL = {"max_gen_toks": NEW_TOKENS, "do_sample": False}
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} Answer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc"}],
    },
    "shots": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "num_fewshot": 1,
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}} {{choices[0]}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "go_on": {
        "output_type": "generate_until",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["</s>"], **UNTIL},
        "metric_list": [{"metric": "bypass"}],
    },
    "stop_early": {
        "output_type": "generate_until",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["e", "\n", " a"], **UNTIL},
        "metric_list": [{"metric": "exact_match"}],
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


@dataclass(frozen=True)
class Both:
    """The same tasks by both backends; samples by task."""

    folder: Path
    tasks: Path
    theirs: Any  # Any: a class of lm-eval
    their_results: dict[str, Any]
    their_samples: dict[str, list[dict[str, Any]]]
    our_results: dict[str, Any]
    our_samples: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def both(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Both:
    backend = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval[hf] is missing")
    from lm_eval.tasks import TaskManager

    home = tmp_path_factory.mktemp("lm_eval")
    folder, tasks = home / "export", home / "tasks"
    made = make_run(home / "run", max_position_embeddings=LONGEST)
    assert export(made, folder, check=False) == 0
    write_tasks(tasks)
    theirs = backend.HFLM(
        str(folder), device="cpu", dtype="float32", batch_size=2, experts_implementation="eager"
    )
    limit = load_with_tokenizer(folder)[0].config.time_step_limit
    for module in theirs.model.modules():
        if hasattr(module, "time_step_limit"):  # transformers clamps it to 0.001 or more
            module.time_step_limit = limit
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = evaluator.simple_evaluate(
        theirs, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
    )
    out, samples = home / "out.json", home / "samples.jsonl"
    words = [*TASKS, "--include-path", str(tasks), "--rows", "5"]
    assert run(["lm-eval", str(folder), *words, "--out", str(out), "--samples", str(samples)]) == 0
    ours: dict[str, list[dict[str, Any]]] = {}
    for line in samples.read_text().splitlines():
        row = json.loads(line)
        ours.setdefault(row["task"], []).append(row)
    results = json.loads(out.read_text())["results"]
    return Both(folder, tasks, theirs, found["results"], found["samples"], results, ours)


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


def test_choices_and_continuations_are_those_of_lm_eval(both: Both):
    model, tokenizer = load_with_tokenizer(both.folder)
    found = both.their_samples
    for row, chosen, continued in zip(ROWS[:2], found["choose"], found["go_on"], strict=False):
        expected = [
            log_likelihood(model, tokenizer, row["text"], f" {more}") for more in row["choices"]
        ]
        # sums of a few float32 log-probabilities by two implementations
        scores = [score for score, _ in chosen["filtered_resps"]]
        assert scores == pytest.approx(expected, rel=0, abs=1e-4)
        assert chosen["acc"] == (expected.index(max(expected)) == 0)
        assert continued["filtered_resps"] == [go_on(model, tokenizer, row["text"])]


@pytest.mark.parametrize("task", TASKS)
def test_our_adapter_gives_the_numbers_of_the_hf_backend(both: Both, task: str):
    ours, theirs = both.our_samples[task], both.their_samples[task]
    assert [row["doc_id"] for row in ours] == [row["doc_id"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if TASKS[task]["output_type"] == "multiple_choice":
            assert [b for _, b in mine["filtered_resps"]] == [b for _, b in other["filtered_resps"]]
            scores = [[score for score, _ in one["filtered_resps"]] for one in (mine, other)]
            assert scores[0] == pytest.approx(scores[1], rel=0, abs=1e-4)
        else:
            # rolling sums have up to 200 tokens
            wanted = other["filtered_resps"]
            is_text = TASKS[task]["output_type"] == "generate_until"
            assert mine["filtered_resps"] == (
                wanted if is_text else pytest.approx(wanted, rel=1e-6)
            )
    for name, value in both.their_results[task].items():
        if isinstance(value, float):
            assert both.our_results[task][name] == pytest.approx(value, rel=1e-4), name


@pytest.fixture(scope="module")
def long_run(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("served") / "run")


@pytest.fixture(scope="module")
def served(long_run: Path) -> Iterator[str]:
    """The address of a server."""
    words = ["serve", str(long_run), "--name", "tiny", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nemotron", *words], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        lines: list[str] = []
        while (found := re.search(r"http://127\.0\.0\.1:\d+", "".join(lines))) is None:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        yield found[0]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("options", [{}, {"num_concurrent": 3, "tokenizer_backend": "huggingface"}])
def test_a_served_model_gives_the_numbers_of_our_adapter(
    served: str, long_run: Path, options: dict[str, Any], tmp_path: Path
):
    """lm-eval asks the server for the log-probabilities of prompts (`local-completions`)."""
    pytest.importorskip("lm_eval.models.api_models", reason="lm_eval[api] is missing")
    pytest.importorskip("tenacity", reason="lm_eval[api] is missing")
    from lm_eval.tasks import TaskManager

    tasks, exported, out = tmp_path / "tasks", tmp_path / "export", tmp_path / "out.json"
    write_tasks(tasks)
    samples = tmp_path / "samples.jsonl"
    words = ["lm-eval", str(long_run), *TASKS, "--include-path", str(tasks), "--out", str(out)]
    assert run([*words, "--samples", str(samples)]) == 0
    ours: dict[str, list[dict[str, Any]]] = {}
    for line in samples.read_text().splitlines():
        row = json.loads(line)
        ours.setdefault(row["task"], []).append(row)
    if options:
        assert export(long_run, exported, check=False) == 0
        options = {**options, "tokenizer": str(exported)}
    found = evaluator.simple_evaluate(
        "local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"{served}/v1/completions",
            "max_length": 4096,
            **options,
        },
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        batch_size=1 if options else 4,
    )
    results = json.loads(out.read_text())["results"]
    for task, other in found["samples"].items():
        for mine, theirs in zip(ours[task], other, strict=True):
            first, second = mine["filtered_resps"], theirs["filtered_resps"]
            if TASKS[task]["output_type"] == "multiple_choice":
                assert [greedy for _, greedy in first] == [greedy for _, greedy in second]
                first, second = ([value for value, _ in one] for one in (first, second))
            is_text = TASKS[task]["output_type"] == "generate_until"
            # sums of float32 log-probabilities from passes of other shapes
            assert first == (second if is_text else pytest.approx(second, rel=1e-6, abs=1e-4))
        for name, value in found["results"][task].items():
            if isinstance(value, float):
                assert results[task][name] == pytest.approx(value, rel=1e-4), name


def test_chat_prompts_are_those_of_the_hf_backend(both: Both):
    from nemotron.evaluate.harness import HarnessLM, Subject
    from nemotron.serve.conversation import ChatFormat

    model, tokenizer = load_with_tokenizer(both.folder)
    chat = ChatFormat.of(tokenizer, TEMPLATE)
    ours = HarnessLM(Subject("tiny", model, tokenizer, frozenset(), chat), rows=2)
    both.theirs.tokenizer.chat_template = TEMPLATE
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 2?"},
    ]
    assert ours.apply_chat_template(history) == both.theirs.apply_chat_template(history)
    begun = [*history, {"role": "assistant", "content": "The answer is"}]
    for words in (ours, both.theirs):
        assert words.apply_chat_template(begun, False).endswith("The answer is")
    assert ours.chat_template(True) == TEMPLATE


def test_wrong_tasks_are_one_sentence(
    both: Both, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "absent.yaml").write_text(
        json.dumps(
            {
                "task": "absent",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "no.jsonl")}},
                "output_type": "generate_until",
                "test_split": "test",
                "doc_to_text": "x",
                "doc_to_target": "x",
            }
        )
    )
    long = json.loads((both.tasks / "go_on.yaml").read_text())
    for name, changes in (("long", {"max_gen_toks": LONGEST}), ("beams", {"num_beams": 4})):
        values = {**long, "task": name, "generation_kwargs": {**UNTIL, "until": [], **changes}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))
    (tmp_path / "broken.yaml").write_text("task: broken\nx: {")
    endless = {**long, "task": "loops", "doc_to_text": "{% for i in range(10**9) %}{% endfor %}"}
    (tmp_path / "loops.yaml").write_text(json.dumps(endless))
    choose = json.loads((both.tasks / "choose.yaml").read_text())
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "choices": None}) + "\n")
    choose |= {"task": "no_choices"}
    choose["dataset_kwargs"] |= {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    (tmp_path / "no_choices.yaml").write_text(json.dumps(choose))
    full = tmp_path / "full.json"
    full.write_text("{}")
    model, names = [str(both.folder)], ["--include-path", str(tmp_path)]
    cases = [
        (["none.yaml", *names], "none.yaml is not a task"),
        (["absent", *names], "TASK = absent cannot be read"),
        (["long", *names], f"max_gen_toks = {LONGEST} must be below {LONGEST}"),
        (["beams", *names], "generation_kwargs.num_beams = 4 is unknown"),
        ([str(tmp_path / "broken.yaml")], "cannot be read: while parsing a flow"),
        (["loops", *names], "Range too big"),
        (["no_choices", *names], "a task cannot be asked"),
        (["absent", "--include-path", str(full)], "is not a folder"),
        (["absent", *names, "--samples", str(full)], "exists already"),
    ]
    for words, said in cases:
        capsys.readouterr()
        assert run(["lm-eval", *model, *words]) == 2, words
        [sentence] = [line for line in capsys.readouterr().err.splitlines() if "nemotron: " in line]
        assert said in sentence
    assert full.read_text() == "{}"


EVIL = """
import pathlib
pathlib.Path(__file__).with_name("executed").touch()
def text(row):
    return "x"
"""
TEMPLATE_OF_CODE = "{{ cycler.__init__.__globals__.os.system('touch executed') }}"


def test_no_code_of_a_task_is_executed_unless_the_environment_allows_it(
    both: Both,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL)
    task = json.loads((both.tasks / "choose.yaml").read_text())
    attacks = {
        "function": "doc_to_text: !function evil.text",
        "module": "doc_to_text: !function os.system",
        "template": f"doc_to_text: {json.dumps(TEMPLATE_OF_CODE)}",
        "metric": 'metric_list: [{"metric": "./evil.py", "hf_evaluate": true}]',
    }
    for name, line in attacks.items():
        key = line.partition(":")[0]
        lines = [f"{k}: {json.dumps(v)}" for k, v in {**task, "task": name}.items() if k != key]
        (tmp_path / f"{name}.yaml").write_text("\n".join([*lines, line]))
        words = ["lm-eval", str(both.folder), name, "--include-path", str(tmp_path)]
        assert run(words) == 2, capsys.readouterr().err
        assert not (tmp_path / "executed").exists(), name
    monkeypatch.setenv("NEMOTRON_ALLOW_UNSAFE_CODE", "1")
    words = ["lm-eval", str(both.folder), "function", "--include-path", str(tmp_path)]
    assert run(words) == 0, capsys.readouterr().err
    assert (tmp_path / "executed").exists()
