import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from consyn_jax.config import UserError
from consyn_jax.distributed.mesh import build_mesh
from consyn_jax.training.checkpoint import Checkpoints
from consyn_jax.training.step import TrainState

ROWS = PartitionSpec(("data", "fsdp"))


def state_of(step: int, width: int = 8, **mesh: int) -> TrainState:
    """A state whose values tell the step, split over a mesh."""
    sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | mesh
    where = build_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    values = jax.device_put(jnp.arange(width * 2.0).reshape(width, 2) + step, NamedSharding(where, ROWS))
    return TrainState(jax.device_put(jnp.int32(step), NamedSharding(where, PartitionSpec())), {"w": values}, ({"mu": values * 2},))


def like(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    found = Checkpoints(tmp_path / "checkpoints", keep_last=2, keep_every=4)
    yield found
    found.close()


def test_the_newest_stay_and_every_fourth(checkpoints: Checkpoints) -> None:
    for step in (1, 3, 4, 5, 6, 7):
        checkpoints.save(step, state_of(step), {})
    checkpoints.wait()
    assert checkpoints.steps() == [4, 6, 7]
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["4", "6", "7"]


def test_what_was_saved_comes_back_on_another_mesh(checkpoints: Checkpoints) -> None:
    record = {"step": 3, "tokens": 2**40, "best_loss": None, "tracker_id": "a1"}
    checkpoints.save(3, state_of(3, fsdp=4), record)
    checkpoints.wait()
    for mesh in ({"fsdp": 4}, {"data": 2, "fsdp": 4}, {"data": 1}):
        wanted = state_of(3, **mesh)
        state, run = checkpoints.restore(3, like(wanted))
        assert run == record
        assert isinstance(state, TrainState)
        jax.tree.map(np.testing.assert_array_equal, state, wanted)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, wanted)


def test_a_saved_state_does_not_change_with_the_run(checkpoints: Checkpoints) -> None:
    """The step donates its state right after the save began."""
    state = state_of(2)
    checkpoints.save(2, state, {})
    state = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0, s), donate_argnums=0)(state)
    checkpoints.wait()
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(2, like(state_of(2)))[0], state_of(2))


def test_later_steps_are_removed(checkpoints: Checkpoints) -> None:
    for step in (4, 8, 9):
        checkpoints.save(step, state_of(step), {})
    checkpoints.wait()
    checkpoints.delete_after(4)
    assert checkpoints.steps() == [4]
    checkpoints.save(8, state_of(80), {})
    checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.restore(8, like(state_of(8)))[0].params["w"], state_of(80).params["w"])


def test_a_step_that_is_not_there_is_named_with_those_that_are(checkpoints: Checkpoints) -> None:
    with pytest.raises(UserError, match=r"has no checkpoint of step 5; there are: none\."):
        checkpoints.restore(5, like(state_of(5)))
    checkpoints.save(4, state_of(4), {})
    checkpoints.wait()
    with pytest.raises(UserError, match=r"has no checkpoint of step 5; there are: 4\."):
        checkpoints.restore(5, like(state_of(5)))


@pytest.fixture(scope="module")
def one_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(directory)
    checkpoints.save(4, state_of(4), {"step": 4})
    checkpoints.close()
    return directory


DAMAGE = {
    "arrays cut short": ("state/**/d/*", lambda file: file.write_bytes(file.read_bytes()[:10])),
    "arrays overwritten": ("state/**/d/*", lambda file: file.write_bytes(b"\x00" * file.stat().st_size)),
    "arrays gone": ("state/**/d/*", lambda file: file.unlink()),
    "tree gone": ("state/_METADATA", lambda file: file.unlink()),
    "tree cut short": ("state/_METADATA", lambda file: file.write_bytes(file.read_bytes()[:50])),
    "record cut short": ("run/metadata", lambda file: file.write_bytes(b'{"step": ')),
    "record gone": ("run/metadata", lambda file: file.unlink()),
}


def refused(checkpoints: Checkpoints, wanted: TrainState) -> str:
    with pytest.raises(UserError) as caught:
        checkpoints.restore(4, like(wanted))
    checkpoints.close()
    return str(caught.value)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_in_words(name: str, one_saved: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(one_saved, tmp_path / "checkpoints")
    pattern, spoil = DAMAGE[name]
    files = [file for file in (directory / "4").glob(pattern) if file.is_file()]
    assert files
    for file in files:
        spoil(file)
    assert "checkpoints/4 cannot be restored: it is damaged or of another model" in refused(Checkpoints(directory), state_of(4))


@pytest.mark.parametrize(
    "wanted", [state_of(4, width=16), state_of(4)._replace(params={"w": state_of(4).params["w"], "more": jnp.zeros(2)})], ids=["shape", "tree"]
)
def test_another_models_checkpoint_is_refused(wanted: TrainState, one_saved: Path) -> None:
    assert "cannot be restored: it is damaged or of another model" in refused(Checkpoints(one_saved), wanted)


def test_a_save_that_was_cut_off_is_no_checkpoint(one_saved: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(one_saved, tmp_path / "checkpoints")
    shutil.copytree(directory / "4", directory / "8.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(directory)
    assert checkpoints.steps() == [4]
    checkpoints.close()
