from typing import Any

import jax
import pytest
from jax.profiler import ProfileData

from consyn_jax.config import architecture
from consyn_jax.distributed.auto_mesh import Machine
from consyn_jax.distributed.hardware import described_gpu
from consyn_jax.resolve import resolve
from consyn_jax.training.diagnostics.operation_costs import Cost
from consyn_jax.training.diagnostics.trace import (
    SCOPES,
    STEP,
    Least,
    Operation,
    scopes_of,
    summarise,
)
from consyn_jax.training.optim.schedules import build_schedule
from consyn_jax.training.program import build_program
from consyn_jax.training.runtime.watchdog import WAITING

pytestmark = pytest.mark.users_compiler

MS = 10**9  # picoseconds
GEMM = ("gemm", 0, 4, "fusion.1")
# The compiler's scopes of the operations below.
SCOPE_OF = {
    "fusion.1": "jit(train_step)/jvp()/while/body/attention/dot_general",
    "fusion.2": "jit(train_step)/transpose(jvp())/while/body/mlp/norm/mul",
    "fusion.3": "jit(train_step)/optimizer/add",
}


def xspace(planes: dict[str, dict[str, list[tuple[Any, ...]]]]) -> ProfileData:
    """Events by line and plane, as the profiler writes them.

    An event is a name, begin and length in ms, and for operations the operation's name.
    """
    text = ""
    for plane, lines in planes.items():
        names = sorted({event[0] for events in lines.values() for event in events})
        body = "".join(
            f'event_metadata {{ key: {i + 1} value {{ id: {i + 1} name: "{name}" }} }}\n'
            for i, name in enumerate(names)
        )
        body += 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }\n'
        for line, events in lines.items():
            body += f'lines {{ name: "{line}"\n'
            for name, begin, length, *operation in events:
                stats = (
                    f'stats {{ metadata_id: 1 str_value: "{operation[0]}" }}' if operation else ""
                )
                times = f"offset_ps: {round(begin * MS)} duration_ps: {round(length * MS)}"
                body += f"events {{ metadata_id: {names.index(name) + 1} {times} {stats} }}\n"
            body += "}\n"
        text += f'planes {{ name: "{plane}"\n{body}}}\n'
    return ProfileData.from_text_proto(text)


GPU = {
    "/host:CPU": {
        "python": [
            (STEP, 0, 1),
            (WAITING, 12, 5),
            (STEP, 17, 1),
            ("backend_compile_and_load", 21, 2),
        ]
    },
    "/device:GPU:0": {
        "Stream #13(Compute)": [
            ("before", -3, 1, "fusion.1"),
            ("gemm_kernel", 1, 4, "fusion.1"),
            ("loop_fusion", 5, 3, "fusion.2"),
            ("loop_fusion", 8.01, 1.99, "fusion.2"),
            ("gemm_kernel", 18, 2, "fusion.1"),
            ("adam", 24, 1, "fusion.3"),
        ],
        "Stream #20(Communication)": [
            ("ncclDevKernel_AllReduce", 9, 3, "all-reduce-start.1"),
            ("MemcpyD2D", 25, 1),
        ],
        "XLA Modules": [("jit_train_step", 0, 30)],
    },
    "/device:GPU:1": {"Stream #13(Compute)": [("gemm_kernel", 0, 30, "fusion.1")]},
}


def test_a_trace_of_a_gpu_is_read_stream_by_stream() -> None:
    """Busy 1-12 (except for 0.01), 18-20, 24-26 of 0-26 ms.

    The other lines of the plane and the other GPU do not count.
    """
    found = summarise(xspace(GPU), SCOPE_OF)
    assert (found.device, found.steps) == ("gpu:0", 2)
    assert found.total_s == pytest.approx(0.026)
    assert found.busy_s == pytest.approx(0.01499)
    assert found.parts == pytest.approx(
        {
            "attention": 0.006,
            "norm": 0.00499,
            "collectives": 0.003,
            "optimizer": 0.001,
            "other": 0.001,
        }
    )
    assert found.idle == pytest.approx(
        {"host": 0.004, "waiting for data": 0.005, "compiling": 0.002, "between operations": 1e-5}
    )
    assert found.busy_s + sum(found.idle.values()) == pytest.approx(found.total_s)
    names = [(each.name, each.part, each.times) for each in found.largest]
    assert names[:3] == [
        ("fusion.1: gemm_kernel", "attention", 2),
        ("fusion.2: loop_fusion", "norm", 2),
        ("all-reduce-start.1: ncclDevKernel_AllReduce", "collectives", 1),
    ]


def test_time_inside_a_loop_counts_for_the_operations_in_it() -> None:
    """On a CPU operations are events of threads, and a loop's is around those of its body."""
    line = [
        ("while.1", 1, 8, "while.1"),
        ("fusion.1", 2, 3, "fusion.1"),
        ("fusion.2", 5, 3, "fusion.2"),
        ("no operation", 0, 20),
    ]
    found = summarise(
        xspace({"/host:CPU": {"python": [(STEP, 0, 10)], "tf_XLA/1": line}}), SCOPE_OF
    )
    assert found.device == "cpu:0"
    assert found.parts == pytest.approx({"attention": 0.003, "norm": 0.003, "other": 0.002})
    assert found.busy_s == pytest.approx(0.008)


def test_a_collective_is_hidden_while_other_operations_run() -> None:
    streams = {
        "Stream #1": [("gemm", 0, 4, "fusion.1"), ("gemm", 6, 1, "fusion.1")],
        "Stream #2": [("ncclDevKernel_AllReduce", 2, 8, "all-reduce.1")],
    }
    planes = {"/host:CPU": {"python": [(STEP, 0, 1)]}, "/device:GPU:0": streams}
    assert summarise(xspace(planes), SCOPE_OF).hidden_share == pytest.approx(3 / 8)
    alone = {"/host:CPU": {"python": [(STEP, 0, 1)]}, "/device:GPU:0": {"Stream #1": [GEMM]}}
    assert summarise(xspace(alone), SCOPE_OF).hidden_share is None


def test_a_kernel_that_begins_before_the_last_one_ends_counts_from_there() -> None:
    stream = [("gemm", 0, 4, "fusion.1"), ("gemm", 3, 4, "fusion.1"), ("norm", 7, 1, "fusion.2")]
    planes = {"/host:CPU": {"python": [(STEP, 0, 1)]}, "/device:GPU:0": {"Stream #1": stream}}
    found = summarise(xspace(planes), SCOPE_OF)
    assert found.parts == pytest.approx({"attention": 0.007, "norm": 0.001})


def test_the_least_time_of_a_part_is_that_of_its_flops_or_of_its_bytes() -> None:
    gpu = described_gpu("NVIDIA H200")
    assert gpu is not None
    costs = {
        "fusion.1": Cost(1e-3 * gpu.bf16_flops, round(5e-4 * gpu.memory_bandwidth)),
        "fusion.2": Cost(0.0, round(2e-3 * gpu.memory_bandwidth)),
    }
    found = summarise(xspace(GPU), SCOPE_OF, costs, gpu)
    # The two kernels of `fusion.2` follow each other, and so belong to one execution.
    assert found.least["attention"] == pytest.approx(Least(2e-3, 2e-3, 1e-3))
    assert found.least["norm"] == pytest.approx(Least(2e-3, 0.0, 2e-3))
    assert set(found.least) == {"attention", "norm"}
    assert [each.least for each in found.largest] == [
        found.least["attention"],
        found.least["norm"],
        *(None,) * (len(found.largest) - 2),
    ]


def test_a_collective_is_recognised_under_any_name() -> None:
    text = """
      %psum.3 = f32[4]{0} reduce-scatter(%f), channel_id=1, metadata={op_name="jit(step)/head/rs"}
      %x.1 = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), metadata={op_name="jit(step)/mlp/dot"}
      %fusion.1 = f32[4]{0} fusion(%all-gather-done.1), metadata={op_name="jit(step)/head/mul"}
    """
    assert scopes_of(text) == {
        "psum.3": "collectives",
        "x.1": "collectives",
        "fusion.1": "jit(step)/head/mul",
    }


@pytest.mark.parametrize("line", [[], [(STEP, 0, 1)]], ids=["no step", "no operation"])
def test_a_trace_without_steps_or_operations_is_refused(line: list[Any]) -> None:
    with pytest.raises(ValueError, match="the trace has no"):
        summarise(xspace({"/host:CPU": {"python": line}}), {})


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
def test_every_part_of_the_step_is_named_in_the_program(unroll: bool) -> None:
    """Forward and backward, if there is a backward pass."""
    run, _ = resolve(
        {
            "model": "haiku",
            "hidden_dim": 32,
            "num_heads": 2,
            "num_layers": 2 if unroll else 13,
            "max_tokens": 32,
            "batch_size": 2,
        }
    )
    shape = architecture(run.model, vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    lowered = build_program(
        shape,
        run.budget,
        run.hardware,
        run.optimizer,
        run.regularisation,
        length=run.length,
        schedule=build_schedule(run.optimizer, 10),
        devices=jax.devices()[:1],
        machine=Machine(1, 1, 2**30),
    ).program.lower_train_step(1, 2, 32)
    paths = scopes_of(lowered.compile().as_text()).values()
    for scope in SCOPES:
        own = [path for path in paths if Operation("", "", path, 0, 0, 0).part == scope]
        assert own, f"nothing of {scope}"
        if scope not in ("optimizer", "head"):  # the head's gradients come with its forward pass
            assert any("transpose" in path for path in own), f"nothing of {scope}, backward"
