"""Each piece of advice has a run that calls for it, and one near it that does not."""

from dataclasses import replace
from typing import Any

import pytest

from consyn_jax.training.logging.advice import Adviser, ProcessUsage, RunSettings, Usage

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
ALONE = {"gradient_accumulation_steps": 1}
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
        ({"memory_share": 0.4, "seconds": 59.0}, {"gradient_checkpointing": "full"}, None),
        ({"memory_share": 0.4, "mfu": 0.19}, ALONE, "small batch"),
        ({"memory_share": 0.4, "mfu": 0.21}, ALONE, None),
        ({"memory_share": 0.4, "mfu": None}, ALONE, None),
        ({"memory_share": 0.4, "mfu": 0.1, "waiting": 21.0}, ALONE, "waiting for data"),
        ({"writes": [(10**9, 21.0)] * 2}, {}, "slow storage"),
        ({"writes": [(10**9, 19.0)] * 2}, {}, None),
        ({"writes": [(10**9, 21.0)]}, {}, None),
        ({"writes": [(10**9, 19.0), (10**9, 21.0)]}, {}, None),
        ({"writes": [(10**8, 9.0)] * 2}, {}, None),
        ({"throttled": "GPU 1: too hot"}, {}, "a GPU throttles"),
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


def test_a_loss_that_jumps_about_its_beginning_has_no_low_rate() -> None:
    adviser = Adviser()
    assert adviser.line(20, 0.0, [3.0] * 20, USAGE, FACTS) == []
    assert adviser.line(220, 0.0, [2.5, 3.5] * 50, USAGE, FACTS) == []


def test_no_lower_rate_is_advised_where_nothing_is_learned() -> None:
    adviser, found = Adviser(), []
    for step in (20, 100, 219, 220, 230):
        found += adviser.line(step, 1.0, [3.0] * 20, USAGE, FACTS)
    assert names(found) == ["rate too low"]


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


@pytest.mark.parametrize(
    ("waiting", "throttled", "about"),
    [
        ([1.0, 21.0, 4.0], "", ["imbalance between processes"]),
        ([1.0, 19.0, 4.0], "", []),
        ([20.0, 21.0, 22.0], "", []),  # all of them wait for data
        ([1.0, 1.0, 1.0], "GPU 0: too hot", ["a GPU throttles"]),
    ],
)
def test_processes(waiting: list[float], throttled: str, about: list[str]) -> None:
    usages = [ProcessUsage(f"node{i}", 100.0, seconds) for i, seconds in enumerate(waiting)]
    usages[2] = replace(usages[2], throttled=throttled)
    adviser = Adviser()
    found = adviser.processes(40, usages)
    assert names(found) == about
    assert adviser.processes(40, usages) == []
    if throttled:
        assert "process 2 (node2), GPU 0: too hot" in found[0].sentence
    elif found:
        assert "Process 1 (node1) waits 21%" in found[0].sentence
    short = [replace(each, seconds=59.0) for each in usages]
    assert throttled or Adviser().processes(40, short) == []


def test_everything_is_said_once_and_at_most_three_at_a_time() -> None:
    adviser = Adviser()
    worst = replace(USAGE, waiting=30.0, evaluating=31.0, saving=12.0, memory_share=0.99)
    first = adviser.line(500, 0.0, FALLING, worst, FACTS)
    assert len(first) == 3
    late = [ProcessUsage("a", 100.0, 0.0), ProcessUsage("b", 100.0, 30.0)]
    assert adviser.processes(500, late) == [], "three at a step, whoever gives them"
    assert names(adviser.line(501, 0.0, FALLING, worst, FACTS)) == ["memory nearly full"]
    assert adviser.line(502, 0.0, FALLING, worst, FACTS) == []
    assert names(adviser.processes(502, late)) == ["imbalance between processes"]


def test_sentences_name_what_to_try() -> None:
    usage = replace(USAGE, evaluating=50.0)
    (advice,) = Adviser().line(500, 0.0, FALLING, usage, FACTS)
    assert "--eval_steps 90 " in advice.sentence  # 10 steps take as long as one evaluation
