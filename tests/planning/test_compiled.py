"""The reader of compiled programs, on a small program whose numbers are known by hand."""

import pytest

from consyn_jax.planning.compiled import Collective, array_shapes, collectives, instructions, kernels

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
  %gather = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%shard), channel_id=1, dimensions={0}
  %gathered = bf16[8,4]{1,0} all-gather-done(%gather)
  %attention = (bf16[8,4]{1,0}, u8[0]{0}) custom-call(%gathered), custom_call_target="__cudnn$fmhaSoftmax"
  %scatter = ((f32[8,4]{1,0}, f32[4]{0}), (f32[2,4]{1,0}, f32[1]{0})) reduce-scatter-start(%a, %b), dimensions={0}, to_apply=%add
  ROOT %next = (s32[], bf16[8,4]{1,0}) tuple(%i, %out)
}

%condition (c: (s32[], bf16[8,4])) -> pred[] {
  %c = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (argument: bf16[8,4]) -> f32[] {
  %argument = bf16[8,4]{1,0} parameter(0)
  %loop = (s32[], bf16[8,4]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %norm = f32[3]{0} all-reduce-start(%local), to_apply=%add
  ROOT %result = f32[] constant(0)
}
"""


def test_a_loop_counts_as_often_as_it_runs() -> None:
    assert kernels(instructions(PROGRAM)) == {"__cudnn$fmhaSoftmax": 5}


def test_collectives_count_whole_arrays() -> None:
    assert collectives(instructions(PROGRAM)) == [
        Collective("all-gather", "bf16", 5, 5 * 8 * 4 * 2),
        Collective("all-reduce", "f32", 1, 3 * 4),
        Collective("reduce-scatter", "f32", 5, 5 * (8 * 4 + 4) * 4),
    ]


def test_shapes_by_dtype() -> None:
    program = instructions(PROGRAM)
    assert array_shapes(program, "f32") == {(), (8, 4), (4,), (2, 4), (1,), (3,)}
    assert array_shapes(program, "bf16") == {(8, 4), (2, 4)}


def test_every_instruction_is_read() -> None:
    assert len(instructions(PROGRAM)) == sum(" = " in line for line in PROGRAM.splitlines())


def test_another_text_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        instructions("module @jit_step {}")
