"""Hooks of mkdocs: pages that are made from the code, and links that leave docs/.

Made at every build, so they cannot be out of date: a page for each command from its parser, the
settings of other trainers, and the page of the notebook. A link from docs/ to another file of the
repository (a test, a record, the README) leads to a copy of that file in the site.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from command_pages import command_modules, command_page
from foreign_page import foreign_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from notebook_page import notebook_page
from repository_links import Repository

ROOT = Path(__file__).parents[2]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that no person writes."""

    def add(uri: str, **source: Any) -> None:
        files.append(File.generated(config, uri, **source))

    for name, module in command_modules().items():
        add(f"reference/{name}.md", content=command_page(name, module))
    add("reference/other-trainers.md", content=foreign_page())
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            content = notebook_page((ROOT / "docs" / file.src_uri).read_text(encoding="utf-8"))
            add(f"{file.src_uri}.md", content=content)
    repository = Repository(ROOT)
    for uri, source in repository.linked_files().items():
        if isinstance(source, str):
            add(uri, content=source)
        else:
            add(uri, abs_src_path=str(source))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page of docs/ that leave docs/ to the copies."""
    if page.file.src_uri.startswith("repository/"):
        return markdown  # rewritten when it was made
    return Repository(ROOT).rewritten(markdown, f"docs/{page.file.src_uri}")
