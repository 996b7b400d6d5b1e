"""Perplexity and log-likelihoods are those of transformers, on any mesh and in any batch."""

import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from stories_model import stories_model
from story_requests import story_rows, write_rows
from transformers import LlamaForCausalLM

from consyn_jax.inference.model_source import ModelSource, find_source
from consyn_jax.inference.scoring.documents import find_documents
from consyn_jax.inference.scoring.evaluation_options import EvaluateTextOptions
from consyn_jax.inference.scoring.ready_scorer import load_scorer
from consyn_jax.inference.scoring.text_scores import score_texts
from consyn_jax.scoring.request_rows import Task, read_tasks
from consyn_jax.scoring.request_scores import Answers, score_task
from consyn_jax.scoring.request_tokens import encode_requests

MESH = "data=2,fsdp=2,tensor=2"
SLOW = [pytest.mark.slow, pytest.mark.users_compiler]
WHOLE = [*SLOW, pytest.mark.exhaustive, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def text(shared_data: Path) -> str:
    return (shared_data / "tinystories" / "tiny_stories.txt").read_text()


@pytest.fixture(scope="module")
def directory(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories_model(shared_data, tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module")
def source(directory: Path) -> ModelSource:
    return find_source(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory).eval()


@pytest.fixture(scope="module")
def guide() -> Callable[..., tuple[float, int]]:
    """Nats and tokens, as in the guide "Perplexity of fixed-length models" of transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
        from perplexity_transformers import theirs

    return theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("characters", "size", "stride", "batch_size", "mesh"),
    [
        (6000, 512, 256, 8, "auto"),
        (6000, 512, 200, 2, MESH),
        (3000, 100, 100, 16, "context=2,tensor=4"),
        pytest.param(20_000, 512, 256, 16, "auto", marks=SLOW),
        pytest.param(None, 512, 256, 16, "auto", marks=WHOLE),
    ],
)
def test_perplexity_in_the_same_windows(
    source: ModelSource,
    theirs: LlamaForCausalLM,
    guide: Callable[..., tuple[float, int]],
    text: str,
    tmp_path: Path,
    characters: int | None,
    size: int,
    stride: int,
    batch_size: int,
    mesh: str,
) -> None:
    (tmp_path / "text.txt").write_text(text[:characters])
    tokenizer = source.tokenizer
    assert tokenizer is not None
    options = EvaluateTextOptions(data=(str(tmp_path / "text.txt"),))
    scorer = load_scorer(source, "float32", mesh, batch_size)
    found = score_texts(scorer, find_documents(options, tokenizer), size, stride)
    ids = tokenizer.encode(text[:characters], add_bos=True)
    nats, tokens = guide(theirs, ids, size, stride)
    assert found.tokens.sum() == tokens
    assert found.unscored == len(ids) - 1 - tokens
    assert found.metrics["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    if not found.unscored:
        size_in_bytes = len(text[:characters].encode())
        expected = nats / math.log(2) / size_in_bytes
        assert found.metrics["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def their_answers(
    model: LlamaForCausalLM, source: ModelSource, context: str, continuation: str
) -> tuple[float, bool]:
    """Log-likelihood and whether it is greedy: one unpadded pass over the ids of lm_eval's rule."""
    assert source.tokenizer is not None
    kept = context.rstrip()
    whole = source.tokenizer.encode(context + continuation, add_bos=True)
    before = source.tokenizer.encode(kept, add_bos=True) if kept else whole[:1]
    inputs, answer = whole[:-1][-source.config.context :], whole[len(before) :]
    with torch.no_grad():
        logits = model(torch.tensor([inputs])).logits[0, -len(answer) :]
    chosen = torch.log_softmax(logits.double(), -1)[range(len(answer)), answer]
    return float(chosen.sum()), logits.argmax(-1).tolist() == answer


def rows_task(path: Path, text: str, count: int) -> Task:
    (task,) = read_tasks((str(write_rows(path, story_rows(text, count))),))
    return task


def check(answers: tuple[Answers, ...], expected: list[list[tuple[float, bool]]]) -> None:
    for found, wanted in zip(answers, expected, strict=True):
        np.testing.assert_allclose(found.log_likelihood, [value for value, _ in wanted], atol=1e-4)
        assert found.is_greedy.tolist() == [greedy for _, greedy in wanted]


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, pytest.param(500, marks=WHOLE)])
def test_log_likelihoods_of_requests(
    source: ModelSource, theirs: LlamaForCausalLM, text: str, tmp_path: Path, count: int
) -> None:
    task = rows_task(tmp_path / "rows.jsonl", text, count)
    expected = [
        [their_answers(theirs, source, *pair) for pair in request.pairs]
        for request in task.requests
    ]
    assert source.tokenizer is not None
    encoded = encode_requests(task.requests, source.tokenizer, source.config.context)
    for mesh, batch_size in (("auto", 8), (MESH, 4), ("fsdp=4,tensor=2", 32)):
        scorer = load_scorer(source, "float32", mesh, batch_size)
        found = score_task(scorer, task, encoded)
        check(found.answers, expected)
    cut = sum(
        len(source.tokenizer.encode("".join(pair), add_bos=True)) > source.config.context + 1
        for request in task.requests
        for pair in request.pairs
    )
    assert cut > 0
    assert f"{cut} of" in found.notes[0]
    assert jax.device_count() == 8
