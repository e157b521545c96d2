"""What the fuzzer damages of runs and their inputs, and who reads it."""

import random
from pathlib import Path

import fuzz_mutations as mutate
import fuzz_readers as direct
import fuzz_requests as read
from fuzz_finished import FINISHED
from fuzz_learning import LEARNING
from fuzz_target import Target, forge_manifest, of_recipe
from fuzz_world import ADAPTED, MERGED, STEP

RESUME = ["train", "mine.yaml", "name=half", "--resume", "--stop-at", "3"]
GENERATE = ["generate", "runs/half", "--prompt", "The river", "--max-new-tokens", "2"]
EXPORT = ["export", "runs/half", "--out", "out", "--no-check"]
RUN = [RESUME, GENERATE, EXPORT]
IMPORT = ["import", "exported", "--out", "out"]
IMPORTED = [IMPORT, ["generate", "exported", "--prompt", "The river", "--max-new-tokens", "2"]]
TRAIN = ["train", "mine.yaml", "name=new", "--stop-at", "1"]
LEARN_TOKENS = ["data", "tokenizer", "--out", "learned.json", "--vocab-size", "300"]
SHARDS = [["data", "inspect", "shards", "--check"], ["data", "plan", "mine.yaml"], TRAIN]


ANEW = ["data", "prepare", "rows.jsonl", "--out", "shards", "--workers", "1", "--overwrite"]
PACKED = [["data", "plan", "sft.yaml"], ["data", "inspect", "sft.yaml"]]
PACKED_USES = ("sft.yaml", "chats", "cache")


def prepare(source: str, *options: str) -> list[str]:
    return ["data", "prepare", source, "--out", "out", "--workers", "1", *options]


RUN_USES = ("mine.yaml", "runs/half", "shards", "cache")
HF_USES = ("exported",)
DATA_USES = ("mine.yaml", "shards", "cache")


def of_run(
    file: str, mutation: mutate.Mutation = mutate.of_json, reads: direct.Direct = direct.run
) -> Target:
    return Target(f"runs/half/{file}", mutation, RUN, RUN_USES, direct=reads)


def of_hf(
    file: str,
    mutation: mutate.Mutation = mutate.of_json,
    reads: direct.Direct | None = None,
) -> Target:
    reads = reads or direct.exported("exported")
    return Target(f"exported/{file}", mutation, IMPORTED, HF_USES, direct=reads)


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
    return Target(f"{ADAPTED}/{file}", mutation, commands, uses, seal, direct=direct.adapters)


def of_merged(file: str) -> Target:
    """Of the first of two checkpoints, which are averaged."""

    def seal(world: Path, draw: random.Random) -> None:
        forge_manifest(world, draw, MERGED)

    commands = [
        ["merge", "runs/mine", "--out", "merged"],
        ["merge", "runs/mine", "--last", "2", "--shape", "ema", "--out", "merged"],
    ]
    uses = ("mine.yaml", "runs/mine")
    return Target(f"{MERGED}/{file}", mutate.of_json, commands, uses, seal, direct=direct.merged)


def of_checkpoint(file: str, mutation: mutate.Mutation = mutate.of_json) -> Target:
    def seal(world: Path, draw: random.Random) -> None:
        if file != "manifest.json":
            forge_manifest(world, draw, STEP)

    is_record = file in ("model.json", "state.json", "manifest.json")
    reads = (direct.records if is_record else direct.checkpoint)("runs/half")
    return Target(f"{STEP}/{file}", mutation, RUN, RUN_USES, seal, direct=reads)


RUNS: dict[str, Target] = {
    "recipe": Target(
        "mine.yaml",
        of_recipe,
        [["recipe", "check", "mine.yaml"], ["recipe", "show", "mine.yaml"],
         ["plan", "mine.yaml", "--gpus", "2"], ["train", "mine.yaml", "name=new", "--dry-run"]],
        DATA_USES,
        direct=direct.recipe("mine.yaml"),
    ),
    "blend": Target("blend.json", mutate.of_json, [["recipe", "show", "mine.yaml",
        "data.sources=null", "data.blend=blend.json"]], DATA_USES,
        direct=direct.recipe("mine.yaml", "data.sources=null", "data.blend=blend.json"),
    ),
    "config.json": of_hf("config.json"),
    "hf index": of_hf("model.safetensors.index.json"),
    "hf header": of_hf("model*.safetensors", mutate.of_header),
    "hf tokenizer": of_hf(
        "tokenizer.json", reads=direct.tokenizer("exported/tokenizer.json")
    ),
    "hf others": of_hf("generation_config.json", reads=direct.kept("exported")),
    "hf tokenizer config": of_hf("tokenizer_config.json", reads=direct.kept("exported")),
    "tokenizer.json": Target(
        "tokenizer.json",
        mutate.of_json,
        [prepare("rows.jsonl", "--tokenizer", "tokenizer.json")],
        ("rows.jsonl",),
        direct=direct.tokenizer("tokenizer.json"),
    ),
    "chat rows": Target(
        "chat.jsonl", mutate.of_lines, [prepare("chat.jsonl", "--chat")],
        direct=direct.prepared("chat.jsonl", is_chat=True),
    ),
    "jsonl": Target(
        "rows.jsonl", mutate.of_lines,
        [prepare("rows.jsonl"), [*LEARN_TOKENS, "rows.jsonl"]],
        direct=direct.prepared("rows.jsonl"),
    ),
    "parquet": Target(
        "rows.parquet", mutate.of_integers, [prepare("rows.parquet")],
        direct=direct.prepared("rows.parquet"),
    ),
    "shard index": Target(
        "shards/*.idx", mutate.of_integers, SHARDS, DATA_USES, direct=direct.shards("shards")
    ),
    "shard manifest": Target(
        "shards/manifest.json", mutate.of_json, SHARDS, DATA_USES, direct=direct.shards("shards")
    ),
    "run recipe": of_run("recipe.yaml", of_recipe, direct.run_recipe),
    "run provenance": of_run("provenance.json"),
    "run status": of_run("status.json"),
    "run metrics": of_run("metrics.jsonl", mutate.of_lines),
    "run tokenizer": of_run("tokenizer.json", reads=direct.tokenizer("runs/half/tokenizer.json")),
    "run experts": Target(
        "runs/mine/experts.json", mutate.of_json, [["report", "runs/mine", "--out", "page.html"]],
        ("runs/mine",), direct=direct.reported,
    ),
    "output mark": Target(
        "shards/.nemotron.json", mutate.of_json, [ANEW],
        ("rows.jsonl", "shards"),
    ),
    "cached counts": Target(
        "cache/rows-*/counts.json", mutate.of_json, PACKED, PACKED_USES,
        direct=direct.packed,
    ),
    "cached rows": Target(
        "cache/rows-*/row_ends.npy", mutate.of_integers, PACKED, PACKED_USES,
        direct=direct.packed,
    ),
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
        direct=direct.recipe("sft.yaml"),
    ),
    "distill recipe": Target(
        "distill.yaml",
        of_recipe,
        [["recipe", "check", "distill.yaml"], ["train", "distill.yaml", "name=new", "--dry-run"]],
        ("runs/mine", "runs/adapted", "chats", "cache"),
        direct=direct.recipe("distill.yaml"),
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
        direct=direct.reported,
    ),
    "sft rows": Target(
        "talks.jsonl",
        mutate.of_lines,
        [["train", "sft.yaml", "name=new", "data.sources=[{name: chats, path: talks.jsonl}]",
          "--dry-run"]],
        ("sft.yaml", "runs/mine"),
        direct=direct.prepared("talks.jsonl", is_chat=True),
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
        is_refused=True,  # without the Hub
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

TARGETS: dict[str, Target] = RUNS | LEARNING | FINISHED
