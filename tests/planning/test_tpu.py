"""Train steps compiled for slices of TPUs that are not here: kernels, memory, meshes."""

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from consyn_jax.cli.train import main
from consyn_jax.config import architecture
from consyn_jax.distributed.hardware import TPUS
from consyn_jax.errors import UserError
from consyn_jax.planning import aot
from consyn_jax.planning.plan import Plan, alternatives, compiled, estimate
from consyn_jax.planning.plan_page import page
from consyn_jax.planning.topology import parse_topology
from consyn_jax.resolve import resolve

KERNELS = {  # of attention in documents, forward and backward for queries and for keys
    "splash_mha_fwd_segmented_residuals",
    "splash_mha_dq_segmented_no_residuals",
    "splash_mha_dkv_segmented_no_residuals",
}


def planned(model: str, topology: str, **flags: Any) -> Plan:
    run, _ = resolve({"model": model} | flags)
    words = {"vocab_size": 49_152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return estimate(architecture(run.model, **words), run, parse_topology(topology))


@cache
def haiku(topology: str) -> Plan:
    """Two layers, compiled."""
    return compiled(planned("haiku", topology, batch_size=16, num_layers=2), topology)


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_packages")
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:2x2x2"])
def test_attention_is_splash_in_bfloat16_and_the_page_gives_no_time(topology: str) -> None:
    plan = haiku(topology)
    assert plan.compiled is not None
    assert set(plan.compiled.kernels) >= KERNELS
    assert plan.fits
    # float32 weights and moments, split over the devices of a slice
    state = plan.compiled.parameter_bytes + plan.compiled.optimizer_bytes
    assert state == pytest.approx(
        12 * plan.compiled.num_parameters / plan.mesh.sizes["fsdp"], rel=0.02
    )
    assert plan.mesh.sizes["data"] == parse_topology(topology).machine.hosts
    text = page(plan)
    assert "attention  splash: JAX's splash attention" in text
    assert "no time is given" in text
    assert "collectives  n/a" in text
    assert "tokens/s" not in text


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_packages")
def test_a_program_that_the_compiler_refuses_is_a_plan_that_does_not_fit() -> None:
    """Epic's state alone is 18 GiB on each of 8 chips."""
    refused = compiled(
        planned("epic", "v5e:2x4", batch_size=8, gradient_checkpointing="full"), "v5e:2x4"
    )
    assert refused.refused_bytes is not None
    assert refused.refused_bytes > 18 * 2**30
    text = page(refused)
    assert text.startswith("DOES NOT FIT")
    assert "The compiler refused the program: it needs " in text
    assert "GiB of 15.75 on each device" in text


MESHES = """
import json
from consyn_jax.distributed.mesh import AXES, build_mesh
from consyn_jax.planning.topology import parse_topology

found = {{}}
for name in {topologies}:
    topology = parse_topology(name)
    devices, slices = topology.described_devices(), topology.machine.hosts
    assert len(devices) == topology.num_devices
    for shape in {shapes}[str(len(devices))]:
        mesh = build_mesh(dict(zip(AXES, shape)), devices)
        assert mesh.devices.shape == tuple(shape)
        assert len(set(mesh.devices.flat)) == len(devices)
        if slices > 1 and shape[0] % slices == 0:
            parts = mesh.devices.reshape(slices, -1)
            assert all(len({{device.slice_index for device in part}}) == 1 for part in parts)
    found[name] = [devices[0].platform, devices[0].device_kind]
print(json.dumps(found))
"""


def shapes(devices: int) -> list[tuple[int, ...]]:
    """Every mesh over the four axes."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    return [
        (d, f, c, devices // (d * f * c))
        for d in sizes
        for f in sizes
        for c in sizes
        if devices % (d * f * c) == 0
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_packages")
def test_every_mesh_is_built_and_data_is_split_over_slices() -> None:
    topologies = ["v5e:2x4", "v6e:2x4", "v5p:2x2x2", "tpu7x:2x2x1", "v5e:2x2x2", "v6e:8x8"]
    topologies += ["v5p:2x2x1x2", "v6e:4x4x4", "v5e:1x1"]
    known = {str(n): shapes(n) for n in (1, 8, 64)}
    assert (4, 16, 1, 1) in known["64"]
    assert len(known["8"]) == 20
    done = subprocess.run(
        [sys.executable, "-c", MESHES.format(topologies=topologies, shapes=json.dumps(known))],
        env=aot.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, (platform, kind) in json.loads(done.stdout.splitlines()[-1]).items():
        assert platform == "tpu"
        assert kind == TPUS[name.partition(":")[0]].kind


# ------------------------------------------------------------------------- without libtpu


def test_a_plan_by_arithmetic_names_the_extra_and_gives_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "packages_are_there", lambda compiler: False)
    given = ["--dry_run", "--topology", "v5p:2x2x2x2", "--model", "verse", "--batch_size", "16"]
    assert main([*given, "--max_steps", "1000"]) == 0
    text = capsys.readouterr().out
    assert "pip install 'consyn_jax[tpu]'" in text
    assert "2 slices of 2x2x2 chips v5p (TPU v5)" in text
    reason = "each of 2 slices has a copy of the weights, split over its devices"
    assert f"data=2, fsdp=8 ({reason})" in text
    assert "no time is given" in text
    assert "budget     1,000 steps, 0.03 billion tokens\n" in text
    assert "tokens/s" not in text


def test_moments_in_host_memory_are_refused_for_tpus() -> None:
    with pytest.raises(UserError, match="--optimizer_memory host does not work on TPUs"):
        planned("haiku", "v5e:2x4", optimizer_memory="host")
    ways = alternatives(planned("stanza", "v5e:2x4", batch_size=64))
    assert ways
    assert not any("optimizer_memory" in way.changes for way in ways)


def test_without_times_less_recomputation_comes_first() -> None:
    """Then fewer micro-batches; rounded moments, which change the result, come last."""
    ways = alternatives(planned("verse", "v5e:2x4", batch_size=64))
    costs = [
        ("moment_dtype" in way.changes, way.plan.work.remat != "none", way.plan.work.accumulation)
        for way in ways
    ]
    assert costs[0] == (False, False, 1)
    assert [rounded for rounded, *_ in costs] == sorted(rounded for rounded, *_ in costs)
    exact = [recomputed for rounded, recomputed, _ in costs if not rounded]
    assert exact == sorted(exact)
