"""`train --dry-run` refuses what training would refuse, and `train RUNDIR` means the run in it."""

from pathlib import Path

import pytest

from nemotron.cli import run
from tests.support.same_run import computed_metrics

SHORT = ["train", "tiny/smoke", "device=cpu", "evaluation.tokens=64", "data.sources=[verse]"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Return a folder with a run that stopped at step 3 of 6, really trained."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run([*SHORT, "--stop-at", "3"]) == 75
    (folder / "file").touch()
    return folder


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch) -> None:
    monkeypatch.chdir(world)


def dry(capfd, *words: str) -> str:
    capfd.readouterr()
    code = run([*SHORT, "--dry-run", *words])
    said = capfd.readouterr()
    assert code == (2 if said.err else 0), said
    return said.out + said.err


def test_it_says_what_would_happen_with_memory_and_time(world: Path, capfd):
    before = sorted(world.rglob("*"))
    said = dry(capfd)
    assert "runs/smoke (exists, at step 3 of 6; would go on with --resume)" in said
    assert "data       verse: 100.0% of the tokens; 359,973 tokens in 255 documents" in said
    assert "memory     about 0.5 GiB, of the" in said
    assert "time       about" in said
    assert "runs/smoke (would go on at step 3 of 6)" in dry(capfd, "--resume")
    assert sorted(world.rglob("*")) == before
    wide = ["data.seq_len=4096", "batch.micro_batch=1024", "batch.global_tokens=4194304"]
    assert "GiB, more than the" in dry(capfd, "name=wide", *wide)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.sources=[nowhere]"], "nowhere: does not exist, nor does a shard of that name"),
        (["output=file/runs"], "file/runs/other: cannot be written: Not a directory; set `output`"),
        (["data.cache=file"], "file cannot be written: Not a directory; name a writable folder"),
        (
            ["data.tokenizer=none.json"],
            "none.json does not exist; give the path of a tokenizer.json",
        ),
        (["data.eod_token=<end>"], "the tokenizer has no token '<end>'"),
        (["model.eos_token_id=3"], "set model.eos_token_id = 2."),
        (["data.max_epochs=0.001"], "passes, where max_epochs = 0.001"),
        (["init_from=runs/none"], "give a run, checkpoint or export"),
        (["init_from=runs/smoke", "model.moe_latent_size=16"], "do not fit the recipe"),
    ],
)
def test_it_refuses_data_tokenizers_and_weights_as_training_does(words, sentence: str, capfd):
    assert sentence in dry(capfd, "name=other", *words)
    capfd.readouterr()
    assert run([*SHORT, "name=other", *words]) == 2
    assert sentence in capfd.readouterr().err
    assert not Path("runs/other").exists()


def test_weights_that_fit_are_said_and_large_text_is_left_to_the_run(capfd, monkeypatch):
    monkeypatch.setattr("nemotron.data.rehearsal.LARGEST_TEXT", 3)
    Path("a.txt").write_text("four words and more " * 40)
    said = dry(capfd, "name=c", "init_from=runs/smoke", "data.sources=[a.txt]")
    assert "weights    every tensor of runs/smoke fits" in said
    assert "a.txt: 1 inputs, 0 MB, which the run tokenizes first" in said
    said = dry(capfd, "name=c", "model.eos_token_id=3", "data.sources=[a.txt]")
    assert "documents end with data.eod_token = </s>; set model.eos_token_id = 2." in said


def test_reinforcement_learning_is_refused_for_its_end_of_text_already_when_dry(capfd):
    words = ["remove=init_from", "device=cpu", "model.eos_token_id=3"]
    assert run(["train", "tiny/arith/rl", "--dry-run", *words]) == 2
    assert "set model.eos_token_id = 2." in capfd.readouterr().err


def test_the_folder_of_a_run_is_its_recipe_also_when_it_was_moved(world: Path, capfd):
    assert run(["train", "runs/smoke"]) == 2
    assert "contains a run at step 3 of 6; add --resume" in capfd.readouterr().err
    assert run(["recipe", "check", "runs/smoke"]) == 0
    Path("moved").mkdir()
    Path("runs/smoke").rename("moved/by_hand")
    assert run(["train", "moved/by_hand", "--resume"]) == 0
    assert not Path("runs/smoke").exists()
    assert [r["step"] for r in computed_metrics(Path("moved/by_hand")) if r["kind"] == "train"] == [
        1, 2, 3, 4, 5, 6,
    ]  # fmt: skip
    assert run(["train", "moved"]) == 2
    assert "moved: is a folder without recipe.yaml; give a recipe" in capfd.readouterr().err
