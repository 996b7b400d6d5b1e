"""How fast are random packed windows read, in how much memory, and how soon is the first batch?

Two token stores of 100 M and 400 M synthetic tokens (documents of 20 to 20,000 tokens, 600 on
average) are made in a temporary directory. Then, on this machine:

- tokens per second, in rounds in which all take turns: `windows` reads windows at random indices;
  `loader` is the one of training (order, batches, prefetching thread); torch's DataLoader reads the
  same 100 M tokens through nanoGPT's memory map, with 0 and with 2 workers;
- resident memory: how far the peak of a fresh process rises while it reads 50 M tokens at random
  from each store;
- the first batch: opening a store, checking the batch's shards and reading it, at random positions
  of the first 10,000 epochs, each in a fresh process, with the store's files in the page cache and
  evicted from it.

    python benchmarks/data_loader.py --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import facts, write

from consyn_jax.data.loader import BatchLoader, Shuffled, prefetch
from consyn_jax.data.packing import PackedDataset, WholeDocuments
from consyn_jax.data.store import TokenStore, TokenStoreWriter
from consyn_jax.tokenization import BPETokenizer

SHAPES = [(8, 2048), (12, 1024), (12, 64)]
SIZES = {"100M": 100_000_000, "400M": 400_000_000}
MEMORY_TOKENS = 50_000_000
FIRST_BATCHES = 7


def build(directory: Path, tokens: int) -> TokenStore:
    """Make a store of that many synthetic tokens, in documents of log-normal lengths."""
    tokenizer = BPETokenizer()
    rng = np.random.default_rng(tokens)
    with TokenStoreWriter(directory, tokenizer) as writer:
        while tokens:
            part = min(tokens, 1 << 24)
            lengths = np.clip(rng.lognormal(5.9, 1.0, part // 20), 20, 20_000).astype(np.int64)
            lengths = lengths[: np.searchsorted(np.cumsum(lengths), part - 1)]
            lengths = np.append(lengths, part - lengths.sum())
            ids = rng.integers(0, tokenizer.vocab_size, part, dtype=np.uint32)
            ids[ids == tokenizer.eos_token_id] = 0
            ids[np.cumsum(lengths) - 1] = tokenizer.eos_token_id
            writer.append("train", ids.astype(np.uint16), lengths, 4 * lengths)
            tokens -= part
        return writer.finish()


def opened(directory: Path, length: int, tokenizer: BPETokenizer) -> PackedDataset:
    """The train split of a store, in windows."""
    return PackedDataset(
        TokenStore(directory).split("train"), length, tokenizer.first_id, tokenizer.fill_id
    )


# -------------------------------------------------------------------------------------------- speed


def torch_loader(file: Path, batch_size: int, length: int, workers: int) -> Iterator[Any]:
    """torch's DataLoader over windows of a memory map, as nanoGPT's `get_batch` cuts them."""
    import torch

    class Windows(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.data = np.memmap(file, np.uint16, "r")

        def __len__(self) -> int:
            return len(self.data) - length

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.from_numpy(self.data[i : i + length].astype(np.int64))
            return x, torch.from_numpy(self.data[i + 1 : i + 1 + length].astype(np.int64))

    windows = Windows()
    sampler = torch.utils.data.RandomSampler(windows, replacement=True, num_samples=1 << 40)
    return iter(
        torch.utils.data.DataLoader(windows, batch_size, sampler=sampler, num_workers=workers)
    )


def contestants(
    directory: Path, file: Path, batch_size: int, length: int
) -> dict[str, Callable[[], Any]]:
    """Functions that read one batch each."""
    torch_0, torch_2 = (torch_loader(file, batch_size, length, workers) for workers in (0, 2))
    rng = np.random.default_rng(0)
    tokenizer = BPETokenizer()
    packed = opened(directory, length, tokenizer)
    whole = WholeDocuments(packed.split, length, tokenizer.first_id, tokenizer.fill_id)
    loader = prefetch(BatchLoader(Shuffled(packed, 0), batch_size))
    return {
        "windows": lambda: packed.rows(rng.integers(0, len(packed), batch_size)),
        "whole documents": lambda: whole.rows(rng.integers(0, len(whole), batch_size)),
        "loader": lambda: next(loader),
        "torch, 0 workers": lambda: next(torch_0),
        "torch, 2 workers": lambda: next(torch_2),
    }


def race(
    directory: Path, file: Path, batch_size: int, length: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """Tokens per second of each contestant, round by round."""
    batch_of = contestants(directory, file, batch_size, length)
    rates: dict[str, list[float]] = {name: [] for name in batch_of}
    for number in range(rounds + 1):
        for name, batch in batch_of.items():
            count, began = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - began) < seconds:
                batch()
                count += 1
            if number:  # the first round reads the file into the page cache
                rates[name].append(count * batch_size * length / elapsed)
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{batch_size:3} x {length:5}  {name:18} {rate / 1e6:7.1f} M tokens/s", flush=True)
    return {"batch_size": batch_size, "length": length, "tokens_per_s": medians, "rounds": rates}


# ----------------------------------------------------------------------- memory and the first batch


def peak_bytes() -> int:
    """The largest resident memory of this process since the record was cleared."""
    return next(
        1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


def memory_growth(directory: Path) -> float:
    """MB by which the peak rises while a store is opened and read at random; in a fresh process."""
    tokenizer = BPETokenizer()
    Path("/proc/self/clear_refs").write_text("5")  # clears the record; see proc(5)
    before, done = peak_bytes(), 0
    packed = opened(directory, 2048, tokenizer)
    rng = np.random.default_rng(0)
    while done < MEMORY_TOKENS:
        packed.rows(rng.integers(0, len(packed), 8))
        done += 8 * 2048
    return (peak_bytes() - before) / 1e6


def first_batch(directory: Path, seed: int) -> float:
    """Seconds until a batch at a random position is read; in a fresh process."""
    step = int(np.random.default_rng(seed).integers(0, 10**7))
    tokenizer = BPETokenizer()
    began = time.perf_counter()
    BatchLoader(Shuffled(opened(directory, 2048, tokenizer), 42), 8).batch(step)
    return time.perf_counter() - began


def elsewhere(what: str, directory: Path, seed: int = 0) -> float:
    """The result of `memory_growth` or `first_batch` in a fresh process."""
    flags = ["--measure", what, "--store", str(directory), "--seed", str(seed)]
    command = [sys.executable, __file__, *flags]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def forget(directory: Path) -> None:
    """Evict a store's files from the page cache."""
    for path in directory.glob("*.*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_batches(directory: Path) -> dict[str, Any]:
    """Seconds to the first batch at each position, with warm and with cold files."""
    found: dict[str, list[float]] = {"warm": [], "cold": []}
    for seed in range(FIRST_BATCHES):
        for name, seconds in found.items():
            if name == "cold":
                forget(directory)
            seconds.append(elsewhere("first_batch", directory, seed))
    return {
        name: {"median_s": float(np.median(seconds)), "max_s": max(seconds)}
        for name, seconds in found.items()
    }


def parse_arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__, tiny=False)
    parser.add_argument(
        "--directory",
        type=Path,
        help="where to make the stores, 2 GB; by default the system's temporary directory",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of each contestant in each round"
    )
    # for the fresh processes
    parser.add_argument(
        "--measure", choices=("memory_growth", "first_batch"), help=argparse.SUPPRESS
    )
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(directory: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Make the stores in `directory` and measure everything."""
    stores = {size: directory / size for size in SIZES}
    for size, store in stores.items():
        began = time.perf_counter()
        shards = len(build(store, SIZES[size]).split("train").shards)
        passed = time.perf_counter() - began
        print(f"store of {size} tokens in {shards} shards made in {passed:.0f} s", flush=True)
    summary: dict[str, Any] = {
        "memory_growth_MB": {
            size: elsewhere("memory_growth", store) for size, store in stores.items()
        },
        "first_batch": {size: first_batches(store) for size, store in stores.items()},
    }
    print(json.dumps(summary, indent=1), flush=True)
    file = directory / "nanogpt.bin"
    with file.open("wb") as out:
        for path in sorted(stores["100M"].glob("train-*.tokens")):
            out.write(path.read_bytes())
    races = [race(stores["100M"], file, *shape, rounds, seconds) for shape in SHAPES]
    return summary | {"speed": races}


def main() -> None:
    """Run, print the figures, write JSON."""
    arguments = parse_arguments()
    if arguments.measure == "memory_growth":
        print(memory_growth(arguments.store))
    elif arguments.measure == "first_batch":
        print(first_batch(arguments.store, arguments.seed))
    else:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            found = measure(Path(directory), arguments.rounds, arguments.seconds)
        if arguments.out:
            write(arguments.out, {**facts(), "numpy": np.__version__, **found})


if __name__ == "__main__":
    main()
