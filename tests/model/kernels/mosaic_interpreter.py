"""JAX's interpreter of Mosaic GPU kernels, with the two operations that it lacks in JAX 0.12.0.

It runs the warpgroups of a program as threads, with their barriers and asynchronous copies, and
finds races between copies and ordinary reads and writes. It runs `wgmma` at once and does not check
what it reads. What it lacks is `wgmma` with an operand in registers, and `pl.run_state`,
by which a kernel adds to an accumulator.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
from jax._src import callback
from jax._src.pallas import primitives
from jax._src.pallas.mosaic_gpu import core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret as interpreter
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from jax._src.state import discharge
from jax._src.state.types import AbstractRef

Interpreter = interpreter.JaxprInterpreter
interpret, run_scoped, wgmma = (
    Interpreter.interpret,
    Interpreter._interpret_run_scoped_p,
    Interpreter._interpret_wgmma_ref_p,
)
REGISTERS = memory.get_memory_space_idx(core.MemorySpace.REGS)


@contextmanager
def interpreted() -> Iterator[None]:
    """Interpret Mosaic GPU kernels, and fail if two threads race for shared memory."""
    with (
        mock.patch.object(Interpreter, "interpret", _interpret),
        mock.patch.object(Interpreter, "_interpret_run_scoped_p", _run_scoped),
        mock.patch.object(Interpreter, "_interpret_wgmma_ref_p", _wgmma),
        force_gpu_interpret_mode(InterpretGPUParams(detect_races=True, on_race="raise")),
    ):
        yield


def _interpret(self: Any, jaxpr: Any, token: Any, *args: Any) -> Any:
    """Interpret a program, with `run_state` as a kind of `run_scoped`, which its methods know."""
    eqns = [
        eqn.replace(primitive=primitives.run_scoped_p)
        if eqn.primitive is discharge.run_state_p
        else eqn
        for eqn in jaxpr.eqns
    ]
    return interpret(self, jaxpr.replace(eqns=eqns), token, *args)


def _run_scoped(self: Any, eqn: Any, token: Any, invals: Callable[[], Any]) -> Any:
    """Interpret `run_state`: put the values into registers, run, and take them back."""
    if "which_linear" not in eqn.params:
        return run_scoped(self, eqn, token, invals)
    held, are_values = [], [not isinstance(var.aval, AbstractRef) for var in eqn.invars]
    for value, is_value in zip(invals(), are_values, strict=True):
        key = value
        if is_value:
            token, key = _put(self, eqn, token, value)
        held.append(key)
    token, _ = self.interpret(eqn.params["jaxpr"], token, *held)
    out = []
    for key, is_value, var in zip(held, are_values, eqn.invars, strict=True):
        value = key
        if is_value:
            read = functools.partial(gpu_callbacks.wgmma_accumulator_deref, wait_n=None)
            answer = gpu_callbacks.TOKEN_SHAPE_DTYPE, var.aval
            token, value = _call(self, eqn, token, read, answer, acc_allocation_key_as_array=key)
            token = _free(self, eqn, token, key)
        out.append(value)
    return token, out


def _wgmma(self: Any, eqn: Any, token: Any, invals: Callable[[], Any]) -> Any:
    """Interpret `wgmma` with an operand in registers."""
    if isinstance(eqn.invars[1].aval, AbstractRef):
        return wgmma(self, eqn, token, invals)
    accumulator, a, b, *leaves = invals()
    trees = (
        eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "b")
    )
    acc_transforms, b_transforms = jax.tree.unflatten(
        jax.tree_util.treedef_tuple(tuple(trees)), leaves
    )
    token, key = _put(self, eqn, token, a)
    operands = {
        "acc_allocation_key_as_array": accumulator,
        "acc_transforms": acc_transforms,
        "a_allocation_key_as_array": key,
        "a_transforms": (),
        "b_allocation_key_as_array": b,
        "b_transforms": b_transforms,
    }
    token = _call(
        self, eqn, token, gpu_callbacks.wgmma, gpu_callbacks.TOKEN_SHAPE_DTYPE, **operands
    )
    return _free(self, eqn, token, key), []


def _call(self: Any, eqn: Any, token: Any, function: Any, answer: Any, **named: Any) -> Any:
    return callback.io_callback(
        functools.partial(function, source_info=eqn.source_info),
        answer,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        **named,
    )


def _put(self: Any, eqn: Any, token: Any, value: Any) -> Any:
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token, compute_unit=self.thread, memory_space_id=REGISTERS, initial_ref_count=1
    )
    return gpu_callbacks.call_allocate_buffer(
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_request_as_array=request,
        value=value,
        source_info=eqn.source_info,
    )


def _free(self: Any, eqn: Any, token: Any, key: Any) -> Any:
    return gpu_callbacks.call_deallocate_buffer(
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_key_as_array=key,
        source_info=eqn.source_info,
    )
