"""Looking at data: the numbers are those of the data, duplicates are found, damage is named."""

import json
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.data.inspect import describe_leaks, gather_statistics, open_path
from nemotron.data.loader import TrainingData
from nemotron.recipe.load import load_recipe
from nemotron.train import pretraining
from nemotron.train.schedule import plan_training
from tests.support.embedded import fill_cache
from tests.support.prepared import write_prepared

RECIPE = """\
extends: {smoke}
name: mine
data:
  cache: {folder}/cache
  seq_len: 32
  max_epochs: {limit}
  sources:
    - name: web
      weight: 3
      sources:
        - {{name: one, path: {folder}/one}}
        - {{name: two, path: {folder}/two}}
    - {{name: three, weight: 1, path: {folder}/three, max_epochs: 100}}
  missing:
    - {{name: books, weight: 2.5}}
schedule: {{total_steps: 15}}
phases:
  - {{name: first, steps: 10}}
  - {{name: second, steps: 5, blend: {{sources: [{{name: three, path: {folder}/three}}]}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    texts = [f"Text {i} of the first kind. " * (1 + i % 9) for i in range(200)]
    one = write_prepared(texts, folder / "one", validation_fraction=0.2)
    held_out = (
        open_path(
            one, tokenizer="embedded", eod_token=None, seq_len=32, cache=str(folder / "cache")
        )
        .tokens["one"]
        .validation
    )
    copies = [
        open_text(shard.document(i)) for shard in held_out.shards for i in range(3)
    ]  # fmt: skip
    write_prepared([*copies, *(f"Second {i}." for i in range(90))], folder / "two")
    write_prepared([f"Third {i}. " * 3 for i in range(90)], folder / "three")
    return folder


def open_text(ids) -> str:
    from nemotron.data.tokenizer import load_tokenizer

    return load_tokenizer("embedded").decode(ids[:-1])


def write_recipe(folder: Path, limit: str = "null") -> Path:
    smoke = Path(__file__).parents[2] / "recipes/tiny/smoke.yaml"
    path = folder / f"mine-{limit}.yaml"
    path.write_text(RECIPE.format(folder=folder, smoke=smoke, limit=limit))
    return path


def test_inspecting_a_recipe_shows_shares_duplicates_and_rows(folder: Path, capsys):
    assert run(["data", "inspect", str(write_recipe(folder)), "--rows", "8", "--check"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    assert "37.500%" in lines["one"]
    assert lines["two"][-3:] == ["3", "of", "93"]  # copies of what is held out of `one`
    assert lines["three"][1] == "100.000%"  # in the last table, that of the second phase
    assert "phase second: from token 2,560" in out
    assert "all files and all ids are correct" in out
    assert "──── document 1" in out
    assert "step 0 row 0:" in out


def test_a_shipped_recipe_is_inspected_by_its_name(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fill_cache(tmp_path / "cache")
    cache = f"data.cache={tmp_path / 'cache'}"
    assert run(["data", "inspect", "tiny/smoke", cache, "--rows", "0", "--documents", "9"]) == 0
    assert "20.8% of the tokens" in capsys.readouterr().out
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/smoke.bin").write_bytes(b"")
    assert run(["data", "inspect", "tiny/smoke"]) == 2  # what lies there comes first
    assert "tiny/smoke.idx" in capsys.readouterr().err


def test_a_validation_set_is_compared_with_what_is_trained_on(folder: Path):
    write_prepared([f"Third {i}. " * 3 for i in range(5)] + ["New."], folder / "leak")
    recipe = write_recipe(folder)
    leak = "  validation: [{name: leak, path: " + f"{folder / 'leak'}" + "}]\n  missing:"
    recipe.write_text(recipe.read_text().replace("  missing:", leak, 1))
    data = open_recipe(recipe)
    found = gather_statistics(data, 1000)
    assert {name: facts.repeated for name, facts in found.items()} == {
        "one": 0, "two": 3, "three": 5,
    }  # fmt: skip
    said = "\n".join(describe_leaks(found))
    assert "5 of the first 90 training documents of three are also held out in leak" in said
    assert "documents of one are" not in said


def open_recipe(recipe: Path) -> TrainingData:
    config = load_recipe(recipe, []).text
    return pretraining.open_data(config, plan_training(config))


def test_statistics_are_those_of_the_documents(folder: Path):
    data = open_path(
        folder / "three", tokenizer="embedded", eod_token=None, seq_len=32,
        cache=str(folder / "cache"),
    )  # fmt: skip
    facts = gather_statistics(data, 50)["three"]
    [shard] = data.tokens["three"].train.shards
    assert facts.lengths.tolist() == [len(shard.document(i)) for i in range(50)]
    assert facts.percentiles()[3] == max(facts.lengths)
    assert (facts.scanned, facts.repeated) == (50, 0)


def test_pictures_are_drawn_where_they_are_wanted(folder: Path, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    arguments = [str(folder / "one"), "--plots", str(tmp_path / "plots"), "--rows", "0"]
    assert run(["data", "inspect", *arguments]) == 0
    told = capsys.readouterr().out
    for name in ("lengths.png", "shares.png"):
        assert (tmp_path / "plots" / name).read_bytes()[:4] == b"\x89PNG"
        assert name in told


def test_a_flipped_bit_is_found_by_the_check_alone(folder: Path, capsys):
    write_prepared(["Some text here. " * 9] * 40, folder / "rotten")
    path = folder / "rotten" / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert run(["data", "inspect", str(folder / "rotten")]) == 0
    capsys.readouterr()
    assert run(["data", "inspect", str(folder / "rotten"), "--check"]) == 2
    assert "train-00000.bin: does not match its manifest" in capsys.readouterr().err


def test_the_plan_counts_tokens_and_passes_of_every_phase(folder: Path, capsys):
    assert run(["data", "plan", str(write_recipe(folder))]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    # 10 steps of 8 rows of 32 tokens: 3/8 of the rows each, then 2/8; then 5 steps of one source
    assert lines["one"][3:5] == ["960", "0"]
    assert lines["two"][3:5] == ["960", "0"]
    assert lines["three"][2:4] == ["640", "1,280"]
    assert "missing: books, 2.5 of 4 weights" in out


def test_the_plan_fails_above_the_limit_and_names_the_shortfall(folder: Path, capsys):
    assert run(["data", "plan", str(write_recipe(folder, "1.01"))]) == 1
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    available = int(lines["two"][2].replace(",", ""))
    assert lines["two"][-1] == f"{round(960 / 1.01) - available:,}"
    assert "too many passes over" in out
    assert "three" not in out.rpartition("too many passes over")[2].split(":")[0]


def test_a_manifest_with_an_impossible_setting_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shards = write_prepared(["a text"] * 40, tmp_path / "shards")
    manifest = shards / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"eod_token": ""}))
    assert run(["data", "inspect", str(shards)]) == 2
    assert "eod_token" in capsys.readouterr().err


def test_plots_are_not_put_into_a_file(folder: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    (folder / "occupied").write_text("mine")
    for below in ("", "/plots"):
        words = ["data", "inspect", str(folder / "one"), "--plots", f"{folder}/occupied{below}"]
        assert run(words) == 2
        assert "lies below, a file" in capsys.readouterr().err
    assert (folder / "occupied").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["corpus", "data.seq_len=5"], "overrides are of a recipe, and corpus is none"),
        (["tiny/smoke", "--seq-len", "64"], "--seq-len has no effect on a recipe; leave it out."),
        (["tiny/smoke", "--tokenizer", "t.json"], "--tokenizer has no effect on a recipe;"),
    ],
)
def test_what_has_no_effect_is_refused(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    assert run(["data", "inspect", *arguments]) == 2
    assert sentence in capsys.readouterr().err
