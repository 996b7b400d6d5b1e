import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from consyn_jax.config import UserError, architecture
from consyn_jax.distributed.auto_mesh import Machine
from consyn_jax.resolve import resolve
from consyn_jax.training import profile
from consyn_jax.training.profile import SCOPES, Profile, Program, Summary, page, scopes_of, summarise
from consyn_jax.training.program import build_program
from consyn_jax.training.scheduler import configured_schedule
from consyn_jax.validation import parse_profile_steps

pytestmark = pytest.mark.users_compiler

MS = 10**9  # picoseconds
# What the compiler says of the operations below.
SCOPE_OF = {
    "fusion.1": "jit(train_step)/jvp()/while/body/attention/dot_general",
    "fusion.2": "jit(train_step)/transpose(jvp())/while/body/mlp/norm/mul",
    "fusion.3": "jit(train_step)/optimizer/add",
}


def xspace(planes: dict[str, dict[str, list[tuple[Any, ...]]]]) -> ProfileData:
    """Events (name, begin in ms, length in ms, and of an operation its name) by line and plane, as the profiler writes them."""
    text = ""
    for plane, lines in planes.items():
        names = sorted({event[0] for events in lines.values() for event in events})
        body = "".join(f'event_metadata {{ key: {i + 1} value {{ id: {i + 1} name: "{name}" }} }}\n' for i, name in enumerate(names))
        body += 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }\n'
        for line, events in lines.items():
            body += f'lines {{ name: "{line}"\n'
            for name, begin, length, *operation in events:
                stats = f'stats {{ metadata_id: 1 str_value: "{operation[0]}" }}' if operation else ""
                body += f"events {{ metadata_id: {names.index(name) + 1} offset_ps: {round(begin * MS)} duration_ps: {round(length * MS)} {stats} }}\n"
            body += "}\n"
        text += f'planes {{ name: "{plane}"\n{body}}}\n'
    return ProfileData.from_text_proto(text)


GPU = {
    "/host:CPU": {
        "python": [
            (profile.STEP, 0, 1),
            (profile.WAITING, 12, 5),
            (profile.STEP, 17, 1),
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
        "Stream #20(Communication)": [("ncclDevKernel_AllReduce", 9, 3, "all-reduce-start.1"), ("MemcpyD2D", 25, 1)],
        "XLA Modules": [("jit_train_step", 0, 30)],
    },
    "/device:GPU:1": {"Stream #13(Compute)": [("gemm_kernel", 0, 30, "fusion.1")]},
}


def test_a_trace_of_a_gpu_is_read_stream_by_stream() -> None:
    """Busy 1-12 (but for 0.01), 18-20, 24-26 of 0-26 ms; the other lines of the plane and the other GPU do not count."""
    found = summarise(xspace(GPU), SCOPE_OF)
    assert (found.device, found.steps) == ("gpu:0", 2)
    assert found.total_s == pytest.approx(0.026)
    assert found.busy_s == pytest.approx(0.01499)
    assert found.parts == pytest.approx({"attention": 0.006, "norm": 0.00499, "collectives": 0.003, "optimizer": 0.001, "other": 0.001})
    assert found.idle == pytest.approx({"host": 0.004, "waiting for data": 0.005, "compiling": 0.002, "between operations": 1e-5})
    assert found.busy_s + sum(found.idle.values()) == pytest.approx(found.total_s)
    names = [(name, part, times) for name, part, _, times in found.largest]
    assert names == [
        ("fusion.1: gemm_kernel", "attention", 2),
        ("fusion.2: loop_fusion", "norm", 2),
        ("all-reduce-start.1: ncclDevKernel_AllReduce", "collectives", 1),
    ]


def test_a_loop_does_not_count_for_what_is_in_it() -> None:
    """On a CPU operations are events of threads, and a loop is one around those of its body."""
    line = [("while.1", 1, 8, "while.1"), ("fusion.1", 2, 3, "fusion.1"), ("fusion.2", 5, 3, "fusion.2"), ("no operation", 0, 20)]
    found = summarise(xspace({"/host:CPU": {"python": [(profile.STEP, 0, 10)], "tf_XLA/1": line}}), SCOPE_OF)
    assert found.device == "cpu:0"
    assert found.parts == pytest.approx({"attention": 0.003, "norm": 0.003, "other": 0.002})
    assert found.busy_s == pytest.approx(0.008)


def test_an_exchange_is_one_whatever_its_name() -> None:
    text = """
      %psum_scatter.3 = f32[4]{0} reduce-scatter(%fusion.1), channel_id=1, metadata={op_name="jit(step)/head/reduce_scatter"}
      %x.1 = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), metadata={op_name="jit(step)/mlp/dot_general"}
      %fusion.1 = f32[4]{0} fusion(%all-gather-done.1), metadata={op_name="jit(step)/head/mul"}
    """
    assert scopes_of(text) == {"psum_scatter.3": "collectives", "x.1": "collectives", "fusion.1": "jit(step)/head/mul"}


@pytest.mark.parametrize("line", [[], [(profile.STEP, 0, 1)]], ids=["no step", "no operation"])
def test_a_trace_without_steps_or_operations_is_refused(line: list[Any]) -> None:
    with pytest.raises(ValueError, match="the trace has no"):
        summarise(xspace({"/host:CPU": {"python": line}}), {})


def test_the_page_says_what_a_device_achieved() -> None:
    summary = Summary("gpu:0", 2, 2.0, 1.5, {"host": 0.5}, {"mlp": 1.2, "head": 0.4}, (("fusion.7", "mlp", 0.8, 48),))
    text = page(summary, Program(str, 400e12, 989e12), (10, 11))
    assert "Steps 10 to 11, 1,000.0 ms each, as gpu:0 spent them." in text
    assert re.search(r"achieved +400 TFLOP/s: 40.4% of the 989 TFLOP/s", text)
    assert re.search(r"busy +75.0%\n +idle +25.0%  \(host 25.0%\)", text)
    assert re.search(r"mlp +75.0% +600.00 ms a step\n +head +25.0%", text)
    assert re.search(r"The 1 largest kernels:\n +50.0% +400.00 ms in 24 a step  fusion.7 \(mlp\)", text)


@pytest.mark.parametrize("text", ["", "3", "5:3", "0:3", "a:b", "1:2:3", "-1:2", "1.5:2", "٣:٤"])
def test_steps_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--profile_steps wants the first and the last step to trace"):
        parse_profile_steps(text)


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
def test_every_part_of_the_step_is_named_in_the_program(unroll: bool) -> None:
    """Forward and backward, where there is a backward pass; the names change no operation."""
    run, _ = resolve({"model": "haiku", "hidden_dim": 32, "num_heads": 2, "num_layers": 2 if unroll else 13, "max_tokens": 32, "batch_size": 2})
    shape = architecture(run.model, vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    lowered = build_program(shape, run, configured_schedule(run.optimizer, 10), jax.devices()[:1], Machine(1, 1, 2**30)).program.lower_train_step(1, 2, 32)
    paths = scopes_of(lowered.compile().as_text()).values()
    for scope in SCOPES:
        own = [path for path in paths if profile.Operation("", "", path, 0, 0, 0).part == scope]
        assert own, f"nothing of {scope}"
        if scope not in ("optimizer", "head"):  # the head's gradients come with its forward pass
            assert any("transpose" in path for path in own), f"nothing of {scope}, backward"


class Told:
    def __init__(self, steps: tuple[int, int] | None, path: Path) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.profile = Profile(steps, path, self.notes.append, self.warnings.append)

    def run(self, steps: int) -> None:
        """Steps of a small program, and the end of the run."""
        with jax.named_scope("mlp"):
            compiled = jax.jit(lambda x: jnp.tanh(x @ x)).lower(jnp.ones((64, 64))).compile()
        self.profile.program = Program(compiled.as_text, 2.0 * 64**3, None)
        x = jnp.ones((64, 64))
        for number in range(1, steps + 1):
            with self.profile.step(number, x):
                x = compiled(x)
            self.profile.ended(number, x)
        self.profile.close()


@pytest.fixture
def no_trace_left() -> Iterator[None]:
    yield
    with pytest.raises(RuntimeError):
        jax.profiler.stop_trace()


@pytest.mark.parametrize(("asked", "steps"), [((2, 3), "2 to 3"), ((4, 9), "4 to 5")], ids=["inside", "beyond the end"])
def test_the_steps_that_were_asked_for_are_traced(asked: tuple[int, int], steps: str, tmp_path: Path, no_trace_left: None) -> None:
    told = Told(asked, tmp_path)
    told.run(5)
    assert told.warnings == []
    assert f"Steps {steps}, " in (tmp_path / "summary.txt").read_text()
    assert told.notes[0].startswith(f"Steps {steps}, ")
    assert str(tmp_path / "summary.txt") in told.notes[-1]
    [trace] = tmp_path.rglob("*.xplane.pb")
    events = [event for plane in ProfileData.from_file(str(trace)).planes for line in plane.lines for event in line.events]
    assert [dict(event.stats)["step_num"] for event in events if event.name == profile.STEP] == list(range(asked[0], min(asked[1], 5) + 1))


def test_steps_that_are_never_run_are_told(tmp_path: Path) -> None:
    told = Told((7, 8), tmp_path / "profile")
    told.run(5)
    assert told.notes == ["No step of --profile_steps 7:8 was run, so there is no profile."]
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("where", ["start_trace", "stop_trace", "page"])
def test_a_profiler_that_fails_is_told_once_and_steps_go_on(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_trace_left: None) -> None:
    def fail(*_: Any, **__: Any) -> None:
        if where == "stop_trace":
            real()
        raise OSError("no space left on device")

    real = jax.profiler.stop_trace
    monkeypatch.setattr(*((profile, "page") if where == "page" else (jax.profiler, where)), fail)
    told = Told((2, 3), tmp_path)
    told.run(5)
    assert told.warnings == ["The profile of these steps failed; the run goes on. OSError: no space left on device"]
    assert told.notes == []
    monkeypatch.undo()


def test_nothing_is_traced_unasked(tmp_path: Path) -> None:
    told = Told(None, tmp_path / "profile")
    told.run(2)
    assert (told.notes, told.warnings, (tmp_path / "profile").exists()) == ([], [], False)
