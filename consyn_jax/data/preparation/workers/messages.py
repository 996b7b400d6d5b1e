"""Messages between workers and the main process: JSON and arrays, never pickled classes.

A message is a JSON object and a few buffers, for pipes and for Ray alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from consyn_jax.data.preparation.encoded_documents import EncodedDocuments
from consyn_jax.data.preparation.workers.worker import Result, Worker
from consyn_jax.data.sources.reader import Block
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.chat.plain_template import PLAIN

Head = dict[str, Any]


@dataclass(frozen=True)
class WorkerSettings:
    """Settings that all workers of a preparation share; the attributes are those of `Worker`."""

    options: CorpusOptions
    tokenizer: BPETokenizer
    test_fraction: float = 0.0
    single: bool = False
    chat_template: str = PLAIN
    tool_template: str | None = None

    def worker(self) -> Worker:
        """A worker with these settings, in this process."""
        return Worker(*(getattr(self, f.name) for f in dataclasses.fields(self)))

    def to_json(self) -> Head:
        """The settings as values of JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {
            "options": dataclasses.asdict(self.options),
            "tokenizer": self.tokenizer.settings(),
        }

    @classmethod
    def from_json(cls, values: Head) -> WorkerSettings:
        """The inverse of `to_json`."""
        options: Head = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values["options"].items()
        }
        given = {
            "options": CorpusOptions(**options),
            "tokenizer": BPETokenizer(**values["tokenizer"]),
        }
        return cls(**{**values, **given})


def block_head(block: Block) -> Head:
    """A block without its data, as values of JSON."""
    return {**dataclasses.asdict(block), "data": None}


def block_from(head: Head, data: bytes) -> Block:
    """Rebuild a block from its data and its head, which `block_head` made."""
    end = tuple(head["end"]) if head["end"] else None
    lists = {name: tuple(head[name]) for name in ("numbers", "unread")}
    return Block(**{**head, **lists, "data": data, "end": end})


def result_head(result: Result) -> tuple[Head, list[np.ndarray]]:
    """A result as values of JSON and contiguous arrays."""
    head = dict(vars(result))
    del head["kept"]
    return head, [np.ascontiguousarray(array) for array in result.kept.arrays()]


def result_from(head: Head, arrays: Sequence[np.ndarray]) -> Result:
    """The inverse of `result_head`."""
    dropped = [(rule, place, text) for rule, place, text in head["dropped"]]
    return Result(EncodedDocuments(*arrays), **{**head, "dropped": dropped})
