"""What building the site adds to mkdocs: pages of files at the repository's root, and a check of what pages load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parent.parent

INCLUDED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages whose text is a file of the repository's root."""

_LOADED = re.compile(r"<(?:script|img|link|iframe)\b[^>]*\s(?:src|href)=\"?(?:https?:)?//[^\s\">]+")

_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_page_read_source(page: Any, config: Any) -> str | None:
    """The text of a page that is a file of the repository's root; its links begin there."""
    name = INCLUDED.get(page.file.src_uri)
    if name is None:
        return None
    return _LINK.sub(_from_docs, (ROOT / name).read_text(encoding="utf-8"))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files that are no pages, such as ``../examples``, as the file's name."""
    return _LINK.sub(
        lambda link: f"`{link[2].removeprefix('../')}`" if link[2].startswith("../") else link[0], markdown
    )


def on_post_build(config: Any) -> None:
    """Fail if a page loads anything from elsewhere: the site is to work without a network."""
    for page in Path(config["site_dir"]).rglob("*.html"):
        found = _LOADED.search(page.read_text(encoding="utf-8"))
        if found:
            raise PluginError(f"{page.name} loads from elsewhere: {found[0]}")


def _from_docs(link: re.Match[str]) -> str:
    target = link[2]
    if not target or ":" in target:
        return link[0]
    inside = target.removeprefix("docs/")
    pages = {root: page for page, root in INCLUDED.items()}
    moved = inside if inside != target else pages.get(target, f"../{target}")
    return f"[{link[1]}]({moved}{link[3] or ''})"
