"""Every command that writes to a place it is given, and a folder in which all of them can work."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from nemotron import cli
from nemotron.posttrain.pivots import turns_of
from tests.support.conversations import GARDEN, GARDEN_TOOLS
from tests.support.tiny_run import MODEL

THEIRS = "\\documentclass{book}"
DOCUMENT = '{\n "begins": "as lines of JSON do, and holds none"\n}\n'
RL = {
    "stage": "rl",
    "name": "learner",
    "device": "cpu",
    "model": MODEL,
    "data": {"seq_len": 700},
    "schedule": {"kind": "constant", "peak": 1e-3, "total_steps": 1},
    "batch": {"global_tokens": 8 * 700, "micro_batch": 2},
    "rollout": {
        "environments": [
            {"name": "arith_chain"},
            {"name": "pivot", "options": {"data": "pivots.jsonl"}},
        ],
        "num_prompts_per_step": 4,
        "num_generations_per_prompt": 2,
        "max_new_tokens": 4,
    },
}
TASK = {
    "task": "task",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}, "cache_dir": "datasets"},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": ["a", "b"],
    "doc_to_target": 0,
}
"""For lm-eval."""
TRAIN = ["train", "tiny/smoke", "output=runs", "name=mine", "device=cpu", "evaluation.tokens=64",
         "schedule.total_steps=2", "schedule.warmup_steps=1", "schedule.decay_steps=1",
         "checkpoint.every_steps=1", "data.cache=cache"]  # fmt: skip


@dataclass(frozen=True)
class Output:
    """A command that writes, and the name, below the output, of a file that stands there."""

    words: str
    option: str = "--out"
    inside: str = ""
    """Empty: the output is the file itself."""
    content: str = THEIRS


FOLDER = "thesis.tex"
OUTPUTS = [
    Output("correct runs/mine --ar --in pairs.jsonl"),
    Output("correct runs/mine --ar --in pairs.jsonl", content=DOCUMENT),
    Output("data characters rows.jsonl"),
    Output("data codeswitch rows.jsonl --lexicon words.tsv --languages xx,en"),
    Output("data demo grammar", inside="text.jsonl"),
    Output("data inspect runs/mine/recipe.yaml --rows 0", "--plots", "shares.png"),
    Output("data noise rows.jsonl --language letters", content=DOCUMENT),
    Output("data pairs pairs.jsonl --workers 1", inside=FOLDER),
    Output("data prepare rows.jsonl --workers 1", inside=FOLDER),
    Output("data tokenizer rows.jsonl --vocab-size 400"),
    Output("evaluate runs/mine"),
    Output("evaluate runs/mine --suite mcqa@0", inside=FOLDER),
    Output("export runs/mine --no-check", inside=FOLDER),
    Output("generate runs/mine --prompts words.tsv"),
    Output("import exported", inside=FOLDER),
    Output("lm-eval runs/mine task.yaml"),
    Output("lm-eval runs/mine task.yaml", "--samples"),
    Output("merge runs/mine --last 2", inside=FOLDER),
    Output("quantize runs/mine --preset fp8 --rows 1 --no-check", inside=FOLDER),
    Output("recipe copy tiny/smoke", inside="tiny/smoke.yaml"),
    Output("report runs/mine"),
    Output("rl chats arith_chain --count 2"),
    Output("rl chats arith_chain --count 2", content=DOCUMENT),
    Output("rl evaluate rl.yaml --model runs/mine"),
    Output("rl evaluate rl.yaml --model runs/mine --budget 0 --budget 1", "--plot"),
    Output("rl pivots rl.yaml chats.jsonl --model runs/mine"),
]


def make_world(folder: Path) -> Path:
    """Fill a folder with a run, an export, rows, and whatever else the commands read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lines = [{"text": f"to be or not {number}"} for number in range(9)]
        Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        pair = {"target": "to be", "candidates": ["to bee", "too be"]}
        Path("pairs.jsonl").write_text((json.dumps(pair) + "\n") * 9)
        chat = {"messages": GARDEN, "tools": GARDEN_TOOLS}
        Path("chats.jsonl").write_text(json.dumps(chat) + "\n")
        Path("pivots.jsonl").write_text("".join(json.dumps(t) + "\n" for t in turns_of(chat)))
        Path("words.tsv").write_text("be\tetre\n")
        Path("task.yaml").write_text(json.dumps(TASK))
        with open("rl.yaml", "w") as file:
            YAML().dump(RL, file)
        assert cli.run(TRAIN) == 0
        assert cli.run(["export", "runs/mine", "--out", "exported", "--no-check"]) == 0
    return folder
