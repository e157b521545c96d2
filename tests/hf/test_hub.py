"""Models by their names on the Hub, through real commands and a server that stands for the Hub."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemotron.hf.weights import read_weights
from tests.support import forked
from tests.support.prepared import write_prepared
from tests.support.stand_in_hub import StandInHub

NAME = "someone/tiny-model"


@pytest.fixture(scope="module")
def hub(exported: Path) -> Iterator[StandInHub]:
    served = StandInHub(NAME, exported)
    yield served
    served.close()


@pytest.fixture
def nemotron(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Return a function that runs a command in an empty folder; it gives exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")

    def run(*arguments: object, endpoint: str = hub.url, **environment: str) -> tuple[int, str]:
        process = forked.command(
            *arguments,
            output=tmp_path / "output.txt",
            environment=os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"} | environment,
        )
        code, text = process.wait(), process.text
        process.output.unlink()
        return code, text

    return run


@pytest.mark.slow
def test_a_name_on_the_hub_is_downloaded_once_and_used_from_the_cache(
    nemotron: Callable, exported: Path, tmp_path: Path
):
    code, text = nemotron("import", f"{NAME}@v1", "--out", "run")
    assert code == 0, text
    ours, theirs = (read_weights(path)[1] for path in (tmp_path / "run", exported))
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())
    [snapshot] = (tmp_path / "cache/hub/models--someone--tiny-model/snapshots").iterdir()
    assert not (snapshot / "README.md").exists()  # nothing reads it
    words = ["generate", f"{NAME}@v1", "--prompt", "a", "--max-new-tokens", "2"]
    code, text = nemotron(*words, HF_HUB_OFFLINE="1")
    assert code == 0, text
    assert "tokens/s" in text
    code, text = nemotron(
        "export", f"{NAME}@v1", "--out", "again", "--no-check", HF_HUB_OFFLINE="1"
    )
    assert code == 0, text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "cache", "run"]
    ours = read_weights(tmp_path / "again")[1]
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())
    assert "# tiny-model" in (tmp_path / "again/README.md").read_text()
    code, text = nemotron("export", tmp_path / "again")
    assert (code, text) == (2, "nemotron: --out is needed for a model that is not a run.\n")
    smoke = Path(__file__).parents[2] / "recipes/tiny/smoke.yaml"
    texts = write_prepared(["the river runs to the sea " * 9] * 40, tmp_path / "texts")
    data = ["device=cpu", f"data.sources=[{{name: texts, path: {texts}}}]"]
    code, text = nemotron("train", smoke, *data, f"init_from={NAME}@v1", HF_HUB_OFFLINE="1")
    assert code == 2
    assert "model.hidden_size = 20 there" in text


def test_what_is_neither_a_path_nor_on_the_hub_is_one_sentence(nemotron: Callable):
    for name, words in {
        "some/other": "the Hub has no model of this name that you may read",
        f"{NAME}@v9": f"the model {NAME} of the Hub has no revision v9",
    }.items():
        code, text = nemotron("generate", name, "--prompt", "a")
        assert code == 2
        assert words in text
        assert "Traceback" not in text
    for arguments in (["import", NAME, "--out", "run"], ["generate", NAME, "--prompt", "a"]):
        code, text = nemotron(*arguments, endpoint="http://127.0.0.1:9")
        assert code == 2
        assert "http://127.0.0.1:9 cannot be reached, nor is the model in the Hub's cache" in text
        assert "Traceback" not in text
    assert not Path("run").exists()


def test_a_path_is_never_asked_for_on_the_hub(nemotron: Callable, exported: Path):
    shutil.copytree(exported, "runs/tiny")
    words = ["generate", "runs/tiny", "--prompt", "a", "--max-new-tokens", "2"]
    code, text = nemotron(*words, endpoint="http://127.0.0.1:9")
    assert code == 0, text


def test_an_export_is_uploaded_only_when_asked_and_with_the_token_of_the_environment(
    nemotron: Callable, hub: StandInHub, run: Path
):
    code, text = nemotron("export", run, "--out", "quiet", "--no-check")
    assert code == 0, text
    assert not hub.created
    code, text = nemotron("export", run, "--out", "out", "--no-check", "--push", NAME)
    assert code == 0, text
    assert f"uploaded to {hub.url}/{NAME}" in text
    [created] = hub.created
    assert (created["name"], created["organization"]) == ("tiny-model", "someone")
    assert created["visibility"] == "private"
    assert set(hub.tokens) == {"Bearer hf_test"}
    files = {p.name: p.read_bytes() for p in Path("out").iterdir() if p.name != ".nemotron.json"}
    assert hub.uploaded.keys() == files.keys()
    assert all(hub.uploaded[name] == content for name, content in files.items())
    assert f'name = "{NAME}"' in files["README.md"].decode()


def test_an_upload_that_fails_leaves_the_export_and_says_so(
    nemotron: Callable, hub: StandInHub, run: Path, monkeypatch
):
    arguments = ["export", run, "--no-check", "--push"]
    code, text = nemotron(*arguments, NAME, "--out", "out", endpoint="http://127.0.0.1:9")
    assert code == 2
    assert f"--push = {NAME} could not be sent to http://127.0.0.1:9" in text
    assert f"send it later: hf upload --private {NAME} out; the export is complete" in text
    assert Path("out/config.json").is_file()
    assert "Traceback" not in text
    monkeypatch.setattr(hub, "refuses", True)
    code, text = nemotron(*arguments, NAME, "--out", "refused")
    assert code == 2
    assert f"--push = {NAME} was refused by {hub.url}: " in text
    assert "; set HF_TOKEN to a token that may write, and send it: hf upload --private " in text
    assert Path("refused/config.json").is_file()
    code, text = nemotron(*arguments, "no-owner", "--out", "other")
    assert code == 2
    assert "--push = no-owner is not a name on the Hub; give OWNER/NAME" in text
    assert not Path("other").exists()
