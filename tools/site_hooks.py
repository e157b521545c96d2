"""Hooks of MkDocs (mkdocs.yml): pages and files outside docs/ become part of the site."""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "launch/README.md": "launch.md",
    "SECURITY.md": "security_policy.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages outside docs/, and their names in the site."""
SHIM = "https://unpkg.com/iframe-worker/shim"
"""Script of the theme that lets pages search which are opened as files; ours stands in for it."""
WORKER = "assets/javascripts/worker.js"
LINK = re.compile(r"\]\(([^)\s#]+)((?:#[^)\s]*)?)\)")


def pages() -> dict[str, str]:
    """Return the name in the site of each page, by its path in the repository."""
    own = {f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    return own | OUTSIDE


def target_of(page: str, link: str) -> str | None:
    """Return the path in the repository to which a link leads; None if it leads elsewhere."""
    if ":" in link or link.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return path if (ROOT / path).is_file() else None


def place_of(path: str) -> str:
    """Return the name in the site of a file of the repository."""
    if path in pages():
        return pages()[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def files_linked() -> list[str]:
    """Return the files outside docs/, other than pages, to which pages link."""
    found = set()
    for page in pages():
        for link, _ in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            path = target_of(page, link)
            if path is not None and place_of(path).startswith("files/"):
                found.add(path)
    return sorted(found)


def rewrite(text: str, page: str) -> str:
    """Return a page with links that fit the site."""
    here = posixpath.dirname(place_of(page))

    def replaced(match: re.Match[str]) -> str:
        path = target_of(page, match[1])
        if path is None:
            return match[0]
        return f"]({posixpath.relpath(place_of(path), here or '.')}{match[2]})"

    return LINK.sub(replaced, text)


# Any: classes of MkDocs, which only the site needs
def on_config(config: Any) -> Any:
    """Give headings the anchors that GitHub gives them."""
    from pymdownx.slugs import slugify

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside docs/."""
    from mkdocs.structure.files import File

    for path, name in (OUTSIDE | {path: place_of(path) for path in files_linked()}).items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    worker = str(Path(__file__).parent / "site_worker.js")
    files.append(File.generated(config, WORKER, abs_src_path=worker))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links fit the site."""
    by_place = {name: path for path, name in pages().items()}
    return rewrite(markdown, by_place.get(page.file.src_uri, page.file.src_uri[len("files/") :]))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Load no script from another place."""
    here = posixpath.dirname(page.file.dest_uri)
    return output.replace(SHIM, posixpath.relpath(WORKER, here or "."))


def on_post_template(output_content: str, **_: Any) -> str:
    """Load no script from another place in the page of what is not found either."""
    return output_content.replace(SHIM, WORKER)
