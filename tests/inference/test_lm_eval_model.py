"""lm_eval's numbers through our adapter are those through its own `hf` model."""

import json
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm_eval")
pytest.importorskip("torch")

from lm_eval_tasks import TASKS, write_tasks  # noqa: E402
from stories_model import stories_model  # noqa: E402

from consyn_jax.errors import UserError  # noqa: E402
from consyn_jax.inference.lm_eval_model import ConsynLM  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of lm_eval and what it imports
]


def results(model: Any, tasks: Path) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=model,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )


def test_a_local_task_gives_the_same_numbers(shared_data: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    directory = stories_model(shared_data, tmp_path / "model")
    tasks = write_tasks(shared_data, tmp_path / "tasks")
    ours = results(ConsynLM(pretrained=str(directory), batch_size=8, dtype="float32"), tasks)
    theirs = results(
        HFLM(pretrained=str(directory), batch_size=4, dtype="float32", device="cpu"), tasks
    )
    for task in TASKS:
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5), metric
        pairs = zip(ours["samples"][task], theirs["samples"][task], strict=True)
        for one, other in pairs:
            compare(one["resps"], other["resps"])
    print(json.dumps({task: ours["results"][task] for task in TASKS}, indent=1, default=str))


def compare(one: Any, other: Any) -> None:
    """The same texts, and log-likelihoods within 1e-4 and, for long texts, a millionth of them.

    hf adds the log-likelihoods of a window in float32.
    """
    if isinstance(other, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            compare(a, b)
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-4)
    else:
        assert one == other


def test_mistakes(shared_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Write --model_args pretrained=MODEL"):
        ConsynLM()
    with pytest.raises(UserError, match="has parallelize, which --model consyn does not know"):
        ConsynLM(pretrained="x", parallelize=True)
