"""The site of the documentation: built strictly, without a dead link, and read without a network."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from consyn_jax.foreign_flags import FOREIGN

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """Links, anchors and loaded files of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors = {"", "__comments"}
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given.get("id") or "", given.get("name") or ""}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        elif tag == "link" and given.get("href") and given.get("rel") != "canonical":
            self.loaded.append(str(given["href"]))
        elif tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(str(given["src"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    if not os.environ.get("CI"):  # where the extra must be installed
        pytest.importorskip("mkdocs", reason="needs the extra docs")
    path = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return path


@pytest.mark.slow
def test_no_link_is_dead_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {file: Page(file) for file in site.rglob("*.html")}
    assert len(pages) > 50
    dead, elsewhere = [], []
    for file, page in pages.items():
        name = file.relative_to(site)
        elsewhere += [f"{name}: {url}" for url in page.loaded if urlsplit(url).netloc]
        for url in page.links + page.loaded:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or name.name == "404.html":
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            is_there = target.is_file()
            if is_there and target in pages:
                is_there = unquote(parts.fragment) in pages[target].anchors
            if not is_there:
                dead.append(f"{name}: {url}")
    assert dead == []
    assert elsewhere == []
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text()), style


@pytest.mark.slow
def test_every_flag_of_every_command_is_in_the_reference(site: Path) -> None:
    for snapshot in sorted((ROOT / "tests" / "cli").glob("flags*.txt")):
        command = f"consyn-{snapshot.stem.removeprefix('flags').strip('-') or 'train'}"
        text = (site / "reference" / f"{command}.html").read_text(encoding="utf-8")
        names = re.findall(r": --(\w+) =", snapshot.read_text())
        assert names
        assert [name for name in names if f"<code>--{name}</code>" not in text] == []


@pytest.mark.slow
def test_settings_of_other_trainers_have_a_page(site: Path) -> None:
    text = (site / "reference" / "other-trainers.html").read_text(encoding="utf-8")
    assert [name for name in FOREIGN if f"<code>{name}</code>" not in text] == []
    for flag in ("--epochs N", "--mesh fsdp=N", "--lora_rank 16", "--optimizer VALUE"):
        assert f"<code>{flag}</code>" in text


def test_every_page_is_in_the_navigation() -> None:
    named = set(
        re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    )
    docs = ROOT / "docs"
    assert {str(page.relative_to(docs)) for page in docs.rglob("*.md")} <= named


def test_the_readme_fits_a_screen_and_leads_to_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert len(links) > 15
    assert [link for link in links if ":" not in link and not (ROOT / link).is_file()] == []
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
        assert (ROOT / picture).stat().st_size < 300_000


def test_the_slurm_page_prints_the_script() -> None:
    """Word for word: the page explains its lines."""
    script = (ROOT / "scripts" / "slurm" / "train.sbatch").read_text().rstrip()
    assert f"```\n{script}\n```" in (ROOT / "docs" / "slurm.md").read_text()
