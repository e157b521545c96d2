"""What the fuzzer damages of finished models: quantized folders, evaluations, corrected text."""

import importlib.util
import random
from pathlib import Path

import fuzz_mutations as mutate
import fuzz_readers as direct
from fuzz_target import Target, forge_manifest, of_recipe
from fuzz_world import CORRECTOR

PAIRS = ["data", "pairs", "pairs.jsonl", "--tokenizer", "letters", "--out", "out", "--workers", "1"]
CORRECT = ["correct", "runs/corrector", "--in", "nbest.jsonl", "--out", "fixed.jsonl"]
SCORE = ["score", "answers.jsonl", "--references", "pairs.jsonl"]
ANSWERS = ["generate", "runs/mine", "--prompts", "prompts.jsonl", "--max-new-tokens", "2"]
CODESWITCH = ["data", "codeswitch", "texts.jsonl", "--languages", "xx,en", "--spf", "none",
              "--out", "switched.jsonl"]  # fmt: skip
PARALLEL = [*CODESWITCH, "--mode", "parallel"]
EXAMINE = ["evaluate", "runs/mine", "--suite", "mcqa@0", "--suite", "mcqa_likelihood@0",
           "--samples", "2", "--temperature", "0.7", "--tasks", "2", "--max-new-tokens", "2",
           "--out", "scores", "--resume"]  # fmt: skip
HARNESS = ["lm-eval", "runs/mine", "tasks/choose.yaml", "--limit", "2"]


def of_quantized(
    folder: str, file: str, mutation: mutate.Mutation = mutate.of_json, alone: bool = False
) -> Target:
    """Of a quantized folder; `alone`: without the file that declares the same once more."""

    def seal(world: Path, draw: random.Random) -> None:
        if alone:
            (world / folder / "hf_quant_config.json").unlink(missing_ok=True)

    commands = [
        ["generate", folder, "--prompt", "The river", "--max-new-tokens", "2"],
        ["evaluate", folder, "--recipe", "runs/wide/recipe.yaml"],
        ["import", folder, "--out", "out"],
        ["quantize", "runs/wide", "--like", folder, "--rows", "2", "--out", "out", "--no-check"],
        ["train", "student.yaml", "name=new", f"quantization.like={folder}", "--stop-at", "1"],
    ]
    uses = (folder, "runs/wide", "student.yaml", "shards", "chats", "cache")
    reads = direct.exported(folder)
    return Target(f"{folder}/{file}", mutation, commands, uses, seal, direct=reads)


def of_corrector(file: str, mutation: mutate.Mutation = mutate.of_json) -> Target:
    """Of the checkpoint of a corrector."""

    def seal(world: Path, draw: random.Random) -> None:
        forge_manifest(world, draw, CORRECTOR)

    commands = [CORRECT, ["train", "runs/corrector", "--resume"]]
    uses = ("correct.yaml", "nbest.jsonl", "runs/corrector", "pairs", "letters")
    reads = direct.records("runs/corrector")
    return Target(f"{CORRECTOR}/{file}", mutation, commands, uses, seal, direct=reads)


PAIR_USES = ("correct.yaml", "pairs", "letters")
PAIR_SHARDS = [["train", "correct.yaml", "name=new", "--stop-at", "1"],
               ["train", "correct.yaml", "name=new", "--dry-run"],
               ["data", "inspect", "pairs", "--tokenizer", "letters", "--check"]]  # fmt: skip

QUANTIZED = {
    "quantized config": of_quantized("quantized", "config.json", alone=True),
    "quantized sidecar": of_quantized("quantized", "hf_quant_config.json"),
    "quantized header": of_quantized("quantized", "model*.safetensors", mutate.of_header),
    "quantized scales": of_quantized("quantized", "model*.safetensors", mutate.of_tensors),
    "compressed config": of_quantized("compressed", "config.json"),
    "compressed header": of_quantized("compressed", "model*.safetensors", mutate.of_header),
}
CORRECTION = {
    "pairs": Target(
        "pairs.jsonl",
        mutate.of_lines,
        [PAIRS, [*PAIRS, "--as", "chat"], SCORE,
         ["data", "characters", "pairs.jsonl", "--out", "out.json"]],
        ("letters", "answers.jsonl"),
    ),
    "corrected answers": Target("answers.jsonl", mutate.of_lines, [SCORE], ("pairs.jsonl",)),
    "candidates": Target(
        "nbest.jsonl", mutate.of_lines,
        [CORRECT, [*CORRECT, "--timed", "--language", "letters"],
         ["correct", "runs/mine", "--ar", "--in", "nbest.jsonl", "--out", "fixed.jsonl"]],
        ("runs/corrector", "runs/mine"),
    ),
    "noised text": Target(
        "rows.jsonl",
        mutate.of_lines,
        [["data", "noise", "rows.jsonl", "--language", "letters", "--out", "noised.jsonl"],
         ["data", "noise", "rows.jsonl", "--language", "grammar", "--sounds", "--out", "n.jsonl"],
         ["data", "characters", "rows.jsonl", "--out", "out.json"]],
    ),
    "pair shard": Target("pairs/*.bin", mutate.of_integers, PAIR_SHARDS, PAIR_USES,
                         direct=direct.shards("pairs", "letters")),
    "pair index": Target("pairs/*.idx", mutate.of_integers, PAIR_SHARDS, PAIR_USES,
                         direct=direct.shards("pairs", "letters")),
    "correct recipe": Target(
        "correct.yaml", of_recipe,
        [["recipe", "check", "correct.yaml"], *PAIR_SHARDS[:2]], PAIR_USES,
        direct=direct.recipe("correct.yaml"),
    ),
    "corrector threshold": Target(
        "runs/corrector/threshold.json", mutate.of_json, [CORRECT],
        ("nbest.jsonl", "runs/corrector"),
        direct=direct.threshold,
    ),
    "corrector model": of_corrector("model.json"),
    "corrector state": of_corrector("state.json"),
    "lexicon": Target(
        "lexicon.tsv", mutate.of_bytes, [[*CODESWITCH, "--lexicon", "lexicon.tsv"]],
        ("texts.jsonl",),
    ),
    "switched text": Target(
        "texts.jsonl", mutate.of_lines, [[*CODESWITCH, "--lexicon", "lexicon.tsv"], PARALLEL],
        ("lexicon.tsv",),
    ),
}  # fmt: skip
EVALUATION = {
    "suite answers": Target("scores/samples.jsonl", mutate.of_lines, [EXAMINE],
                            ("runs/mine", "scores"),
        direct=direct.answers,
    ),
    "suite settings": Target("scores/samples.settings.json", mutate.of_json, [EXAMINE],
                             ("runs/mine", "scores"),
        direct=direct.settings,
    ),
    "prompts": Target(
        "prompts.jsonl", mutate.of_lines,
        [ANSWERS, [*ANSWERS, "--out", "new.jsonl"],
         [*ANSWERS, "--out", "written.jsonl", "--resume"]],
        ("runs/mine", "written.jsonl"),
        direct=direct.prompts,
    ),
    "written answers": Target(
        "written.jsonl", mutate.of_lines, [[*ANSWERS, "--out", "written.jsonl", "--resume"]],
        ("runs/mine", "prompts.jsonl"),
        direct=direct.written,
    ),
}  # fmt: skip
if importlib.util.find_spec("lm_eval") is not None:
    EVALUATION |= {
        "lm-eval task": Target("tasks/choose.yaml", of_recipe, [HARNESS], ("runs/mine", "tasks")),
        "lm-eval rows": Target(
            "tasks/rows.jsonl", mutate.of_lines, [HARNESS], ("runs/mine", "tasks")
        ),
    }

FINISHED: dict[str, Target] = QUANTIZED | CORRECTION | EVALUATION
