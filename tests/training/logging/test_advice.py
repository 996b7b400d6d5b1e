"""Each piece of advice has a run that calls for it, and one near it that does not."""

from dataclasses import replace
from typing import Any

import pytest

from consyn_jax.training.logging.advice import Adviser, RunSettings, Usage

FACTS = RunSettings(
    total_steps=1000,
    warmup_steps=20,
    learning_rate=1e-3,
    max_grad_norm=1.0,
    batch_size=8,
    gradient_accumulation_steps=4,
    gradient_checkpointing="none",
    eval_steps=10,
    save_steps=10,
)
USAGE = Usage(seconds=100.0, waiting=0.0, evaluating=0.0, saving=0.0, memory_share=None)
FALLING = [3.0 - 0.01 * i for i in range(100)]


def names(found: list[Any]) -> list[str]:
    return [advice.about for advice in found]


@pytest.mark.parametrize(
    ("usage", "facts", "about"),
    [
        ({"waiting": 21.0}, {}, "waiting for data"),
        ({"waiting": 19.0}, {}, None),
        ({"waiting": 21.0, "seconds": 59.0}, {}, None),
        ({"evaluating": 31.0}, {}, "evaluations too frequent"),
        ({"evaluating": 29.0}, {}, None),
        ({"saving": 11.0}, {}, "saves too frequent"),
        ({"saving": 9.0}, {}, None),
        ({"memory_share": 0.96}, {}, "memory nearly full"),
        ({"memory_share": 0.94}, {}, None),
        ({"memory_share": 0.4}, {}, "memory to spare"),
        ({"memory_share": 0.5}, {}, None),
        ({"memory_share": 0.4}, {"gradient_accumulation_steps": 1}, None),
        (
            {"memory_share": 0.4},
            {"gradient_checkpointing": "full"},
            "recomputation without need",
        ),
        ({"memory_share": 0.5}, {"gradient_checkpointing": "full"}, None),
    ],
)
def test_time_and_memory(usage: dict[str, Any], facts: dict[str, Any], about: str | None) -> None:
    found = Adviser().line(500, 0.0, FALLING, replace(USAGE, **usage), replace(FACTS, **facts))
    assert names(found) == ([] if about is None else [about])


@pytest.mark.parametrize(("clipped", "about"), [(0.95, ["most steps clipped"]), (0.85, [])])
def test_steps_that_are_clipped(clipped: float, about: list[str]) -> None:
    adviser, found = Adviser(), []
    for step in (5, 100, 219):
        assert adviser.line(step, clipped, FALLING, USAGE, FACTS) == []
    found += adviser.line(220, clipped, FALLING, USAGE, FACTS)
    assert names(found) == about


def test_a_step_that_is_not_clipped_begins_anew() -> None:
    adviser = Adviser()
    for step, clipped in ((20, 1.0), (210, 0.5), (220, 1.0), (410, 1.0)):
        assert adviser.line(step, clipped, FALLING, USAGE, FACTS) == []


@pytest.mark.parametrize(("now", "about"), [(2.99, ["rate too low"]), (2.9, [])])
def test_a_loss_that_does_not_move(now: float, about: list[str]) -> None:
    adviser = Adviser()
    assert adviser.line(20, 0.0, [3.0] * 20, USAGE, FACTS) == []
    assert adviser.line(100, 0.0, [now] * 100, USAGE, FACTS) == []
    assert names(adviser.line(220, 0.0, [now] * 100, USAGE, FACTS)) == about


@pytest.mark.parametrize(("apart", "about"), [(100, ["rate too high"]), (300, [])])
def test_spikes(apart: int, about: list[str]) -> None:
    adviser, found = Adviser(), []
    for step in (100, 100 + apart, 100 + 2 * apart):
        found += adviser.spike(step, FACTS)
    assert names(found) == about


@pytest.mark.parametrize(
    ("evaluations", "trains", "about"),
    [
        ([2.0, 2.1, 2.2, 2.3], [1.9, 1.7, 1.5, 1.3], ["overfitting"]),
        ([2.0, 2.1, 2.2, 2.3], [1.9, 2.0, 2.1, 2.2], []),  # both rise: no memorising
        ([2.0, 2.01, 2.02, 2.03], [1.9, 1.7, 1.5, 1.3], []),  # hardly worse
        ([2.0, 2.1, 2.2, 1.9], [1.9, 1.7, 1.5, 1.3], []),  # better again
        ([2.0] + [1.999] * 6, [1.9] * 7, ["plateau"]),
        ([2.0 - 0.01 * i for i in range(7)], [1.9] * 7, []),
    ],
)
def test_evaluations(evaluations: list[float], trains: list[float], about: list[str]) -> None:
    adviser, found = Adviser(), []
    for number, (loss, train) in enumerate(zip(evaluations, trains, strict=True)):
        found += adviser.evaluation(100 + 10 * number, loss, [train] * 50, FACTS)
    assert names(found) == about
    adviser = Adviser()
    if about == ["plateau"]:  # near the end there is nothing left to change
        late = [adviser.evaluation(900 + i, e, [1.9], FACTS) for i, e in enumerate(evaluations)]
        assert not any(late)


def test_everything_is_said_once_and_at_most_three_at_a_time() -> None:
    adviser = Adviser()
    worst = replace(USAGE, waiting=30.0, evaluating=31.0, saving=12.0, memory_share=0.99)
    first = adviser.line(500, 0.0, FALLING, worst, FACTS)
    assert len(first) == 3
    assert names(adviser.line(501, 0.0, FALLING, worst, FACTS)) == ["memory nearly full"]
    assert adviser.line(502, 0.0, FALLING, worst, FACTS) == []


def test_sentences_name_what_to_try() -> None:
    usage = replace(USAGE, evaluating=50.0)
    (advice,) = Adviser().line(500, 0.0, FALLING, usage, FACTS)
    assert "--eval_steps 90 " in advice.sentence  # 10 steps take as long as one evaluation
