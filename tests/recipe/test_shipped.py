"""The package brings its recipes and start scripts along, and works from any folder."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.recipe.load import load_recipe
from nemotron.recipe.shipped import home, names

ROOT = Path(__file__).parents[2]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_those_of_complete_recipes():
    assert "tiny/pretrain" in names()
    parts = ["tiny/model", "super/blends/phase1", "super/layouts/64xh100"]
    assert not set(parts) & set(names())


def test_a_shipped_recipe_is_found_by_name_from_anywhere(empty: Path):
    assert load_recipe("tiny/smoke").path == home() / "tiny/smoke.yaml"
    Path("mine.yaml").write_text("extends: tiny/smoke\nname: mine\n")
    assert load_recipe("mine.yaml").config.name == "mine"


def test_a_file_of_that_name_comes_first(empty: Path):
    Path("tiny").mkdir()
    Path("tiny/smoke").write_text("extends: [tiny/pretrain]\nname: own\n")
    assert load_recipe("tiny/smoke").config.name == "own"


def test_a_misspelt_name_gets_the_nearest(empty: Path, capsys: pytest.CaptureFixture):
    assert run(["recipe", "check", "tiny/pretrian"]) == 2
    said = capsys.readouterr().err
    assert said == "nemotron: tiny/pretrian: there is no such recipe; did you mean tiny/pretrain?\n"
    assert run(["recipe", "copy", "smoke"]) == 2
    assert "did you mean tiny/smoke?" in capsys.readouterr().err
    assert run(["recipe", "check", "unheard-of"]) == 2
    assert "unheard-of: there is no such file" in capsys.readouterr().err


def test_the_list_says_what_each_recipe_is(capsys: pytest.CaptureFixture):
    assert run(["recipe", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names()
    assert "A few seconds: does everything work?" in lines[-1]


@pytest.mark.parametrize("name", ["tiny/pretrain", "super/pretrain_64xh100"])
def test_a_copy_is_the_same_recipe_without_the_package(
    name: str, empty: Path, capsys: pytest.CaptureFixture
):
    assert run(["recipe", "copy", name]) == 0
    written = {Path(line) for line in capsys.readouterr().out.splitlines()}
    assert {path for path in Path("recipes").rglob("*") if path.is_file()} == written
    copied = load_recipe(f"recipes/{name}.yaml")
    assert copied.config == load_recipe(name).config
    assert not [path for path in copied.files if path.is_absolute()]
    assert Path("recipes/schema.json").is_file()


def test_a_copy_keeps_what_is_there(empty: Path, capsys: pytest.CaptureFixture):
    assert run(["recipe", "copy", "tiny/smoke", "--launch"]) == 0
    assert os.access("launch/torchrun.sh", os.X_OK)
    assert run(["recipe", "copy", "tiny/smoke"]) == 0  # all of it is there already
    Path("recipes/tiny/model.yaml").write_text("mine\n")
    capsys.readouterr()
    assert run(["recipe", "copy", "tiny/pretrain"]) == 2
    assert "recipes/tiny/model.yaml: exists with other content" in capsys.readouterr().err
    assert Path("recipes/tiny/model.yaml").read_text() == "mine\n"
    assert not Path("recipes/tiny/pretrain.yaml").exists()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel that was built from the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    [wheel] = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_every_recipe_and_script_once(installed: Path):
    for folder in ("recipes", "launch"):
        ours = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*") if p.is_file()}
        packed = {p.relative_to(installed / "nemotron" / folder)
                  for p in (installed / "nemotron" / folder).rglob("*") if p.is_file()}  # fmt: skip
        assert packed == ours
        assert not (installed / folder).exists()
    assert (installed / "nemotron/py.typed").is_file()


def test_the_installed_package_works_in_an_empty_folder(installed: Path, empty: Path):
    program = (
        "import nemotron, sys; from nemotron.cli import run\n"
        "assert nemotron.__file__.startswith(sys.path[1]), nemotron.__file__\n"
        "assert run(['recipe', 'list']) == 0\n"
        "assert run(['recipe', 'check', 'super/pretrain_64xh100']) == 0\n"
        "assert run(['recipe', 'copy', 'tiny/pretrain', '--launch']) == 0\n"
        "assert run(['recipe', 'check', 'recipes/tiny/pretrain.yaml']) == 0\n"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "tiny/smoke" in done.stdout
    assert Path("launch/torchrun.sh").is_file()
