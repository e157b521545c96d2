"""The versions that docs/install.md and the Dockerfile name are those of constraints.txt."""

import re

import pytest

from tests.support.pages import ROOT

PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)
ROWS = re.findall(
    r"^\| `([\w-]+)` \| (\d[\d.]+)", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize(("package", "version"), ROWS)
def test_the_table_has_the_pinned_version(package: str, version: str):
    assert PINNED[package] == version


def test_the_table_names_what_matters_most():
    assert {"torch", "triton", "numpy", "transformers"} <= {package for package, _ in ROWS}


def test_the_dockerfile_copies_what_exists_and_pins_all_that_it_installs():
    text = (ROOT / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    installs = re.findall(r"pip install (.*)", text)
    assert installs
    assert all("--constraint constraints.txt" in words for words in installs)
    base = re.search(r"^FROM python:(\d\.\d+)-", text, re.MULTILINE)
    tested = re.search(r"tested with \(Python (\d\.\d+)\)", (ROOT / "constraints.txt").read_text())
    assert base is not None
    assert tested is not None
    assert base[1] == tested[1]
