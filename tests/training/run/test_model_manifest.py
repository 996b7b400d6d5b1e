"""A model says of itself which files it has, and which content."""

import json
import os
from pathlib import Path

import pytest

from consyn_jax.training.run.model_manifest import (
    MANIFEST,
    added,
    disagreement,
    has_manifest,
    seal,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "chat").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "chat" / "template").write_text("text")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    seal(tmp_path)
    return tmp_path


def test_a_model_agrees_with_its_manifest_and_files_may_be_added(model: Path) -> None:
    assert has_manifest(model)
    assert disagreement(model) is None
    (model / "README.md").write_text("mine")
    assert disagreement(model) is None
    files = json.loads((model / MANIFEST).read_text())["files"]
    assert sorted(files) == ["chat/template", "config.json", "model.safetensors"]
    assert files["config.json"] == {
        "size": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.safetensors", bytes(25_600), "model.safetensors is not what was written"),
        ("model.safetensors", b"", "model.safetensors has 0 bytes and not 25,600"),
        ("chat/template", None, "chat/template is missing"),
        (MANIFEST, None, f"{MANIFEST} is missing"),
        (MANIFEST, b"", f"{MANIFEST} is damaged"),
        (MANIFEST, bytes(100), f"{MANIFEST} is damaged"),
        (MANIFEST, b'{"files": {}}', f"{MANIFEST} names no file"),
        (MANIFEST, b'{"files": {"a": 1}}', f"{MANIFEST} is damaged"),
        (MANIFEST, b'{"files": {"config.json": {}}}', None),
        (
            MANIFEST,
            b'{"files": {"../x": {}}}',
            f"{MANIFEST} names ../x, which is outside the directory",
        ),
    ],
)
def test_what_differs_is_named(
    name: str, content: bytes | None, reason: str | None, model: Path
) -> None:
    if content is None:
        (model / name).unlink()
    else:
        (model / name).write_bytes(content)
    found = disagreement(model)
    assert found == reason if reason else found


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("config.json", "config.json cannot be read ("),
        (MANIFEST, f"{MANIFEST} cannot be read ("),
        ("chat", "chat is a link"),
        ("deep", "deep is a link"),
        ("deep/er", "deep/er is a link"),
    ],
)
def test_links_are_not_followed_even_to_an_equal_file(
    name: str, reason: str, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (model / "deep" / "er").mkdir(parents=True)
    (model / "deep" / "er" / "file").touch()
    (model / MANIFEST).unlink()
    seal(model)
    assert disagreement(model) is None
    outside = tmp_path_factory.mktemp("outside") / "original"
    (model / name).rename(outside)
    (model / name).symlink_to(outside)
    assert str(disagreement(model)).startswith(reason)


def test_files_that_nobody_listed_are_named(model: Path) -> None:
    assert list(added(model)) == []
    for name in ("chat/.hidden", ".git/config", "chat/mine", "a"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).touch()
    (model / "link").symlink_to("chat")
    unlisted = [f"{name} is not in {MANIFEST}" for name in ("a", "chat/mine", "link")]
    assert list(added(model)) == unlisted
    (model / MANIFEST).write_text("")
    assert list(added(model)) == []


def test_a_sealed_model_is_on_the_disk(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").readlink())
    )
    seal(model, lambda weights: json.dumps(sorted(weights)))
    names = ("config.json", "chat/template", "model.safetensors", "provenance.json", "chat", "")
    assert {*flushed} >= {model / name for name in names}
    assert json.loads((model / "provenance.json").read_text()) == ["model.safetensors"]
