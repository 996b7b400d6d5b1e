"""Readers of pairs, Arrow files, saved datasets and token files, and of studies, as in `targets`."""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.preparation.corpus_report import REPORT
from consyn_jax.data.store.token_files import UnusableError, read_head
from consyn_jax.errors import UserError
from consyn_jax.resolve import resolve
from consyn_jax.training.preference.reference import FILE, _read, _write
from consyn_jax.training.run.directory import STUDY_RECORD
from consyn_jax.tuning.optuna_study import OptunaStudy
from consyn_jax.tuning.search_space import Dimension
from consyn_jax.tuning.study_directory import JOURNAL, STUDY
from consyn_jax.tuning.study_page import study_page
from consyn_jax.tuning.study_results import DONE, OUTCOME, STEP, STEPS, results_of, table
from consyn_jax.tuning.tune_options import StudyOptions

SPACE = [Dimension("lr", 1e-4, 1e-2, True), Dimension("optimizer", choices=("adamw", "muon"))]
RECORD = '{"study": "0123456789abcdef", "storage": ""}'
REFERENCE = {"train": np.zeros((3, 2), np.float32)}


def preference_pairs(data: bytes, here: Path) -> None:
    """Pairs of a chosen and a rejected answer."""
    _corpus(here / "pairs.jsonl", data, row_format="preference", objective="dpo")


def arrow(data: bytes, here: Path) -> None:
    """An Arrow file to train on."""
    _corpus(here / "rows.arrow", data)


def saved_dataset(data: bytes, here: Path) -> None:
    """state.json of a dataset that `save_to_disk` wrote."""
    place = here / "saved"
    place.mkdir(exist_ok=True)
    (place / "data.arrow").write_bytes(_stream())
    (place / "dataset_info.json").write_text("{}")
    _corpus(place / "state.json", data, place)


def token_file(data: bytes, here: Path) -> None:
    """A token file of nanoGPT or llm.c."""
    file = here / "train.bin"
    file.write_bytes(data)
    try:
        read_head(file)
    except UnusableError as fault:
        raise UserError(f"{file} {fault}") from fault


def store_report(data: bytes, here: Path) -> None:
    """report.json of a token store that is used again."""
    place = here / "store"
    if not place.exists():
        prepare(_options(_two_rows(here)), output=place)
    (place / REPORT).write_bytes(data)
    prepare(_options(_two_rows(here)), output=place)


def reference(data: bytes, here: Path) -> None:
    """The log-probabilities that a run with pairs has left."""
    (here / FILE).write_bytes(data)
    _read(here / FILE, "key", {"train": 3})


def study_journal(data: bytes, here: Path) -> None:
    """The journal of a study."""
    shutil.rmtree(here / STUDY, ignore_errors=True)
    (here / STUDY).mkdir()
    (here / STUDY_RECORD).write_text(RECORD)
    (here / STUDY / JOURNAL).write_bytes(data)
    study = _study(here)
    results = results_of(study.trials, SPACE, "eval/loss", False)
    study_page(results, "Study", study.importance(), "consyn-train")
    table(results)
    if (claim := study.claim(3)) is not None:
        claim.release()


def _study(here: Path) -> OptunaStudy:
    rest: dict[str, Any] = {"maximize": False, "num_evaluations": 4, "seed": 1}
    return OptunaStudy(here, StudyOptions(), SPACE, {"--epochs": 3.0}, **rest)


def _corpus(file: Path, data: bytes, source: Path | None = None, **options: Any) -> None:
    file.write_bytes(data)
    store = file.with_name("a-store")
    try:
        prepare(_options(source or file, **options), output=store)
    finally:
        shutil.rmtree(store, ignore_errors=True)


def _options(source: Path, **more: Any) -> Any:
    values = {"data": [str(source)], "tokenizer": "bytes", "num_workers": 0}
    return resolve({"model": "haiku", "validation_fraction": 0.0, **values, **more})[0].data


def _two_rows(here: Path) -> Path:
    rows = here / "rows.jsonl"
    if not rows.exists():
        rows.write_text('{"text": "one"}\n{"text": "two and a bit"}\n')
    return rows


ROW_TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    f.__name__: f
    for f in (
        preference_pairs,
        arrow,
        saved_dataset,
        token_file,
        store_report,
        reference,
        study_journal,
    )
}


def _stream() -> bytes:
    rows, file = pa.table({"text": ["one", "two and a bit"], "n": [1, 2]}), io.BytesIO()
    with pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)
    return file.getvalue()


def _arrow_file() -> bytes:
    rows, file = pa.table({"text": ["one", "two and a bit"]}), io.BytesIO()
    with pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)
    return file.getvalue()


def _journal(here: Path) -> bytes:
    """Of three trials: one is done, one pruned, and a process was killed at the last."""
    (here / STUDY).mkdir(exist_ok=True)
    (here / STUDY_RECORD).write_text(RECORD)
    study = _study(here)
    for number in range(3):
        claim = study.claim(3)
        assert claim is not None
        claim.trial.report(2.5 - number, 0)
        if number < 2:
            for name, value in ((STEP, 4), (STEPS, 8), (OUTCOME, DONE)):
                claim.trial.set_user_attr(name, value)
            study.tell(claim, None if number else 2.5)
        claim.release()
    return (here / STUDY / JOURNAL).read_bytes()


def row_seeds(here: Path) -> dict[str, list[bytes]]:
    """Valid inputs for each target."""
    prepare(_options(_two_rows(here)), output=here / "reported")
    _write(here / FILE, "key", REFERENCE)
    messages = [{"role": "user", "content": "Why?"}]
    answers = [{"role": "assistant", "content": text} for text in ("So.", "No.")]
    pairs = [
        {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
        {"prompt": messages, "chosen": answers[:1], "rejected": answers[1:]},
        {"chosen": [*messages, answers[0]], "rejected": [*messages, answers[1]]},
    ]
    llm_c = struct.pack("<256i", 20240520, 1, 4, *[0] * 253) + bytes(8)
    state = {"_data_files": [{"filename": "data.arrow"}], "_format_type": None, "_split": "train"}
    return {
        "preference_pairs": [json.dumps(pair).encode() + b"\n" for pair in pairs],
        "arrow": [_stream(), _arrow_file()],
        "saved_dataset": [json.dumps(state).encode()],
        "token_file": [llm_c, bytes(range(16))],
        "store_report": [(here / "reported" / REPORT).read_bytes()],
        "reference": [(here / FILE).read_bytes()],
        "study_journal": [_journal(here)],
    }
