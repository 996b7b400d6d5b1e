import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from consyn_jax.errors import UserError
from consyn_jax.training.runtime.compilation_cache import (
    enable_compilation_cache,
    prepare_caches,
    tidy,
)
from consyn_jax.training.runtime.kernel_choices import (
    CHOICES,
    KERNELS,
    KernelChoices,
    keep_kernels,
    made_here,
    read_kernels,
)

OLD_NAME, NEW_NAME = "DcSae3w1K4gh7BrFNI6AS-ei29flhmRc0B6tsTL2aNM.textproto", "gpu-1/v2/9f3c.pb"
FILES = {OLD_NAME: b"triton { block_m: 64 }", NEW_NAME: b"\x0a\xff\x00"}


pytestmark = pytest.mark.usefixtures("programs")


def used() -> Path:
    """The directory of the choices in use."""
    return Path(jax.config.jax_compilation_cache_dir) / CHOICES


def choose(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (used() / name).parent.mkdir(parents=True, exist_ok=True)
        (used() / name).write_bytes(content)


def test_choices_are_kept_and_found_by_a_resume_with_an_empty_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enable_compilation_cache()
    choose(FILES | {"tmp/tmp_per_fusion_cache_x.textproto": b"", "gpu-1/.tmp_9f3c_1": b""})
    keep_kernels(tmp_path)
    kept = read_kernels(tmp_path)
    assert kept == KernelChoices(made_here(), FILES)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "another machine"))
    assert prepare_caches(tmp_path, continues=True) == []  # no row, as this is a CPU
    assert {name: (used() / name).read_bytes() for name in FILES} == FILES


def test_the_record_follows_new_choices_and_is_else_left_alone(tmp_path: Path) -> None:
    enable_compilation_cache()
    keep_kernels(tmp_path)
    assert not (tmp_path / KERNELS).exists()  # nothing was chosen
    choose({OLD_NAME: b"first"})
    keep_kernels(tmp_path)
    written = (tmp_path / KERNELS).stat()
    keep_kernels(tmp_path)
    assert (tmp_path / KERNELS).stat().st_ino == written.st_ino
    choose({NEW_NAME: b"second"})
    keep_kernels(tmp_path)
    kept = read_kernels(tmp_path)
    assert kept is not None
    assert kept.files == {OLD_NAME: b"first", NEW_NAME: b"second"}


def test_a_machine_with_other_choices_keeps_its_own_programs(tmp_path: Path) -> None:
    """Programs and choices stay together: those of the run have a directory of their own."""
    enable_compilation_cache()
    own = used()
    choose({OLD_NAME: b"this machine's"})
    jax.config.update("jax_compilation_cache_dir", None)
    kept = KernelChoices(made_here(), FILES)
    enable_compilation_cache(kept)
    assert used() != own
    assert {name: (used() / name).read_bytes() for name in FILES} == FILES
    assert (own / OLD_NAME).read_bytes() == b"this machine's"
    again = used()
    jax.config.update("jax_compilation_cache_dir", None)
    enable_compilation_cache(kept)
    assert used() == again


def test_a_new_run_does_not_read_the_record(tmp_path: Path) -> None:
    (tmp_path / KERNELS).write_text("damaged")
    assert prepare_caches(tmp_path, continues=False) == []
    with pytest.raises(UserError, match=r"kernels\.json is damaged"):
        prepare_caches(tmp_path, continues=True)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"made_with": {}, "choices": {"a.pb": 3}}',
        '{"made_with": {}, "choices": {"a.pb": "not base64"}}',
        '{"made_with": [], "choices": []}',
        *(
            json.dumps({"made_with": {}, "choices": {name: ""}})
            for name in ("../a.pb", "/etc/a.pb", "x/../../a.pb", ".a.pb", "a.so", "a/b/c/d.pb", "")
        ),
    ],
)
def test_a_damaged_record_is_named_and_nothing_is_written(text: str, tmp_path: Path) -> None:
    (tmp_path / KERNELS).write_text(text)
    with pytest.raises(UserError, match=r"kernels\.json is damaged"):
        read_kernels(tmp_path)


def test_choices_are_deleted_only_with_all_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, program = tmp_path / CHOICES / OLD_NAME, tmp_path / "jit_step-cache"
    choice.parent.mkdir()
    choice.write_bytes(b"a choice")
    program.write_bytes(b"a program")
    tidy(tmp_path, limit_entries=0)
    assert choice.exists()
    assert not program.exists()
    program.write_bytes(b"a program")
    (tmp_path / ".tidied").unlink()
    monkeypatch.setattr("consyn_jax.training.runtime.compilation_cache.MOST_CHOICES", 0)
    tidy(tmp_path)
    assert not choice.exists()
    assert not program.exists()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    client = SimpleNamespace(platform_version="cuda 13000")
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", client=client)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])


def promise(run: Path) -> str:
    [(name, text)] = prepare_caches(run, continues=True)
    assert name == "kernels"
    return text


@pytest.mark.usefixtures("on_gpu")
def test_the_header_says_which_bits_are_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert "a resumed run gives the same bits as an uninterrupted run" in promise(run)
    choose(FILES)
    keep_kernels(run)
    assert promise(run).startswith("kept from kernels.json, so the run gives the same bits")
    choose({OLD_NAME: b"another run of this process"})
    assert "the choices in this process's cache differ" in promise(run)
    record = read_kernels(run)
    assert record is not None
    other = dataclasses.replace(record, made_with=record.made_with | {"jaxlib": "0.1"})
    monkeypatch.setattr(
        "consyn_jax.training.runtime.compilation_cache.read_kernels", lambda _: other
    )
    assert "were made with jaxlib 0.1, so a resumed run can differ" in promise(run)
    jax.config.update("jax_enable_compilation_cache", False)
    assert "chosen again at each start" in promise(run)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "each process chooses its own" in promise(run)
