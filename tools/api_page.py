"""Write the reference in docs/api.md from the docstrings: api_page.py. The top is by hand."""

import ast
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs/api.md"
METHODS = {
    "Trainer": ["update"],
    "Engine": ["submit", "step", "cancel", "run", "generate", "update"],
}
"""Methods that are shown of a class, where others are public for the rest of the package only."""
MARK = "<!-- From here on: python tools/api_page.py -->\n"


def reference() -> str:
    """Return the part of the page that follows from the code."""
    import nemotron

    public = [name for name in dir(nemotron) if name != "__version__"]
    order = sorted(public, key=lambda name: (name[0].isupper(), name))
    return "\n".join(section(name, getattr(nemotron, name)) for name in order)


def section(name: str, item: Any) -> str:
    """Return the heading, signature and docstring of a function or class, with its methods."""
    node = definition(item)
    lines = [f"## {name}", "", *described(f"nemotron.{name}", node)]
    if isinstance(node, ast.ClassDef) and not is_dataclass(node):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and is_shown(name, method.name):
                lines += [f"### {name}.{method.name}", "", *described(method.name, method)]
    return "\n".join(lines)


def is_shown(name: str, method: str) -> bool:
    return not method.startswith("_") and method in METHODS.get(name, [method])


def definition(item: Any) -> ast.ClassDef | ast.FunctionDef:
    [node] = ast.parse(textwrap.dedent(inspect.getsource(item))).body
    assert isinstance(node, ast.ClassDef | ast.FunctionDef)
    return node


def described(shown: str, node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    """Return the signature as a block of code, then the docstring, sections as emphasis."""
    text = ast.get_docstring(node) or ""
    start = constructor(node)
    if start is not None and start is not node:
        text = "\n\n".join(filter(None, [text, ast.get_docstring(start)]))
    for word in ("Raises:", "Source:"):
        before, found, after = text.partition(f"\n{word}")
        text = before + (f"\n*{word}* " + " ".join(after.split()) if found else "")
    call = [] if shown.endswith("Error") else ["```text", signature(shown, node), "```", ""]
    return [*call, text, ""]


def constructor(node: ast.ClassDef | ast.FunctionDef) -> ast.FunctionDef | None:
    if isinstance(node, ast.FunctionDef):
        return node
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    return next((method for method in methods if method.name == "__init__"), None)


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def signature(shown: str, node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return the call with types and defaults, one argument a line when it is long."""
    function = constructor(node)
    if isinstance(node, ast.FunctionDef) and any(
        ast.unparse(decorator) == "property" for decorator in node.decorator_list
    ):
        return f"{shown} -> {ast.unparse(node.returns)}" if node.returns else shown
    if function is None:
        fields = [item for item in getattr(node, "body", []) if isinstance(item, ast.AnnAssign)]
        arguments = [ast.unparse(field) for field in fields]
    else:
        arguments = split(function.args)
    returns = isinstance(node, ast.FunctionDef) and node.returns
    end = f") -> {ast.unparse(returns)}" if returns else ")"
    line = f"{shown}({', '.join(arguments)}{end}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{shown}(", *(f"    {argument}," for argument in arguments), end])


def split(arguments: ast.arguments) -> list[str]:
    """Return each argument as it is written, without `self`."""
    names = arguments.posonlyargs + arguments.args
    given: list[ast.expr | None] = [*arguments.defaults]
    defaults = [None] * (len(names) - len(given)) + given
    parts = [written(name, default) for name, default in zip(names, defaults, strict=True)]
    parts = [part for name, part in zip(names, parts, strict=True) if name.arg != "self"]
    if arguments.kwonlyargs:
        keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        parts += ["*", *(written(name, default) for name, default in keywords)]
    return parts


def written(name: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(name) + (f" = {ast.unparse(default)}" if default is not None else "")


def page(current: str) -> str:
    """Return the page with its reference renewed."""
    top = current.partition(MARK)[0]
    return top + MARK + "\n" + reference().rstrip() + "\n"


def main() -> int:
    PAGE.write_text(page(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
