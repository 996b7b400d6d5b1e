"""Weights are loaded onto a mesh with little more memory than they take there."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from consyn_jax.model.pretrained.config_json import to_hf_config
from consyn_jax.model.pretrained.tensors import hf_tensors
from consyn_jax.model_config import FileFormat, ModelConfig
from consyn_jax.resolve import preset_architecture

# epic with 8 layers of its shape, and each size divided by 2.5: 1.1 GB in bfloat16
CONFIG = ModelConfig(
    vocab_size=32_768,
    hidden_dim=2048,
    num_layers=8,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=6656,
    context=4096,
    tie_embeddings=False,
    files=FileFormat(dtype="bfloat16"),
)
LOAD = """
import sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
from consyn_jax.distributed.mesh import build_mesh, parse_mesh
from consyn_jax.inference.model_source import find_source

def taken():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line[:6] in ("VmRSS:", "VmSwap"))

mesh = build_mesh(parse_mesh(sys.argv[2], 8))
source = find_source(sys.argv[1])
jax.block_until_ready([jax.device_put(jnp.zeros(8), d) for d in jax.devices()])
before, peak, ends = taken(), 0, False
def watch():
    global peak
    while not ends:
        peak = max(peak, taken())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
params = jax.block_until_ready(source.parameters(mesh, jnp.bfloat16))
ends = True
thread.join()
held = sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)
print(peak - before, held)
"""


def write_zeros(directory: Path, config: ModelConfig) -> int:
    """A model of zeros in a sparse file; the bytes of its largest tensor."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(to_hf_config(config)))
    header: dict[str, object] = {}
    at = largest = 0
    for tensor in hf_tensors(config):
        size = 2 * math.prod(tensor.shape)
        header[tensor.name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at, largest = at + size, max(largest, size)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return largest


def check_peak(model: Path, config: ModelConfig, mesh: str) -> int:
    """At most 1.3 x what the devices hold plus one tensor; every device is in this host's memory.

    Returns:
        The bytes that the devices hold.
    """
    largest = write_zeros(model, config)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, model, mesh], capture_output=True, text=True, check=True
    )
    peak, held = map(int, done.stdout.split())
    print(f"{mesh}: {held / 1e9:.2f} GB held, peak {peak / held:.3f} x")
    assert peak <= 1.3 * held + largest
    return held


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=2,tensor=4"])
def test_loading_peaks_near_the_size_of_the_shards(tmp_path: Path, mesh: str) -> None:
    assert check_peak(tmp_path / "model", CONFIG, mesh) > 1e9


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=2,tensor=4"])
def test_loading_epic(mesh: str) -> None:
    """The real sizes, 26 GB. Swap on zram will do for most of it, as zeros take no room there."""
    config = preset_architecture("epic").saved_as("bfloat16")
    size = sum(tensor.num_bytes for tensor in hf_tensors(config))
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines}
    room = free["MemAvailable:"] + free["SwapFree:"]
    if room < 1.4 * size:
        pytest.skip(
            f"{room / 1e9:.0f} GB of memory and swap are free, and epic needs {1.4 * size / 1e9:.0f}."
            " Add swap; zeros take no room in /dev/zram0."
        )
    # /var/tmp, as /tmp may be in memory
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        assert check_peak(Path(directory) / "model", config, mesh) > 26e9
