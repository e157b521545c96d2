import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron.data.corpus import load_documents
from nemotron.data.indexed import Shard
from nemotron.data.prepare import open_shard, prepare_embedded, write_shard
from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError

TOKENIZER = load_tokenizer("embedded")
TEXTS = ["One.", "naïve </s> text\n", "", "x = 3"]
PREPARE = """
import sys
from pathlib import Path
from nemotron.data.prepare import prepare_embedded
from nemotron.data.tokenizer import load_tokenizer
print(prepare_embedded("verse", Path(sys.argv[1]), load_tokenizer("embedded"), "</s>"))
"""


def start(cache: Path) -> subprocess.Popen[str]:
    """Prepare the embedded verse in another process."""
    command = [sys.executable, "-c", PREPARE, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def texts_of(prefix: Path) -> list[str]:
    shard = Shard(prefix)
    documents = [shard.document(i).tolist() for i in range(shard.num_documents)]
    assert all(document[-1] == 2 for document in documents)
    return [TOKENIZER.decode(document[:-1]) for document in documents]


@pytest.fixture(scope="module")
def verse(tmp_path_factory) -> Path:
    return prepare_embedded("verse", tmp_path_factory.mktemp("cache"), TOKENIZER, "</s>")


def test_a_document_is_its_text_and_one_end(tmp_path: Path, caplog):
    prefix = write_shard(TEXTS, tmp_path / "mine", TOKENIZER)
    assert texts_of(prefix) == [text for text in TEXTS if text]
    assert "skipped 1 documents without text" in caplog.text
    manifest = json.loads((tmp_path / "mine.json").read_text())
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert (manifest["documents"], manifest["eod_id"]) == (3, 2)
    assert manifest["tokens"] == open_shard(prefix, TOKENIZER).num_tokens
    assert sorted(os.listdir(tmp_path)) == ["mine.bin", "mine.idx", "mine.json"]


def test_the_embedded_shard_holds_every_document_once(verse: Path):
    found = texts_of(verse)
    assert found != load_documents("verse")
    assert sorted(found) == sorted(load_documents("verse"))


def test_a_prepared_shard_is_used_again(verse: Path):
    before = Path(f"{verse}.bin").stat()
    assert prepare_embedded("verse", verse.parent, TOKENIZER, "</s>") == verse
    assert Path(f"{verse}.bin").stat() == before


@pytest.mark.parametrize("end", ["bin", "idx", "json"])
def test_a_damaged_shard_is_made_again(verse: Path, end: str):
    good = {e: Path(f"{verse}.{e}").read_bytes() for e in ("bin", "idx", "json")}
    if end == "json":
        os.remove(f"{verse}.json")
    else:
        with open(f"{verse}.{end}", "r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"\x07")
    assert prepare_embedded("verse", verse.parent, TOKENIZER, "</s>") == verse
    assert {e: Path(f"{verse}.{e}").read_bytes() for e in good} == good


KILL_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
from nemotron.data import prepare
from nemotron.data.tokenizer import load_tokenizer

cache, deaths = Path(sys.argv[1]), 0
prepare.load_documents = lambda domain: ["one", "two", "three"]

def die_at(last):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove") and str(cache) in str(arguments[0]):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

while True:
    child = os.fork()
    if not child:
        die_at(deaths + 1)
        prepare.prepare_embedded("verse", cache, load_tokenizer("embedded"), "</s>")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    deaths += 1
print(deaths)
"""


def test_a_preparation_killed_at_any_file_operation_leaves_nothing_that_counts(tmp_path: Path):
    command = [sys.executable, "-c", KILL_EVERYWHERE, str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(answer.stdout) > 8
    (manifest,) = tmp_path.glob("verse-*.json")
    prefix = manifest.with_suffix("")
    assert sorted(texts_of(prefix)) == ["one", "three", "two"]
    ends = ("bin", "idx", "json")
    assert sorted(os.listdir(tmp_path)) == [".lock", *(f"{prefix.name}.{end}" for end in ends)]


def test_two_processes_at_once_make_one_whole_shard(tmp_path: Path, verse: Path):
    processes = [start(tmp_path), start(tmp_path)]
    answers = [process.communicate()[0].split() for process in processes]
    assert answers[0] == answers[1] == [str(tmp_path / verse.name)]
    for end in ("bin", "idx", "json"):
        assert (tmp_path / f"{verse.name}.{end}").read_bytes() == Path(
            f"{verse}.{end}"
        ).read_bytes()


def test_a_shard_of_another_tokenizer_is_refused_with_both_hashes(tmp_path: Path):
    prefix = write_shard(TEXTS, tmp_path / "mine", TOKENIZER)
    manifest = json.loads((tmp_path / "mine.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(manifest | {"tokenizer": "abc"}))
    with pytest.raises(
        UserError, match=rf"mine was made with the tokenizer abc, .* {TOKENIZER.hash}"
    ):
        open_shard(prefix, TOKENIZER)
    (tmp_path / "mine.json").write_text("[]")
    with pytest.raises(UserError, match=r"mine\.json is no shard manifest"):
        open_shard(prefix, TOKENIZER)


def test_a_shard_of_another_end_of_document_is_refused(tmp_path: Path):
    prefix = write_shard(TEXTS, tmp_path / "mine", TOKENIZER, eod_token="<|im_end|>")
    with pytest.raises(UserError, match=r"ends its documents with id 11, .* </s> is id 2; name"):
        open_shard(prefix, TOKENIZER)
    assert open_shard(prefix, TOKENIZER, eod_token="<|im_end|>").document(0)[-1] == 11


def test_a_shard_without_documents_is_refused(tmp_path: Path):
    prefix = write_shard(["", ""], tmp_path / "none", TOKENIZER)
    assert Shard(prefix).num_documents == 0
    with pytest.raises(UserError, match=r"none\.bin holds no tokens; give a shard with documents"):
        open_shard(prefix, TOKENIZER)
