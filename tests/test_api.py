"""The package from Python: what it offers, what its page says, what it imports and when."""

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nemotron
from tests.support.embedded import fill_cache
from tests.support.pages import blocks

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OTHER_NAMES = {"ruamel.yaml": "ruamel", "nemotron-train": "nemotron"}
"""Distributions whose module has another name."""
OF_KERNELS = {"triton", "numba", "llvmlite"}
"""Compilers, imported by kernels alone: with CUDA builds of torch, or from the extra `cpu`."""
OF_LM_EVAL = {"evaluate"}
"""Comes with lm-eval, and only what reads its tasks imports it."""
OF_THE_SYSTEM = {"seccomp"}
"""Comes with libseccomp's own packages, never from an index."""


def test_the_public_names_are_listed_and_exist():
    assert dir(nemotron) == sorted(nemotron.__all__)
    assert {"load", "Session", "Trainer", "Engine"} <= set(dir(nemotron))
    for name in dir(nemotron):
        assert getattr(nemotron, name) is getattr(nemotron, name)
    with pytest.raises(AttributeError, match="has no attribute 'polish'"):
        nemotron.polish  # noqa: B018


def test_names_for_type_checkers_are_those_that_are_imported():
    tree = ast.parse(Path(nemotron.__file__).read_text())
    homes = {
        name.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nemotron.")
        for name in node.names
    }
    assert homes == nemotron._HOMES
    assert set(homes) | {"__version__"} == set(nemotron.__all__)


def test_the_page_is_what_the_docstrings_say():
    tool = importlib.import_module("tools.api_page")
    current = tool.PAGE.read_text()
    assert tool.page(current) == current, "run: python tools/api_page.py"


@pytest.mark.slow
def test_the_notebook_of_the_page_trains_evaluates_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    [block] = [block for block in blocks("python") if block.page.name == "api.md"]
    assert len(block.text.strip().splitlines()) <= 15
    fill_cache(tmp_path / "runs/.cache")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(block.text, block.where, "exec"), scope)
    first, *_ = lines = capsys.readouterr().out.splitlines()
    *losses, bits = map(float, first.split())
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.5
    assert 0 < bits < 8
    assert "\n".join(lines[1:]).startswith("def read(self):")
    assert scope["session"].evaluate()["validation/bits_per_byte"] == bits
    assert list(scope["session"].steps()) == []
    # what is left is the embedded text, prepared
    assert not list(tmp_path.glob("runs/smoke*"))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".jsonl", ".yaml")]


HEAVY = {
    "wandb", "datasets", "pyarrow", "pandas", "transformers", "huggingface_hub", "matplotlib",
    "tensorboard", "trackio", "requests", "httpx", "mamba_ssm", "flash_attn", "IPython",
}  # fmt: skip
PROBE = """
import contextlib, io, json, sys, time
begin = time.process_time()
from nemotron.cli import run
with contextlib.redirect_stdout(io.StringIO()):
    assert run(sys.argv[1:]) == 0
print(json.dumps([time.process_time() - begin, sorted(sys.modules)]))
"""


def probe(*words: str) -> tuple[float, list[str]]:
    """Run a command in a process of its own; return its processor time and modules."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    seconds, modules = ast.literal_eval(done.stdout)
    return seconds, modules


# Six times what a core needs; torch alone takes 3 seconds and a thousand modules.
@pytest.mark.parametrize(
    ("words", "seconds", "modules"),
    [
        (["--help"], 1.0, 400),
        (["recipe", "show", "tiny/smoke"], 2.0, 430),
    ],
    ids=["help", "show"],
)
def test_a_command_imports_what_it_uses(words: list[str], seconds: float, modules: int):
    spent, loaded = probe(*words)
    packages = {name.partition(".")[0] for name in loaded}
    assert not packages & HEAVY
    assert len(loaded) < modules
    assert spent < seconds
    assert not packages & {"torch", "numpy", "sympy", "triton", "tokenizers"}


@pytest.mark.slow
def test_a_run_on_one_process_imports_no_tracker_compiler_or_layout(tmp_path: Path):
    words = ["train", "tiny/smoke", f"output={tmp_path}", "batch.global_tokens=128"]
    _, loaded = probe(*words)
    assert len(loaded) < 2500  # torch's own are 1,300
    assert not {"torch._dynamo", "torch.distributed.tensor", "sympy", "triton"} & set(loaded)
    assert (tmp_path / "smoke/metrics.jsonl").is_file()
    assert not {name.partition(".")[0] for name in loaded} & HEAVY


@functools.cache
def imports(path: Path) -> tuple[set[str], set[str]]:
    """Return the packages that a file imports whenever it is, and those it imports later."""
    tree = ast.parse(path.read_text())
    inner = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try)
        for node in ast.walk(block)
    }
    at_once, later = set[str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        else:
            continue
        (later if node in inner else at_once).update(name.partition(".")[0] for name in names)
    return at_once, later


def declared(requirements: list[str]) -> set[str]:
    """Return the modules of distributions that pyproject.toml names."""
    found = [re.match(r"[\w.-]+", text)[0].lower() for text in requirements]  # type: ignore[index]
    return {OTHER_NAMES.get(name, name.replace("-", "_")) for name in found}


@pytest.mark.slow
def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    ours = {"nemotron"} | set(sys.stdlib_module_names)
    at_once, later = set[str](), set[str]()
    for path in (ROOT / "nemotron").rglob("*.py"):
        first, second = imports(path)
        # only the commands that need them import these
        if path.is_relative_to(ROOT / "nemotron/serve") or path.name == "harness.py":
            first, second = set(), first | second
        at_once |= first - ours
        later |= second - ours
    needed = declared(PROJECT["dependencies"])
    extras = declared([r for rs in PROJECT["optional-dependencies"].values() for r in rs])
    assert at_once - needed - OF_KERNELS == set()
    assert later - needed - extras - OF_KERNELS - OF_LM_EVAL - OF_THE_SYSTEM == set()
    assert needed - at_once - later == set()


def test_no_module_imports_a_data_set_reader_or_tracker_at_once():
    for path in (ROOT / "nemotron").rglob("*.py"):
        at_once, _ = imports(path)
        assert not at_once & (HEAVY), path
