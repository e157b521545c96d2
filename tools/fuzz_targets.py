"""What the fuzzer damages: a world in which everything is right, its files, and who reads them."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fuzz_mutations as mutate
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


def forge_manifest(world: Path, draw: random.Random) -> None:
    """Let the manifest of the checkpoint have the hashes of its files, most times."""
    folder = world / STEP
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
}  # fmt: skip


def build_world(folder: Path) -> None:
    """Write inputs in which everything is right, and train, stop and export a run of them.

    The current folder must be `folder`.
    """
    from nemotron import cli

    texts = [f"Text {i}: the river runs to the sea, and stone {i % 7} stays." for i in range(60)]
    lines = "".join(json.dumps({"text": text, "n": {"score": 1}}) + "\n" for text in texts)
    Path("rows.jsonl").write_text(lines[: lines.index("Text 9")].rpartition("\n")[0] + "\n")
    Path("all.jsonl").write_text(lines)
    Path("chat.jsonl").write_text((json.dumps(CHAT) + "\n") * 3)
    blend = {"sources": [{"name": "text", "weight": 1.0, "path": "shards"}]}
    Path("blend.json").write_text(json.dumps(blend))
    with open("mine.yaml", "w") as file:
        YAML().dump(RECIPE, file)
    write_parquet(texts)
    for code, words in (
        (0, ["data", "prepare", "all.jsonl", "--out", "shards", "--workers", "1",
             "--hold-out", "0.1"]),
        (0, ["train", "mine.yaml"]),
        (75, ["train", "mine.yaml", "name=half", "--stop-at", "2"]),
        (0, ["export", "runs/mine", "--out", "exported", "--no-check"]),
    ):  # fmt: skip
        if (found := cli.run(words)) != code:
            raise RuntimeError(f"{words} of the undamaged world ended with {found}")
    # without --no-check an export has hashes, which would keep every damage from its readers
    Path("tokenizer.json").write_bytes(Path("exported/tokenizer.json").read_bytes())


def write_parquet(texts: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": texts, "n": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, "rows.parquet", row_group_size=20)
