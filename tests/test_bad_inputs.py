"""Bad inputs: each gets exit code 2 and one sentence, and changes nothing on the disk."""

import hashlib
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron.cli import run
from nemotron.recipe.load import load_recipe
from nemotron.run.folder import RunFolder
from tests.support.prepared import write_prepared

RECIPE = """\
name: mine
output: runs
device: cpu
model:
  vocab_size: 4096
  hidden_size: 24
  hybrid_override_pattern: ME*-
  mamba_num_heads: 4
  mamba_head_dim: 6
  n_groups: 2
  ssm_state_size: 8
  num_attention_heads: 4
  num_key_value_heads: 2
  head_dim: 6
  intermediate_size: 40
  n_routed_experts: 6
  num_experts_per_tok: 2
  moe_intermediate_size: 20
  moe_shared_expert_intermediate_size: 28
  num_nextn_predict_layers: 1
  mtp_hybrid_override_pattern: "*E"
data:
  cache: cache
  seq_len: 32
  sources:
    - {name: text, weight: 1.0, path: shards/text}
batch:
  global_tokens: 128
  micro_batch: 2
schedule:
  peak: 1.0e-2
  total_steps: 4
  warmup_steps: 1
  decay_steps: 2
optimizer:
  weight_decay: 0.1
checkpoint:
  every_steps: 2
  keep: 2
evaluation:
  every_steps: 4
  tokens: 64
"""


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything is right: recipe, shards, a stopped run, its export."""
    world = tmp_path_factory.mktemp("valid")
    texts = [f"Text {i}: the river runs to the sea, and stone {i % 7} stays.\n" for i in range(90)]
    write_prepared(texts, world / "shards" / "text", validation_fraction=0.1)
    (world / "mine.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        assert run(["train", "mine.yaml"]) == 0
        assert run(["train", "mine.yaml", "name=half", "--stop-at", "2"]) == 75
        assert run(["export", "runs/mine", "--out", "exported"]) == 0
        assert run([*QUANTIZE, "--preset", "fp8", "--out", "small"]) == 0
    return world


@pytest.fixture
def world(valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to break, as the current folder."""
    copy = tmp_path / "world"
    shutil.copytree(valid, copy, symlinks=True)
    monkeypatch.chdir(copy)
    return copy


TRAIN = ["train", "mine.yaml", "name=new"]
CHECK = ["recipe", "check", "mine.yaml"]
RESUME = ["train", "mine.yaml", "name=half", "--resume"]
IMPORT = ["import", "exported", "--out", "imported"]
GENERATE = ["generate", "runs/mine", "--prompt", "The river"]
QUANTIZE = ["quantize", "runs/mine", "--rows", "2", "--no-check"]


@dataclass(frozen=True)
class Row:
    """What is broken, the command, and what the answer must name."""

    name: str
    spoil: Callable[[Path], object]
    command: list[str]
    words: tuple[str, ...]


def replace(name: str, old: str, new: str) -> Callable[[Path], object]:
    """Replace a piece of any text file."""

    def spoil(world: Path) -> None:
        text = (world / name).read_text()
        assert old in text
        (world / name).write_text(text.replace(old, new))

    return spoil


def edit(old: str, new: str) -> Callable[[Path], object]:
    """Replace a piece of the recipe."""
    return replace("mine.yaml", old, new)


def line(old: str) -> int:
    return RECIPE[: RECIPE.index(old)].count("\n") + 1


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda world: (world / name).write_bytes(data)


def nothing(world: Path) -> None:
    """Leave everything as it is: the command itself is wrong."""


def remove(name: str) -> Callable[[Path], object]:
    return lambda world: (world / name).unlink()


def truncate(name: str, by: int) -> Callable[[Path], object]:
    return lambda world: os.truncate(world / name, (world / name).stat().st_size - by)


def patch(name: str, at: int, data: bytes) -> Callable[[Path], object]:
    """Overwrite bytes; a negative place counts from the end."""

    def spoil(world: Path) -> None:
        with open(world / name, "r+b") as file:
            file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
            file.write(data)

    return spoil


def both(*steps: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda world: [step(world) for step in steps]


def occupy(name: str) -> Callable[[Path], object]:
    """Put a folder with a file in it where something is to be written."""

    def spoil(world: Path) -> None:
        (world / name).mkdir()
        (world / name / "mine.txt").write_text("kept")

    return spoil


def weights(change: Callable[[dict], object], folder: str = "exported") -> Callable[[Path], object]:
    """Change the tensors of an export, whose hash is then no longer known."""

    def spoil(world: Path) -> None:
        (file,) = (world / folder).glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        index = world / folder / "model.safetensors.index.json"
        if index.exists():
            values = json.loads(index.read_text())
            values["weight_map"] = dict.fromkeys(tensors, file.name)
            index.write_text(json.dumps(values))

    return spoil


PICKLE = b"\x80\x04cos\nsystem\n(S'touch executed'\ntR."

RECIPE_ROWS = [
    Row("1 unknown key", edit("optimizer:", "optimzer:"), CHECK,
        (f"mine.yaml:{line('optimizer:')}", "optimzer", "`optimizer`")),
    Row("2 wrong section", edit("  seq_len: 32", "  seq_len: 32\n  weight_decay: 0.1"), CHECK,
        (f"mine.yaml:{line('seq_len') + 1}", "weight_decay", "belongs under `optimizer`")),
    Row("3 text for a number", edit("peak: 1.0e-2", "peak: fast"), CHECK,
        (f"mine.yaml:{line('peak')}", "schedule.peak", "fast", "number")),
    Row("3 fraction for a whole number", edit("total_steps: 4", "total_steps: 1.5"), CHECK,
        (f"mine.yaml:{line('total_steps')}", "schedule.total_steps", "1.5", "whole number")),
    Row("3 truth for a number", edit("total_steps: 4", "total_steps: true"), CHECK,
        ("schedule.total_steps", "true", "whole number")),
    Row("5 duplicate key", edit("  micro_batch: 2", "  micro_batch: 2\n  micro_batch: 1"), CHECK,
        (f"{line('micro_batch')}", f"{line('micro_batch') + 1}", "micro_batch")),
    Row("6 tab", edit("  seq_len: 32", "\tseq_len: 32"), CHECK, ("mine.yaml:", r"'\t'")),
    Row("6 bad indent", edit("  seq_len: 32", "   seq_len: 32"), CHECK, ("mine.yaml",)),
    Row("6 not a mapping", write("mine.yaml", "- a\n- b\n"), CHECK, ("mine.yaml", "mapping")),
    Row("6 empty", write("mine.yaml", ""), CHECK, ("mine.yaml", "empty")),
    Row("6 binary", write("mine.yaml", bytes(range(256))), CHECK, ("mine.yaml",)),
    Row("6 list for a mapping", nothing, [*CHECK, "schedule=[1]"],
        ("command line", "schedule = [1]", "mapping")),
    Row("6 null for a mapping", nothing, [*CHECK, "model=null"], ("model = null", "mapping")),
    Row("3 null for a number", edit("peak: 1.0e-2", "peak:"), CHECK,
        (f"mine.yaml:{line('peak')}", "schedule.peak = null", "number")),
    Row("6 missing file", remove("mine.yaml"), CHECK, ("mine.yaml", "no such file")),
    Row("6 folder", both(remove("mine.yaml"), lambda w: (w / "mine.yaml").mkdir()), CHECK,
        ("mine.yaml",)),
    Row("7 base missing", edit("name: mine", "extends: base.yaml\nname: mine"), CHECK,
        ("mine.yaml -> base.yaml", "does not exist")),
    Row("7 circle", both(edit("name: mine", "extends: b.yaml\nname: mine"),
        write("b.yaml", "extends: mine.yaml\n")), CHECK, ("mine.yaml -> b.yaml -> mine.yaml",)),
    Row("8 missing path", nothing, [*CHECK, "schedule.a.b=1"],
        ("command line", "schedule.a is unknown")),
    Row("8 no equals sign", nothing, [*CHECK, "schedule.peak"], ("schedule.peak", "key=value")),
    Row("9 unresolved", edit("peak: 1.0e-2", "peak: ${schedule.peek}"), CHECK,
        (f"mine.yaml:{line('peak')}", "schedule.peak", "${schedule.peek}")),
    Row("9 circle", both(edit("peak: 1.0e-2", "peak: ${schedule.min}"),
        edit("  warmup_steps", "  min: ${schedule.peak}\n  warmup_steps")), CHECK,
        ("schedule.peak", "${schedule.min}")),
    Row("10 letter", edit("pattern: ME*-", "pattern: MEX-"), CHECK,
        ("'X'", "position 2", "M", "*", "E", "-")),
    Row("10 empty pattern", edit("pattern: ME*-", "pattern: ''"), CHECK,
        ("hybrid_override_pattern",)),
    Row("10 only dense layers", edit("pattern: ME*-", "pattern: '--'"), CHECK,
        ("hybrid_override_pattern = --", "M or *")),
    Row("11 length", edit("vocab_size: 4096", "vocab_size: 4096\n  num_hidden_layers: 5"), CHECK,
        ("num_hidden_layers = 5", "4")),
    Row("12 too many experts a token", edit("per_tok: 2", "per_tok: 7"), CHECK, ("7", "6")),
    Row("12 no expert", edit("per_tok: 2", "per_tok: 0"), CHECK, ("num_experts_per_tok", "0")),
    Row("12 groups", edit("per_tok: 2", "per_tok: 2\n  n_group: 4\n  topk_group: 2"), CHECK,
        ("n_group", "4", "6")),
    Row("13 heads", edit("key_value_heads: 2", "key_value_heads: 3"), CHECK,
        ("num_attention_heads", "4", "num_key_value_heads", "3")),
    Row("13 mamba groups", edit("n_groups: 2", "n_groups: 3"), CHECK,
        ("mamba_num_heads", "4", "n_groups", "3")),
    Row("16 global batch", edit("global_tokens: 128", "global_tokens: 100"), CHECK,
        ("global_tokens = 100", "32", "nearest is 96")),
    Row("16 micro batch", edit("micro_batch: 2", "micro_batch: 3"), CHECK,
        ("micro_batch = 3", "4 rows", "nearest is")),
    Row("17 row length", edit("hidden_size: 24", "hidden_size: 24\n  max_position_embeddings: 16"),
        CHECK, ("seq_len = 32", "16")),
    Row("19 missing package", nothing, [*TRAIN, "ops.ssd=mamba_ssm"],
        ("mamba_ssm", "pip install", "remove the key")),
    Row("19 unknown backend", nothing, [*TRAIN, "ops.ssd=fastest"], ("fastest", "chunked")),
    Row("20 negative rate", edit("peak: 1.0e-2", "peak: -1"), CHECK, ("schedule.peak", "-1")),
    Row("20 rate is no number", edit("peak: 1.0e-2", "peak: .nan"), CHECK,
        ("schedule.peak", "nan")),
    Row("20 infinite rate", edit("peak: 1.0e-2", "peak: .inf"), CHECK, ("schedule.peak", "inf")),
    Row("20 warm-up too long", edit("warmup_steps: 1", "warmup_steps: 9"), CHECK,
        ("warm-up", "512")),
    Row("20 no weight", edit("weight: 1.0", "weight: 0.0"), CHECK, ("weight", "0")),
    Row("20 no sources", edit("    - {name: text, weight: 1.0, path: shards/text}", "    []"),
        CHECK, ("sources",)),
    Row("21 prediction without pattern", edit('  mtp_hybrid_override_pattern: "*E"\n', ""), CHECK,
        ("mtp_hybrid_override_pattern",)),
    Row("21 negative loss weight", nothing, [*CHECK, "loss.mtp_loss_factor=-0.1"],
        ("mtp_loss_factor", "-0.1")),
    Row("23 newer recipe", edit("name: mine", "version: 2\nname: mine"), CHECK,
        ("mine.yaml:1", "version = 2", "1")),
    Row("a name that leaves the folder", nothing, [*CHECK, "name=../mine"], ("name = ../mine",)),
    Row("no folder", nothing, [*CHECK, "output="], ("output", "text")),
    Row("quantized float32", nothing, [*CHECK, "precision.preset=nvfp4_super"],
        ("precision", "compute = fp32", "bf16")),
    Row("an unknown preset", nothing, [*CHECK, "precision.preset=nvfp44"],
        ("precision.preset", "nvfp44", "nvfp4")),
    Row("an unknown word for all of it", nothing, [*CHECK, "precision=nvfp44"],
        ("precision = nvfp44", "fp32, bf16", "did you mean nvfp4?")),
    Row("histories of nothing", nothing, [*CHECK, "precision.fp8_delayed.margin=1"],
        ("precision.fp8_delayed.margin", "no effect", "fp8_delayed")),
    Row("a backend of nothing", nothing, [*CHECK, "precision.backend=emulate"],
        ("precision.backend", "no effect", "quantized")),
    Row("ingredients of nothing", nothing, [*CHECK, "precision.nvfp4.hadamard=false"],
        ("precision.nvfp4.hadamard", "no effect")),
    Row("nothing reads it", edit("pattern: ME*-", "pattern: ME*E"), CHECK,
        ("intermediate_size", "no effect", "no - layer")),
]  # fmt: skip

SHARD_PREFIX = "shards/text/train-00000"
PLAIN = remove("shards/text/manifest.json")
"""Without its manifest the folder is one of shards that somebody else wrote."""


def write_other(world: Path, name: str) -> None:
    """Write a shard of other text in the place of a prepared one."""
    write_prepared(["One.", "Two."], world / "other")
    for end in ("bin", "idx"):
        (world / "other" / f"train-00000.{end}").rename(world / "shards" / "text" / f"{name}.{end}")


DATA_ROWS = [
    Row("blend of wrong types", write("blend.json", '{"sources": [3, {"weight": []}]}'),
        [*CHECK, "data.sources=null", "data.blend=blend.json"],
        ("blend.json: data.sources.0 = 3",)),
    Row("blend with another text", write("blend.json", '[0.5, "x", "much", "y"]'),
        [*CHECK, "data.sources=null", "data.blend=blend.json"], ("blend.json", "much")),
    Row("24 missing path", edit("path: shards/text", "path: shards/nothing"), TRAIN,
        ("nothing.bin", "does not exist", "/world/")),
    Row("24 a folder without shards", edit("path: shards/text", "path: runs"), TRAIN,
        ("runs", "manifest.json", "shards")),
    Row("24 prefix with its ending", edit("shards/text", "shards/text/train-00000.bin"), TRAIN,
        ("train-00000.bin.bin", "without its .bin or .idx ending")),
    Row("25 bin without idx", remove(f"{SHARD_PREFIX}.idx"), TRAIN, ("idx", "does not exist")),
    Row("25 idx without bin", remove(f"{SHARD_PREFIX}.bin"), TRAIN, ("bin", "does not exist")),
    Row("25 magic", patch(f"{SHARD_PREFIX}.idx", 0, b"NOTANIDX"), TRAIN, (".idx", "MMIDIDX")),
    Row("25 version", patch(f"{SHARD_PREFIX}.idx", 9, struct.pack("<Q", 7)), TRAIN,
        (".idx", "version 7")),
    Row("25 id type", patch(f"{SHARD_PREFIX}.idx", 17, b"\x63"), TRAIN, (".idx", "code 99")),
    Row("25 sequence count", patch(f"{SHARD_PREFIX}.idx", 18, struct.pack("<Q", 7)), TRAIN,
        (".idx", "7 sequences")),
    Row("25 document count", patch(f"{SHARD_PREFIX}.idx", 26, struct.pack("<Q", 0)), TRAIN,
        (".idx", "empty document index")),
    Row("25 garbage in the index", both(patch(f"{SHARD_PREFIX}.idx", 60, b"\xff" * 8), PLAIN),
        TRAIN, ("train-00000.idx", "damaged", "sequence 6")),
    Row("25 garbage in the manifest", write("shards/text/manifest.json", "{"), TRAIN,
        ("manifest.json", "prepare the folder again")),
    Row("25 newer manifest", write("shards/text/manifest.json", '{"format": 9}'), TRAIN,
        ("manifest.json", "format = 9 is unknown")),
    Row("25 short idx", truncate(f"{SHARD_PREFIX}.idx", 8), TRAIN, (".idx", "bytes")),
    Row("25 short bin", truncate(f"{SHARD_PREFIX}.bin", 10), TRAIN, (".bin", "bytes")),
    Row("25 another shard under its name", lambda w: write_other(w, "train-00000"), TRAIN,
        ("train-00000: has 2 documents", "manifest.json says")),
    Row("26 no token at all", lambda w: write_prepared([], w / "shards" / "text"), TRAIN,
        ("text", "no tokens")),
    Row("27 id outside", both(patch(f"{SHARD_PREFIX}.bin", 0, b"\xff\xff"), PLAIN), TRAIN,
        ("65535", "document 0, position 0", "4095")),
    Row("27 id outside in a prepared shard", patch(f"{SHARD_PREFIX}.bin", 0, b"\xff\xff" * 900),
        TRAIN, ("65535", "4095")),
    Row("27 vocabulary too small", nothing, [*TRAIN, "model.vocab_size=100"],
        ("shards/text/manifest.json: counts.largest_id = ", "model.vocab_size")),
    Row("29 negative weight", edit("weight: 1.0", "weight: -1.0"), CHECK, ("weight", "-1")),
    Row("29 unknown tier", edit("weight: 1.0", "tier: gold"), CHECK, ("gold", "tiers")),
    Row("29 blend is missing", nothing, [*CHECK, "data.blend=none.yaml"], ("none.yaml",)),
    Row("29 blend of odd length", write("b.json", '["0.3", "shards/text", "0.7"]'),
        [*CHECK, "data.blend=b.json"], ("b.json", "3 entries")),
    Row("29 blend weight of nothing", write("b.json", '[0, "shards/text"]'),
        [*CHECK, "data.blend=b.json"], ("b.json", "above 0")),
    Row("29 blend without sources", write("b.yaml", "texts: 3"),
        [*CHECK, "data.blend=b.yaml"], ("b.yaml", "sources")),
    Row("29 phase of odd length", edit("batch:\n", "phases: [{name: a, tokens: 100}]\nbatch:\n"),
        CHECK, ("phases.0.tokens = 100", "128")),
    Row("29 phase without an end", edit("batch:\n",
        "phases: [{name: a}, {name: b, steps: 2}]\nbatch:\n"), CHECK, ("phases.0", "no length")),
    Row("29 phases beyond the schedule", edit("batch:\n",
        "phases: [{name: a, steps: 9}, {name: b}]\nbatch:\n"), CHECK,
        ("phases.1", "nothing left")),
    Row("29 samples without conversations", nothing,
        [*TRAIN, "data.objective=samples"], ("data.objective = samples", "text")),
    Row("a rule for no layer", nothing, [*TRAIN, "precision.compute=bf16",
        "precision.rules=[{format: mxfp8, kind: mamba.inproj}]"],
        ("precision.rules.0", "mamba.inproj")),
    Row("28 no such end of text", nothing, [*TRAIN, "data.eod_token=<nothing>"], ("<nothing>",)),
    Row("28 no tokenizer", nothing, [*TRAIN, "data.tokenizer=nowhere.json"],
        ("nowhere.json", "does not exist")),
    Row("28 not a tokenizer", write("t.json", "{}"), [*TRAIN, "data.tokenizer=t.json"],
        ("t.json", "not a tokenizer.json")),
    Row("28 another tokenizer", lambda w: (w / "t.json").write_text(
        (w / "runs/mine/tokenizer.json").read_text() + "\n"), [*TRAIN, "data.tokenizer=t.json"],
        ("manifest.json: tokenizer = ", "is not that of data.tokenizer")),
    Row("28 binary tokenizer", write("t.json", b"\xff\xfe"), [*TRAIN, "data.tokenizer=t.json"],
        ("t.json", "not a tokenizer.json")),
    Row("32 no whole row", nothing,
        [*TRAIN, "data.seq_len=100000", "batch.global_tokens=200000"],
        ("shards/text", "tokens to train on", "data.seq_len = 100000")),
    Row("47 cache is a file", write("taken", ""),
        [*TRAIN, "data.cache=taken"], ("data.cache", "taken")),
    Row("32 too little text", nothing, [*TRAIN, "data.max_epochs=0.01"],
        ("passes", "max_epochs")),
]  # fmt: skip

SHARD = "exported/model-00001-of-00001.safetensors"
INDEX = "exported/model.safetensors.index.json"

FOLDER_ROWS = [
    Row("35 cut short", truncate(SHARD, 100), IMPORT, ("model", "truncated", "bytes")),
    Row("35 empty", write(SHARD, b""), IMPORT, ("model", "empty")),
    Row("35 a web page", write(SHARD, "<!doctype html><p>404</p>"), IMPORT, ("model",)),
    Row("36 flipped bit", patch(SHARD, -3, b"\x55"), IMPORT, ("model", "hash")),
    Row("38 pickle for weights", write(SHARD, PICKLE), IMPORT, ("model",)),
    Row("40 missing tensor", weights(lambda t: t.pop("backbone.norm_f.weight")), IMPORT,
        ("missing", "backbone.norm_f.weight")),
    Row("40 extra tensor", weights(lambda t: t.update(surplus=torch.zeros(2))), IMPORT,
        ("not in the model", "surplus")),
    Row("40 no prediction head", weights(
        lambda t: [t.pop(name) for name in list(t) if name.startswith("mtp.")]), IMPORT,
        ("missing", "mtp")),
    Row("39 shape", weights(lambda t: t.update({"backbone.norm_f.weight": torch.zeros(25)})),
        IMPORT, ("backbone.norm_f.weight", "[25]", "[24]")),
    Row("39 dtype", weights(lambda t: t.update({"backbone.norm_f.weight":
        torch.zeros(24, dtype=torch.int32)})), IMPORT, ("backbone.norm_f.weight", "I32", "BF16")),
    Row("41 missing file", replace(INDEX, "00001-of-00001", "00002-of-00001"), IMPORT,
        ("model-00002-of-00001.safetensors", "missing")),
    Row("41 file outside", replace(INDEX, "model-00001", "../model-00001"), IMPORT,
        ("../model-00001", "inside the folder")),
    Row("41 binary index", write(INDEX, b"\xff\xfe"), IMPORT, (INDEX, "not valid JSON")),
    Row("configuration without end", write("exported/config.json", "[" * 99_999), IMPORT,
        ("config.json", "not valid JSON")),
    Row("configuration with text", replace("exported/config.json", '"vocab_size": 4096',
        '"vocab_size": "many"'), IMPORT, ("config.json", "vocab_size", "integer")),
    Row("configuration with a list", replace("exported/config.json", '"model_type": "nemotron_h"',
        '"model_type": ["nemotron_h"]'), IMPORT, ("config.json", "model_type")),
    Row("pattern that is a number", replace("exported/config.json", '"ME*-"', "7"), IMPORT,
        ("config.json", "hybrid_override_pattern")),
    Row("configuration that cannot be", replace("exported/config.json", '"n_groups": 2',
        '"n_groups": 3'), IMPORT, ("config.json", "n_groups = 3", "mamba_num_heads = 4")),
    Row("report that is none", write("exported/export_report.json", '{"xxh128": 3}'), IMPORT,
        ("export_report.json",)),
    Row("28 import without tokenizer", remove("exported/tokenizer.json"), IMPORT,
        ("tokenizer.json", "does not exist")),
    Row("42 packed", weights(lambda t: t.update({
        "lm_head.weight": torch.zeros(4096, 12, dtype=torch.uint8),
        "lm_head.weight_scale": torch.zeros(4096, 2).to(torch.float8_e4m3fn)})), IMPORT,
        ("NVFP4", "bfloat16")),
    Row("42 another family", lambda w: (w / "exported/config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'), IMPORT, ("llama",)),
    Row("no configuration", remove("exported/config.json"), IMPORT, ("config.json",)),
    Row("34 name of the hub", nothing, ["import", "nvidia/model", "--out", "imported"],
        ("nvidia/model: does not exist", "of a model on the Hub")),
    Row("62 import onto a file", write("imported", ""), IMPORT, ("imported", "file")),
    Row("62 import below a file", write("imported", ""), [*IMPORT[:-1], "imported/run"],
        ("imported/run", "Not a directory")),
    Row("62 import over a trained run", nothing, [*IMPORT[:-1], "runs/mine", "--overwrite"],
        ("runs/mine", "not replaced")),
    Row("62 export onto a file", write("out", ""), ["export", "runs/mine", "--out", "out"],
        ("out", "file")),
    Row("62 export over other files", nothing,
        ["export", "runs/mine", "--out", "shards", "--overwrite"], ("shards", "not replaced")),
    Row("62 files of no size", nothing,
        ["export", "runs/mine", "--out", "out", "--max-shard-gb", "0"], ("--max-shard-gb",)),
    Row("62 files of any size", nothing,
        ["export", "runs/mine", "--out", "out", "--max-shard-gb", "nan"], ("--max-shard-gb",)),
    Row("62 target of an import", occupy("imported"), IMPORT,
        ("imported", "--overwrite")),
    Row("62 target of an export", occupy("out"),
        ["export", "runs/mine", "--out", "out"], ("out", "--overwrite")),
    Row("62 inside the checkpoints", nothing,
        ["export", "runs/mine", "--out", "runs/mine/checkpoints/out"], ("checkpoints",)),
    Row("export of nothing", nothing, ["export", "runs/none"], ("runs/none", "does not exist")),
]  # fmt: skip

NEWEST = "runs/half/checkpoints/step-00000002"
ONLY = f"{NEWEST}/rank-00000.safetensors"

RUN_ROWS = [
    Row("origin of an export", write("runs/mine/provenance.json", "[1]"),
        ["export", "runs/mine", "--out", "out", "--no-check"], ("runs/mine/provenance.json",)),
    Row("37 tensors missing", remove(ONLY), RESUME, ("step-00000002", "rank-00000.safetensors")),
    Row("37 index empty", write(f"{NEWEST}/index.json", b""), RESUME,
        ("step-00000002", "index.json has 0 bytes")),
    Row("37 index missing", remove(f"{NEWEST}/index.json"), RESUME,
        ("step-00000002", "index.json is missing")),
    Row("37 manifest missing", remove(f"{NEWEST}/manifest.json"), RESUME,
        ("step-00000002", "the save did not finish")),
    Row("37 manifest is text", write(f"{NEWEST}/manifest.json", "{"), RESUME,
        ("step-00000002", "manifest.json: it is not valid JSON")),
    Row("37 manifest without step", replace(f"{NEWEST}/manifest.json", '"step"', '"stop"'),
        RESUME, ("step-00000002", "manifest.json: step is missing")),
    Row("37 manifest without hashes", write(f"{NEWEST}/manifest.json",
        '{"format": 2, "step": 2, "code_version": "", "model_config_hash": "",'
        ' "files": {"model.json": 3}}'), RESUME, ("step-00000002", "files.model.json = 3")),
    Row("42 newer checkpoint", replace(f"{NEWEST}/manifest.json", '"format": 2', '"format": 3'),
        RESUME, ("step-00000002", "format 3", "upgrade")),
    Row("42 older checkpoint", replace(f"{NEWEST}/manifest.json", '"format": 2', '"format": 1'),
        RESUME, ("step-00000002", "older version", "nemotron checkpoint convert")),
    Row("36 flipped bit", patch(ONLY, -50, b"\x55\xaa"), RESUME, ("step-00000002", "hash")),
    Row("38 planted pickle", write(f"{NEWEST}/index.json", PICKLE), RESUME,
        ("step-00000002", "index.json")),
    Row("12 renamed run", lambda w: (w / "runs/half").rename(w / "runs/other"),
        ["train", "runs/other/recipe.yaml", "--resume"],
        ("runs/other/recipe.yaml", "runs/half", "name=other")),
    Row("13 nothing to convert", nothing, ["checkpoint", "convert", "runs/half"],
        ("runs/half", "no checkpoint of the old format")),
    Row("39 other width", nothing, [*RESUME, "model.hidden_size=48"],
        ("hidden_size", "24", "48")),
    Row("44 seed", nothing, [*RESUME, "seed=9"], ("seed", "1234", "9")),
    Row("44 batch", nothing, [*RESUME, "batch.global_tokens=256"], ("global_tokens", "128", "256")),
    Row("44 data", nothing, [*RESUME, "data.mask_eod_loss=true"],
        ("data.mask_eod_loss", "was false, is true")),
    Row("44 row length", nothing, [*RESUME, "data.seq_len=64"], ("data.seq_len", "32", "64")),
    Row("44 vocabulary", nothing, [*RESUME, "model.vocab_size=4100"],
        ("model.vocab_size", "4096", "4100")),
    Row("44 weight of a source", edit("weight: 1.0", "weight: 2.0"), RESUME,
        ("data.sources", "1.0", "2.0")),
    Row("44 leave for a key that is none", nothing, [*RESUME, "--allow-changed", "speed"],
        ("--allow-changed = speed", "not a key")),
    Row("46 damaged recipe", write("runs/half/recipe.yaml", "a: [1"), RESUME,
        ("runs/half/recipe.yaml", "damaged")),
    Row("46 binary recipe", write("runs/half/recipe.yaml", b"\xff\x00"), RESUME,
        ("runs/half/recipe.yaml", "damaged")),
    Row("46 recipe that is a list", write("runs/half/recipe.yaml", "- 1"), RESUME,
        ("runs/half/recipe.yaml", "damaged")),
    Row("33 shard replaced", lambda w: write_prepared(["Other text. " * 9] * 90,
        w / "shards" / "text"), RESUME, ("shards/text", "tokens", "hash")),
    Row("43 weights only", lambda w: [run(["import", "exported", "--out", "runs/half2"]),
        edit("name: mine", "name: half2")(w)], ["train", "mine.yaml", "--resume"],
        ("runs/half2", "init_from")),
    Row("46 finished", nothing, ["train", "mine.yaml"], ("runs/mine", "finished", "name")),
    Row("46 not finished", nothing, ["train", "mine.yaml", "name=half"], ("half", "--resume")),
    Row("46 another recipe", nothing, ["train", "mine.yaml", "name=half", "schedule.peak=3e-3"],
        ("schedule.peak", "0.01", "0.003")),
    Row("a file in its place", write("runs/new", ""), TRAIN, ("runs/new", "file")),
    Row("48 init_from nowhere", nothing, [*TRAIN, "init_from=nowhere"],
        ("nowhere", "does not exist")),
    Row("39 init_from another size", nothing, [*TRAIN, "init_from=runs/mine",
        "model.hidden_size=48"], ("init_from", "hidden_size")),
    Row("54 no GPU", nothing, [*TRAIN, "device=cuda"], ("cuda", "doctor")),
    Row("48 init_from a recipe", nothing, [*TRAIN, "init_from=mine.yaml"],
        ("mine.yaml", "no complete checkpoint")),
    Row("no steps", nothing, [*TRAIN, "--stop-at", "0"], ("--stop-at", "1")),
    Row("no number for a temperature", nothing, [*GENERATE, "--temperature", "nan"],
        ("temperature = nan",)),
    Row("top k", nothing, [*GENERATE, "--top-k", "0"], ("top_k = 0",)),
    Row("seed", nothing, [*GENERATE, "--seed", "-1"], ("seed = -1",)),
    Row("no tokens", nothing, [*GENERATE, "--max-new-tokens", "0"], ("--max-new-tokens",)),
    Row("no room for the shortest answer", nothing, [*GENERATE, "--min-new-tokens", "129"],
        ("--min-new-tokens = 129", "128 tokens")),
    Row("unknown stop token", nothing, [*GENERATE, "--stop-token-id", "99999"],
        ("--stop-token-id has token 99999", "vocabulary")),
    Row("prompt of bytes", nothing, ["generate", "runs/mine", "--prompt", "a\udcff"],
        ("prompt", "UTF-8")),
    Row("device", nothing, [*GENERATE, "--device", "gpu"], ("device = gpu", "auto, cpu")),
    Row("28 run without tokenizer", remove("runs/mine/tokenizer.json"), GENERATE,
        ("runs/mine/tokenizer.json", "does not exist")),
    Row("28 run with another tokenizer", write("runs/mine/tokenizer.json", b"\xff"), GENERATE,
        ("runs/mine/tokenizer.json", "not a tokenizer.json")),
    Row("checkpoint that was removed", nothing,
        ["generate", "runs/mine/checkpoints/step-00000009", "--prompt", "a"],
        ("step-00000009", "does not exist")),
    Row("generate from a recipe", nothing, ["generate", "mine.yaml", "--prompt", "a"],
        ("mine.yaml", "no complete checkpoint")),
    Row("temperature", nothing, [*GENERATE, "--temperature", "-1"], ("temperature", "-1")),
    Row("top p", nothing, [*GENERATE, "--top-p", "1.5"], ("top_p", "1.5")),
    Row("empty prompt", nothing, ["generate", "runs/mine", "--prompt", ""], ("prompt",)),
    Row("generate from nothing", nothing, ["generate", "nowhere", "--prompt", "a"],
        ("nowhere", "does not exist")),
    Row("generate without checkpoint", lambda w: shutil.rmtree(w / "runs/mine/checkpoints"),
        GENERATE, ("runs/mine",)),
    Row("unknown command", nothing, ["trian"], ("trian",)),
    Row("unknown option", nothing, [*TRAIN, "--resum"], ("--resum", "--resume")),
    Row("no recipe", nothing, ["train"], ("RECIPE",)),
    Row("unknown tracker", nothing, [*TRAIN, "logging.trackers=[wnadb]"], ("wnadb", "wandb")),
]  # fmt: skip

NEW = [*QUANTIZE, "--out", "new"]
FP8 = [*NEW, "--preset", "fp8"]
LIKE = [*NEW, "--like", "small"]
EVALUATE = ["evaluate", "runs/mine"]
SMALL = ["evaluate", "small", "--recipe", "runs/mine"]
REPORT_OF = ["report", "runs/mine"]
MERGE = ["merge", "runs/mine", "--out", "runs/new"]
DECLARED = "small/hf_quant_config.json"
CUT = truncate("small/model-00001-of-00001.safetensors", 99)


def scales(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    """Change all scales of a kind in the quantized folder."""
    return weights(
        lambda t: t.update({key: change(t[key]) for key in t if key.endswith(ending)}), "small"
    )


NO_SCALES = weights(
    lambda t: [t.pop(key) for key in list(t) if key.endswith(".weight_scale")], "small"
)
IMPORT_SMALL = ["import", "small", "--out", "new"]

FINISHED_ROWS = [
    Row("quantize without formats", nothing, NEW, ("--preset", "--bits", "--like")),
    Row("quantize twice", nothing, [*FP8, "--bits", "8"], ("twice",)),
    Row("quantize to an unknown preset", nothing, [*NEW, "--preset", "nvfp5"], ("nvfp5", "nvfp4")),
    Row("quantize what does not fit", nothing, [*NEW, "--preset", "nvfp4"], ("16", "--keep")),
    Row("quantize to too few bits", nothing, [*NEW, "--bits", "3"], ("3", "least")),
    Row("quantize to no number of bits", nothing, [*NEW, "--bits", "nan"], ("--bits",)),
    Row("a score of nothing", nothing, [*FP8, "--score", "kl"], ("--score", "--bits")),
    Row("rows for a score of nothing", nothing, [*FP8, "--score-rows", "4"],
        ("--score-rows", "--bits")),
    Row("a cost of nothing", nothing, [*FP8, "--cost", "active"], ("--cost", "--bits")),
    Row("scales of no weights", nothing, [*FP8, "--weights", "mse"], ("--weights", "NVFP4")),
    Row("quantize nothing", nothing, [*FP8, "--keep", "*"], ("--keep = *", "every layer")),
    Row("keep what is not there", nothing, [*FP8, "--keep", "head"], ("--keep = head",)),
    Row("like nothing", nothing, [*NEW, "--like", "nowhere"], ("--like = nowhere",)),
    Row("like an export", nothing, [*NEW, "--like", "exported"], ("--like = exported",)),
    Row("like a damaged configuration", write("small/config.json", "{"), LIKE, ("config.json",)),
    Row("like a damaged declaration", write(DECLARED, "{"), LIKE, ("hf_quant_config.json",)),
    Row("like a short file", CUT, LIKE, ("small", "truncated")),
    Row("like missing scales", NO_SCALES, LIKE, ("weight_scale",)),
    Row("like scales that are NaN", scales("weight_scale", lambda t: t * torch.nan), LIKE,
        ("weight_scale", "nan", "positive")),
    Row("like negative scales of inputs", scales("input_scale", lambda t: -t), LIKE,
        ("input_scale", "positive")),
    Row("quantize a quantized folder", nothing,
        ["quantize", "small", "--recipe", "runs/mine", "--preset", "fp8", "--out", "new"],
        ("small", "quantized already")),
    Row("quantize into the run", nothing,
        [*QUANTIZE, "--preset", "fp8", "--out", "runs/mine", "--overwrite"], ("runs/mine",)),
    Row("quantize over other files", occupy("new"), [*FP8, "--overwrite"], ("new",)),
    Row("rows of no suite", nothing, [*EVALUATE, "--tasks", "4"], ("--tasks", "--suite")),
    Row("a temperature of no suite", nothing, [*EVALUATE, "--temperature", "1"],
        ("--temperature", "--suite")),
    Row("depths of no long texts", nothing, [*EVALUATE, "--suite", "mcqa@0", "--depths", "0.5"],
        ("--depths", "--suite ruler")),
    Row("an unknown suite", nothing, [*EVALUATE, "--suite", "maths"], ("maths", "mathematics")),
    Row("against nothing", nothing, [*EVALUATE, "--against", "nowhere"], ("--against = nowhere",)),
    Row("evaluate a short file", CUT, SMALL, ("small", "truncated")),
    Row("evaluate scales of 0", scales("weight_scale", torch.zeros_like), SMALL,
        ("weight_scale", "positive")),
    Row("evaluate an unknown format", replace(DECLARED, '"FP8"', '"INT4"'), SMALL,
        ("hf_quant_config.json", "INT4", "FP8")),
    Row("import missing scales", NO_SCALES, IMPORT_SMALL, ("weight_scale",)),
    Row("import a short file", CUT, IMPORT_SMALL, ("small", "truncated")),
    Row("seconds between no reports", nothing, [*REPORT_OF, "--every", "5"],
        ("--every", "--watch")),
    Row("tokens after no prompt", nothing, [*REPORT_OF, "--max-new-tokens", "5"],
        ("--max-new-tokens", "--prompt")),
    Row("report of an export", nothing, ["report", "exported"], ("exported",)),
    Row("report onto a folder", occupy("new"), [*REPORT_OF, "--out", "new"], ("new",)),
    Row("list what is not there", nothing, ["runs", "nowhere"], ("nowhere",)),
    Row("compare with nothing", nothing, ["compare", "runs/mine", "nowhere"], ("nowhere",)),
    Row("merge one checkpoint", nothing, [*MERGE, "--step", "4"], ("--step",)),
    Row("merge an unknown step", nothing, [*MERGE, "--step", "4", "--step", "9"], ("9",)),
    Row("evaluate at no temperature", nothing,
        ["evaluate", "runs/mine", "--suite", "arithmetic", "--temperature", "nan", "--out", "out"],
        ("--temperature", "nan")),
    Row("evaluate at an infinite temperature", nothing,
        ["evaluate", "runs/mine", "--suite", "arithmetic", "--temperature", "inf", "--out", "out"],
        ("--temperature", "inf")),
    Row("evaluate a model of another size", nothing,
        ["evaluate", "runs/mine", "model.hidden_size=65"],
        ("command line", "model.hidden_size", "trained model")),
    Row("evaluate with another rate", nothing, ["evaluate", "runs/mine", "schedule.peak=1"],
        ("command line", "schedule.peak", "trained model")),
    Row("quantize a model of another size", nothing,
        [*NEW, "--preset", "fp8", "model.hidden_size=65"],
        ("command line", "model.hidden_size", "trained model")),
    Row("merge no number of tokens", nothing, [*MERGE, "--last-tokens", "nan"],
        ("--last-tokens", "nan")),
    Row("a decay of no average", nothing, [*MERGE, "--ema-decay", "0.5"],
        ("--ema-decay", "--shape ema")),
    Row("a device of no search", nothing, [*MERGE, "--device", "cpu"], ("--device", "--search")),
    Row("merge into the run", nothing, [*MERGE[:-1], "runs/mine", "--overwrite"], ("runs/mine",)),
    Row("merge into a trained run", nothing, [*MERGE[:-1], "runs/half", "--overwrite"],
        ("runs/half",)),
]  # fmt: skip


def snapshot(folder: Path) -> dict[str, str]:
    """Return every path below the folder with what is there.

    The cache may gain what is known of good shards, and a lock names who held it last.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_relative_to(folder / "cache") or path.name == "lock":
            continue
        if path.is_symlink() or path.is_dir():
            found[str(path)] = os.readlink(path) if path.is_symlink() else "folder"
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize(
    "row",
    RECIPE_ROWS + DATA_ROWS + FOLDER_ROWS + RUN_ROWS + FINISHED_ROWS,
    ids=lambda row: row.name,
)
def test_a_bad_input_gets_one_sentence(row: Row, world: Path, capsys: pytest.CaptureFixture):
    if row.name.startswith("54") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    row.spoil(world)
    before = snapshot(world)
    capsys.readouterr()
    code = run(row.command)
    answer = capsys.readouterr().err
    assert code == 2, answer
    assert len(answer.strip().splitlines()) <= 3
    missing = [word for word in row.words if word not in answer]
    assert not missing, answer
    assert "Traceback" not in answer
    assert snapshot(world) == before


def test_numbers_may_be_written_as_people_do(world: Path):
    # row 4 of the table is no mistake
    for text in ("1e-2", "1.0e-2", "0.01", ".01", "1E-2"):
        assert load_recipe("mine.yaml", [f"schedule.peak={text}"]).config.schedule.peak == 0.01
    schedule = load_recipe("mine.yaml", ["schedule.total_steps=1_000"]).config.schedule
    assert schedule.total_steps == 1000


def test_a_run_in_use_is_named_with_its_holder(world: Path, capsys: pytest.CaptureFixture):
    config = load_recipe("mine.yaml", ["name=half"]).config
    with RunFolder(config.run_path, config):
        before = snapshot(world)
        assert run(RESUME) == 2
        answer = capsys.readouterr().err
        assert f"in use by process {os.getpid()} on {socket.gethostname()} since" in answer
        assert snapshot(world) == before


@pytest.mark.parametrize("origin", ['"a"', "[1]", '{"starts": [3]}', '{"starts": 3, "id": "x"}'])
def test_a_run_with_a_broken_origin_is_not_resumed(
    world: Path, origin: str, capsys: pytest.CaptureFixture
):
    (world / "runs/half/provenance.json").write_text(origin)
    known = sorted(os.listdir("runs/half/checkpoints"))
    assert run(RESUME) == 2
    assert "runs/half/provenance.json: " in capsys.readouterr().err
    assert (world / "runs/half/provenance.json").read_text() == origin
    assert sorted(os.listdir("runs/half/checkpoints")) == known


def test_a_folder_that_cannot_be_written_is_found_before_training(
    world: Path, capsys: pytest.CaptureFixture
):
    # root may write where modes forbid it, so a file stands where the folder should be
    (world / "blocked").write_text("")
    before = snapshot(world)
    assert run([*TRAIN, "output=blocked/runs"]) == 2
    assert "blocked/runs/new: cannot be written" in capsys.readouterr().err
    assert snapshot(world) == before


def test_a_run_without_held_out_text_is_no_mistake(world: Path):
    write_prepared(["The river runs to the sea. " * 5] * 40, world / "shards" / "text")
    assert run(TRAIN) == 0
    lines = Path("runs/new/metrics.jsonl").read_text().splitlines()
    kinds = {json.loads(line)["kind"] for line in lines}
    assert kinds == {"train"}


def test_a_run_of_absurd_length_starts(world: Path):
    assert run([*TRAIN, f"schedule.total_steps={10**21}", "--stop-at", "1"]) == 75
