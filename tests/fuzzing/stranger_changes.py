"""What a stranger does to a directory tree: changes of one entry, by chance."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

NAMES = [
    "\x1b[2J\x1b[31mred", "two\nlines", "n" * 255, "\udcff\udcfe", "-rf", "\u202egnp.exe", " ",
    "best", "final", "checkpoints", "lock", "metrics.jsonl", "config.yaml", "run.json", "tokenizer",
    "report.html", "loss.png", ".metrics.jsonl.0123456789abcdef.new", ".best.0123456789abcdef.old",
    "tokenizer.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
    "model.safetensors.index.json", "train.jsonl", "validation.jsonl", "notes.md", "x.parquet",
    "y.csv", "z.npy", "data.txt.gz",
]  # fmt: skip
VALUES = [
    "../" * 12 + "etc/passwd", "/dev/zero", "/proc/self/environ",
    "\x1b[31m", "x" * 5000, "-1", "1e999", "null", "nan",
]  # fmt: skip
ELSEWHERE = ["/dev/zero", "/proc/self/mem", "/etc/passwd", "nowhere", ".", "/", "/dev/stdin"]
IN_TEXT = re.compile(r'"[^"\n]{1,80}"|(?<=: )[^\s"{\[]{1,80}')


def change(tree: Path, outside: Path, big: int, names: bool, draw: random.Random) -> str:
    """Change one entry as a stranger might, and say what.

    Args:
        outside: what links and paths in files lead to.
        big: size in bytes of a huge sparse file.
        names: write paths of `outside` into files, too.
    """
    entries = sorted(tree.rglob("*"))
    files = [each for each in entries if stat.S_ISREG(each.lstat().st_mode)]
    deed = draw.choice([*DEEDS, "text", "text", "link", "link", "link"])
    if deed == "text" and files:
        return _other_text(draw.choice(files), outside if names else None, draw)
    new = draw.random() < 0.3 or not entries
    if new:
        folders = [tree, *(each for each in entries if stat.S_ISDIR(each.lstat().st_mode))]
        path = draw.choice(folders) / draw.choice(NAMES)
    else:
        path = draw.choice(entries)
    size = path.lstat().st_size if not new else 0
    try:
        if os.path.lexists(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        said = DEEDS.get(deed, DEEDS["link"])(path, outside, big, size, draw)
    except OSError as error:
        return f"{deed} failed: {error}"
    return f"{deed} {str(path.relative_to(tree))!r} {said}"


def _other_text(path: Path, outside: Path | None, draw: random.Random) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(1 << 20)
    except (OSError, UnicodeDecodeError):
        return "text of no text"
    spots = list(IN_TEXT.finditer(text))
    if not spots:
        return "text without values"
    spot = draw.choice(spots)
    paths = (
        [str(outside / "secret.txt"), str(outside / "directory"), "../../outside/secret.txt"]
        if outside
        else []
    )
    value = draw.choice([*paths, *VALUES])
    quoted = json.dumps(value) if spot[0].startswith('"') else value
    path.unlink()  # it may be a hard link to a file outside
    path.write_text(text[: spot.start()] + quoted + text[spot.end() :])
    return f"text {path.name}: {spot[0][:40]} -> {value[:40]}"


def _link(path: Path, outside: Path, big: int, size: int, draw: random.Random) -> str:
    folder, up = outside / "directory", os.path.relpath(outside / "secret.txt", path.parent)
    target = draw.choice(
        [outside / "secret.txt", outside / "secret.json", outside / path.name, folder, outside, up]
    )
    if draw.random() < 0.5:
        target = draw.choice([path.name, *ELSEWHERE])
    path.symlink_to(target)
    return f"-> {target}"


def _hard_link(path: Path, outside: Path, big: int, size: int, draw: random.Random) -> str:
    path.hardlink_to(outside / draw.choice(["secret.txt", "secret.json"]))
    return ""


def _pipe(path: Path, *_: object) -> str:
    os.mkfifo(path)
    return ""


def _socket(path: Path, *_: object) -> str:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
    return ""


def _device(path: Path, *_: object) -> str:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # zero
    return ""


def _huge(path: Path, outside: Path, big: int, size: int, draw: random.Random) -> str:
    with path.open("wb") as file:
        file.truncate(big)
    return ""


def _zeros(path: Path, outside: Path, big: int, size: int, draw: random.Random) -> str:
    path.write_bytes(bytes(min(size, 1 << 20)))
    return ""


def _noise(path: Path, outside: Path, big: int, size: int, draw: random.Random) -> str:
    path.write_bytes(draw.randbytes(draw.choice([0, 1, 100, 5000])))
    return ""


def _folder(path: Path, *_: object) -> str:
    path.mkdir()
    return ""


DEEDS: dict[str, Callable[..., str]] = {
    "link": _link,
    "hard link": _hard_link,
    "pipe": _pipe,
    "socket": _socket,
    "device": _device,
    "huge": _huge,
    "zeros": _zeros,
    "noise": _noise,
    "folder": _folder,
}
