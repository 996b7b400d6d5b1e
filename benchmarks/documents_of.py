"""Time of `consyn-train --documents_of` on a mixture of three stores with 400 million tokens.

The stores have the documents, indices and origins of real ones; their tokens are holes in files, as
the command does not read them. Each time is that of a whole process, imports included: by the clock,
and of the processor (user and system), which other work on the machine does not lengthen.

    python benchmarks/documents_of.py --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import parser, report

from consyn_jax.data.mixture import Mixture
from consyn_jax.data.packing import pack
from consyn_jax.data.store import TokenStore
from consyn_jax.data.store.manifest import FORMAT, VERSION, totals
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.provenance.data_record import record_order
from consyn_jax.training.provenance.run_facts import RunFacts

SHARD_TOKENS, MEAN_LENGTH, SEQUENCES = 1 << 24, 500, 512


def made_store(directory: Path, num_tokens: int, seed: int) -> TokenStore:
    """A store of documents with lognormal lengths around `MEAN_LENGTH` tokens."""
    rng, tokenizer = np.random.default_rng(seed), BPETokenizer()
    directory.mkdir()
    tokenizer.save(directory / "tokenizer")
    sources = json.dumps(
        [{"name": f"source-{seed}.jsonl", "kind": "jsonl", "is_validation": False, "sha256": [""]}]
    )
    (directory / "sources.json").write_text(sources)
    shards, row = [], 0
    for number in range(-(-num_tokens // SHARD_TOKENS)):
        size = min(SHARD_TOKENS, num_tokens - number * SHARD_TOKENS)
        lengths = np.maximum(rng.lognormal(np.log(MEAN_LENGTH) - 0.5, 1, size // 100), 2).astype(
            int
        )
        starts = np.cumsum(lengths) - lengths
        starts = starts[starts < size]
        origins = np.zeros((len(starts), 3), "<u8")
        origins[:, 1] = row + 1 + np.arange(len(starts))
        row += len(starts)
        name = f"train-{number:05d}"
        with (directory / f"{name}.tokens").open("wb") as file:
            file.truncate(2 * size)
        entry = {
            "file": f"{name}.tokens",
            "tokens": size,
            "documents": len(starts),
            "bytes": 4 * size,
        }
        entry["sha256"] = "not computed"
        for kind, values in (("index", starts.astype("<u8")), ("origins", origins)):
            (directory / f"{name}.{kind}").write_bytes(values.tobytes())
            entry[kind] = f"{name}.{kind}"
            entry[f"{kind}_sha256"] = hashlib.sha256(values.tobytes()).hexdigest()
        shards.append(entry)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16",
        "sources_sha256": hashlib.sha256(sources.encode()).hexdigest(),
        "splits": {"train": {**totals(shards), "shards": shards}},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return TokenStore(directory)


def made_run(place: Path, stores: list[TokenStore], packing: str, sequences: int) -> None:
    """The record of a run on the stores."""
    packed = {
        f"store {n}": pack(store.split("train"), 1024, 1, 0, packing)
        for n, store in enumerate(stores)
    }
    facts = RunFacts(
        {
            "run": "0" * 32,
            "code": {"digest": "", "files": {}},
            "data": {
                "digest": None,
                "sequences_per_step": sequences,
                **record_order(Mixture(packed, [3, 2, 1], seed=1)),
            },
            "tokenizer": {"digest": None, "files": {}},
            "initial_weights": {"from": "seed 1", "digest": None},
            "configuration": {"digest": "", "total_steps": 1_000_000, "values": {}},
            "starts": [],
        }
    )
    place.mkdir()
    (place / "provenance.json").write_text(facts.text())


def measured(run: Path, steps: str) -> tuple[float, float]:
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "consyn_jax.cli.train", "--output", str(run)]
    subprocess.run(
        [*command, "--documents_of", steps, "--json"], check=True, stdout=subprocess.DEVNULL
    )
    clock_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return clock_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(tiny: bool = False) -> dict[str, Any]:
    """Times for both packings, an early and a late step, and ten steps; medians of five calls."""
    tokens, repeats, rows = (3_000_000, 1, []) if tiny else (400_000_000, 5, [])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        stores = [made_store(place / f"store-{n}", tokens // 3, n) for n in range(3)]
        documents = sum(store.split("train").num_documents or 0 for store in stores)
        for packing in ("cut", "whole"):
            made_run(place / packing, stores, packing, SEQUENCES)
            for steps in ("1", "100000", "500:509"):
                times = [measured(place / packing, steps) for _ in range(repeats)]
                clock_s, cpu_s = np.median(np.array(times), axis=0).tolist()
                about = {"packing": packing, "steps": steps}
                rows.append({**about, "clock_s": clock_s, "processor_s": cpu_s})
    return {"tokens": tokens, "documents": documents, "sequences": SEQUENCES, "rows": rows}


def main() -> None:
    given = parser(__doc__).parse_args()
    report(measure(given.tiny), given.out)


if __name__ == "__main__":
    main()
