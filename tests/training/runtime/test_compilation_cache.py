import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest

from consyn_jax.training.runtime import compilation_cache as module
from consyn_jax.training.runtime.compilation_cache import (
    SETTLED_S,
    STAMP,
    TIDY_EVERY_S,
    enable_compilation_cache,
    tidy,
)

pytestmark = pytest.mark.usefixtures("programs")


def hits() -> int:
    """Cache hits while one small program is compiled again."""
    count = 0

    def note(event: str, **_: object) -> None:
        nonlocal count
        count += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_listener(note)
    jax.clear_caches()
    assert float(jax.jit(lambda x: jnp.sqrt(x) * 12345)(4.0)) == pytest.approx(24690)
    jax.monitoring.unregister_event_listener(note)
    return count


def entries(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*-cache"))


def test_even_a_small_program_is_kept_and_loaded(programs: Path) -> None:
    assert enable_compilation_cache() is None
    assert hits() == 0
    kept = entries(programs)
    assert kept
    assert {path.stat().st_mode & 0o777 for path in programs.iterdir()} == {0o700}
    assert hits() >= 1
    assert entries(programs) == kept


def test_the_users_own_settings_win(programs: Path, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert not programs.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("JAX_COMPILATION_CACHE_DIR", "theirs"), ("JAX_ENABLE_COMPILATION_CACHE", "false")],
)
def test_jaxs_environment_variables_win(name: str, value: str, tmp_path: Path) -> None:
    code = """
import jax
from consyn_jax.training.runtime.compilation_cache import enable_compilation_cache
enable_compilation_cache()
print(jax.config.jax_compilation_cache_dir)
"""
    env = {**os.environ, "CONSYN_CACHE": str(tmp_path), name: value}
    if name != "JAX_COMPILATION_CACHE_DIR":
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ("theirs" if name == "JAX_COMPILATION_CACHE_DIR" else "None")


@pytest.mark.parametrize(
    "content", [b"", b"\x78\x9c torn", b"no program at all"], ids=["empty", "torn", "other"]
)
def test_a_damaged_entry_is_compiled_again(content: bytes, programs: Path) -> None:
    enable_compilation_cache()
    hits()
    for path in entries(programs):
        path.write_bytes(content)
    assert hits() == 0


def test_a_directory_that_cannot_be_made_is_reported(programs: Path) -> None:
    programs.parent.mkdir()
    programs.write_text("a file")
    assert "cannot be made" in (enable_compilation_cache() or "")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_directory_that_others_can_write_is_refused(programs: Path) -> None:
    enable_compilation_cache()
    [place] = programs.iterdir()
    jax.config.update("jax_compilation_cache_dir", None)
    place.chmod(0o777)
    assert enable_compilation_cache() == f"not kept, because {place} can be written by others"
    assert jax.config.jax_compilation_cache_dir is None


def test_a_directory_that_disappears_is_ignored(programs: Path) -> None:
    enable_compilation_cache()
    hits()
    shutil.rmtree(programs)
    programs.write_text("a file")
    assert hits() == 0


def test_another_processor_has_another_directory(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA compiles for exactly the features of a CPU."""
    here = module._processor()
    monkeypatch.setattr(
        Path, "read_text", lambda *_, **__: "model name : another\nflags : fpu avx1024\n"
    )
    assert module._processor() != here


def entry(directory: Path, name: str, content: bytes, age_s: float) -> Path:
    path = directory / f"{name}-cache"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_the_least_recently_used_entries_are_deleted_first(tmp_path: Path) -> None:
    for limits, left in (({"limit_bytes": 3500}, 3), ({"limit_entries": 1}, 1)):
        place = tmp_path / str(left)
        paths = [
            entry(place, f"jit_{i}", zlib.compress(os.urandom(1000)), 3600 * (i + 1))
            for i in range(6)
        ]
        tidy(place, **limits)
        assert [path.exists() for path in paths] == [True] * left + [False] * (6 - left)


def test_a_truncated_entry_is_deleted_unless_it_may_still_be_written(tmp_path: Path) -> None:
    whole = zlib.compress(os.urandom(1000))
    old, new = (
        entry(tmp_path, "old", whole[:500], SETTLED_S + 60),
        entry(tmp_path, "new", whole[:500], 1),
    )
    empty, kept = (
        entry(tmp_path, "empty", b"", SETTLED_S + 60),
        entry(tmp_path, "kept", whole, SETTLED_S + 60),
    )
    tidy(tmp_path)
    assert [path.exists() for path in (old, new, empty, kept)] == [False, True, False, True]


def test_tidying_happens_once_a_day(tmp_path: Path) -> None:
    tidy(tmp_path)
    paths = [entry(tmp_path, f"jit_{i}", b"a program", 3600) for i in range(2)]
    tidy(tmp_path, limit_entries=1)
    assert all(path.exists() for path in paths)
    os.utime(tmp_path / STAMP, (time.time() - TIDY_EVERY_S - 1,) * 2)
    tidy(tmp_path, limit_entries=1)
    assert [path.exists() for path in paths].count(True) == 1


def test_several_processes_may_tidy_at_once(tmp_path: Path) -> None:
    for i in range(200):
        entry(tmp_path, f"jit_{i}", b"a program", 3600)
    threads = [threading.Thread(target=tidy, args=(tmp_path, 50)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entries(tmp_path)) == 5
