"""`consyn-doctor` as a command in environments that are bad in every way that can be made.

Mounts and limits are real, in a mount namespace of the command's own. The driver, the plugin and a
file system without locks are played by modules that Python finds first.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from free_ports import free_port

ALONE = ("unshare", "-m") if os.geteuid() == 0 else ("unshare", "-rm")

NVML = """
import types
class NVMLError(Exception): ...
NVML_NVLINK_MAX_LINKS, NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 18, 1, 0
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 0
def nvmlInit(): ...
def nvmlShutdown(): ...
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(i): return i
def nvmlSystemGetCudaDriverVersion_v2(): return 11040
def nvmlSystemGetDriverVersion(): return "470.57.02"
def nvmlDeviceGetName(handle): return "NVIDIA H100 80GB HBM3"
def nvmlDeviceGetMemoryInfo(handle): return types.SimpleNamespace(total=85e9, used=40e9 * handle)
def nvmlDeviceGetMaxClockInfo(handle, kind): return 1980
def nvmlDeviceGetTemperature(handle, kind): return 91
def nvmlDeviceGetEccMode(handle): return [1, 1]
def nvmlDeviceGetTotalEccErrors(handle, kind, since): return 3 * handle
def nvmlDeviceGetRemappedRows(handle): return 0, 0, 0, 0
def nvmlDeviceGetNvLinkState(handle, i): return int(i > 1 or not handle)
"""
NO_LOCKS = """
import errno, fcntl
def flock(descriptor, operation): raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = fcntl.lockf = flock
"""
PLUGIN = """
def cudnn_build_version(): return 91200
def cudnn_get_version(): raise RuntimeError("libcudnn.so.9: cannot open shared object file")
"""


@pytest.fixture
def outside() -> Iterator[Path]:
    """A directory that is not in /dev/shm, as those of tests may be."""
    with TemporaryDirectory(dir="/var/tmp") as place:
        yield Path(place)


@pytest.fixture
def played(outside: Path) -> Path:
    """Modules that play the driver, the plugin without cuDNN, and a file system without locks."""
    import jax

    place = outside / "modules"
    for name, text in {
        "pynvml.py": NVML,
        "sitecustomize.py": NO_LOCKS,
        "jax_cuda13_plugin/_versions.py": PLUGIN,
        "jax_cuda13_plugin/__init__.py": "",
        f"jax_cuda13_plugin-{jax.__version__}.dist-info/METADATA": (
            f"Metadata-Version: 2.1\nName: jax-cuda13-plugin\nVersion: {jax.__version__}\n"
            "Requires-Dist: nvidia-cudnn-cu13>=9.12; extra == 'with-cuda'\n"
            "Requires-Dist: jax>=0.1; extra == 'with-cuda'\nProvides-Extra: with-cuda\n"
        ),
    }.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return place


def test_every_fault_is_named(played: Path, outside: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*ALONE, "true"], check=False).returncode:
        assert not os.environ.get("CI"), "this test must run here"
        pytest.skip("needs a mount namespace of its own")
    (output := outside / "output").mkdir()
    script = (
        f"mount -t tmpfs -o size=64m tmpfs /dev/shm && mount -t tmpfs -o size=4m tmpfs {output} && "
        f"ulimit -n 64 && exec {sys.executable} -m consyn_jax.cli.doctor --quick --json "
        f"--output {output}/run"
    )
    done = subprocess.run(
        [*ALONE, "sh", "-c", script],
        env={**os.environ, "PYTHONPATH": f"{played}:{os.environ.get('PYTHONPATH', Path.cwd())}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    found = {each["name"]: each for each in json.loads(done.stdout)["checks"]}
    words = {
        "driver": ("fail", "470.57.02, up to CUDA 11.4, too old for JAX's CUDA 13"),
        "GPU memory": ("warn", "GPU 1: 40.0 GB"),
        "ECC": ("fail", "GPU 1: 3 uncorrected"),
        "NVLink": ("fail", "GPU 1: 2 of 18 down"),
        "CUDA packages": ("fail", "missing: nvidia-cudnn-cu13"),
        "cuDNN": ("fail", "it cannot be loaded"),
        "devices": ("warn", "the driver shows 2 GPUs; JAX_PLATFORMS=cpu"),
        "open files": ("fail", "limit 64,"),
        "shared memory": ("warn", "/dev/shm: 67.1 MB of 67.1 MB"),
        "disk space": ("fail", "4.2 MB"),
        "file system": ("warn", "tmpfs"),
        "file locks": ("warn", "none"),
    }
    assert {name: found[name]["status"] for name in words} == {
        name: status for name, (status, _) in words.items()
    }
    assert {
        name: said for name, (_, said) in words.items() if said not in found[name]["found"]
    } == {}
    assert all(found[name]["advice"] for name in words)
    others = {name: each["status"] for name, each in found.items() if name not in words}
    assert set(others.values()) <= {"pass", "info"}, others
    failing = [name for name, (status, _) in words.items() if status == "fail"]
    assert all(name in done.stderr for name in failing)


@pytest.mark.slow
def test_clocks_that_are_apart(tmp_path: Path) -> None:
    """Two processes; the clock of the second one is ten minutes ahead."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() + 600\n"
    )
    path = os.environ.get("PYTHONPATH", str(Path.cwd()))
    command: list[Any] = [sys.executable, "-m", "consyn_jax.cli.doctor", "--quick", "--json"]
    command += ["--output", tmp_path, "--distributed", "--num_processes", "2"]
    command += ["--coordinator_address", f"localhost:{free_port()}", "--process_id"]
    both = [
        subprocess.Popen(
            [*command, str(number)],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{path}" if number else path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [2, 0]
    found = {each["name"]: each for each in json.loads(said[0])["checks"]}
    assert (found["clocks"]["status"], found["network"]["status"]) == ("fail", "pass")
    assert "+600 s" in found["clocks"]["found"]
    assert "NTP" in found["clocks"]["advice"]
    assert said[1] == ""
