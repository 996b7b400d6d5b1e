"""Numbers as arguments: the same training as with constants, by one program for all trials."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from consyn_jax.config import RunConfig
from consyn_jax.flags import with_flags
from consyn_jax.model.parameters import initial_parameters
from consyn_jax.resolve import preset_architecture, resolve
from consyn_jax.training.optim.schedules import build_schedule
from consyn_jax.training.program import TRAIN_AXES, Program, build_program
from consyn_jax.tuning.search_space import parse_search
from consyn_jax.tuning.shared_programs import (
    FREE_FLAGS,
    RATES,
    SharedPrograms,
    TrialProgram,
    compiled_values,
    numbers_of,
    program_key,
)
from consyn_jax.tuning.varied_run import VariedRun

STEPS, LENGTH = 6, 16
TINY: dict[str, Any] = {
    "model": "haiku",
    "hidden_dim": 16,
    "num_heads": 2,
    "num_kv_heads": 2,
    "num_layers": 1,
    "max_tokens": LENGTH,
    "batch_size": 8,
    "max_steps": STEPS,
    "mesh": "data=4,fsdp=2",
}
MODEL = replace(
    preset_architecture("haiku", vocab_size=64),
    hidden_dim=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_layers=1,
)


def run_of(**values: Any) -> RunConfig:
    return resolve({**TINY, **values})[0]


def program_of(run: RunConfig) -> Program:
    return build_program(
        MODEL,
        run.budget,
        run.hardware,
        run.optimizer,
        run.regularisation,
        length=LENGTH,
        schedule=build_schedule(run.optimizer, STEPS),
        devices=jax.devices(),
    ).program


def batches(program: Program) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(STEPS):
        like = program.batch_like((1, 8, LENGTH), TRAIN_AXES)
        ids = rng.integers(0, 64, (1, 8, LENGTH + 1), np.int32)
        arrays = {
            "input_ids": ids[..., :-1],
            "labels": ids[..., 1:],
            "segment_ids": np.ones((1, 8, LENGTH), np.int32),
            "loss_mask": np.ones((1, 8, LENGTH), bool),
        }
        found.append({k: jax.device_put(v, like[k].sharding) for k, v in arrays.items()})
    return found


def losses(program: Program, step: Any, seed: int) -> list[float]:
    state = program.initial_state(initial_parameters(MODEL, seed, program.mesh))
    found = []
    for batch in batches(program):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found


def own(run: RunConfig) -> list[float]:
    """The losses of a run with its numbers as constants."""
    program = program_of(run)
    return losses(program, program.lower_train_step(1, 8, LENGTH).compile(), run.budget.seed)


def shared(run: RunConfig, programs: SharedPrograms) -> list[float]:
    """The losses of a trial."""
    program = program_of(run)
    names = program.__match_args__
    trial = TrialProgram(
        **{name: getattr(program, name) for name in names},
        shared=programs,
        run=run,
        total_steps=STEPS,
    )
    return losses(trial, programs.bound_step(trial, run, STEPS), run.budget.seed)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": (
        {
            "lr": 1e-2,
            "scheduler": "wsd",
            "warmup_steps": 2,
            "label_smoothing": 0.05,
            "z_loss": 1e-4,
        },
        {
            "lr": 3e-2,
            "label_smoothing": 0.2,
            "z_loss": 1e-2,
            "weight_decay": 0.3,
            "beta1": 0.8,
            "beta2": 0.9,
            "eps": 1e-5,
            "max_grad_norm": 0.1,
            "scheduler": "linear",
            "warmup_steps": 0,
            "min_lr_ratio": 0.0,
            "seed": 7,
        },
    ),
    "dropout, no clipping, no decay": (
        {"lr": 1e-2, "dropout": 0.1},
        {"lr": 2e-2, "dropout": 0.4, "max_grad_norm": 0, "weight_decay": 0, "seed": 3},
    ),
    "muon": (
        {"optimizer": "muon", "lr": 1e-2},
        {"optimizer": "muon", "lr": 2e-2, "momentum": 0.8, "beta2": 0.9},
    ),
    "lion": ({"optimizer": "lion"}, {"optimizer": "lion", "lr": 3e-3, "beta1": 0.7}),
    "sgd": (
        {"optimizer": "sgd", "lr": 0.1},
        {"optimizer": "sgd", "lr": 0.3, "momentum": 0.5},
    ),
    "adafactor": (
        {"optimizer": "adafactor", "momentum": 0.9},
        {"optimizer": "adafactor", "momentum": 0.5, "lr": 1e-2},
    ),
    "schedule-free": (
        {"optimizer": "schedule_free_adamw", "lr": 1e-2},
        {"optimizer": "schedule_free_adamw", "lr": 2e-2, "beta1": 0.8},
    ),
    "cautious, plateau": (
        {"optimizer": "cautious_adamw", "scheduler": "plateau", "lr": 1e-2},
        {"optimizer": "cautious_adamw", "scheduler": "plateau", "lr": 2e-2, "plateau_patience": 5},
    ),
    "multipliers": (
        {"lr": 1e-2, "lr_multipliers": "embedding=2"},
        {"lr": 2e-2, "lr_multipliers": "embedding=0.5", "beta1": 0.7},
    ),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "adamw" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def test_a_trial_learns_as_a_run_with_constants(name: str) -> None:
    """The first loss is equal to the last bit; later ones differ by roundings of constants."""
    programs = SharedPrograms()
    first, second = (run_of(**values) for values in VARIANTS[name])
    before = shared(first, programs)
    made = len(programs)
    together, alone = shared(second, programs), own(second)
    assert len(programs) == made, "the second trial compiled a program"
    assert together[0] == alone[0]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert max(abs(a - b) for a, b in zip(before, together, strict=True)) > 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "muon"),
        ("hidden_dim", 32),
        ("batch_size", 16),
        ("label_smoothing", 0.1),
        ("z_loss", 1e-4),
        ("dropout", 0.1),
        ("scheduler", "plateau"),
        ("moment_dtype", "bfloat16"),
        ("lr_multipliers", "norms=2"),
    ],
)
def test_what_is_no_number_needs_a_program_of_its_own(name: str, value: Any) -> None:
    before, after = run_of(), run_of(**{name: value})
    assert program_key(before, MODEL, STEPS) != program_key(after, MODEL, STEPS)


def test_numbers_alone_need_no_other_program() -> None:
    other = {"lr": 0.5, "weight_decay": 0.0, "beta1": 0.1, "beta2": 0.2, "seed": 1, "eps": 1e-4}
    other |= {"max_grad_norm": 0.0, "warmup_ratio": 0.5, "scheduler": "linear", "dropout": 0.5}
    assert program_key(run_of(dropout=0.1), MODEL, STEPS) == program_key(
        run_of(**other), MODEL, STEPS
    )


def test_multipliers_of_the_same_groups_share_a_program() -> None:
    def key(multipliers: str) -> Any:
        return program_key(run_of(lr_multipliers=multipliers), MODEL, STEPS)

    assert key("embedding=2,norms=3") == key("norms=1,embedding=0")
    assert key("embedding=2,norms=3") != key("embedding=2")


ZEROS, PLATEAU = ["dropout 0", "z_loss 0"], "scheduler plateau"
FACTORS = ["mlp=1", "mlp=2", "mlp=3", "head=1", "head=2"]


@pytest.mark.parametrize(
    ("search", "each", "others"),
    [
        ("lr=0.1:0.2 dropout=0.1:0.2 warmup_steps=0:3", [], []),
        ("dropout=0:0.3 z_loss=0:0.1 label_smoothing=0:0.1", [], [*ZEROS, "label_smoothing 0"]),
        ("dropout=0,0.1,0.2 scheduler=cosine,linear,plateau", [], ["dropout 0", PLATEAU]),
        (f"lr_multipliers={';'.join(FACTORS)}", [], [f"lr_multipliers {' or '.join(FACTORS[3:])}"]),
        ("dropout=0,0.1 optimizer=adamw,lion,muon", ["dropout", "optimizer"], []),
        ("num_layers=1:4 batch_size=8:16", ["num_layers", "batch_size"], []),
    ],
)
def test_the_values_that_need_a_program_of_their_own(
    search: str, each: list[str], others: list[str]
) -> None:
    varied = VariedRun({"model": "haiku"}, {})
    assert compiled_values(parse_search(search.split()), varied) == (each, others)


def test_every_free_flag_is_a_flag() -> None:
    assert with_flags(RunConfig(), dict.fromkeys(FREE_FLAGS))


def test_runs_of_several_lengths_share_a_program() -> None:
    """The rates of a shorter run are padded; a branch has those of its decay."""
    whole, branch = run_of(scheduler="wsd"), run_of(scheduler="wsd", decay_from=8)
    key = program_key(whole, MODEL, 20)
    assert program_key(branch, MODEL, 20) == key
    rates = numbers_of(branch, 10, 20)[RATES]
    assert rates.shape == numbers_of(whole, 20)[RATES].shape
    assert rates[:10] == pytest.approx(numbers_of(branch, 10)[RATES])
    assert rates[9] < rates[8] == pytest.approx(numbers_of(whole, 20)[RATES][8])


def test_what_is_off_is_no_argument() -> None:
    off = {"dropout", "momentum", "label_smoothing", "z_loss"}
    assert off.isdisjoint(numbers_of(run_of(), STEPS))
    on = numbers_of(run_of(dropout=0.1, optimizer="muon"), STEPS)
    assert on["dropout"] == np.float32(0.1)
    assert on["momentum"] == np.float32(0.95)
    assert numbers_of(run_of(max_grad_norm=0), STEPS)["max_grad_norm"] == np.inf
