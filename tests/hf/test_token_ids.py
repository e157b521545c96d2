"""Ids of tokens, from training to an export that others read: nothing stops or begins elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from nemotron import cli
from nemotron.data.tokenizer import Tokenizer
from nemotron.hf import selfcheck
from nemotron.hf.export import export
from nemotron.hf.model_card import model_card
from nemotron.hf.source import open_checkpoint
from nemotron.hf.weights import read_weights
from nemotron.loading import stop_ids
from nemotron.run.metrics import read_metrics
from tests.support.pages import FENCE

SMOKE = Path(__file__).parents[2] / "recipes/tiny/smoke.yaml"
END = 300
"""Of the foreign tokenizer, in which `!` and `"` have the ids 0 and 1."""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of others, which adds a beginning to every text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary |= {f"word{i}": i for i in range(len(letters), END)} | {"<end>": END, "<begin>": 301}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<begin>"])
    tokenizer.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=False),
            tokenizers.processors.TemplateProcessing("<begin> $A", None, [("<begin>", 301)]),
        ]
    )
    path = tmp_path_factory.mktemp("foreign") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def recipe(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A recipe of texts in the foreign tokenizer's ids."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [json.dumps({"text": f"The river runs to the sea {i} times."}) for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    ends = ["--tokenizer", str(foreign), "--eod-token", "<end>", "--hold-out", "0.3"]
    rows_and_shards = [str(folder / "rows.jsonl"), "--out", str(folder / "shards")]
    assert cli.run(["data", "prepare", *rows_and_shards, *ends]) == 0
    places = [
        f"output={folder}",
        f"data.sources=[{{name: t, path: {folder / 'shards'}}}]",
        f"data.tokenizer={foreign}",
    ]
    return [
        str(SMOKE),
        "device=cpu",
        "data.eod_token=<end>",
        *places,
    ]


@pytest.fixture(scope="module")
def trained(recipe: list[str]) -> Path:
    """A run with the foreign tokenizer; tests must not change it."""
    assert cli.run(["train", *recipe, "name=foreign", f"model.eos_token_id={END}"]) == 0
    return Path(recipe[3].removeprefix("output=")) / "foreign"


def test_an_end_of_text_that_is_not_that_of_the_data_is_refused(
    recipe: list[str], capsys: pytest.CaptureFixture
):
    assert cli.run(["train", *recipe, "name=refused"]) == 2
    assert (
        "model.eos_token_id = 2 is '#' in data.tokenizer, but documents end with data.eod_token = "
        "<end>; set model.eos_token_id = 300." in capsys.readouterr().err
    )


@pytest.mark.slow
def test_the_ids_of_an_export_are_those_of_training(
    trained: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    transformers = pytest.importorskip("transformers")
    assert export(trained, tmp_path / "out", check=False) == 0
    assert selfcheck.main(tmp_path / "out", trained) == 0
    printed = capsys.readouterr().out
    assert "note: tokenizer.json adds no tokens to a text, as in training" in printed
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = Tokenizer(foreign.read_bytes())
    for text in selfcheck.TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == END
    assert {theirs.bos_token_id, theirs.pad_token_id} == {None}
    assert theirs.tokenize('"a!"') == ['"', "a", "!", '"']
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ids = ["eos_token_id", "bos_token_id", "pad_token_id"]
    assert [config[name] for name in ids] == [END, None, None]
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert [getattr(generation, name) for name in ids] == [END, None, None]


def test_the_check_finds_a_tokenizer_that_adds_tokens(run: Path, exported: Path, tmp_path: Path):
    pytest.importorskip("transformers")
    shutil.copytree(exported, tmp_path / "out")
    path = tmp_path / "out" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    step = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.post_processor = step
    tokenizer.save(str(path))
    check = selfcheck.SelfCheck(tmp_path / "out", selfcheck.open_checkpoint(run))
    with pytest.raises(selfcheck.Failed, match=r"is \[1, .* for transformers, \[.* in training"):
        check.check_tokenizer()


def test_an_imported_tokenizer_keeps_what_its_makers_add(exported: Path, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "theirs")
    path = tmp_path / "theirs" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    step = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.post_processor = step
    tokenizer.save(str(path))
    for command in (["import", "theirs", "--out", "run"], ["export", "run", "--out", "again"]):
        words = [str(tmp_path / w) if w in {"theirs", "run", "again"} else w for w in command]
        assert cli.run([*words, *(["--no-check"] if command[0] == "export" else [])]) == 0
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == path.read_bytes()


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.slow
def test_the_companions_of_a_folder_travel_with_its_weights(
    trained: Path,
    recipe: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    first = Path("first")
    assert export(trained, first, check=False) == 0
    change_json(
        first / "tokenizer_config.json", model_input_names=["input_ids"], add_bos_token=True
    )
    change_json(first / "special_tokens_map.json", additional_special_tokens=["<begin>"])
    change_json(first / "generation_config.json", eos_token_id=[END, 301], temperature=0.6)
    (first / "chat_template.jinja").write_text("{{ messages }}")
    assert cli.run(["import", "first", "--out", "imported"]) == 0
    model = f"model.eos_token_id={END}"
    for name, origin in {"further": "imported", "last": str(tmp_path / "runs/further")}.items():
        settings = [*recipe, f"name={name}", "output=runs", model, f"init_from={origin}"]
        assert cli.run(["train", *settings]) == 0
    assert cli.run(["export", "runs/last", "--out", "out", "--no-check"]) == 0
    settings = json.loads(Path("out/tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids"]
    assert settings["add_bos_token"] is False  # it was trained without
    for name in ("special_tokens_map.json", "generation_config.json", "chat_template.jinja"):
        assert (Path("out") / name).read_bytes() == (first / name).read_bytes()
    for place in ("runs/last", "out", "imported"):
        assert stop_ids(place, read_weights(Path(place))[0]) == {END, 301}
    capsys.readouterr()
    shutil.copy("first/tokenizer.json", "other.json")
    layout = json.loads(Path("other.json").read_text())
    vocabulary = layout["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    Path("imported/tokenizer.json").write_text(json.dumps(layout))
    settings = [*recipe, "name=other", "output=runs", model, "init_from=imported"]
    assert cli.run(["train", *settings]) == 0
    assert "the tokenizer there is another one than data.tokenizer" in " ".join(
        Path("runs/other/log.txt").read_text().split()
    )
    assert not Path("runs/other/hf").exists()


def test_several_ends_of_text_of_a_configuration_alone_survive_an_import(
    exported: Path, tmp_path: Path
):
    shutil.copytree(exported, tmp_path / "theirs")
    (tmp_path / "theirs/generation_config.json").unlink()
    change_json(tmp_path / "theirs/config.json", eos_token_id=[2, 11])
    assert cli.run(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "run")]) == 0
    assert stop_ids(tmp_path / "run", read_weights(tmp_path / "run")[0]) == {2, 11}
    assert export(tmp_path / "run", tmp_path / "again", check=False) == 0
    generation = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 11]


def test_a_damaged_list_of_ends_is_one_sentence(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(exported, tmp_path / "theirs")
    change_json(tmp_path / "theirs/generation_config.json", eos_token_id=["</s>"])
    assert cli.run(["generate", str(tmp_path / "theirs"), "--prompt", "a"]) == 2
    assert "eos_token_id = ['</s>'] must be the id of a token, or a list" in capsys.readouterr().err


@pytest.mark.slow
def test_the_program_of_the_model_card_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    pytest.importorskip("transformers")
    assert export(trained, tmp_path / "out", check=False) == 0
    card = (tmp_path / "out/README.md").read_text()
    records = [r for r in read_metrics(trained / "metrics.jsonl") if r["kind"] == "validation"]
    for words in (
        "## Intended use\n\n*To be filled in:",
        "| schedule.peak | 0.003 |",
        "| batch.global_tokens | 256 |",
        f"| validation/loss | {records[-1]['validation/loss']:.4f} |",
        f"| held-out text, at step | {records[-1]['step']} |",
    ):
        assert words in card, card
    assert "base model" not in card
    assert "optimizer.muon" not in card  # the run used AdamW
    [block] = [match[2] for match in FENCE.finditer(card) if match[1] == "python"]
    monkeypatch.chdir(tmp_path / "out")
    capsys.readouterr()
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("def read(")


def test_a_model_of_the_hub_is_named_as_the_base_model(trained: Path, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    recipe = (copy / "recipe.yaml").read_text()
    for origin, metadata in {
        "someone/base@v2": "base_model: someone/base\n",
        str(copy): "",
    }.items():
        (copy / "recipe.yaml").write_text(recipe.replace("init_from: null", f"init_from: {origin}"))
        card = model_card(open_checkpoint(copy), [])
        assert f"| base model | {origin} |" in card
        assert f"mixture-of-experts]\n{metadata}# license" in card
