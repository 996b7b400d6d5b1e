"""Read the state and the run record of a verified checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from etils import epath  # type: ignore[import-untyped]

from consyn_jax.errors import UserError
from consyn_jax.training.checkpointing.checkpoint_files import STATE, damage
from consyn_jax.training.checkpointing.commit import RECORD
from consyn_jax.training.step import TrainState, new_scales

OTHER = "Resume from another checkpoint with --resume STEP."


def read_record(place: Path) -> dict[str, Any]:
    """Verify and read the run record of a checkpoint.

    Raises:
        UserError: The record is damaged.
    """
    if reason := damage(place, only=RECORD):
        raise UserError(f"{place} is damaged: {reason}. {OTHER}")
    try:
        record = json.loads((place / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{place / RECORD} cannot be read: {type(error).__name__}. {OTHER}"
        ) from error
    if not isinstance(record, dict):
        raise UserError(f"{place / RECORD} is not the record of a run. {OTHER}")
    return record


def read_state(handler: Any, place: Path, like: TrainState) -> TrainState:
    """Read the arrays of a checkpoint.

    The fp8 scales may be missing in the checkpoint or in `like`, because only fp8 runs have them.
    If the checkpoint has no scales, the scales of a new run are used; the next step replaces them.
    If `like` has no scales, the checkpoint's scales are left out.

    Args:
        handler: Orbax's checkpoint handler.
        like: Shapes, dtypes and shardings of the state to return; the mesh may differ from the mesh
            of the saved state.

    Raises:
        UserError: The arrays belong to another model.
        Exception: Any error that Orbax raises for files of another version of Orbax.
    """
    import orbax.checkpoint as ocp

    state = epath.Path(place / STATE)
    saved = handler.metadata(state).tree
    stored = like._replace(scales=_stored_scales(saved.get("scales") or (), like))
    check_model(place, array_types(saved), array_types(stored))
    restore_args = ocp.checkpoint_utils.construct_restore_args(stored)
    # Checkpoints from before fp8 had scales do not even name the field. For all others, Orbax
    # checks that the structures are equal.
    arguments = ocp.args.PyTreeRestore(stored, restore_args, partial_restore="scales" not in saved)
    found: TrainState = handler.restore(state, args=arguments)
    if len(stored.scales) == len(like.scales):
        return found
    return found._replace(scales=new_scales(like.scales))


def _stored_scales(saved: Any, like: TrainState) -> tuple[Any, ...]:
    """Return shapes, dtypes and shardings of the fp8 scales in a checkpoint."""
    if saved and like.scales:
        return like.scales
    return tuple(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.step.sharding) for leaf in saved
    )


def check_model(place: Path, old: dict[str, str], new: dict[str, str]) -> None:
    """Check that the arrays `old` of a checkpoint have the shapes and dtypes of the model.

    Raises:
        UserError: The arrays belong to another model.
    """
    names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    if names:
        first = "; ".join(
            f"{name} is {old.get(name, 'missing')} in the checkpoint and "
            f"{new.get(name, 'missing')} in the model"
            for name in names[:3]
        )
        more = " and so on" if names[3:] else ""
        raise UserError(
            f"{place} holds another model: {first}{more}. Use the model that this checkpoint was "
            "saved from."
        )


def array_types(state: Any) -> dict[str, str]:
    """Dtype and shape of each array, by its path in the state."""
    import orbax.checkpoint as ocp

    tree = ocp.tree.serialize_tree(state, keep_empty_nodes=True)
    leaves = ocp.tree.to_flat_dict(tree, sep="/")
    return {name: f"{leaf.dtype} {list(leaf.shape)}" for name, leaf in leaves.items()}
