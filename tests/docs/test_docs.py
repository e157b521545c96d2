"""What the pages say is true of the code: commands, paths, keys, examples, tables."""

import ast
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel
from ruamel.yaml import YAML

from nemotron import cli
from nemotron.data.config import BlendConfig
from nemotron.model.parameters import count_parameters
from nemotron.ops.apply import ALL
from nemotron.ops.registry import Backend
from nemotron.recipe.blend import read_blend
from nemotron.recipe.load import load_recipe
from nemotron.recipe.stages import STAGES
from tests.support.pages import PAGES, ROOT, Block, Command, blocks, commands, prose, spans

COMMANDS = commands()
OURS = [command for command in COMMANDS if command.words[0] == "nemotron"]
OTHER_PROGRAMS = {"cd", "curl", "git", "lm_eval", "sbatch", "torchrun", "."}
FOLDERS = ("nemotron/", "recipes/", "tests/", "tools/", "docs/")


def name_of(item: Command | Block | Path) -> str:
    return item.name if isinstance(item, Path) else item.where


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes, and with those that the pages tell the reader to write."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for block in blocks("yaml"):
        if path := written_to(block):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(block.text)
    return folder


@pytest.fixture
def newcomer(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in that folder, into which no test writes."""
    monkeypatch.chdir(recipes)


def written_to(block: Block) -> str | None:
    """Return the file that the block's first line names."""
    match = re.match(r"# (recipes/\S+\.yaml)\n", block.text)
    return match[1] if match else None


def parse(words: tuple[str, ...], in_sentence: bool = False) -> tuple[str, dict[str, Any]]:
    """Return the subcommand and its parameters as the command line understands them."""
    command: Any = cli.command_line()
    context, names, rest = None, ["nemotron"], list(words[1:])
    while hasattr(command, "resolve_command"):
        context = command.make_context(names[-1], rest, parent=context)
        arguments = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, arguments)
        names.append(name)
    if in_sentence and not rest:
        return " ".join(names[1:]), {}
    return " ".join(names[1:]), command.make_context(names[-1], rest, parent=context).params


@pytest.mark.parametrize("command", OURS, ids=name_of)
def test_the_command_line_understands_each_command(command: Command):
    subcommand, _ = parse(command.words, command.in_sentence)
    assert subcommand


def test_a_command_that_does_not_exist_would_be_noticed():
    with pytest.raises(Exception, match="polish"):
        parse(("nemotron", "polish"))
    with pytest.raises(Exception, match="--fast"):
        parse(("nemotron", "train", "a.yaml", "--fast"))
    with pytest.raises(Exception, match="recipe"):
        parse(("nemotron", "train"))


@pytest.mark.parametrize("command", OURS, ids=name_of)
def test_recipes_and_overrides_in_commands_are_valid(command: Command, newcomer: None):
    _, given = parse(command.words, command.in_sentence)
    if command.answer.startswith("nemotron: "):
        return  # shown because it is wrong; its answer is compared below
    for key in {"recipe", "first", "second"} & given.keys():
        if given[key] is not None and not re.fullmatch(
            r"runs/[\w-]+(/recipe\.yaml)?|RECIPE", str(given[key])
        ):
            load_recipe(given[key], given.get("overrides") or [])


def is_cheap(command: Command) -> bool:
    """Say whether a command only reads recipes: the shipped ones, or those of the pages."""
    reads = command.words[1:3] in {("recipe", name) for name in ("list", "show", "check", "diff")}
    is_whole = not command.in_sentence and not command.answer.startswith("nemotron: ")
    return reads and is_whole and not any(word.startswith("runs/") for word in command.words)


@pytest.mark.parametrize("command", [c for c in OURS if is_cheap(c)], ids=name_of)
def test_commands_that_only_read_recipes_succeed(
    command: Command, newcomer: None, capsys: pytest.CaptureFixture[str]
):
    assert cli.run(list(command.words[1:])) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [c for c in OURS if c.answer.startswith("nemotron: ")], ids=name_of
)
def test_mistakes_are_answered_as_the_pages_show(
    command: Command, newcomer: None, capsys: pytest.CaptureFixture[str]
):
    assert cli.run(list(command.words[1:])) == 2
    assert capsys.readouterr().err == command.answer


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_named_in_sentences_exist(page: Path):
    for span in spans(page):
        if match := re.match(r"(--[a-z-]+[a-z0-9-]*)", span):
            assert match[1] in known_options(cli.command_line()), span


def known_options(command: Any) -> set[str]:
    found = {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for inner in getattr(command, "commands", {}).values():
        found |= known_options(inner)
    return found


def test_every_other_command_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in COMMANDS:
        program, *rest = command.words
        if program == "make":
            wanted = [word for word in rest if "=" not in word]
            assert set(wanted) <= set(targets), command.where
        elif program in ("python", ".venv/bin/python"):
            if rest[0] == "-m":
                assert importlib.util.find_spec(rest[1]), f"{command.where}: {rest[1]}"
            else:
                assert (ROOT / rest[0]).exists(), f"{command.where}: {rest[0]}"
        elif program.startswith(("tools/", "launch/")):
            assert (ROOT / program).exists(), command.where
        elif program != "nemotron":
            assert program in OTHER_PROGRAMS, command.where


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert anchor in anchors, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_in_sentences_exist(page: Path):
    for span in spans(page):
        if span.startswith(FOLDERS) and not re.search(r"[<>A-Z ]", span):
            file = span.partition("::")[0]  # a test of a file is checked by `test_strangers.py`
            assert list(ROOT.glob(file)), f"{page.name}: {span}"


@pytest.mark.parametrize("block", blocks("python"), ids=name_of)
def test_python_examples_compile_and_import_what_exists(block: Block):
    tree = ast.parse(block.text, block.where)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemotron"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), name.name


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def unknown_keys(values: dict[str, Any], section: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        field = section.model_fields.get(key)
        if field is None:
            found.append(prefix + key)
        elif isinstance(value, dict):
            inner = [t for t in (*get_args(field.annotation), field.annotation) if is_section(t)]
            found += unknown_keys(value, inner[0], f"{prefix}{key}.")
    return found


@pytest.mark.parametrize("block", blocks("yaml"), ids=name_of)
def test_recipes_in_the_pages_are_valid(block: Block, newcomer: None):
    path = written_to(block)
    if path and "/blends/" in path:
        BlendConfig.model_validate(read_blend(Path(path)).values)
    elif path:
        load_recipe(path)
    else:
        values = YAML(typ="safe", pure=True).load(block.text) or {}
        values.pop("extends", None)  # a key of files, not of their content
        stage = STAGES[values.get("stage", "pretrain")]
        assert unknown_keys(values, stage.recipe) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipe_keys_in_sentences_exist(page: Path):
    sections: dict[str, set[str]] = {}
    for stage in STAGES.values():
        for name, field in stage.recipe.model_fields.items():
            if is_section(field.annotation):
                sections.setdefault(name, set()).update(field.annotation.model_fields)
    for span in spans(page):
        match = re.fullmatch(r"([a-z]+)\.([a-z_]+)(?:[:=].*)?", span)
        if match and match[1] in sections and match[2] not in ("json", "yaml", "py"):
            assert match[2] in sections[match[1]], f"{page.name}: {span}"


def rows_of(table: str, page: str) -> list[list[str]]:
    """Return the cells of the table whose header begins with the given words."""
    after = (ROOT / page).read_text().split(table, 1)[1].split("\n\n", 1)[0]
    lines = [line for line in after.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def limits_of(backend: Backend) -> str:
    """Return what the table says of a backend, in its words."""
    words = ["GPU"] * (backend.devices == {"cuda"}) + ["CPU"] * (backend.devices == {"cpu"})
    words += ["bfloat16"] * (backend.dtypes == {torch.bfloat16})
    # which CPUs use this one without its name depends on their instructions
    words += ["by name"] * (backend.by_name and backend.name != "float32_products")
    return ", ".join(words)


def test_the_page_on_backends_lists_those_that_are_registered():
    listed = {
        row[0].strip("`"): re.findall(r"`(\w+)`(?: \(([^)]*)\))?", row[1])
        for row in rows_of("| Operation | Backends", "docs/backends.md")
    }
    assert listed == {
        operation.name: [(backend.name, limits_of(backend)) for backend in operation.backends]
        for operation in ALL
    }


@pytest.mark.parametrize("row", rows_of("| Recipe | Parameters", "README.md"), ids=lambda r: r[0])
def test_the_readme_counts_parameters_right(row: list[str]):
    path, written = row[0].strip("`"), row[1]
    config = load_recipe(ROOT / path).config.model
    count = count_parameters(config)
    unit, letter = (1e9, "B") if count.total > 1e9 else (1e6, "M")
    assert written == f"{count.total / unit:.2f} {letter} ({count.active / unit:.2f} {letter})"
