"""Several GPUs of one host: is each mesh the same run, how does it scale, and which settings help?

Each measurement is a process of its own, because the number of visible devices and the settings of
XLA and NCCL belong to a process. In order of importance:

* parity: steps on each mesh against the same batches on one device, and twice on the same mesh,
  which must give the same bits
* scaling: tokens/s with the batch of one device kept (weak) and with the whole batch kept (strong)
* exchanges: the share of their time that other operations hide, from a trace of some steps
* settings: each against none, in turns; also layers in a loop, and one process for each device

    python benchmarks/multi_gpu.py --out benchmarks/results/NAME.json  # 8 GPUs
    python benchmarks/multi_gpu.py --tiny                              # 8 simulated CPU devices

NCCL between hosts is not measured. docs/design/compiled-programs.md has the place for the results.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from harness import ROOT, child_environment, facts, parser, table, write

MODEL, BATCH, STEPS, ROUNDS = "verse", 8, 10, 3
LIMIT_S = 600.0  # of a process
PARITY_STEPS, TOLERANCE = 5, 2e-3  # relative; bfloat16 rounds differently on each mesh
MESHES = (
    "data={n}",
    "fsdp={n}",
    "data=2,fsdp={half}",
    "fsdp={half},tensor=2",
    "fsdp={half},context=2",
)
XLA = "XLA_FLAGS"


class Setting(NamedTuple):
    """What differs from a default run.

    Attributes:
        environment: Variables of the processes.
        loops: Whether the layers are in a loop, also where they would be unrolled.
        processes: Whether each device has a process of its own.
    """

    environment: Mapping[str, str] = MappingProxyType({})
    loops: bool = False
    processes: bool = False


DEFAULT = Setting()
THRESHOLD = "--xla_gpu_reduce_scatter_combine_threshold_bytes"
SETTINGS = {
    "default combination of reduce-scatters": Setting({XLA: f"{THRESHOLD}=31457280"}),
    "reduce-scatters combined to 64 MiB": Setting({XLA: f"{THRESHOLD}=67108864"}),
    "reduce-scatters combined to 128 MiB": Setting({XLA: f"{THRESHOLD}=134217728"}),
    "no command buffers": Setting({XLA: "--xla_gpu_enable_command_buffer="}),
    "one queue to the device": Setting({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    "NVLink SHARP": Setting({"NCCL_NVLS_ENABLE": "1"}),
    "registered buffers": Setting({XLA: "--xla_gpu_enable_nccl_user_buffers=true"}),
    "layers in a loop": Setting(loops=True),
    "one process for each device": Setting(processes=True),
}


def child(request: dict[str, Any]) -> dict[str, Any]:
    """Run steps in this process: losses, seconds, a hash of the weights, and the hidden share.

    Of several processes, each hashes its own parts of the weights.
    """
    import hashlib

    import jax
    import numpy as np
    from programs import CASES, TrainStep

    from consyn_jax.training import program

    if "place" in request:
        address, processes, number = request["place"]
        jax.distributed.initialize(
            address, processes, number, cluster_detection_method="deactivate"
        )
    if request["loops"]:
        program.unrolls = lambda *_: False
    case = CASES[request["case"]]
    step = TrainStep(case.flags | request["flags"], case.vocab_size)
    batches = [_placed(step, seed) for seed in range(4)]
    losses, seconds = [], []
    for number in range(request["steps"]):
        began = time.perf_counter()
        losses.append(float(step(batches[number % 4])["loss"]))
        seconds.append(time.perf_counter() - began)
    bits = hashlib.sha256()
    for leaf in jax.tree.leaves(step.state.params):
        for shard in leaf.addressable_shards:
            bits.update(np.asarray(shard.data).tobytes())
    found = {"losses": losses, "weights": bits.hexdigest(), "tokens": step.tokens}
    found["step_s"] = statistics.median(seconds[len(seconds) // 2 :])
    return found | ({"hidden": _hidden(step, batches[0])} if request["traces"] else {})


def _placed(step: Any, seed: int) -> dict[str, Any]:
    """A batch on the devices of all processes, each of which makes the whole batch."""
    import jax
    import numpy as np
    from programs import make_batch

    from consyn_jax.distributed.mesh import sharding
    from consyn_jax.training.runtime.signals import SIGNALS, is_shared, signals_like

    budget, mesh = step.run.budget, step.program.mesh
    shape = budget.gradient_accumulation_steps, budget.batch_size, step.length
    arrays = make_batch(shape, step.vocab_size, seed)
    where = dict.fromkeys(arrays, sharding(mesh, (None, "batch", "sequence")))
    if is_shared(mesh):  # no process has received a signal
        like = signals_like(mesh)
        arrays[SIGNALS], where[SIGNALS] = np.zeros(like.shape, like.dtype), like.sharding
    return {
        name: jax.make_array_from_callback(values.shape, where[name], values.__getitem__)
        for name, values in arrays.items()
    }


def _hidden(step: Any, batch: Any) -> float | None:
    import jax
    from jax.profiler import ProfileData, StepTraceAnnotation

    from consyn_jax.training.diagnostics.trace import STEP, scopes_of, summarise

    options: Any = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        jax.profiler.start_trace(directory, profiler_options=options)
        for number in range(3):
            with StepTraceAnnotation(STEP, step_num=number):
                float(step(batch)["loss"])
        jax.profiler.stop_trace()
        (file,) = Path(directory).rglob("*.xplane.pb")
        trace = ProfileData.from_file(str(file))
    return summarise(trace, scopes_of(step.compiled.as_text())).hidden_share


class Host:
    """The devices of this host, on which measurements run in processes of their own."""

    def __init__(self, tiny: bool) -> None:
        self.tiny, self.case = tiny, "tiny" if tiny else MODEL
        self.devices = 8 if tiny else self._count()

    def run(
        self,
        devices: int,
        mesh: str,
        batch_size: int,
        *,
        steps: int = STEPS,
        traces: bool = False,
        setting: Setting = DEFAULT,
    ) -> dict[str, Any]:
        """Steps on the first devices; the error's last line if a process fails."""
        flags = {"mesh": mesh, "batch_size": batch_size}
        request = {"case": self.case, "flags": flags, "steps": steps, "traces": traces}
        request |= {"loops": setting.loops}
        parts = [[i] for i in range(devices)] if setting.processes else [list(range(devices))]
        address = f"localhost:{_free_port()}"
        started = []
        for number, part in enumerate(parts):
            place = {"place": (address, len(parts), number)} if setting.processes else {}
            command = [sys.executable, __file__, "--child", json.dumps(request | place)]
            where = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(len(part))}
            if not self.tiny:
                where = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, part))}
            environment = child_environment(**where, **setting.environment)
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes))
        with ThreadPoolExecutor(len(started)) as pool:  # all pipes are read, so none fills
            return _first(list(pool.map(_ended, started)))

    def meshes(self) -> list[str]:
        """The meshes of all devices."""
        return [mesh.format(n=self.devices, half=self.devices // 2) for mesh in MESHES]

    @staticmethod
    def _count() -> int:
        # Not in this process, which would keep most of the memory of each GPU.
        code = "import jax; print(len(jax.devices('cuda')))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"No GPU is here: {done.stderr.strip().splitlines()[-1]}")
        return int(done.stdout)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def _ended(process: subprocess.Popen[str]) -> tuple[str, str, int]:
    """Output, errors and exit code of a process, which is killed if it hangs."""
    try:
        output, error = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, error = process.communicate()
        error += f"\nkilled after {LIMIT_S} s"
    return output, error, process.returncode


def _first(ended: list[tuple[str, str, int]]) -> dict[str, Any]:
    """The answer of the first process, or the last line of the one that failed by itself."""
    failed = [
        (error.strip().splitlines() or ["no output"])[-1][:300] for _, error, code in ended if code
    ]
    if failed:  # the others end with an error of the coordination service
        return {"failed": min(failed, key=lambda line: "oordination" in line)}
    return dict(json.loads(ended[0][0].splitlines()[-1]))


def parity(host: Host) -> list[dict[str, Any]]:
    """Losses on each mesh against one device, and bits of a repetition."""
    alone = host.run(1, "data=1", BATCH, steps=PARITY_STEPS)
    rows = []
    for mesh in host.meshes():
        first, again = (host.run(host.devices, mesh, BATCH, steps=PARITY_STEPS) for _ in range(2))
        row: dict[str, Any] = {"what": "parity", "mesh": mesh}
        if failed := [each["failed"] for each in (alone, first, again) if "failed" in each]:
            rows.append(row | {"failed": failed[0]})
            continue
        pairs = zip(first["losses"], alone["losses"], strict=True)
        apart = max(abs(a / b - 1) for a, b in pairs)
        same = (first["losses"], first["weights"]) == (again["losses"], again["weights"])
        rows.append(row | {"apart": apart, "holds": apart < TOLERANCE, "same bits": same})
    return rows


def scaling(host: Host) -> list[dict[str, Any]]:
    """Tokens/s of 1, 2, 4, ... devices against as many times those of one."""
    rows = []
    sizes = [2**i for i in range(host.devices.bit_length()) if 2**i <= host.devices]
    for axis in ("data", "fsdp"):
        for kind in ("weak", "strong"):
            alone = 0.0
            for devices in sizes:
                batch = BATCH * devices if kind == "weak" else BATCH * host.devices
                found = host.run(devices, f"{axis}={devices}", batch)
                row: dict[str, Any] = {"what": f"{kind} scaling", "mesh": f"{axis}={devices}"}
                if "failed" in found:
                    rows.append(row | {"failed": found["failed"]})
                    continue
                rate = found["tokens"] / found["step_s"]
                alone = alone or rate / devices
                rows.append(row | {"tokens/s": rate, "of linear": rate / devices / alone})
    return rows


def exchanges(host: Host) -> list[dict[str, Any]]:
    """The share of the exchanges' time that other operations hide, for each mesh."""
    rows = []
    for mesh in host.meshes():
        found = host.run(host.devices, mesh, BATCH * host.devices, traces=True)
        named = {name: found[name] for name in ("hidden", "failed") if name in found}
        rows.append({"what": "exchanges", "mesh": mesh} | named)
    return rows


def settings(host: Host) -> list[dict[str, Any]]:
    """Step time with each setting against that without, in turns on fsdp."""
    mesh, rows = f"fsdp={host.devices}", []
    for name, setting in SETTINGS.items():
        ratios, failed = [], ""
        for _ in range(ROUNDS if not host.tiny else 1):
            pair = [
                host.run(host.devices, mesh, BATCH * host.devices, setting=each)
                for each in (DEFAULT, setting)
            ]
            failed = next((each["failed"] for each in pair if "failed" in each), "")
            if failed:
                break
            ratios.append(pair[0]["step_s"] / pair[1]["step_s"])
        row: dict[str, Any] = {"what": "setting", "mesh": mesh, "setting": name}
        rows.append(
            row | ({"failed": failed} if failed else {"faster by": statistics.median(ratios)})
        )
    return rows


PARTS = {"parity": parity, "scaling": scaling, "exchanges": exchanges, "settings": settings}


def measure(tiny: bool = False, parts: tuple[str, ...] = tuple(PARTS)) -> dict[str, Any]:
    """Run the parts, and print each as it ends."""
    host, rows = Host(tiny), list[dict[str, Any]]()
    for name in parts:
        found = PARTS[name](host)
        print(table(found), flush=True)
        rows += found
    return {"devices": host.devices, "case": host.case, "rows": rows}


def main() -> None:
    """Run, print a table for each part, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    arguments.add_argument("--child", help="what one process measures; for this script itself")
    given = arguments.parse_args()
    if given.child is not None:
        print(json.dumps(child(json.loads(given.child))))
        return
    result = measure(given.tiny, tuple(given.parts))
    if given.out is not None:
        write(given.out, {**facts(), **result})


if __name__ == "__main__":
    main()
