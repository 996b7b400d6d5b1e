"""Families and options compared with transformers, and the table of docs/models.md.

    JAX_PLATFORMS=cpu python tests/model/pretrained/models_page.py

measures all of them and rewrites the table; words after the command measure only the rows that have
one of them, as in `models_page.py phi3 yarn`, and keep the others.
"""

import math
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import Params
from consyn_jax.model.pretrained.inspection import read_checkpoint
from consyn_jax.model.pretrained.tensors import hf_tensors
from consyn_jax.model.pretrained.weights import load_parameters, save_parameters
from consyn_jax.model_config import ModelConfig

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
WEIGHTS = ("random", "stories260K")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
LIMIT = 1e-4
CONTEXT, WITHIN, BEYOND = 64, 48, 128  # the original context, and sequences shorter and longer
SIZES: dict[str, Any] = {  # those of stories260K
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.1,
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class Case:
    """A row of the table: an option of a family, as transformers' configuration sets it."""

    family: str
    option: str
    kind: str  # of the classes in transformers
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return f"{self.family}, {self.option}"


def scaled(kind: str, **values: Any) -> dict[str, Any]:
    """The spelling of transformers 5."""
    original = {} if kind in ("linear", "dynamic") else {"original_max_position_embeddings": 64}
    context = {"max_position_embeddings": 256} if original else {}
    return {
        "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **original, **values},
        **context,
    }


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLIDING, FULL = "sliding_attention", "full_attention"
LATE = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
LONGROPE = scaled("longrope", short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[1.0, 2.0, 3.5, 4.0])
LONGROPE["original_max_position_embeddings"] = CONTEXT
PARTIAL = scaled("longrope", short_factor=[1.0, 1.2, 1.5], long_factor=[1.0, 2.0, 4.0])
PARTIAL["rope_parameters"]["partial_rotary_factor"] = 0.75
PARTIAL["original_max_position_embeddings"] = CONTEXT
CASES = [
    Case("llama", "plain, also SmolLM2", "Llama"),
    Case("llama", "untied output", "Llama", {"tie_word_embeddings": False}),
    Case("llama", "attention_bias", "Llama", {"attention_bias": True}),
    Case("llama", "mlp_bias", "Llama", {"mlp_bias": True}),
    Case("llama", "RoPE linear", "Llama", scaled("linear", factor=4.0)),
    Case("llama", "RoPE dynamic", "Llama", scaled("dynamic", factor=4.0)),
    Case("llama", "RoPE llama3", "Llama", scaled("llama3", **LLAMA3)),
    Case("llama", "RoPE yarn", "Llama", scaled("yarn", factor=4.0)),
    Case("llama", "RoPE longrope", "Llama", scaled("longrope", **{
        name: LONGROPE["rope_parameters"][name] for name in ("short_factor", "long_factor")
    })),
    Case("mistral", "window", "Mistral", {"sliding_window": 16}),
    Case("mistral", "no window", "Mistral", {"sliding_window": None}),
    Case("ministral", "window on some layers", "Ministral",
         {"head_dim": 8, "sliding_window": 16, "layer_types": [SLIDING, FULL, SLIDING, FULL, FULL]}),
    Case("qwen2", "plain, also qwen2.5", "Qwen2"),
    Case("qwen2", "window on some layers", "Qwen2", LATE),
    Case("qwen2", "RoPE yarn", "Qwen2", scaled("yarn", factor=4.0)),
    Case("qwen3", "plain", "Qwen3", {"head_dim": 8}),
    Case("qwen3", "window on some layers", "Qwen3", {"head_dim": 8, **LATE}),
    Case("qwen3", "layer_types", "Qwen3",
         {"head_dim": 8, **LATE, "layer_types": [FULL, SLIDING, FULL, SLIDING, FULL]}),
    Case("qwen3", "attention_bias", "Qwen3", {"head_dim": 8, "attention_bias": True}),
    Case("qwen3", "RoPE yarn", "Qwen3", {"head_dim": 8, **scaled("yarn", factor=4.0)}),
    Case("smollm3", "every 4th layer without rotation", "SmolLM3"),
    Case("smollm3", "no_rope_layers, window", "SmolLM3",
         {"no_rope_layers": [0, 1, 1, 0, 1], "use_sliding_window": True, "sliding_window": 16}),
    Case("smollm3", "biases, RoPE yarn", "SmolLM3",
         {"attention_bias": True, "mlp_bias": True, **scaled("yarn", factor=4.0)}),
    Case("phi3", "plain, also phi-4", "Phi3"),
    Case("phi3", "window", "Phi3", {"sliding_window": 16}),
    Case("phi3", "RoPE longrope", "Phi3", LONGROPE),
    Case("phi3", "rotation in part, longrope", "Phi3", PARTIAL),
]  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Largest differences to transformers in float32.

    Attributes:
        within, beyond: Of the logits, for sequences shorter and longer than the original context.
        gradient: Of all gradients of the loss, as a share of their norm.
        kept: Whether all tensors are the same bytes after a round trip.
        exported: Of the logits, after one step and an export, in transformers.
    """

    within: float
    beyond: float
    gradient: float
    kept: bool
    exported: float

    @property
    def is_right(self) -> bool:
        worst = max(self.within, self.beyond, self.gradient, self.exported)
        return self.kept and worst <= LIMIT

    def cells(self) -> list[str]:
        kept = "same bytes" if self.kept else "DIFFERS"
        return [
            f"{self.within:.0e}", f"{self.beyond:.0e}", kept, f"{self.gradient:.0e}",
            f"{self.exported:.0e}",
        ]  # fmt: skip


def random_model(case: Case) -> Any:
    """A model of transformers whose biases and norms are random, too."""
    config = getattr(transformers, f"{case.kind}Config")(**{**SIZES, **case.settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{case.kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def stories_model(case: Case, stories: Path) -> Any:
    """The same with the weights of stories260K, which has no biases and no norms of heads."""
    model, given = random_model(case), load_file(stories / "hf" / "model.safetensors")
    values = {name: torch.tensor(value) for name, value in given.items()}
    for layer in range(SIZES["num_hidden_layers"]):
        for fused, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            room = f"model.layers.{layer}.{fused.split('.')[0]}"
            rows = [values[f"{room}.{part}_proj.weight"] for part in parts]
            values[f"model.layers.{layer}.{fused}_proj.weight"] = torch.cat(rows)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    return model


def measure(model: Any, ids: np.ndarray) -> Measured:
    """Compare a model of transformers with ours, which reads it from bfloat16 files."""
    with tempfile.TemporaryDirectory() as scratch:
        first, second, third = (Path(scratch) / name for name in ("first", "second", "third"))
        model.to(torch.bfloat16).save_pretrained(first)
        model = loaded(model, first)
        config = read_checkpoint(first)
        params = jax.device_get(load_parameters(first, config))
        within = _forward_program(config)(params, ids[:, :WITHIN])
        beyond, gradient = ours(config, params, ids)
        save_parameters(second, config, params)
        before, after = (load_file(place / "model.safetensors") for place in (first, second))
        stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        save_parameters(third, config.saved_as("float32"), stepped)
        again = loaded(model, third)
        trained, _ = ours(config, stepped, ids)
        return Measured(
            within=difference(within, theirs(model, ids[:, :WITHIN])),
            beyond=difference(beyond, theirs(model, ids)),
            gradient=gradient_difference(config, gradient, model, ids),
            kept=before.keys() == after.keys()
            and all(after[name].tobytes() == value.tobytes() for name, value in before.items()),
            exported=difference(trained, theirs(again, ids)),
        )


def loaded(like: Any, place: Path) -> Any:
    """A model of the same class in float32; tables of rotations are computed in it, too."""
    model = type(like).from_pretrained(place, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def ours(config: ModelConfig, params: Params, ids: np.ndarray) -> Any:
    """Logits and the gradient of the loss."""
    return jax.device_get(_program(config)(params, ids))


def forward(config: ModelConfig, params: Params, ids: jax.Array) -> jax.Array:
    return ConsynLMHeadModel.from_parameters(config, params)(ids)


@cache
def _forward_program(config: ModelConfig) -> Any:
    return jax.jit(partial(forward, config))


@cache
def _program(config: ModelConfig) -> Any:
    def loss(params: Params, ids: jax.Array) -> Any:
        logits = forward(config, params, ids)
        chosen = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(chosen, ids[:, 1:, None], -1)), logits

    def both(params: Params, ids: jax.Array) -> Any:
        (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params, ids)
        return logits, gradient

    return jax.jit(both)


def theirs(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)).logits.numpy()


def difference(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def gradient_difference(
    config: ModelConfig, gradient: Params, model: Any, ids: np.ndarray
) -> float:
    """The norm of the difference of all gradients, as a share of the norm."""
    model.zero_grad()
    logits = model(torch.tensor(ids, dtype=torch.long)).logits[:, :-1]
    labels = torch.tensor(ids[:, 1:], dtype=torch.long)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    named, total, wrong = dict(model.named_parameters()), 0.0, 0.0
    for tensor in hf_tensors(config):
        rows = []
        for part in tensor.parts:
            value: Any = gradient
            for key in part.path:
                value = value[key]
            rows.append(
                part.to_rows(np.asarray(value if part.layer is None else value[part.layer]))
            )
        expected = named.pop(tensor.name).grad.numpy()
        total += float(np.square(expected).sum())
        wrong += float(np.square(np.concatenate(rows) - expected).sum())
    assert not named, "every parameter of transformers was compared"
    return math.sqrt(wrong / total)


# --------------------------------------------------------------------------------------------- page


def input_ids(stories: Path) -> np.ndarray:
    return np.load(stories / "golden.npz")["input_ids"][:2, :BEYOND]


def rows(case: Case, stories: Path) -> dict[tuple[str, ...], Measured]:
    """The rows of a case, by family, option and weights."""
    made = {"random": random_model(case), "stories260K": stories_model(case, stories)}
    ids = input_ids(stories)
    return {(case.family, case.option, name): measure(model, ids) for name, model in made.items()}


def table(cells: dict[tuple[str, ...], list[str]]) -> str:
    lines = [
        "| family | option | weights | logits | beyond the context | round trip | gradients "
        "| exported |",
        "|---|---|---|---:|---:|---|---:|---:|",
    ]
    for case in CASES:
        for weights in WEIGHTS:
            key = (case.family, case.option, weights)
            if key in cells:
                lines.append(f"| {' | '.join([*key, *cells[key]])} |")
    return "\n".join(lines)


def on_page() -> list[list[str]]:
    """The cells of the page's table."""
    text = PAGE.read_text(encoding="utf-8")
    lines = text[text.index(BEGIN) : text.index(END)].splitlines()[3:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
    stories = PAGE.parents[2] / "shared" / "data" / "parity" / "stories260K"
    words = sys.argv[1:]
    cells = {tuple(row[:3]): row[3:] for row in on_page()} if words else {}
    for case in CASES:
        if words and not any(word in case.name for word in words):
            continue
        for key, result in rows(case, stories).items():
            print(*key, result, flush=True)
            cells[key] = result.cells()
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{table(cells)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
