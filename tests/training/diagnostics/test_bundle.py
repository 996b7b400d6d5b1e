"""Writing, reading and refusing replay bundles."""

import io
import json
import math
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_program import A, B, T, place, program, state_of

from consyn_jax.data.loader import BatchLoader, Shuffled
from consyn_jax.data.mixture import Mixture
from consyn_jax.errors import UserError
from consyn_jax.training.diagnostics import step_statistics
from consyn_jax.training.diagnostics.bundle import (
    Incident,
    read_bundle,
    sample_names,
    write_bundle,
)


def damaged(bundle: Path, to: Path, **changes: bytes) -> str:
    """The error message for a bundle with some files replaced."""
    to.mkdir(parents=True)
    for name in ("replay.json", "batch.npz"):
        (to / name).write_bytes(changes.get(name.partition(".")[0], (bundle / name).read_bytes()))
    with pytest.raises(UserError) as error:
        read_bundle(to)
    assert "\n" not in str(error.value)
    return str(error.value)


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


@pytest.mark.slow
def test_damaged_and_missing_records_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"is not a replay bundle: it has no replay\.json\. Give a directory under nonfinite",
    ):
        read_bundle(tmp_path)
    record = json.loads((bundle / "replay.json").read_text())
    for number, change in enumerate(
        [
            {"format": 2},
            {"shape": [2, 4]},
            {"shape": [2, 4, 10**12]},
            {"shape": [2, -4, 8]},
            {"step": "7"},
            {"samples": [["a"]]},
            {"model": {"vocab_size": 3}},
            {"model": record["model"] | {"hidden_dim": "16"}},
            {"model": record["model"] | {"num_heads": 0}},
            {"metrics": {"loss": []}},
        ]
    ):
        assert "is damaged" in damaged(
            bundle, tmp_path / str(number), replay=json.dumps(record | change).encode()
        ), change
    for number, content in enumerate([b"", b"[]", b"\xff", b"[" * 100_000, b'{"format": 1}']):
        assert "is damaged" in damaged(bundle, tmp_path / f"json{number}", replay=content)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["batch.npz", "config.yaml", "checkpoints"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_in_a_bundle_are_named(
    bundle: Path, tmp_path: Path, name: str, kind: str
) -> None:
    """A link was followed, and a pipe was waited for without an end."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    (copy / name).rename(tmp_path / "moved")
    (copy / name).symlink_to(tmp_path / "moved") if kind == "link" else os.mkfifo(copy / name)
    with pytest.raises(
        UserError, match=f"read: {copy / name} is a {kind}. Replace it with the file itself"
    ):
        read_bundle(copy)


def test_a_batch_is_never_unpickled(bundle: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("unpickled",))

    ids = np.zeros((A, B, T), np.int32)
    others = {"labels": npy(ids), "segment_ids": npy(ids), "loss_mask": npy(ids.astype(bool))}
    objects = npy(np.array([Harm()], object), allow_pickle=True)
    whole = npy(ids)
    contents = [
        npz(input_ids=bad, **others)
        for bad in (
            objects,
            pickle.dumps(Harm()),
            npy(ids[:1]),
            npy(ids.astype(np.int64)),
            whole[:-4],
            b"",
        )
    ]
    for number, content in enumerate(
        [*contents, npz(), b"PK", (bundle / "batch.npz").read_bytes()[:-30]]
    ):
        assert "is damaged" in damaged(bundle, tmp_path / str(number), batch=content)


def test_a_bundle_that_cannot_be_written_does_not_hide_the_divergence(
    batch: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, warnings = program(fsdp=4), []
    monkeypatch.setattr(
        step_statistics,
        "_activations",
        lambda *_: (_ for _ in ()).throw(
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        ),
    )
    (tmp_path / "file").write_text("")
    state, parts = state_of(p), place(batch, p.mesh)
    for where in (tmp_path / "file" / "7", tmp_path / "7"):  # no directory; no config.yaml to copy
        text = write_bundle(
            where,
            p,
            state,
            parts,
            Incident(7, {"loss": math.nan}, 20, None),
            tmp_path / "none.yaml",
            warnings.append,
        )
        assert (
            text == "The first non-finite value is unknown: a device could not repeat the step "
            "(RESOURCE_EXHAUSTED: out of memory)."
        )
        assert not where.exists()
    assert warnings == [
        f"The replay bundle {tmp_path / 'file' / '7'} could not be written: Not a directory.",
        f"The replay bundle {tmp_path / '7'} could not be written: No such file or directory.",
    ]


class Numbers:
    """Sequences that contain their own numbers."""

    def __init__(self, size: int, first: int) -> None:
        self.size, self.first = size, first

    def __len__(self) -> int:
        return self.size

    def rows(self, indices: Any) -> dict[str, np.ndarray]:
        return {"input_ids": self.first + np.asarray(indices, np.int32)[:, None]}


@pytest.mark.parametrize("step", [1, 4, 9])
def test_samples_are_named_in_the_order_of_reading(step: int) -> None:
    shuffled, mixture = (
        Shuffled(Numbers(13, 0), 3),
        Mixture({"a": Numbers(13, 1000), "b": Numbers(5, 2000)}, [0.7, 0.3], 3),
    )
    read = BatchLoader(shuffled, 4, 2).batch(step - 1)["input_ids"][..., 0]
    assert sample_names(shuffled, step, 2, 4) == [[f"sample {i}" for i in row] for row in read]
    read = BatchLoader(mixture, 4, 2).batch(step - 1)["input_ids"][..., 0]
    assert sample_names(mixture, step, 2, 4) == [
        [f"sample {i % 1000} of {'ab'[i // 1000 - 1]}" for i in row] for row in read
    ]
    assert sample_names(None, step, 2, 4) is None
