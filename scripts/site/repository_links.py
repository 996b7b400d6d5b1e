"""Links between pages of docs/ and the other files of the repository, as links inside the site."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from pathlib import Path

LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FENCE = re.compile(r"^\s*(```|~~~)")
OUTSIDE = re.compile(r"[a-z]+:|#|/")  # another host, this page, or no file of ours
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


class Repository:
    """The files of the repository as the site has them.

    A page of docs/ keeps its place. Any other file that is linked to is below repository/: Markdown
    as a page, programs as a page with their text, and the rest as it is.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def uri(self, place: str) -> str:
        """Where the site has the file at `place`, a path below the root."""
        if place.startswith("docs/"):
            return place.removeprefix("docs/")
        suffix = ".md" if Path(place).suffix in LANGUAGES else ""
        return f"repository/{place}{suffix}"

    def rewritten(self, markdown: str, place: str) -> str:
        """The text of the file at `place` with links that are right in the site."""
        here = Path(self.uri(place)).parent

        def link(match: re.Match[str]) -> str:
            target, hash_sign, anchor = match[0].partition("#")
            if OUTSIDE.match(match[0]):
                return match[0]
            aim = os.path.normpath(Path(place).parent / target)
            if not (self.root / aim).is_file():
                return match[0]  # mkdocs names it
            return os.path.relpath(self.uri(aim), here) + hash_sign + anchor

        return "\n".join(
            LINK.sub(link, line) if is_text else line for line, is_text in lines_of(markdown)
        )

    def linked_files(self) -> dict[str, str | Path]:
        """Files outside of docs/ that pages need, by place in the site: a page's text or a file."""
        found: dict[str, str | Path] = {}
        pages = [str(p.relative_to(self.root)) for p in (self.root / "docs").rglob("*.md")]
        for place in pages:
            text = (self.root / place).read_text(encoding="utf-8")
            for aim in self._aims(text, place):
                uri = self.uri(aim)
                if aim.startswith("docs/") or uri in found:
                    continue
                found[uri] = self._content(aim)
                if aim.endswith(".md"):
                    pages.append(aim)
        return found

    def _aims(self, markdown: str, place: str) -> Iterator[str]:
        for line, is_text in lines_of(markdown):
            for match in LINK.finditer(line) if is_text else ():
                if not OUTSIDE.match(match[0]):
                    target = match[0].partition("#")[0]
                    aim = os.path.normpath(Path(place).parent / target)
                    if (self.root / aim).is_file():
                        yield aim

    def _content(self, place: str) -> str | Path:
        file = self.root / place
        if place.endswith(".md"):
            return self.rewritten(file.read_text(encoding="utf-8"), place)
        language = LANGUAGES.get(file.suffix)
        if language is None:
            return file
        # Found by links only: the search is for documentation.
        head = f"---\nsearch:\n  exclude: true\n---\n\n# {place}\n\n"
        return f"{head}~~~~{language}\n{file.read_text(encoding='utf-8')}\n~~~~\n"


def lines_of(markdown: str) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it is text: not inside a fence of code."""
    fence = ""
    for line in markdown.split("\n"):
        mark = FENCE.match(line)
        is_text = not fence and not mark
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1] == fence:
            fence = ""
        yield line, is_text
