"""House rules that the linter does not know, checked on the syntax trees of the package."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nemotron"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# what these read can run code
LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# torch writes the index of a checkpoint as a pickle; this file builds only the types it lists
OWN_UNPICKLER = "checkpoint/metadata.py"
CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "eval", "exec", "compile", "__import__"}
KEYWORDS = {("weights_only", False), ("trust_remote_code", True), ("allow_pickle", True)}
KEYWORDS |= {("shell", True)}


def dotted(node: ast.expr) -> str:
    """Return `a.b` for a name or an attribute of one, else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def code_from_files(tree: ast.AST) -> Iterator[str]:
    """Yield each place where what stands in a file could be executed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                if name in CALLS or LOADERS & set(name.split(".")):
                    yield f"line {node.lineno}: import of {name}"
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CALLS or name.split(".")[0] in LOADERS:
                yield f"line {node.lineno}: call of {name}"
            for keyword in node.keywords:
                value = keyword.value
                if isinstance(value, ast.Constant) and (keyword.arg, value.value) in KEYWORDS:
                    yield f"line {node.lineno}: {keyword.arg}={value.value}"


def swallowed_errors(tree: ast.AST) -> Iterator[str]:
    """Yield each handler that catches every exception and does not raise again."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        everything = node.type is None or dotted(node.type) in ("Exception", "BaseException")
        if everything and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
            yield f"line {node.lineno}: every exception is swallowed"


def environment(tree: ast.AST) -> Iterator[str]:
    """Yield each place where the environment is read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv"):
            yield f"line {node.lineno}: {dotted(node)}"


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_that_stands_in_a_file_is_executed(path: Path):
    found = list(code_from_files(ast.parse(path.read_text())))
    if name_of(path) == OWN_UNPICKLER:
        found = [where for where in found if not where.endswith("import of pickle")]
    assert found == []


def test_the_one_unpickler_builds_only_what_it_lists():
    tree = ast.parse((PACKAGE / OWN_UNPICKLER).read_text())
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    [own] = [node for node in classes if "pickle.Unpickler" in map(dotted, node.bases)]
    [find_class] = own.body
    assert isinstance(find_class, ast.FunctionDef)
    assert find_class.name == "find_class"
    called = {dotted(node.func) for node in ast.walk(find_class) if isinstance(node, ast.Call)}
    assert called == {"getattr", "isinstance", "DamagedCheckpoint"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_error_is_swallowed(path: Path):
    found = list(swallowed_errors(ast.parse(path.read_text())))
    # a tracker's library may raise anything, is told of in the log, and must not stop a run
    assert len(found) == (1 if name_of(path) == "train/trackers.py" else 0), found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_value_is_set_by_recipe_or_command_line_not_by_the_environment(path: Path):
    allowed = {
        "train/provenance.py",  # records it
        "train/trackers.py",  # the keys of a tracker's account belong there and nowhere else
        "train/redaction.py",  # removes those keys from what is written
        "hf/export.py",  # hands it on to the process that checks the export
    }
    if name_of(path) not in allowed:
        assert list(environment(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=name_of)
def test_a_package_file_holds_only_its_docstring(path: Path):
    # so that a section of the recipe can be imported without torch
    body = ast.parse(path.read_text()).body
    assert ast.get_docstring(ast.parse(path.read_text()))
    is_operation = path.parent.parent == PACKAGE / "ops"
    if path.parent != PACKAGE and not is_operation:
        assert len(body) == 1


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("import pickle", code_from_files),
        ("from pickle import loads", code_from_files),
        ("pickle.Unpickler(file).load()", code_from_files),
        ("from torch import load", code_from_files),
        ("torch.load(path)", code_from_files),
        ("torch.load(path, weights_only=False)", code_from_files),
        ("read(path, weights_only=False)", code_from_files),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", code_from_files),
        ("numpy.load(path, allow_pickle=True)", code_from_files),
        ("subprocess.run(line, shell=True)", code_from_files),
        ("eval(text)", code_from_files),
        ("exec(text)", code_from_files),
        ("try: f()\nexcept Exception: pass", swallowed_errors),
        ("try: f()\nexcept: pass", swallowed_errors),
        ("rank = os.environ['RANK']", environment),
        ("rank = os.getenv('RANK')", environment),
    ],
)
def test_the_rules_see_what_breaks_them(line: str, rule: Callable[[ast.AST], Iterator[str]]):
    assert list(rule(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    ["model.eval()", "re.compile(text)", "torch.compile(model)", "load(path, weights_only=True)"],
)
def test_the_rules_leave_the_rest_alone(line: str):
    assert list(code_from_files(ast.parse(line))) == []
