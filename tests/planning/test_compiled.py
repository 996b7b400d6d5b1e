"""Reading compiled programs, on small ones whose numbers are known."""

import pytest
from analyses import array_shapes, matmul_flops

from consyn_jax.distributed.compiled import (
    Collective,
    collectives,
    first_group,
    instructions,
    kernels,
    update_bytes,
)

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %shard = bf16[2,4]{1,0} constant(0)
  %gather = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%shard), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %gathered = bf16[8,4]{1,0} all-gather-done(%gather)
  %attention = (bf16[8,4]{1,0}, u8[0]{0}) custom-call(%gathered), custom_call_target="__cudnn$fmhaSoftmax"
  %scatter = ((f32[8,4]{1,0}, f32[4]{0}), (f32[2,4]{1,0}, f32[1]{0})) reduce-scatter-start(%a, %b), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  ROOT %next = (s32[], bf16[8,4]{1,0}) tuple(%i, %out)
}

%condition (c: (s32[], bf16[8,4])) -> pred[] {
  %c = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (argument: bf16[8,4]) -> f32[] {
  %argument = bf16[8,4]{1,0} parameter(0)
  %loop = (s32[], bf16[8,4]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %norm = f32[3]{0} all-reduce-start(%local), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, to_apply=%add
  %now = f32[2]{0} reduce-scatter(%whole), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
  ROOT %result = f32[] constant(0)
}
"""


def test_instructions_in_a_loop_count_as_often_as_it_runs() -> None:
    assert kernels(instructions(PROGRAM)) == {"__cudnn$fmhaSoftmax": 5}


def test_collectives_count_whole_arrays_along_mesh_axes() -> None:
    expected = [
        ("all-gather", "bf16", ("fsdp",), 5, 5 * 8 * 4 * 2),
        ("all-reduce", "f32", ("tensor",), 1, 3 * 4),
        ("reduce-scatter", "f32", ("fsdp",), 5, 5 * (8 * 4 + 4) * 4),
        ("reduce-scatter", "f32", ("tensor",), 1, 2 * 2 * 4),
    ]
    assert collectives(
        instructions(PROGRAM), {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    ) == [Collective(*each) for each in expected]
    assert {c.axes for c in collectives(instructions(PROGRAM), {"data": 4, "fsdp": 2})} == {
        ("data",),
        ("fsdp",),
    }


def test_the_results_of_an_asynchronous_sum_are_not_communicated_again() -> None:
    """XLA of JAX 0.12 lists them after the operands."""
    newer = PROGRAM.replace("%norm = f32[3]{0} all", "%norm = ((f32[3]{0}), f32[3]{0}) all")
    assert newer != PROGRAM
    mesh = {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert collectives(instructions(newer), mesh) == collectives(instructions(PROGRAM), mesh)


def test_groups_in_an_unknown_form_have_no_axes() -> None:
    assert (
        first_group("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}, to_apply=%add")
        == first_group("replica_groups={}")
        == []
    )


def test_shapes_by_dtype() -> None:
    shapes = array_shapes(instructions(PROGRAM))
    assert shapes["f32"] == {(), (8, 4), (4,), (2, 4), (1,), (2,), (3,)}
    assert shapes["bf16"] == {(8, 4), (2, 4)}


STEP = """\
HloModule jit_step, is_scheduled=true

%fused_product (p: f8e4m3fn[8,4], q: f8e5m2[4,2]) -> bf16[8,2] {
  %p = f8e4m3fn[8,4]{1,0} parameter(0)
  %q = f8e5m2[4,2]{1,0} parameter(1)
  ROOT %dot = bf16[8,2]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (l: f32[6,5]) -> f32[6,5] {
  %l = f32[6,5]{1,0} parameter(0)
  %inside = bf16[8,2]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_product
  ROOT %kept = f32[6,5]{1,0} copy(%l)
}

ENTRY %main (weight: f32[6,5], moment: bf16[6,5]) -> f32[6,5] {
  %weight = f32[6,5]{1,0} parameter(0)
  %moment = bf16[6,5]{1,0} parameter(1)
  %fill = f32[6,5]{1,0} fusion(%zero), kind=kLoop
  %early = f32[6,5]{1,0} copy(%weight)
  %backward = f32[6,5]{1,0} while(%fill), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %scatter = f32[6,5]{1,0} fusion(%backward), kind=kInput, metadata={op_name="jit(step)/transpose(jvp())/add"}
  %norm = f32[] fusion(%scatter), kind=kInput, metadata={op_name="jit(step)/reduce_sum"}
  %turned = f32[6,5]{0,1} copy(%scatter)
  %update = (f32[6,5]{1,0}, bf16[6,5]{1,0}) fusion(%weight, %moment, %turned, %norm), kind=kLoop, metadata={op_name="jit(step)/select_n"}
  %other = bf16[4]{0} fusion(%small), kind=kLoop, metadata={op_name="jit(step)/add"}
  ROOT %result = f32[6,5]{1,0} get-tuple-element(%update), index=0
}
"""


def test_matmuls_count_by_types_and_as_often_as_they_run() -> None:
    assert matmul_flops(instructions(STEP)) == {("f8e4m3fn", "f8e5m2"): 3 * 2 * 8 * 4 * 2}


def test_the_update_reads_parameters_and_is_not_differentiated() -> None:
    array = 30
    norm, copy, update = 4 * array + 4, 2 * 4 * array, (4 + 2 + 4) * array + 4 + (4 + 2) * array
    assert update_bytes(instructions(STEP), {array}) == norm + copy + update


def test_every_instruction_is_read() -> None:
    assert len(instructions(PROGRAM)) == sum(" = " in line for line in PROGRAM.splitlines())


def test_another_text_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        instructions("module @jit_step {}")
