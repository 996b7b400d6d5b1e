"""Flags reach what they are for: a run with other values gives what NumPy computes with those.

Every flag of the mathematics has a value here that is not its default, so that a wire cut anywhere
between `resolve` and the compiled step shows. The gradients come from JAX, through the model's
public call; the update rules, schedules and the objective are written down here once more.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from consyn_jax.cli.choices.training_data import training_data
from consyn_jax.data.pairs import PairDataset
from consyn_jax.data.store.manifest import BETWEEN
from consyn_jax.data.store.shards import MemoryShard
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import ModelConfig
from consyn_jax.resolve import resolve
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training import ConsynTrainer

V, B, T, A = 32, 8, 8, 2
MODEL = ModelConfig(
    vocab_size=V,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    context=T,
    tie_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model() -> ConsynLMHeadModel:
    """A model with a random output embedding: no gradient is zero at the start."""
    params = ConsynLMHeadModel.from_config(MODEL).parameters
    shape = params["output"].shape
    return ConsynLMHeadModel.from_parameters(
        MODEL, params | {"output": 0.3 * jax.random.normal(jax.random.key(0), shape)}
    )


def batches(count: int, *, same: bool = False) -> list[dict[str, np.ndarray]]:
    """Micro-batches with targets left out unevenly."""
    random = np.random.default_rng(7)
    found = []
    for _ in range(count):
        ids, labels = random.integers(3, V, (2, B, T))
        labels[0, : random.integers(1, T - 1)] = -100
        found.append({"input_ids": ids, "labels": labels})
    return [found[0]] * count if same else found


def flatten(tree: Any, path: str = "") -> Weights:
    if not isinstance(tree, dict):
        return {path[1:]: np.asarray(tree, np.float64)}
    return {
        k: v for name, value in tree.items() for k, v in flatten(value, f"{path}.{name}").items()
    }


@jax.jit
@jax.grad
def gradient(
    params: Any, micro: list[dict[str, jax.Array]], smoothing: float, z_loss: float
) -> jax.Array:
    """The gradient of the mean objective over the real targets of all micro-batches."""
    total, count = jnp.float32(0), jnp.int32(0)
    call = ConsynLMHeadModel.from_parameters(MODEL, params)
    for batch in micro:
        logits, labels = call(jnp.int32(batch["input_ids"])), batch["labels"]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        label = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
        loss = log_z - (1 - smoothing) * label - smoothing * logits.mean(-1) + z_loss * log_z**2
        total += jnp.sum(jnp.where(labels != -100, loss, 0))
        count += jnp.sum(labels != -100)
    return total / count


def group(name: str) -> str:
    if "norm" in name:
        return "norms"
    if name in ("embedding", "output"):
        return {"embedding": "embedding", "output": "head"}[name]
    return "mlp" if name.split(".")[-1] in ("gate", "up", "down") else "attention"


def predicted(
    model: ConsynLMHeadModel,
    data: list[dict[str, np.ndarray]],
    rates: list[float],
    direction: Callable[[int, str, np.ndarray, dict[str, Any]], np.ndarray],
    *,
    weight_decay: float,
    multipliers: dict[str, float] | None = None,
    max_grad_norm: float = 0.0,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Weights, list[float]]:
    """Weights after the steps, and the norm of each step's gradient before clipping."""
    params, memory, norms = model.parameters, {}, []
    for step, rate in enumerate(rates):
        micro = data[step * A : (step + 1) * A]
        g = flatten(gradient(params, micro, smoothing, z_loss))
        p = flatten(params)
        norms.append(float(np.sqrt(sum((x**2).sum() for x in g.values()))))
        scale = min(1.0, max_grad_norm / norms[-1]) if max_grad_norm else 1.0
        for name in p:
            d = direction(step, name, g[name] * scale, memory.setdefault(name, {}))
            decay = 0.0 if group(name) == "norms" else weight_decay
            factor = (multipliers or {}).get(group(name), 1.0)
            p[name] = p[name] - rate * factor * (d + decay * p[name])
        params = unflatten(p)
    return flatten(params), norms


def unflatten(weights: Weights) -> Any:
    tree: Any = {}
    for name, value in weights.items():
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = jnp.asarray(value, jnp.float32)
    return tree


def adamw(beta1: float, beta2: float, eps: float) -> Any:
    def direction(step: int, name: str, g: np.ndarray, memory: dict[str, Any]) -> np.ndarray:
        memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * g
        memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * g**2
        m, v = memory["m"] / (1 - beta1 ** (step + 1)), memory["v"] / (1 - beta2 ** (step + 1))
        return m / (np.sqrt(v) + eps)

    return direction


def lion(beta1: float, beta2: float) -> Any:
    def direction(step: int, name: str, g: np.ndarray, memory: dict[str, Any]) -> np.ndarray:
        m = memory.get("m", 0.0)
        memory["m"] = beta2 * m + (1 - beta2) * g
        return np.sign(beta1 * m + (1 - beta1) * g)

    return direction


def momentum(beta: float) -> Any:
    def direction(step: int, name: str, g: np.ndarray, memory: dict[str, Any]) -> np.ndarray:
        memory["m"] = beta * memory.get("m", 0.0) + g
        return memory["m"]

    return direction


def run(
    model: ConsynLMHeadModel,
    data: Any,
    path: Path,
    *,
    evaluation: Any = None,
    **settings: Any,
) -> tuple[Weights, list[dict[str, Any]]]:
    """Train with these flags; the weights that come out, and the log."""
    given = {
        "num_epochs": None,
        "batch_size": B,
        "gradient_accumulation_steps": A,
        "logging_steps": 1,
        "logging_backend": "none",
        "quiet": True,
        **settings,
    }
    # Of its own: a model that was given is the trained one afterwards.
    model = ConsynLMHeadModel.from_parameters(model.config, model.parameters)
    trainer = ConsynTrainer(model, data, evaluation, path, **given)
    trainer.train()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert isinstance(trainer.model, ConsynLMHeadModel)
    return flatten(trainer.model.parameters), lines


def logged(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line and "event" not in line]


def close(found: Weights, wanted: Weights, before: Weights, tolerance: float = 2e-4) -> None:
    """The changes agree, relative to the largest change of each tensor."""
    for name in wanted:
        moved = wanted[name] - before[name]
        assert np.abs(found[name] - wanted[name]).max() <= tolerance * np.abs(moved).max(), name


@pytest.mark.slow
def test_every_flag_of_adamw(model: ConsynLMHeadModel, tmp_path: Path) -> None:
    data, steps = batches(6), 3
    found, lines = run(
        model,
        data,
        tmp_path,
        max_steps=steps,
        learning_rate=0.02,
        optimizer="adamw",
        beta1=0.7,
        beta2=0.8,
        eps=1e-3,
        weight_decay=0.4,
        max_grad_norm=0.3,
        lr_multipliers="embedding=2,head=0.3,attention=1.5,mlp=0.7,norms=3",
        label_smoothing=0.2,
        z_loss=0.03,
        scheduler="polynomial",
        power=3.0,
        warmup_steps=1,
        min_lr_ratio=0.3,
    )
    rates = [0.02 / 2, 0.02, 0.02 * (0.3 + 0.7 * 0.5**3)]
    wanted, norms = predicted(
        model,
        data,
        rates,
        adamw(0.7, 0.8, 1e-3),
        weight_decay=0.4,
        multipliers={"embedding": 2, "head": 0.3, "attention": 1.5, "mlp": 0.7, "norms": 3},
        max_grad_norm=0.3,
        smoothing=0.2,
        z_loss=0.03,
    )
    np.testing.assert_allclose(logged(lines, "train/learning_rate"), rates, rtol=1e-6)
    np.testing.assert_allclose(logged(lines, "train/grad_norm"), norms, rtol=1e-4)
    assert logged(lines, "train/clipped_fraction") == [1.0] * steps
    close(found, wanted, flatten(model.parameters))


@pytest.mark.slow
def test_logits_dtype_rounds_the_logits_of_training(
    model: ConsynLMHeadModel, tmp_path: Path
) -> None:
    """With several micro-batches, targets left out and both extra terms; not those of evaluation.

    A rate of almost 0 leaves the weights as they are, so only rounding makes a difference.
    """
    settings = {"max_steps": 1, "learning_rate": 1e-30, "mixed_precision": "bf16", "eval_steps": 1}
    settings |= {"label_smoothing": 0.2, "z_loss": 0.03, "weight_decay": 0.0}
    names = "train/loss", "train/grad_norm", "eval/loss"
    (loss, norm, judged), (rounded_loss, rounded_norm, rounded_judged) = (
        [
            logged(lines, name)[-1]
            for lines in [
                run(
                    model,
                    batches(A),
                    tmp_path / dtype,
                    evaluation=batches(1),
                    logits_dtype=dtype,
                    **settings,
                )[1]
            ]
            for name in names
        ]
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < abs(rounded_loss / loss - 1) < 1e-3
    assert 0 < abs(rounded_norm / norm - 1) < 1e-2
    assert rounded_judged == judged


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "rule", "rates"),
    [
        (
            {"optimizer": "sgd", "momentum": 0.6, "scheduler": "linear", "warmup_ratio": 0.5},
            momentum(0.6),
            [0.01 * (1 / 3), 0.01 * (2 / 3), 0.01, 0.01 * 0.75],
        ),
        (
            {"optimizer": "lion", "beta1": 0.6, "beta2": 0.7, "scheduler": "wsd"}
            | {"decay_ratio": 0.5, "decay_shape": "linear", "warmup_steps": 0},
            lion(0.6, 0.7),
            [0.01, 0.01, 0.01, 0.01 * 0.75],
        ),
        (
            {"optimizer": "adamw", "beta1": 0.6, "beta2": 0.7, "warmup_steps": 0}
            | {"scheduler": "cosine_with_restarts", "num_cycles": 2},
            adamw(0.6, 0.7, 1e-8),
            [0.01, 0.01 * 0.75, 0.01, 0.01 * 0.75],
        ),
    ],
    ids=["sgd", "lion", "adamw"],
)
def test_the_flags_of_other_rules_and_schedules(
    flags: dict[str, Any], rule: Any, rates: list[float], model: ConsynLMHeadModel, tmp_path: Path
) -> None:
    data = batches(8)
    found, lines = run(
        model,
        data,
        tmp_path,
        max_steps=4,
        learning_rate=0.01,
        weight_decay=0.3,
        max_grad_norm=0,
        min_lr_ratio=0.5,
        **flags,
    )
    wanted, _ = predicted(model, data, rates, rule, weight_decay=0.3)
    np.testing.assert_allclose(logged(lines, "train/learning_rate"), rates, rtol=1e-6)
    assert logged(lines, "train/clipped_fraction") == [0.0] * 4
    close(found, wanted, flatten(model.parameters))


@pytest.mark.slow
def test_a_plateau_lowers_the_rate_of_the_steps_after_it(
    model: ConsynLMHeadModel, tmp_path: Path
) -> None:
    """No evaluation is 90 % better. Two in a row that are not lower the rate (a patience of 1), and
    the one after that does not count (a cooldown of 1), as in torch's ReduceLROnPlateau."""
    data = batches(16)
    found, lines = run(
        model,
        data,
        tmp_path,
        evaluation=batches(1),
        max_steps=8,
        learning_rate=0.01,
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        max_grad_norm=0,
        scheduler="plateau",
        warmup_steps=0,
        eval_steps=1,
        plateau_factor=0.25,
        plateau_patience=1,
        plateau_cooldown=1,
        plateau_threshold=0.9,
        min_lr_ratio=0.01,
    )
    rates = [0.01 * 0.25**n for n in (0, 0, 0, 1, 1, 1, 2, 2)]
    wanted, _ = predicted(model, data, rates, momentum(0.0), weight_decay=0.0)
    np.testing.assert_allclose(logged(lines, "train/learning_rate"), rates, rtol=1e-6)
    close(found, wanted, flatten(model.parameters))


@pytest.mark.slow
def test_the_seed_and_the_step_choose_what_dropout_zeroes(
    model: ConsynLMHeadModel, tmp_path: Path
) -> None:
    """With a rate of zero and one batch over and over, only the mask can change the loss."""

    def losses(name: str, **settings: Any) -> list[float]:
        options = {"max_steps": 4, "learning_rate": 1e-30, "weight_decay": 0.0, **settings}
        return logged(
            run(model, batches(8, same=True), tmp_path / name, **options)[1], "train/loss"
        )

    plain = losses("plain")
    assert len(set(plain)) == 1
    dropped = losses("dropped", dropout=0.4)
    assert len(set(dropped)) == 4
    assert not set(dropped) & set(plain)
    assert losses("again", dropout=0.4) == dropped
    assert not set(losses("seed", dropout=0.4, seed=43)) & set(dropped)


def exported(path: Path) -> Weights:
    return load_file(path / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("load_best", [True, False])
def test_the_best_or_the_last_model_is_exported(
    load_best: bool, model: ConsynLMHeadModel, tmp_path: Path
) -> None:
    """At a rate that spoils the model, the first evaluation is the best."""
    settings = {"max_steps": 4, "eval_steps": 1, "learning_rate": 3.0, "warmup_steps": 0}
    _, lines = run(
        model,
        batches(8),
        tmp_path,
        evaluation=batches(2),
        optimizer="sgd",
        load_best_model_at_end=load_best,
        **settings,
    )
    losses = logged(lines, "eval/loss")
    assert np.argmin(losses) < len(losses) - 1
    best = [line["step"] for line in lines if line.get("event") == "best"]
    assert best[-1] == np.argmin(losses) + 1
    same = all(
        np.array_equal(value, exported(tmp_path / "best")[name])
        for name, value in exported(tmp_path / "final").items()
    )
    assert same == load_best


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"early_stopping_patience": 2}, 6),
        ({"early_stopping_patience": 2, "early_stopping_min_delta": 10.0}, 3),
        ({"early_stopping_patience": 3, "early_stopping_min_delta": 10.0}, 4),
        (
            {
                "early_stopping_patience": 2,
                "early_stopping_min_delta": 10.0,
                "early_stopping_min_steps": 5,
            },
            5,
        ),
    ],
)
def test_when_it_stops_early(
    settings: dict[str, Any], steps: int, model: ConsynLMHeadModel, tmp_path: Path
) -> None:
    """The loss falls at every evaluation, by far less than 10: without a least improvement nothing
    stops; with one only the first evaluation counts as better."""
    same = batches(12, same=True)
    _, lines = run(
        model,
        same,
        tmp_path,
        evaluation=same[:1],
        max_steps=6,
        eval_steps=1,
        learning_rate=1e-3,
        warmup_steps=0,
        **settings,
    )
    losses = logged(lines, "eval/loss")
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == steps


@pytest.mark.slow
def test_the_metric_chooses_the_best_model(model: ConsynLMHeadModel, tmp_path: Path) -> None:
    """Accuracy is better the higher it is, and the log shows both metrics to compare with."""
    _, lines = run(
        model,
        batches(16),
        tmp_path,
        evaluation=batches(3),
        max_steps=8,
        eval_steps=1,
        learning_rate=0.05,
        metric_for_best_model="eval/accuracy",
    )
    values = logged(lines, "eval/accuracy")
    wanted = [i + 1 for i, v in enumerate(values) if all(v > other for other in values[:i])]
    assert [line["step"] for line in lines if line.get("event") == "best"] == wanted


@pytest.mark.slow
def test_budgets_lengths_and_batches_count_as_they_say(
    model: ConsynLMHeadModel, tmp_path: Path
) -> None:
    documents = [[3 + (i * j) % 20 for j in range(10)] for i in range(60)]

    def steps(name: str, **settings: Any) -> int:
        options = {"max_tokens": T, **settings}
        _, lines = run(model, documents, tmp_path / name, **options)
        return max(line["step"] for line in lines)

    sequences = 60 * 11 // T
    assert steps("epochs", num_epochs=1) == -(-sequences // (A * B))
    assert steps("tokens", total_tokens=5 * A * B * T) == 5
    assert steps("batch", total_tokens=64 * T, batch_size=16) == 2
    assert steps("accumulation", total_tokens=64 * T, gradient_accumulation_steps=4) == 2
    assert steps("steps", max_steps=3, total_tokens=64 * T) == 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_state_that_is_saved_has_the_type_of_the_moments(
    dtype: str, model: ConsynLMHeadModel, tmp_path: Path
) -> None:
    run(model, batches(4), tmp_path, max_steps=2, save_steps=2, moment_dtype=dtype)
    sizes = [f.stat().st_size for f in (tmp_path / "checkpoints" / "2").rglob("*") if f.is_file()]
    elements = sum(value.size for value in flatten(model.parameters).values())
    described = (tmp_path / "checkpoints" / "2").rglob("_METADATA")
    text = "".join(file.read_text() for file in described)
    assert sum(sizes) > elements
    assert (tmp_path / "config.yaml").read_text().count(f"moment_dtype: {dtype}") == 1
    assert text.count("mu") >= 1


def test_rows_that_are_too_long_are_cut_left_out_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows in bytes: of `cd` and its end 3 tokens are learned; of 60 `x`, those that fit."""
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "pppp", "completion": "x" * 60}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def learned(**flags: Any) -> int:
        given = {"model": "haiku", "tokenizer": "bytes", "max_tokens": 16}
        given |= {"data": [str(tmp_path / "rows.jsonl")], "validation_fraction": 0.0}
        tokenizer = BPETokenizer.bytes()
        with training_data(resolve({**given, **flags}), tokenizer, None) as found:
            every = found.training.rows(np.arange(len(found.training)))
            return int(every["loss_mask"].sum())

    assert learned() == learned(on_long_rows="truncate") == 3 + (16 - len("pppp"))
    assert learned(on_long_rows="drop") == 3
    assert learned(packing="cut") == 3 + 60 + 1
    with pytest.raises(UserError, match="A row has 65 tokens, more than the 16"):
        learned(on_long_rows="error")


@pytest.mark.slow
def test_a_configuration_of_its_own_reaches_the_exported_model(tmp_path: Path) -> None:
    config = replace(MODEL, rope_theta=500.0, norm_eps=1e-3, sliding_window=4, qk_norm=False)
    model = ConsynLMHeadModel.from_config(config)
    run(model, batches(4), tmp_path, max_steps=2)
    found = json.loads((tmp_path / "final" / "config.json").read_text())
    wanted = {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
        "max_position_embeddings": T,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-3,
        "sliding_window": 4,
    }
    assert {name: found.get(name) for name in wanted} == wanted
    assert "500" in json.dumps(found)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.4, 3.0])
def test_the_objective_and_beta_make_the_step_of_dpo(
    beta: float, model: ConsynLMHeadModel, tmp_path: Path
) -> None:
    """The step of the paper's loss over all pairs, with the gradient through the public call."""
    draw, documents, targets = np.random.default_rng(3), [], []
    for _ in range(A * B):
        prompt = draw.integers(3, V, 2)
        answers = [draw.integers(3, V, draw.integers(1, 5)) for _ in range(2)]
        halves = [np.concatenate([prompt, answer, [2]]) for answer in answers]
        documents.append(np.concatenate([halves[0], [2], halves[1]]))
        marks = [np.repeat([0, 1], [2, len(answer) + 1]) for answer in answers]
        targets.append(np.concatenate([marks[0], [BETWEEN], marks[1]]))
    pairs = PairDataset(StoreSplit([MemoryShard(documents, 2, targets)]), T, 1, 0)
    rows = pairs.rows(np.arange(len(pairs)))
    ids, labels, mask = (rows[name].reshape(-1, T) for name in ("input_ids", "labels", "loss_mask"))

    def log_probs(params: Any) -> jax.Array:
        logits = ConsynLMHeadModel.from_parameters(MODEL, params)(jnp.asarray(ids))
        each = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
        return jnp.sum(each * mask, -1).reshape(-1, 2)

    start = log_probs(model.parameters)

    def loss(params: Any) -> jax.Array:
        ratios = log_probs(params) - start
        return jnp.mean(jnp.logaddexp(0.0, -beta * (ratios[:, 0] - ratios[:, 1])))

    found, lines = run(
        model,
        pairs,
        tmp_path,
        max_steps=1,
        objective="dpo",
        dpo_beta=beta,
        learning_rate=0.5,
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        scheduler="constant",
    )
    before, g = flatten(model.parameters), flatten(jax.jit(jax.grad(loss))(model.parameters))
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    np.testing.assert_allclose(logged(lines, "train/grad_norm"), [norm], rtol=1e-4)
    close(found, {name: before[name] - 0.5 * g[name] for name in g}, before)
