"""Uploads, to a server here that speaks the Hub's API."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import MOMENTS, Hub, hub
from huggingface_hub import constants

from consyn_jax.cli.convert import main
from consyn_jax.errors import UserError
from consyn_jax.inference.conversion.hub_upload import push

# huggingface_hub's own call of httpx
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub() as started:
        monkeypatch.setattr(constants, "ENDPOINT", started.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield started


def test_a_directory_is_one_commit(server: Hub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": bytes(3000), "a/template.jinja": b"x"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert push(tmp_path, "me/model", "card").startswith(server.url)
    assert server.files == {"me/model": files}
    assert len(server.commits) == 1


def test_a_file_goes_with_its_card(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    push(tmp_path / "model.gguf", "me/model", "# Card")
    assert server.files == {"me/model": {"model.gguf": b"GGUF", "README.md": b"# Card"}}


@pytest.mark.parametrize(
    ("path", "code"), [("/repos/create", 403), ("/commit/", 400), ("/objects/batch", 404)]
)
def test_a_refusal_leaves_the_hub_as_it_was(
    server: Hub, tmp_path: Path, path: str, code: int
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    server.refuses = (path, code)
    with pytest.raises(UserError, match=r"is written, but not uploaded to me/model: .*hf upload"):
        push(tmp_path / "model.gguf", "me/model", "# Card")
    assert server.files == {}
    assert server.commits == []


def test_the_command_uploads_what_it_wrote(server: Hub, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--output", str(out), "--push_to_hub", "me/model", "--license", "mit"]
    assert main([str(run), *flags]) == 0
    written = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    assert server.files == {"me/model": written}
    assert b"license: mit" in written["README.md"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written.keys()


PUSH = """
import sys
from pathlib import Path
from consyn_jax.inference.conversion.hub_upload import push
push(Path(sys.argv[1]), "me/model", "card")
"""
REQUESTS = ("/repos/create", "/preupload/", "/objects/batch", "/blob/", "/commit/")


@pytest.mark.slow
@pytest.mark.parametrize("request_of", REQUESTS)
def test_a_killed_push_shows_nothing_or_all_and_a_repeat_completes_it(
    server: Hub, tmp_path: Path, request_of: str
) -> None:
    """Killed in each moment of a request: nothing is visible before the commit has been sent.

    A file and the commit are larger than what the system takes from a sender before it is read.
    """
    files = {"config.json": b"{}", "model.safetensors": bytes(24 << 20)}
    files["tokenizer.json"] = b"[%s]" % (b" " * (16 << 20))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    for moment in MOMENTS if request_of in ("/blob/", "/commit/") else MOMENTS[:3]:
        server.files.clear()
        server.blobs.clear()
        child: list[subprocess.Popen[bytes]] = []
        dead = threading.Event()

        def kill(
            path: str,
            now: str,
            moment: str = moment,
            child: list[subprocess.Popen[bytes]] = child,
            dead: threading.Event = dead,
        ) -> None:
            if request_of in path and now == moment and not dead.is_set():
                child[0].send_signal(signal.SIGKILL)
                child[0].wait()
                dead.set()

        server.at = kill
        child.append(subprocess.Popen([sys.executable, "-c", PUSH, str(tmp_path)], env=environment))
        assert child[0].wait(240) == -signal.SIGKILL, moment
        server.settle()
        visible = server.files.get("me/model", {})
        is_sent = request_of == "/commit/" and moment in ("read", "done")
        assert visible == (files if is_sent else {}), moment
        assert all(blob == files["model.safetensors"] for blob in server.blobs.values()), moment
        server.at = lambda path, now: None
        push(tmp_path, "me/model", "card")
        assert server.files == {"me/model": files}, moment
