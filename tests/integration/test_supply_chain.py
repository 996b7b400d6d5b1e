"""A run opens no connection that nobody asked for, and keeps no key in its files."""

import stat
from pathlib import Path

import pytest

from .nursery import FLAGS, Nursery

pytestmark = pytest.mark.slow

SECRETS = ("wandb-key-5f1c9a", "hf_hub_token_77d2e0")
WATCHED = """
import os, sys
os.environ["WANDB_API_KEY"], os.environ["HF_TOKEN"] = {secrets!r}
os.umask(0)
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname"):
        with open({mark!r}, "a") as file:
            file.write(f"{{event}} {{arguments[1:]}}\\n")
        raise OSError("the network is blocked in this test")
sys.addaudithook(hook)
"""


def test_no_connection_no_key_and_nothing_that_all_may_write(
    nursery: Nursery, corpus: Path, tmp_path: Path
) -> None:
    mark, path = tmp_path / "connections", tmp_path / "run"
    before = WATCHED.format(secrets=SECRETS, mark=str(mark))
    flags = [flag for flag in FLAGS if flag not in ("--logging_backend", "none")]
    child = nursery.start(*flags, "--data", corpus, "--output", path, before=before)
    assert child.wait(240) == 0, child.said
    assert not mark.exists(), mark.read_text()
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) > 20
    for file in files:
        content = file.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS), file
    for each in (path, *path.rglob("*")):
        assert not each.stat().st_mode & stat.S_IWOTH, each
