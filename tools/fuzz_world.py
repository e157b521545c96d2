"""The world that the fuzzer damages, in which everything is right."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fuzz_requests as read
from ruamel.yaml import YAML

RECIPE: dict[str, Any] = {
    "name": "mine",
    "output": "runs",
    "device": "cpu",
    "model": {
        "vocab_size": 4096,
        "hidden_size": 8,
        "hybrid_override_pattern": "ME*-",
        "mamba_num_heads": 2,
        "mamba_head_dim": 4,
        "n_groups": 1,
        "ssm_state_size": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "moe_shared_expert_intermediate_size": 8,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
    },
    "data": {
        "cache": "cache",
        "seq_len": 32,
        "sources": [{"name": "text", "weight": 1.0, "path": "shards"}],
    },
    "batch": {"global_tokens": 64, "micro_batch": 2},
    "schedule": {"peak": 1e-2, "total_steps": 4, "warmup_steps": 1, "decay_steps": 2},
    "optimizer": {"weight_decay": 0.1},
    "checkpoint": {"every_steps": 2, "keep": 2},
    "evaluation": {"every_steps": 4, "tokens": 64},
}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"k": [1, {"d": None}]}}}
CHAT: dict[str, list[Any]] = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Is it wet?"},
        {"role": "assistant", "reasoning_content": "Ask.", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "yes"},
        {"role": "assistant", "content": "Yes."},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
}
STEP = "runs/half/checkpoints/step-00000002"
MERGED = "runs/mine/checkpoints/step-00000002"
CORRECTOR = "runs/corrector/checkpoints/step-00000004"
PLAYED = "runs/played/checkpoints/step-00000001"
ADAPTED = "runs/adapted/checkpoints/step-00000001"
TUNE = {
    **{key: RECIPE[key] for key in ("output", "device", "model", "batch", "schedule")},
    "stage": "sft",
    "name": "adapted",
    "init_from": "runs/mine",
    "data": {
        "cache": "cache",
        "seq_len": 256,
        "sources": [{"name": "chats", "path": "chats"}],
    },
    "batch": {"global_tokens": 512, "micro_batch": 1},
    "tune": {"adapter": {"rank": 2, "targets": ["in_proj", "q_proj", "experts"]}},
    "evaluation": {"tokens": 256},
}
DISTILL = {
    **{key: value for key, value in TUNE.items() if key != "tune"},
    "stage": "distill",
    "name": "student",
    "teacher": "runs/adapted",
}
WIDE = {
    "hidden_size": 16,
    "mamba_head_dim": 8,
    "head_dim": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}
"""Widths that NVFP4 can have."""
STUDENT = {
    **DISTILL,
    "name": "quantized-student",
    "model": RECIPE["model"] | WIDE,
    "init_from": "runs/wide",
    "teacher": "runs/wide",
}
CORRECTION: dict[str, Any] = {
    **{key: RECIPE[key] for key in ("output", "device", "schedule", "checkpoint")},
    "stage": "correct",
    "name": "corrector",
    "model": {
        **{k: v for k, v in RECIPE["model"].items() if "mtp" not in k and "nextn" not in k},
        "vocab_size": 128,
        "correction": {"candidates": 2},
    },
    "data": {
        "seq_len": 256,
        "tokenizer": "letters",
        "sources": [{"name": "pairs", "path": "pairs"}],
    },
    "batch": {"global_tokens": 512, "micro_batch": 1},
    "correct": {"kind": "soft", "first_steps": 2},
    "evaluation": {"every_steps": 4, "tokens": 512},
}
HARNESS_TASK = {
    "task": "choose",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "tasks/rows.jsonl"}, "cache_dir": "tasks/cache"},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc"}],
}
REINFORCE: dict[str, Any] = {
    **{key: RECIPE[key] for key in ("output", "device", "model", "schedule")},
    "stage": "rl",
    "name": "learner",
    "data": {"seq_len": 127},
    "rollout": {
        "environments": [
            {
                "name": "gym",
                "options": {"url": "http://127.0.0.1:9", "data": "tasks.jsonl", "timeout_s": 1.0},
            }
        ],
        "num_prompts_per_step": 4,
        "num_generations_per_prompt": 2,
        "max_new_tokens": 4,
    },
    "batch": {"global_tokens": 8 * 127, "micro_batch": 2},
}
PLAY: dict[str, Any] = {
    **REINFORCE,
    "name": "played",
    "rollout": {
        **REINFORCE["rollout"],
        "environments": [{"name": "mcqa"}, {"name": "arith_chain"}, {"name": "if_constraints"}],
        "prompt": "text",
        "curriculum": {"window": 2},
        "lag": 1,
    },
}
PREFER = {
    **{key: value for key, value in TUNE.items() if key != "tune"},
    "stage": "dpo",
    "name": "preferring",
    "data": {
        "cache": "cache",
        "seq_len": 256,
        "sources": [{"name": "pairs", "path": "preferences.jsonl"}],
    },
}
PIVOT = {
    **REINFORCE,
    "data": {"seq_len": 1023},
    "batch": {"global_tokens": 8 * 1023, "micro_batch": 2},
    "rollout": REINFORCE["rollout"] | {"environments": [{"name": "pivot"}]},
}
TASK = {
    "responses_create_params": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "What is 1 + 1?"}]}],
        "tools": [],
    },
    "agent_ref": {"type": "responses_api_agents", "name": "gym"},
    "expected_answer": "2",
}
ASKED = {
    "model": "mine",
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "n": 2,
    "stop": ["."],
    "seed": 1,
    "logit_bias": {"5": -1.0},
    "stream": False,
    "user": "me",
    "presence_penalty": 0.5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "reasoning_budget": 4,
}
ASKED_CHAT = {
    **ASKED,
    "messages": CHAT["messages"][:4],
    "tools": CHAT["tools"],
    "tool_choice": "auto",
    "logprobs": True,
    "reasoning_effort": "low",
    "chat_template_kwargs": {"enable_thinking": True, "reasoning_budget": 3},
}


STEPS: list[tuple[int, list[str]]] = [
    (0, ["data", "prepare", "all.jsonl", "--out", "shards", "--workers", "1", "--hold-out", "0.1"]),
    (0, ["train", "mine.yaml"]),
    (75, ["train", "mine.yaml", "name=half", "--stop-at", "2"]),
    (0, ["export", "runs/mine", "--out", "exported", "--no-check"]),
    (0, ["data", "prepare", "talks.jsonl", "--out", "chats", "--workers", "1", "--chat",
         "--hold-out", "0.3"]),
    (75, ["train", "sft.yaml", "--stop-at", "1"]),
    (75, ["train", "play.yaml", "--stop-at", "1"]),
    (0, ["train", "mine.yaml", "name=wide", *(f"model.{k}={size}" for k, size in WIDE.items())]),
    (0, ["quantize", "runs/wide", "--preset", "super_nvfp4", "--rows", "4", "--out", "quantized",
         "--no-check"]),
    (0, ["quantize", "runs/wide", "--preset", "super_nvfp4", "--rows", "4", "--out", "compressed",
         "--layout", "compressed-tensors", "--no-check"]),
    (0, ["data", "characters", "all_pairs.jsonl", "--out", "letters/tokenizer.json"]),
    (0, ["data", "pairs", "all_pairs.jsonl", "--tokenizer", "letters", "--candidates", "2",
         "--hold-out", "0.3", "--workers", "1", "--out", "pairs"]),
    (0, ["train", "correct.yaml"]),
    (0, ["correct", "runs/corrector", "--in", "nbest.jsonl", "--out", "fixed.jsonl"]),
    (0, ["evaluate", "runs/mine", "--suite", "mcqa@0", "--suite", "mcqa_likelihood@0",
         "--samples", "2", "--temperature", "0.7", "--tasks", "2", "--max-new-tokens", "2",
         "--out", "scores"]),
    (0, ["generate", "runs/mine", "--prompts", "prompts.jsonl", "--max-new-tokens", "2", "--out",
         "written.jsonl"]),
]  # fmt: skip
"""Commands that make the rest of the world, with their exit codes."""


def build_world(folder: Path) -> None:
    """Write inputs in which everything is right, and train, stop and export runs of them.

    The current folder must be `folder`.
    """
    from nemotron.data.chat.template import TEMPLATE

    texts = [f"Text {i}: the river runs to the sea, and stone {i % 7} stays." for i in range(60)]
    write_texts(texts)
    write_pairs(texts)
    recipes = {"mine": RECIPE, "sft": TUNE, "distill": DISTILL, "rl": REINFORCE, "play": PLAY,
               "student": STUDENT, "correct": CORRECTION, "dpo": PREFER,
               "pivot": PIVOT}  # fmt: skip
    for name, values in recipes.items():
        with open(f"{name}.yaml", "w") as file:
            YAML().dump(values, file)
    Path("tasks/choose.yaml").write_text(json.dumps(HARNESS_TASK))
    Path("completion.json").write_text(json.dumps({**ASKED, "prompt": ["The river", "A"]}))
    Path("asked.json").write_text(json.dumps(ASKED_CHAT))
    Path("judged.jsonl").write_bytes(read.environment_rows())
    Path("name.txt").write_text("owner/name@main")
    run_commands(STEPS)
    # without --no-check an export has hashes, which would keep every damage from its readers
    Path("tokenizer.json").write_bytes(Path("exported/tokenizer.json").read_bytes())
    Path("exported/chat_template.jinja").write_text(TEMPLATE + "\n{#- another one #}")
    Path("answers.jsonl").write_bytes(Path("fixed.jsonl").read_bytes())


def run_commands(steps: Sequence[tuple[int, list[str]]]) -> None:
    """Run commands, each of which must end with its exit code."""
    from nemotron import cli

    for code, words in steps:
        if (found := cli.run(words)) != code:
            raise RuntimeError(f"{words} of the undamaged world ended with {found}")


def write_lines(path: str, rows: Iterable[Any]) -> None:
    """Write JSON lines."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_texts(texts: list[str]) -> None:
    """Write texts, conversations, tasks and prompts."""
    rows = [{"text": text, "n": {"score": 1}} for text in texts]
    write_lines("rows.jsonl", rows[:9])
    write_lines("all.jsonl", rows)
    write_lines("chat.jsonl", [CHAT] * 3)
    write_lines("tasks.jsonl", [TASK] * 3)
    Path("tasks").mkdir()
    write_lines("tasks/rows.jsonl", [{"text": t, "choices": ["yes", "no"]} for t in texts[:3]])
    write_lines("prompts.jsonl", [{"id": n, "prompt": text} for n, text in enumerate(texts[:3])])
    questions = [{"role": "user", "content": f"{i} and {i}?"} for i in range(12)]
    write_lines("talks.jsonl", [{"messages": [q, CHAT["messages"][-1]]} for q in questions])
    write_lines("trajectories.jsonl", [CHAT] * 2)
    said = [{"role": "assistant", "content": word} for word in ("Yes.", "No.")]
    preferred = [{"chosen": [q, said[0]], "rejected": [q, said[1]]} for q in questions[:6]]
    write_lines("preferences.jsonl", preferred)
    blend = {"sources": [{"name": "text", "weight": 1.0, "path": "shards"}]}
    Path("blend.json").write_text(json.dumps(blend))
    write_parquet(texts)


def write_pairs(texts: list[str]) -> None:
    """Write what is corrected, and what switches between languages."""
    pairs = [
        {"id": str(n), "target": text, "candidates": [text.replace("o", "e"), text[1:]],
         "language": "letters"}
        for n, text in enumerate(texts[:24])
    ]  # fmt: skip
    write_lines("all_pairs.jsonl", pairs)
    write_lines("pairs.jsonl", pairs[:3])
    write_lines("nbest.jsonl", [{k: p[k] for k in ("id", "candidates")} for p in pairs[:3]])
    switched = [{"text": text, "translation": text.upper()} for text in texts[:6]]
    write_lines("texts.jsonl", switched)
    Path("lexicon.tsv").write_text("river\tfleuve\tn\nstone\tpierre\nruns to\tva\tv\n")


def write_parquet(texts: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": texts, "n": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, "rows.parquet", row_group_size=20)
