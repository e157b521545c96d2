"""House rules that the linter does not know, checked on the syntax trees of the package."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nemotron"
TREES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}

Rule = Callable[[ast.AST], Iterator[tuple[int, str]]]

# what these read can run code
LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}
CALLS |= {"eval", "exec", "compile", "__import__"}
KEYWORDS = {
    ("weights_only", False),
    ("trust_remote_code", True),
    ("allow_pickle", True),
    ("shell", True),
}


def dotted(node: ast.expr) -> str:
    """Return `a.b` for a name or an attribute of one, else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def code_from_files(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield each place where what stands in a file could be executed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                if name in CALLS or LOADERS & set(name.split(".")):
                    yield node.lineno, f"import of {name}"
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CALLS or name.split(".")[0] in LOADERS:
                yield node.lineno, f"call of {name}"
            for keyword in node.keywords:
                value = keyword.value
                if isinstance(value, ast.Constant) and (keyword.arg, value.value) in KEYWORDS:
                    yield node.lineno, f"{keyword.arg}={value.value}"


def swallowed_errors(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield each handler that catches every exception and does not raise again."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        everything = node.type is None or dotted(node.type) in ("Exception", "BaseException")
        if everything and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
            yield node.lineno, "every exception is swallowed"


def environment(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield each place where the environment is read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv"):
            yield node.lineno, dotted(node)


def broken(rule: Rule) -> dict[str, list[str]]:
    """Return, for each file that breaks a rule, how it does."""
    found = {name: [f"{line}: {what}" for line, what in rule(TREES[name])] for name in TREES}
    return {name: places for name, places in found.items() if places}


def test_nothing_that_stands_in_a_file_is_executed():
    assert broken(code_from_files) == {}


def test_no_error_is_swallowed():
    found = broken(swallowed_errors)
    assert found.keys() == {
        "run/trackers.py",  # a tracker's library may raise anything; the log names it
        "tune/compiled.py",  # so may the compiler; the log of the search names it
        "data/chat/render_worker.py",  # a template may raise anything; its answer says what
        "train/reliability/store.py",  # it goes to the thread that asked
        "sol/worker.py",  # it goes to the process that asked
    }
    assert all(len(places) == 1 for places in found.values())


def test_no_value_of_a_run_comes_from_the_environment():
    assert broken(environment).keys() == {
        "ops/tuning/base.py",  # asks where the user's cache lies
        "tune/compiled.py",  # hands it on to the processes that compile
        "run/provenance.py",  # records some of it
        "evaluate/harness_command.py",  # keeps lm-eval from starting processes
        "train/profile.py",  # silences the profiler, which prints by itself
        "run/redaction.py",  # removes its secrets from what is written
        "run/trackers.py",  # asks whether there is an account
        "data/prepare/run.py",  # keeps each of its processes to one core
        "parallel/runtime.py",  # asks which rank it is
        "train/reliability/watchdog.py",  # asks who hosts the store, to name it
        "train/reliability/deterministic.py",  # asks whether cuBLAS was told to be so
        "doctor/ranks.py",  # asks where the ranks meet
        "children.py",  # sets where children look for modules
        "posttrain/sandbox/run.py",  # asks whether code may run without isolation
    }


def test_a_package_file_holds_only_its_docstring():
    # so that a section of the recipe can be imported without torch
    for name, tree in TREES.items():
        path = Path(name)
        is_operation = path.parts[0] == "ops" and len(path.parts) == 3
        if path.name == "__init__.py" and path.parent != Path(".") and not is_operation:
            assert len(tree.body) == 1, name


def test_every_file_says_what_it_is_for():
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("import pickle", code_from_files),
        ("from pickle import loads", code_from_files),
        ("pickle.Unpickler(file).load()", code_from_files),
        ("from torch import load", code_from_files),
        ("torch.load(path)", code_from_files),
        ("read(path, weights_only=False)", code_from_files),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", code_from_files),
        ("numpy.load(path, allow_pickle=True)", code_from_files),
        ("subprocess.run(line, shell=True)", code_from_files),
        ("eval(text)", code_from_files),
        ("exec(text)", code_from_files),
        ("os.system(line)", code_from_files),
        ("try: f()\nexcept Exception: pass", swallowed_errors),
        ("try: f()\nexcept: pass", swallowed_errors),
        ("rank = os.environ['RANK']", environment),
        ("rank = os.getenv('RANK')", environment),
    ],
)
def test_the_rules_see_what_breaks_them(code: str, rule: Rule):
    assert list(rule(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    ["model.eval()", "re.compile(text)", "torch.compile(model)", "load(path, weights_only=True)"],
)
def test_the_rules_leave_the_rest_alone(code: str):
    assert not list(code_from_files(ast.parse(code)))


def test_every_name_that_runs_is_defined():
    # ruff and mypy are silent about undefined names, because shapes are written in strings
    words = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821"]
    found = subprocess.run([*words, "--output-format", "json", PACKAGE], capture_output=True)
    for finding in json.loads(found.stdout):
        place = finding["location"]["row"], finding["location"]["column"] - 1
        tree = TREES[str(Path(finding["filename"]).relative_to(PACKAGE))]
        names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
        where = [node.id for node in names if (node.lineno, node.col_offset) == place]
        assert not where, f"{finding['filename']}:{place[0]}: {where[0]} is not defined"


def test_every_file_of_tests_has_a_name_of_its_own():
    """Folders of tests are no packages, so that two files of one name cannot both be collected."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
