"""Compare the adapter for lm-evaluation-harness with its own `hf` backend, on the same tasks.

Usage: python tools/bench/harness.py EXPORT [--questions 40] [--rows 16] [--slots 64] [--theirs 16]
       [--only TASK]

Tasks are made of the text that ships with the package. Loading the model is not timed. On a CPU the
seconds are those of the processor, which other programs do not lengthen. Needs
pip install 'lm_eval[hf]'.
"""

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TASKS: dict[str, dict[str, Any]] = {
    "4 choices, 5 shots": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "num_fewshot": 5,
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc"}],
    },
    "4 choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "4 letters, 5 shots": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": 1,
        "num_fewshot": 5,
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc"}],
    },
    "whole texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "32 new tokens": {
        "output_type": "generate_until",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 32, "do_sample": False},
        "metric_list": [{"metric": "bypass"}],
    },
}


def write_tasks(folder: Path, questions: int) -> None:
    from nemotron.data.corpus import load_documents

    domains = ("code", "docs", "verse")
    texts = [text for domain in domains for text in load_documents(domain) if len(text) > 900]
    rows = []
    for number in range(questions):
        text = texts[number % len(texts)]
        begin = 600 * (number // len(texts)) % (len(text) - 600)
        others = [texts[(number + k) % len(texts)][begin % 300 :][:60] for k in (1, 2, 3)]
        choices = [text[begin + 400 : begin + 460], *others]
        rows.append({"text": text[begin : begin + 400], "choices": choices})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
    for name, task in TASKS.items():
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": data}
        common |= {"test_split": "test", "doc_to_text": "{{text}}"}
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))


def our_model(export: Path, rows: int, slots: int, device: str) -> Any:
    from nemotron.evaluate.harness import HarnessLM
    from nemotron.evaluate.harness_command import read_subject

    return HarnessLM(read_subject(export, device), rows, slots)


def their_model(export: Path, rows: int, device: str) -> Any:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(str(export), device=device, dtype="float32", batch_size=rows)
    for module in lm.model.modules():
        if hasattr(module, "time_step_limit"):  # transformers clamps it to 0.001 or more
            module.time_step_limit = (0.0, float("inf"))
    return lm


METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
"""What lm-eval asks a model for; the rest of its time is that of the package itself."""


@dataclass(frozen=True)
class Timed:
    """Seconds of an evaluation, those of them inside the model, and what it answered."""

    seconds: float
    inside: float
    answers: list[float | str]


def timed(lm: Any, task: str, folder: Path) -> Timed:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    inside = 0.0

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal inside
            begin = clock()
            try:
                return method(*given, **named)
            finally:
                inside += clock() - begin

        return call

    for name in METHODS:
        setattr(lm, name, watched(getattr(type(lm), name).__get__(lm)))
    begin = clock()
    found = simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    seconds = clock() - begin
    answers: list[float | str] = []
    for sample in found["samples"][task]:
        for one in sample["filtered_resps"]:
            answers.append(one[0] if isinstance(one, tuple | list) else one)
    return Timed(seconds, inside, answers)


def apart(ours: list[float | str], theirs: list[float | str]) -> str:
    """Return the largest difference of numbers, or how many texts differ."""
    largest, texts = 0.0, 0
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, float) and isinstance(b, float):
            largest = max(largest, abs(a - b))
        else:
            texts += a != b
    return f"{texts} texts" if isinstance(ours[0], str) else f"{largest:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--theirs", type=int, default=16, help="texts at a time of the hf backend")
    parser.add_argument("--only", choices=TASKS, action="append", help="repeatable; default: all")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"{given.export}, {given.questions} questions, {name}")
    print(f"{given.rows} texts and {given.slots} answers at a time, hf {given.theirs}")
    heads = ("hf, s", "ours, s", "ratio", "hf, model", "ours", "ratio")
    print(f"{'task':<20}" + "".join(f"{head:>10}" for head in heads) + "  largest difference")
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), given.questions)
        models = [
            their_model(given.export, given.theirs, device),
            our_model(given.export, given.rows, given.slots, device),
        ]
        for lm in models:
            timed(lm, "4 letters, 5 shots", Path(folder))  # the first calls are slower
        for task in given.only or TASKS:
            theirs, ours = (timed(lm, task, Path(folder)) for lm in models)
            cells = "".join(
                f"{a:10.2f}{b:10.2f}{a / b:10.1f}"
                for a, b in ((theirs.seconds, ours.seconds), (theirs.inside, ours.inside))
            )
            print(f"{task:<20}{cells}  {apart(ours.answers, theirs.answers)}", flush=True)


if __name__ == "__main__":
    main()
