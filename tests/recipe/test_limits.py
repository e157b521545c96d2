"""Recipes that would cost more than a recipe may: each is refused at once, in one sentence."""

import os
import threading
import time
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.divisors import divisors, nearest
from nemotron.errors import UserError
from nemotron.recipe.load import load_recipe
from nemotron.yaml_text import parse_yaml

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "recipes/tiny/smoke.yaml")


def refusal(path: Path | str, *overrides: str) -> str:
    begin = time.process_time()
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    assert time.process_time() - begin < 10
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


DOUBLING = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n"
    for below, name in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\n" + DOUBLING, "more than 100,000 values"),
        ("a: " + "[" * 3000, "m.yaml:1: mappings and lists are more than 32 levels deep"),
        ("a:\n" + "".join(f"{' ' * n}- a:\n" for n in range(1, 80, 2)), "32 levels deep"),
        ("a: &a [" + "[" * 20 + "]" * 20 + "]\nb: " + "[" * 20 + "*a" + "]" * 20, "m.yaml:2"),
        ("a: &a\n  b: *a\n", "m.yaml:2: the alias *a has no complete anchor before it"),
        ("a: *b\n", "m.yaml:1: the alias *b has no complete anchor"),
        ("name: a\n<<: {seed: 1}\n", "m.yaml:2: merge keys (<<) are not read"),
        ("<<: 1\n", "m.yaml:1: merge keys"),
        ("seed: !!int 3\n", "m.yaml:1: the tag"),
        ("seed: !!python/object:os.system [x]\n", "m.yaml:1: the tag"),
        ("!x name: a\n", "m.yaml:1: a key is not text"),
        ("? {a: 1}\n: 2\n", "m.yaml:1: a key is not text"),
        ("1: 2\n", "m.yaml:1: the key 1 is not text"),
        (f"seed: 1{'0' * 400}\n", "m.yaml:1: 10000000000000000000... is too large"),
        (f"seed: -1{'0' * 5000}\n", "m.yaml:1: -1000000000000000000... is too large"),
        (f"seed: 0x{'f' * 400}\n", "is too large"),
        ("schedule: {peak: 1e400}\n", "schedule.peak = inf must be a finite number"),
        ('output: "a\\0b"\n', "m.yaml:1: a text holds a null character"),
        ('output: "\\ud800"\n', "half a surrogate pair"),
        (f"name: {'a' * 300}\n", "must have at most 128 characters"),
        (f"extends: {'a' * 300}\n", "extends names a file that does not exist"),
        (f"data: {{blend: {'a' * 300}}}\n", "cannot be read: File name too long"),
        ("name: a\n---\nname: b\n", "m.yaml:2: a second document begins"),
        ("name: a\nseed: 1\nname: b\n", "m.yaml:3: the key name is given twice, first at line 1"),
    ],
)  # fmt: skip
def test_text(text: str, said: str, tmp_path: Path):
    path = tmp_path / "m.yaml"
    base = "" if "extends" in text else f"extends: {SMOKE}\n"
    # the base comes last, so that lines are counted from the text
    path.write_text(text if text.startswith(("<<", "? ", "!x")) else text + base)
    assert said in refusal(path)


def test_aliases_repeat_values_and_do_not_share_them():
    places: dict[tuple[str, ...], str] = {}
    values = parse_yaml("a: &x {b: {c: 1}}\nd: *x\n", "s", places)
    assert values == {"a": {"b": {"c": 1}}, "d": {"b": {"c": 1}}}
    assert values["a"] is not values["d"]
    assert places["d",] == "s:2"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_000", 1000), ("-0x1F", -31), ("0o17", 15), ("010", 10), ("0b11", 3), ("1e3", 1000.0),
        (".5", 0.5), ("-.inf", float("-inf")), ("true", True), ("no", "no"), ("~", None),
        ("", None),
        ("'1'", "1"), ("2024-01-01", "2024-01-01"), ("_", "_"), ("|\n  1", "1"), ("1:30", "1:30"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object):
    found = parse_yaml(f"a: {text}", "s")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "fifo"])
def test_a_device_or_pipe_is_not_read(name: str, tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / name
    assert f"{path}: is not a regular file" in refusal(path)
    (tmp_path / "b.yaml").write_text(f"extends: {SMOKE}\ndata: {{blend: {path}}}\n")
    assert f"{path}: is not a regular file" in refusal(tmp_path / "b.yaml")
    assert threading.active_count() < 20


def test_diamonds_end_after_a_number_of_files(tmp_path: Path):
    (tmp_path / "0.yaml").write_text(f"extends: {SMOKE}\n")
    for n in range(1, 12):
        (tmp_path / f"{n}.yaml").write_text(f"extends: [{n - 1}.yaml, {n - 1}.yaml]\n")
    assert load_recipe(tmp_path / "3.yaml").config.name == "smoke"
    assert "names more than 64 files" in refusal(tmp_path / "11.yaml")


def test_large_files_are_refused_before_they_are_parsed(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("name: a\n#" + "x" * (1 << 19))
    (tmp_path / "b.yaml").write_text("extends: [a.yaml, a.yaml]\n")
    assert "are larger than 1 MiB" in refusal(tmp_path / "b.yaml")
    (tmp_path / "c.json").write_text("[" * (1 << 21))
    assert "are larger than 1 MiB" in refusal(SMOKE, f"data.blend={tmp_path / 'c.json'}")
    (tmp_path / "d.json").write_text("[" * 100_000)
    assert "d.json" in refusal(SMOKE, f"data.blend={tmp_path / 'd.json'}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["batch.global_tokens=64000000000000000", "batch.micro_batch=7"], "the nearest is 8"),
        (["model.n_routed_experts=1999999973", "model.n_group=7"], "1 would"),
        (["model.mamba_num_heads=1000000000", "model.n_groups=7"], "8 would"),
        (["model.hidden_size=1000000000000"], "dimensions stay below 2^31"),
        (["model.hidden_size=2147483647"], "makes a tensor of over 2^50 numbers"),
        (
            ["model.moe_shared_expert_intermediate_size=2147483647", "model.hidden_size=1048576"],
            "makes a tensor of over 2^50 numbers",
        ),
        (
            ["model.hidden_size=2000000000", "model.vocab_size=2000000000"],
            "makes a tensor of over 2^50 numbers",
        ),
        ([f"model.hybrid_override_pattern={'M' * 100_001}"], "100001 letters"),
    ],
)
def test_the_nearest_legal_value_of_a_huge_size_is_found_at_once(changes: list[str], said: str):
    assert said in refusal(SMOKE, *changes)


def test_a_huge_mesh_is_refused_at_once(capsys: pytest.CaptureFixture):
    begin = time.process_time()
    assert run(["plan", SMOKE, "parallel.tp=1000000007", "--gpus", "1000000007"]) in (1, 2)
    assert time.process_time() - begin < 20
    assert "Traceback" not in capsys.readouterr().err


def test_divisors_are_complete_below_a_million_squared():
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(1) == [1]
    for number in range(1, 200):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
    assert divisors(999_983 * 1_000_003) == [1, 999_983, 1_000_003, 999_983 * 1_000_003]
    assert nearest(5, [4, 6]) == 4


@pytest.mark.parametrize("key", ["evaluation.suites.tasks", "evaluation.suites.samples"])
def test_no_evaluation_asks_without_end(key: str):
    said = refusal(SMOKE, "evaluation.suites.names=[mcqa]", f"{key}=99999999999999999999")
    assert f"{key} = 99999999999999999999" in said


ENDLESS = [
    ("evaluate", "runs/none", "--suite", "mcqa", "--tasks"),
    ("evaluate", "runs/none", "--suite", "mcqa", "--samples"),
    ("check-parity", "runs/none", "--length"),
    ("check-parity", "runs/none", "--rows"),
    ("check-parity", "runs/none", "--new-tokens"),
    ("rl", "chats", "mcqa", "--out", "o", "--count"),
    ("rl", "pivots", "pivot.yaml", "rows.jsonl", "--out", "o", "--samples"),
    ("data", "codeswitch", "t.jsonl", "--languages", "a,b", "--out", "o", "--per-sentence"),
    ("data", "prepare", "t.jsonl", "--out", "o", "--max-row-mib"),
    ("quantize", "runs/none", "--preset", "fp8", "--out", "o", "--rows"),
    ("quantize", "runs/none", "--bits", "6", "--out", "o", "--score-rows"),
    ("quantize", "runs/none", "--out", "o", "--bits"),
    ("generate", "runs/none", "--prompt", "x", "--max-new-tokens"),
    ("evaluate", "runs/none", "--suite", "mcqa", "--max-new-tokens"),
    ("report", "runs/none", "--prompt", "x", "--max-new-tokens"),
    ("chat", "runs/none", "--max-new-tokens"),
]


@pytest.mark.parametrize("number", ["9" * 20, "9" * 5000, "1e400", "inf", "nan"])
@pytest.mark.parametrize("words", ENDLESS, ids=lambda words: f"{words[0]} {words[-1]}")
def test_no_command_is_asked_without_end(
    words: tuple[str, ...], number: str, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run([*words, number]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert words[-1] in said
    assert not list(tmp_path.iterdir())


def test_a_path_with_a_null_character_is_a_mistake(capsys: pytest.CaptureFixture[str]):
    words = ["data", "noise", "x\0y", "--language", "grammar", "--out", "o"]
    assert run(words) == 2
    assert "a path cannot be used (embedded null byte)" in capsys.readouterr().err
