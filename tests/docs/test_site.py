"""The site of docs/ has every page, leads nowhere wrong, and loads nothing from other places."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.pages import ROOT
from tools import site_hooks


def named(entries: list) -> list[str]:  # type: ignore[type-arg]  # nested YAML
    found = []
    for entry in entries:
        values = entry.values() if isinstance(entry, dict) else [entry]
        for value in values:
            found += named(value) if isinstance(value, list) else [value]
    return found


def test_the_navigation_has_every_page_once():
    config = YAML(typ="safe", pure=True).load((ROOT / "mkdocs.yml").read_text())
    assert sorted(named(config["nav"])) == sorted(site_hooks.pages().values())


def test_links_out_of_the_folder_lead_to_pages_and_files_of_the_site():
    text = "[a](../launch/README.md#stopping) [b](recipes.md) [c](https://x.org/y) [d](nowhere.md)"
    wanted = "[a](launch.md#stopping) [b](recipes.md) [c](https://x.org/y) [d](nowhere.md)"
    assert site_hooks.rewrite(text, "docs/distributed.md") == wanted
    text = "[a](docs/data.md#blends) [b](recipes/tiny/nano.yaml)"
    wanted = "[a](data.md#blends) [b](files/recipes/tiny/nano.yaml)"
    assert site_hooks.rewrite(text, "README.md") == wanted
    assert all((ROOT / path).is_file() for path in site_hooks.files_linked())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_is_built_without_warnings_and_needs_nothing_else(tmp_path: Path):
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe|link)[^>]*?(?:src|href)=\"(\w+:)?//", page.read_text()
        )
        assert loaded == [], page
    index = (tmp_path / "search/search_index.js").read_text()
    for name in site_hooks.pages().values():
        html = Path(name).with_suffix(".html")
        assert (tmp_path / html).is_file(), name
        assert f'"location":"{html}' in index, name
