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
    ends = ["--tokenizer", str(foreign), "--eod-token", "<end>", "--hold-out", "0.1"]
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
