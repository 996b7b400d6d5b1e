"""Read the parameters of a checkpoint without the rest of its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath  # type: ignore[import-untyped]
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from consyn_jax.errors import UserError, brief
from consyn_jax.model.parameters import Params
from consyn_jax.training.checkpointing.checkpoint_files import STATE, damage
from consyn_jax.training.checkpointing.orbax_writes import refusal
from consyn_jax.training.checkpointing.ownership import check_step
from consyn_jax.training.checkpointing.restoring import array_types, check_model, read_record
from consyn_jax.training.optim.state import averaged

PARAMS = "params"  # name of the parameters in the state
WEIGHT, AVERAGED_WITH = "b1", "z"  # names in the optimizer state of schedule-free training


def read_weights(place: Path, like: Params) -> Params:
    """Verify a checkpoint, and read the parameters that its run would export.

    The optimizer's state is read only for schedule-free training, where the exported weights are an
    average that is computed from this state.

    Args:
        like: Shapes, dtypes and shardings of the parameters to return.

    Raises:
        UserError: The checkpoint is damaged, belongs to another model, or has the name of another
            step.
    """
    import orbax.checkpoint as ocp

    place = place.absolute()  # Orbax needs an absolute path
    if reason := damage(place):
        raise UserError(f"{place} is damaged: {reason}. Give the step of another checkpoint.")
    check_step(place, read_record(place))
    handler = ocp.PyTreeCheckpointHandler()
    try:
        there = handler.metadata(epath.Path(place / STATE)).tree
        types = array_types(there)
        average = next((name for name in types if name.endswith(f"/{WEIGHT}")), "")
        own = {name: kind for name, kind in types.items() if name.startswith(f"{PARAMS}/")}
        check_model(place, own, array_types({PARAMS: _in_float32(like)}))
        if not average:
            params: Params = _read(handler, place, {PARAMS: like})[PARAMS]
            return params
        return _read_averaged(handler, place, like, average.split("/")[:-1])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # The files are intact, but another version of Orbax may have written them.
        reason = refusal(error) or brief(error)
        raise UserError(
            f"{place} cannot be read: {reason}. Give the step of another checkpoint."
        ) from error
    finally:
        handler.close()


def read_arrays(place: Path, like: Params) -> Params:
    """Read a directory in which Orbax has written exactly these arrays.

    Args:
        like: Shapes, dtypes and shardings of the arrays to return.

    Raises:
        UserError: The arrays are damaged, or belong to another model.
    """
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    try:
        there = array_types(handler.metadata(epath.Path(place.absolute())).tree)
        shapes = {name: kind.partition(" ")[2] for name, kind in there.items()}
        wanted = {name: kind.partition(" ")[2] for name, kind in array_types(like).items()}
        check_model(place, shapes, wanted)
        arguments = ocp.checkpoint_utils.construct_restore_args(like)
        found: Params = handler.restore(
            epath.Path(place.absolute()),
            args=ocp.args.PyTreeRestore(item=like, restore_args=arguments),
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = refusal(error) or brief(error)
        raise UserError(f"{place} cannot be read: {reason}. Convert the model again.") from error
    finally:
        handler.close()
    return found


def _read(handler: Any, place: Path, wanted: Params) -> Params:
    """Read only the arrays in `wanted` from a checkpoint."""
    import orbax.checkpoint as ocp

    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    found: Params = handler.restore(
        epath.Path(place / STATE),
        args=ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True),
    )
    return found


def _read_averaged(handler: Any, place: Path, like: Params, path: list[str]) -> Params:
    """Read the averaged weights of schedule-free training from the state at `path`."""
    whole = _in_float32(like)
    everywhere = _replicated(jax.tree.leaves(like)[0].sharding)
    weight = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    wanted: Params = {WEIGHT: weight, AVERAGED_WITH: whole}
    for name in reversed(path):
        wanted = {name: wanted}
    found = _read(handler, place, {PARAMS: whole, **wanted})
    inner = found
    for name in path:
        inner = inner[name]
    params = jax.jit(averaged)(found[PARAMS], inner[WEIGHT], inner[AVERAGED_WITH])
    return jax.tree.map(lambda p, leaf: p.astype(leaf.dtype), params, like)


def _replicated(sharding: Sharding) -> Sharding:
    """The sharding that replicates a scalar over the same devices as `sharding`."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _in_float32(like: Params) -> Params:
    """Return the shapes and shardings of `like` with dtype float32, the dtype on disk."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), like
    )
