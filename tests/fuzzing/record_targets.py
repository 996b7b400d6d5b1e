"""Readers of what runs, adapters and preparations leave, and of tables, as in `targets`."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.preparation.journal import JOURNAL, Journal
from consyn_jax.data.preparation.preparation_spec import build_spec, contents_of, find, key_of
from consyn_jax.data.store.manifest import PREPARING
from consyn_jax.inference.text_generation.generation_options import SamplingOptions
from consyn_jax.inference.text_generation.sampling_choice import choose_sampling
from consyn_jax.model.pretrained.config_json import GENERATION, read_config, to_hf_config
from consyn_jax.model.pretrained.peft_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PREFIX,
    A,
    B,
    check_adapter,
    read_adapter,
)
from consyn_jax.model.pretrained.weights import base_of
from consyn_jax.model_config import ModelConfig
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.reporting.recorded_run import read_runs
from consyn_jax.reporting.runs_page import runs_page
from consyn_jax.reporting.runs_table import as_lines
from consyn_jax.resolve import resolve
from consyn_jax.training.checkpointing.checkpoint_files import PROVENANCE
from consyn_jax.training.provenance.run_facts import FORMAT, made_with, read_facts
from consyn_jax.training.run.lock import LOCK, _parsed, is_held, read_holder

MODEL = ModelConfig(
    vocab_size=32,
    hidden_dim=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=16,
    context=16,
)
MODULE = "model.layers.0.self_attn.q_proj"
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "bias": "none",
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "base",
}
RUN = b"model: haiku\nlr: 0.003\nderived: {total_steps: 10, data: x, vocab_size: 32}\n"
LINES = [
    {"step": 0, "tokens": 0, "time_s": 0.0, "event": "start"},
    {"step": 1, "tokens": 8, "time_s": 0.1, "train/loss": 2.5, "throughput/tokens_per_s": 80.0},
    {"step": 2, "tokens": 16, "time_s": 0.2, "train/loss": 2.0, "eval/loss": 2.25},
    {"step": 2, "tokens": 16, "time_s": 0.2, "event": "finish"},
]


def page_of_runs(data: bytes, here: Path) -> None:
    """metrics.jsonl of a run that is shown on a page and in a table."""
    (here / "config.yaml").write_bytes(RUN)
    (here / "metrics.jsonl").write_bytes(data)
    _show(here)


def page_of_settings(data: bytes, here: Path) -> None:
    """config.yaml of a run that is shown on a page and in a table."""
    (here / "config.yaml").write_bytes(data)
    (here / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    _show(here)


def _show(here: Path) -> None:
    runs = read_runs([here])
    runs_page(runs, "Runs")
    as_lines(runs)


def provenance(data: bytes, here: Path) -> None:
    """provenance.json of a run, a checkpoint or a model."""
    (here / PROVENANCE).write_bytes(data)
    facts = read_facts(here)
    if facts is not None and facts["starts"]:
        made_with(facts)


def lock(data: bytes, here: Path) -> None:
    """The lock file of a run."""
    (here / LOCK).write_bytes(data)
    is_held(here)
    _parsed(read_holder(here))


def adapter_config(data: bytes, here: Path) -> None:
    """adapter_config.json of an adapter in PEFT's layout."""
    (here / ADAPTER_CONFIG).write_bytes(data)
    (here / ADAPTER_WEIGHTS).write_bytes(_adapter())
    _take_adapter(here)


def adapter_weights(data: bytes, here: Path) -> None:
    """adapter_model.safetensors."""
    (here / ADAPTER_CONFIG).write_text(json.dumps(ADAPTER))
    (here / ADAPTER_WEIGHTS).write_bytes(data)
    _take_adapter(here)


def _take_adapter(here: Path) -> None:
    adapter = read_adapter(here)
    if not isinstance(adapter.base.name, str):  # the base itself is elsewhere, or on the hub
        base_of(here, adapter)
    check_adapter(here, adapter, MODEL)


def generation_config(data: bytes, here: Path) -> None:
    """generation_config.json."""
    (here / "config.json").write_text(json.dumps(to_hf_config(MODEL)))
    (here / GENERATION).write_bytes(data)
    config = read_config(here)
    _ = config.eos_token_ids
    choose_sampling(SamplingOptions(), json.loads(config.generation_config or "{}"))


def journal(data: bytes, here: Path) -> None:
    """The journal of an unfinished store of the same data."""
    store = here / "unfinished"
    shutil.rmtree(store, ignore_errors=True)
    (store / PREPARING).mkdir(parents=True)
    (store / PREPARING / "lock").touch()
    options = _options(_two_rows(here))
    try:
        saved = json.loads(data)
        saved["key"] = _begin(options).key
        data = json.dumps(saved).encode()
    except (ValueError, TypeError, RecursionError):
        pass
    (store / PREPARING / JOURNAL).write_bytes(data)
    prepare(options, output=store)


def table(data: bytes, here: Path) -> None:
    """A CSV file to train on."""
    _corpus(here / "rows.csv", data)


def parquet(data: bytes, here: Path) -> None:
    """A Parquet file to train on."""
    _corpus(here / "rows.parquet", data)


def _corpus(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    store = file.with_name("store")
    try:
        prepare(_options(file), output=store)
    finally:
        shutil.rmtree(store, ignore_errors=True)


def _options(file: Path) -> CorpusOptions:
    values = {"data": [str(file)], "tokenizer": "bytes", "num_workers": 0}
    return resolve({"model": "haiku", "validation_fraction": 0.0, **values})[0].data


def _two_rows(here: Path) -> Path:
    rows = here / "two-rows.jsonl"
    if not rows.exists():
        rows.write_text('{"text": "one"}\n{"text": "two and a bit"}\n')
    return rows


def _begin(options: CorpusOptions) -> Journal:
    spec = build_spec(*find(options), options, None, 0.0, None)
    return Journal.begin(spec, key_of(spec, contents_of(spec)), single=False)


RECORD_TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    f.__name__: f
    for f in (
        page_of_runs,
        page_of_settings,
        provenance,
        lock,
        adapter_config,
        adapter_weights,
        generation_config,
        journal,
        table,
        parquet,
    )
}


def _adapter() -> bytes:
    values = {A: np.ones((2, 8), np.float32), B: np.ones((8, 2), np.float32)}
    return save({f"{PREFIX}{MODULE}{end}": value for end, value in values.items()})


def _provenance() -> bytes:
    start = {"step": 0, "code": None, "versions": {"jax": "0.10"}, "mesh": {"data": 1}}
    facts = {
        "format": FORMAT,
        "run": "0" * 32,
        "code": {"digest": "0", "files": {"a.py": "0"}, "commit": None},
        "data": {"digest": None, "order": "shuffled", "sequences_per_step": 8},
        "tokenizer": {"digest": None, "files": {}},
        "initial_weights": {"from": "seed 0", "digest": None},
        "configuration": {"digest": "0", "total_steps": 9, "values": {"lr": 0.1}},
        "starts": [start],
    }
    return json.dumps(facts).encode()


def record_seeds(here: Path) -> dict[str, list[bytes]]:
    """Valid inputs for each target."""
    _begin(_options(_two_rows(here))).write(here / JOURNAL)
    rows = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two and a bit"], "n": [1, 2]}), rows)
    generation = {
        "eos_token_id": [2, 3],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "max_new_tokens": 64,
        "repetition_penalty": 1.1,
    }
    return {
        "page_of_runs": ["".join(json.dumps(line) + "\n" for line in LINES).encode()],
        "page_of_settings": [RUN],
        "provenance": [_provenance()],
        "lock": [b'{"pid": 1, "host": "h", "since": "now", "born": "0", "run": "0"}'],
        "adapter_config": [
            json.dumps(ADAPTER | {"alpha_pattern": {"q_proj": 8}}).encode(),
        ],
        "adapter_weights": [_adapter()],
        "generation_config": [json.dumps(generation).encode()],
        "journal": [(here / JOURNAL).read_bytes()],
        "table": [b'text,n\na row,1\n"two, and",2\n'],
        "parquet": [rows.getvalue()],
    }
