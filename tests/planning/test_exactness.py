"""Steps for GPUs that are not here give the same bits each time, by their programs.

No result may depend on the order in which threads come, and a resume runs the kernels that were
chosen first. Only a GPU shows that its libraries keep their promise of reproducible results.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from analyses import unordered
from recipes import STANZA, STEPS, VERSE, Dumped, dumped, dumping

from consyn_jax.distributed.compiled import instructions, kernels
from consyn_jax.planning import aot

pytestmark = pytest.mark.usefixtures("cuda_packages")

ATOMIC = re.compile(r"\b(?:atom|red)\.[\w.]+")
# Besides this package's kernels: matmuls, and the sort of the embedding's gradient.
LIBRARIES = {"__cublas$lt$matmul", "__cub$DeviceRadixSort", "__cub$DeviceRadixSortPairs"}


@pytest.mark.parametrize(("name", "gpu"), STEPS)
def test_nothing_depends_on_the_order_of_threads(name: str, gpu: str) -> None:
    check_order(dumped(name, gpu))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (STANZA, {"precision": "fp8"}),
        (VERSE, {"logits": "bfloat16"}),
        (VERSE, {"optimizer": "muon"}),
    ],
    ids=["fp8", "logits in bfloat16", "muon"],
)
def test_nor_does_it_in_other_precisions_and_with_muon(name: str, changes: dict[str, str]) -> None:
    check_order(dumped(name, "h200", **changes))


def check_order(step: Dumped) -> None:
    """No scatter to places that can be equal, and no atomic operation in any kernel."""
    _, program, ptx = step
    assert unordered(program) == []
    assert len(ptx) > 20
    assert [found for text in ptx.values() for found in ATOMIC.findall(text)] == []
    named = {kernel for kernel in kernels(program) if kernel.startswith("__")}
    assert named <= LIBRARIES


SCATTER = """
import jax, jax.numpy as jnp
from consyn_jax.planning.topology import parse_topology
place = jax.sharding.SingleDeviceSharding(parse_topology("h200:1x1").described_devices()[0])
table, at, x = (
    jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    for shape, dtype in (((512, 64), "float32"), ((4096,), "int32"), ((4096, 64), "float32"))
)
print(jax.jit(lambda t, i, x: t.at[i].add(x)).lower(table, at, x).compile().as_text())
"""


def test_an_atomic_scatter_is_found(tmp_path: Path) -> None:
    text = run_child(SCATTER, XLA_FLAGS=dumping(tmp_path))[0]
    assert unordered(instructions(text))
    assert any(ATOMIC.search(path.read_text()) for path in tmp_path.glob("*.ptx"))


TUNED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from consyn_jax.planning.topology import parse_topology
from consyn_jax.training.runtime.compilation_cache import enable_compilation_cache
from consyn_jax.training.runtime.kernel_choices import keep_kernels, read_kernels
run = Path(sys.argv[1])
enable_compilation_cache(read_kernels(run))
place = jax.sharding.SingleDeviceSharding(parse_topology("h200:1x1").described_devices()[0])
x, w = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    for shape in ((512, 1024), (1024, 256))
)
print(jax.jit(jnp.matmul).lower(x, w).compile().as_text())
keep_kernels(run)
"""
# A file has the first message, or, from JAX 0.12 on, an entry with the second one (BackendConfig).
CHOICE = "triton { block_m: 64 block_n: 32 block_k: 64 num_stages: 3 num_warps: 8 num_ctas: 1 }"
TRITON = {1: 64, 2: 32, 3: 64, 5: 3, 6: 8, 7: 1}


def message(fields: Mapping[int, int | str | bytes]) -> bytes:
    """A protocol buffer of these fields by number; numbers and lengths are below 128."""
    written = b""
    for number, value in fields.items():
        if isinstance(value, int):
            written += bytes([number << 3, value])
        else:
            content = value.encode() if isinstance(value, str) else value
            written += bytes([number << 3 | 2, len(content)]) + content
    return written


def choice(file: Path, log: str) -> bytes:
    """Content of the file that XLA asks for, as XLA writes it: its AutotuneEntry since JAX 0.12."""
    if file.suffix == ".textproto":
        return CHOICE.encode()
    version = re.search(r"Codegen version: (\w+)", log)
    assert version is not None
    target = message({1: file.parent.name, 3: file.stem})
    key = message({1: target, 2: message({1: version[1]})})
    config = message({1: 2, 2: message({2: message(TRITON)})})  # the backend TRITON, its settings
    return message({1: key, 2: message({1: config})})


def test_kept_choices_are_loaded(tmp_path: Path) -> None:
    """A choice that is in kernels.json decides the kernel on a machine with an empty cache.

    Without a GPU nothing is timed, so the test writes a choice that XLA's default is not, to the
    file that XLA asks for.
    """
    if shutil.which("strace") is None:
        if os.environ.get("CI"):
            pytest.fail("strace is not installed, and this test must run here")
        pytest.skip("strace is not installed")
    run, calls = tmp_path / "run", tmp_path / "calls"
    run.mkdir()
    traced = ("strace", "-f", "-qq", "-e", "trace=/access", "-o", str(calls))
    here = {"CONSYN_CACHE": str(tmp_path / "here")}
    default, log = run_child(TUNED, str(run), before=traced, **here, **LOG)
    assert '"num_warps":"8"' not in default
    wanted = re.findall(r'"([^"]+_autotune_cache_dir/[^"]+\.(?:textproto|pb))"', calls.read_text())
    assert wanted  # the product's, and then that of the sum of its parts, if XLA splits it
    file = Path(wanted[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(choice(file, log))
    chosen, _ = run_child(TUNED, str(run), **here)
    resumed, _ = run_child(TUNED, str(run), CONSYN_CACHE=str(tmp_path / "another machine"))
    for text in (chosen, resumed):
        assert '"num_warps":"8"' in text
        assert '"num_stages":3' in text


LOG = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "autotuner_cache_interface=1"}


def run_child(
    code: str, *arguments: str, before: tuple[str, ...] = (), **variables: str
) -> tuple[str, str]:
    """What a process that compiles prints, and its log; `before` is a command that starts it."""
    environment = aot.environment() | {"XLA_FLAGS": ""} | variables
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # the tests' own
    done = subprocess.run(
        [*before, sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, done.stderr
