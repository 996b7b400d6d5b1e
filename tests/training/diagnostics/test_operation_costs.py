"""FLOPs and bytes of operations, on a small program whose numbers are known."""

import pytest

from consyn_jax.training.diagnostics.operation_costs import Cost, operation_costs

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused (p0: bf16[8,16], p1: bf16[16,4]) -> bf16[8,4] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[16,4]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%sliced (q0: f32[10,8], q1: s32[]) -> f32[1,8] {
  %q0 = f32[10,8]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  ROOT %cut = f32[1,8]{1,0} dynamic-slice(%q0, %q1, %q1), dynamic_slice_sizes={1,8}
}

%updated (r0: f32[10,8], r1: f32[1,8], r2: s32[]) -> f32[10,8] {
  %r0 = f32[10,8]{1,0} parameter(0)
  %r1 = f32[1,8]{1,0} parameter(1)
  %r2 = s32[] parameter(2)
  ROOT %put = f32[10,8]{1,0} dynamic-update-slice(%r0, %r1, %r2, %r2)
}

ENTRY %main (a: bf16[8,16], b: bf16[16,4], c: f32[10,8], i: s32[], q: bf16[2,32,4,8]) -> f32[10,8] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  %c = f32[10,8]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %q = bf16[2,32,4,8]{3,2,1,0} parameter(4)
  %e = f8e4m3fn[8,16]{1,0} convert(%a)
  %f = f8e4m3fn[16,4]{1,0} convert(%b)
  %narrow = bf16[8,4]{1,0} dot(%e, %f), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gemm = bf16[8,4]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused
  %library = (bf16[8,4]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %kernel = bf16[2,32,4,8]{3,2,1,0} custom-call(%q, %q, %q), \
custom_call_target="__gpu$xla.gpu.triton", backend_config={debug = false, name = "document_attention_forward"}
  %row = f32[1,8]{1,0} fusion(%c, %i), kind=kLoop, calls=%sliced
  ROOT %whole = f32[10,8]{1,0} fusion(%c, %row, %i), kind=kLoop, calls=%updated
}
"""
MATMUL = 2 * 8 * 16 * 4
OPERANDS = 2 * (8 * 16 + 16 * 4)


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("gemm", Cost(MATMUL, OPERANDS + 2 * 8 * 4)),
        ("library", Cost(MATMUL, OPERANDS + 2 * 8 * 4 + 64)),
        # A GPU multiplies 8 bits at twice its rate for 16.
        ("narrow", Cost(MATMUL / 2, OPERANDS / 2 + 2 * 8 * 4)),
        # Two causal matmuls of [32, 32] and [32, 8] for each of 2 x 4 heads.
        ("kernel", Cost(2 * 2 * 4 * 32 * 32 * 8, 2 * 2 * (2 * 32 * 4 * 8))),
        # Only the row is read, and only the row is written.
        ("row", Cost(0, 4 * 8 + 4 + 4 * 8)),
        ("whole", Cost(0, 4 * 8 + 4 + 4 * 8)),
    ],
)
def test_costs_of_an_operation(name: str, cost: Cost) -> None:
    assert operation_costs(PROGRAM)[name] == pytest.approx(cost)
