"""What the fuzzer damages: a world in which everything is right, its files, and who reads them."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_mutations as mutate
import fuzz_requests as read
import xxhash
from ruamel.yaml import YAML

RECIPE = {
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
CHAT = {
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
    },
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

RESUME = ["train", "mine.yaml", "name=half", "--resume", "--stop-at", "3"]
GENERATE = ["generate", "runs/half", "--prompt", "The river", "--max-new-tokens", "2"]
EXPORT = ["export", "runs/half", "--out", "out", "--no-check"]
RUN = [RESUME, GENERATE, EXPORT]
IMPORT = ["import", "exported", "--out", "out"]
IMPORTED = [IMPORT, ["generate", "exported", "--prompt", "The river", "--max-new-tokens", "2"]]
TRAIN = ["train", "mine.yaml", "name=new", "--stop-at", "1"]
SHARDS = [["data", "inspect", "shards", "--check"], ["data", "plan", "mine.yaml"], TRAIN]


def prepare(source: str, *options: str) -> list[str]:
    return ["data", "prepare", source, "--out", "out", "--workers", "1", *options]


@dataclass(frozen=True)
class Target:
    """A file that is damaged, the commands of which one reads it, and which folders they use."""

    file: str
    """Its path in the world; of several that match a pattern, the first is damaged."""
    mutation: mutate.Mutation
    commands: list[list[str]]
    uses: tuple[str, ...] = ()
    """Folders and files beside the damaged one that a command reads or changes."""
    seal: Callable[[Path, random.Random], None] = lambda world, draw: None
    """Forges what vouches for the damaged file, so that its readers get to see it."""
    reader: read.Reader = read.run_command
    """What is called with a command's words."""


def forge_manifest(world: Path, draw: random.Random, step: str = STEP) -> None:
    """Let the manifest of the checkpoint have the hashes of its files, most times."""
    folder = world / step
    manifest = json.loads((folder / "manifest.json").read_bytes())
    if draw.random() < 0.1:
        return
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {
            "bytes": len(content),
            "xxh128": xxhash.xxh128(content).hexdigest(),
        }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def of_recipe(content: bytes, draw: random.Random) -> bytes:
    """Change a value of a recipe, which then stands there as JSON, or the bytes of its YAML."""
    if draw.random() < 0.4:
        return mutate.of_bytes(content, draw)
    value = YAML(typ="safe", pure=True).load(content.decode())
    return mutate.of_json(json.dumps(value).encode(), draw)


RUN_USES = ("mine.yaml", "runs/half", "shards", "cache")
HF_USES = ("exported",)
DATA_USES = ("mine.yaml", "shards", "cache")


def of_run(file: str, mutation: mutate.Mutation = mutate.of_json) -> Target:
    return Target(f"runs/half/{file}", mutation, RUN, RUN_USES)


def of_adapters(file: str, mutation: mutate.Mutation = mutate.of_json) -> Target:
    def seal(world: Path, draw: random.Random) -> None:
        forge_manifest(world, draw, ADAPTED)

    commands = [
        ["generate", "runs/adapted", "--prompt", "The river", "--max-new-tokens", "2"],
        ["export", "runs/adapted", "--out", "out", "--no-check"],
        ["export", "runs/adapted", "--out", "out", "--adapter"],
        ["train", "sft.yaml", "name=new", "init_from=runs/adapted", "--stop-at", "1"],
        ["train", "distill.yaml", "name=new", "--stop-at", "1"],
        ["train", "runs/adapted", "--resume"],
    ]
    uses = ("sft.yaml", "distill.yaml", "runs/adapted", "runs/mine", "chats", "cache")
    return Target(f"{ADAPTED}/{file}", mutation, commands, uses, seal)


def of_merged(file: str) -> Target:
    """Of the first of two checkpoints, which are averaged."""

    def seal(world: Path, draw: random.Random) -> None:
        forge_manifest(world, draw, MERGED)

    commands = [
        ["merge", "runs/mine", "--out", "merged"],
        ["merge", "runs/mine", "--last", "2", "--shape", "ema", "--out", "merged"],
    ]
    return Target(f"{MERGED}/{file}", mutate.of_json, commands, ("mine.yaml", "runs/mine"), seal)


def of_checkpoint(file: str, mutation: mutate.Mutation = mutate.of_json) -> Target:
    seal = (lambda world, draw: None) if file == "manifest.json" else forge_manifest
    return Target(f"{STEP}/{file}", mutation, RUN, RUN_USES, seal)


TARGETS: dict[str, Target] = {
    "recipe": Target(
        "mine.yaml",
        of_recipe,
        [["recipe", "check", "mine.yaml"], ["recipe", "show", "mine.yaml"],
         ["plan", "mine.yaml", "--gpus", "8"], ["train", "mine.yaml", "name=new", "--dry-run"]],
        DATA_USES,
    ),
    "blend": Target("blend.json", mutate.of_json, [["recipe", "show", "mine.yaml",
        "data.sources=null", "data.blend=blend.json"]], DATA_USES),
    "config.json": Target("exported/config.json", mutate.of_json, IMPORTED, HF_USES),
    "hf index": Target(
        "exported/model.safetensors.index.json", mutate.of_json, IMPORTED, HF_USES
    ),
    "hf header": Target("exported/model*.safetensors", mutate.of_header, IMPORTED, HF_USES),
    "hf tokenizer": Target("exported/tokenizer.json", mutate.of_json, IMPORTED, HF_USES),
    "hf others": Target(
        "exported/generation_config.json", mutate.of_json, IMPORTED, HF_USES
    ),
    "hf tokenizer config": Target(
        "exported/tokenizer_config.json", mutate.of_json, IMPORTED, HF_USES
    ),
    "tokenizer.json": Target(
        "tokenizer.json",
        mutate.of_json,
        [prepare("rows.jsonl", "--tokenizer", "tokenizer.json")],
        ("rows.jsonl",),
    ),
    "chat rows": Target("chat.jsonl", mutate.of_lines, [prepare("chat.jsonl", "--chat")]),
    "jsonl": Target("rows.jsonl", mutate.of_lines, [prepare("rows.jsonl")]),
    "parquet": Target("rows.parquet", mutate.of_integers, [prepare("rows.parquet")]),
    "shard index": Target("shards/*.idx", mutate.of_integers, SHARDS, DATA_USES),
    "shard manifest": Target("shards/manifest.json", mutate.of_json, SHARDS, DATA_USES),
    "run recipe": of_run("recipe.yaml", of_recipe),
    "run provenance": of_run("provenance.json"),
    "run status": of_run("status.json"),
    "run metrics": of_run("metrics.jsonl", mutate.of_lines),
    "run tokenizer": of_run("tokenizer.json"),
    "checkpoint manifest": of_checkpoint("manifest.json"),
    "checkpoint model": of_checkpoint("model.json"),
    "checkpoint state": of_checkpoint("state.json"),
    "checkpoint index": of_checkpoint("index.json"),
    "checkpoint header": of_checkpoint("rank-00000.safetensors", mutate.of_header),
    "adapter index": of_adapters("index.json"),
    "adapter header": of_adapters("rank-00000.safetensors", mutate.of_header),
    "adapter model": of_adapters("model.json"),
    "sft recipe": Target(
        "sft.yaml",
        of_recipe,
        [["recipe", "check", "sft.yaml"], ["train", "sft.yaml", "name=new", "--dry-run"]],
        ("runs/mine", "chats", "cache"),
    ),
    "distill recipe": Target(
        "distill.yaml",
        of_recipe,
        [["recipe", "check", "distill.yaml"], ["train", "distill.yaml", "name=new", "--dry-run"]],
        ("runs/mine", "runs/adapted", "chats", "cache"),
    ),
    "rl recipe": Target(
        "rl.yaml", of_recipe, [["rl.yaml"]], ("tasks.jsonl",), reader=read.draw_tasks
    ),
    "tasks": Target(
        "tasks.jsonl", mutate.of_lines, [["rl.yaml"]], ("rl.yaml",), reader=read.draw_tasks
    ),
    "environment request": Target(
        "judged.jsonl", mutate.of_lines, [["judged.jsonl"]], reader=read.judge
    ),
    "merged index": of_merged("index.json"),
    "merged model": of_merged("model.json"),
    "merged state": of_merged("state.json"),
    "reported metrics": Target(
        "runs/mine/metrics.jsonl",
        mutate.of_lines,
        [["report", "runs/mine", "--out", "page.html"], ["runs", "runs"],
         ["compare", "runs/mine", "runs/half"]],
        ("runs",),
    ),
    "rollouts": Target(
        "runs/played/rollouts/step-00000000.jsonl",
        mutate.of_lines,
        [["rl", "reverify", "runs/played"], ["rl", "reverify", "runs/played", "--out", "again"]],
        ("runs/played",),
    ),
    "sft rows": Target(
        "talks.jsonl",
        mutate.of_lines,
        [["train", "sft.yaml", "name=new", "data.sources=[{name: chats, path: talks.jsonl}]",
          "--dry-run"]],
        ("sft.yaml", "runs/mine"),
    ),
    "chat template": Target(
        "exported/chat_template.jinja",
        mutate.of_bytes,
        [["chat", "exported", "--max-new-tokens", "2"]],
        HF_USES,
        reader=read.converse,
    ),
    "hub name": Target(
        "name.txt",
        mutate.of_bytes,
        [["generate", "NAME", "--prompt", "x"], ["import", "NAME", "--out", "out"],
         ["chat", "NAME"], ["train", "mine.yaml", "name=new", "init_from=NAME"]],
        DATA_USES,
        reader=read.name_model,
    ),
    "completion request": Target(
        "completion.json", mutate.of_json, [["/v1/completions", "completion.json"]],
        ("runs/mine",), reader=read.ask_server,
    ),
    "chat request": Target(
        "asked.json", mutate.of_json, [["/v1/chat/completions", "asked.json"]],
        ("runs/mine",), reader=read.ask_server,
    ),
}  # fmt: skip


def build_world(folder: Path) -> None:
    """Write inputs in which everything is right, and train, stop and export a run of them.

    The current folder must be `folder`.
    """
    from nemotron import cli
    from nemotron.data.chat.template import TEMPLATE

    texts = [f"Text {i}: the river runs to the sea, and stone {i % 7} stays." for i in range(60)]
    lines = "".join(json.dumps({"text": text, "n": {"score": 1}}) + "\n" for text in texts)
    Path("rows.jsonl").write_text(lines[: lines.index("Text 9")].rpartition("\n")[0] + "\n")
    Path("all.jsonl").write_text(lines)
    Path("chat.jsonl").write_text((json.dumps(CHAT) + "\n") * 3)
    talks = [
        {"messages": [{"role": "user", "content": f"{i} and {i}?"}, CHAT["messages"][-1]]}
        for i in range(12)
    ]
    Path("talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    blend = {"sources": [{"name": "text", "weight": 1.0, "path": "shards"}]}
    Path("blend.json").write_text(json.dumps(blend))
    recipes = {"mine": RECIPE, "sft": TUNE, "distill": DISTILL, "rl": REINFORCE, "play": PLAY}
    for name, values in recipes.items():
        with open(f"{name}.yaml", "w") as file:
            YAML().dump(values, file)
    Path("tasks.jsonl").write_text((json.dumps(TASK) + "\n") * 3)
    Path("judged.jsonl").write_bytes(read.environment_rows())
    Path("completion.json").write_text(json.dumps({**ASKED, "prompt": ["The river", "A"]}))
    Path("asked.json").write_text(json.dumps(ASKED_CHAT))
    Path("name.txt").write_text("owner/name@main")
    write_parquet(texts)
    for code, words in (
        (0, ["data", "prepare", "all.jsonl", "--out", "shards", "--workers", "1",
             "--hold-out", "0.1"]),
        (0, ["train", "mine.yaml"]),
        (75, ["train", "mine.yaml", "name=half", "--stop-at", "2"]),
        (0, ["export", "runs/mine", "--out", "exported", "--no-check"]),
        (0, ["data", "prepare", "talks.jsonl", "--out", "chats", "--workers", "1", "--chat",
             "--hold-out", "0.3"]),
        (75, ["train", "sft.yaml", "--stop-at", "1"]),
        (75, ["train", "play.yaml", "--stop-at", "1"]),
    ):  # fmt: skip
        if (found := cli.run(words)) != code:
            raise RuntimeError(f"{words} of the undamaged world ended with {found}")
    # without --no-check an export has hashes, which would keep every damage from its readers
    Path("tokenizer.json").write_bytes(Path("exported/tokenizer.json").read_bytes())
    Path("exported/chat_template.jinja").write_text(TEMPLATE + "\n{#- another one #}")


def write_parquet(texts: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": texts, "n": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, "rows.parquet", row_group_size=20)
