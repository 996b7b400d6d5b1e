"""Scale a model to smaller and larger sizes: width and depth change, the head width does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from consyn_jax.config import PRESETS, ModelOptions, architecture
from consyn_jax.errors import UserError
from consyn_jax.integers import round_up
from consyn_jax.model.arithmetic import num_block_parameters, train_flops_per_token
from consyn_jax.model_config import ModelConfig

MLP_MULTIPLE = 16  # feed-forward widths are multiples of this
# Weight of the error in log(size), relative to log(width / depth). A curve through sizes of
# different proportions is not smooth: parameters in more layers lower the loss less than
# parameters in more width.
SIZE_WEIGHT = 2.0
SHRINKAGE = 2  # ratio of parameters between neighbouring sizes of a ladder
TARGETS = ("verse", "stanza", "epic")  # presets whose losses a ladder predicts
VOCABULARY = 256  # vocabulary size for counts that do not depend on it


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model; the fields have the names of flags."""

    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int

    @property
    def flags(self) -> dict[str, Any]:
        """The dimensions by flag name."""
        return dict(vars(self))


def model_of(options: ModelOptions, shape: Shape, vocab_size: int = VOCABULARY) -> ModelConfig:
    """Return `options` with the dimensions of this shape."""
    return architecture(replace(options, **shape.flags), vocab_size=vocab_size)


def num_body_parameters(model: ModelConfig) -> int:
    """The size of a model in a scaling law: its parameters without embeddings.

    Embeddings grow with the vocabulary and hardly add to what a model can compute; in small models
    they would be most of the size (Kaplan et al., 2020).
    """
    return model.num_layers * num_block_parameters(model)


def shape_of(options: ModelOptions) -> Shape:
    """The shape of a model, given by its options.

    Raises:
        UserError: the total width of its heads is not the model's width, so it cannot be scaled.
    """
    model = architecture(options, vocab_size=VOCABULARY)
    if model.num_heads * model.head_dim != model.hidden_dim:
        raise UserError(
            "--ladder does not change --head_dim, so --num_heads x --head_dim must equal "
            f"--hidden_dim, but {model.num_heads} x {model.head_dim} is not {model.hidden_dim}. "
            "Change one of these flags."
        )
    names = Shape.__dataclass_fields__
    return Shape(**{name: getattr(model, name) for name in names})


def scaled(options: ModelOptions, parameters: float) -> Shape:
    """Find the shape of a scaled model with about this many parameters, without embeddings.

    Width and depth change by the same factor, as far as whole heads and layers allow. The number of
    query heads per key-value head stays the same, and so does the ratio of feed-forward width to
    model width.

    >>> from consyn_jax.resolve import resolve
    >>> haiku = resolve({"model": "haiku"})[0].model
    >>> scaled(haiku, 100_000)  # doctest: +NORMALIZE_WHITESPACE
    Shape(hidden_dim=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, mlp_dim=192)
    """
    base = shape_of(options)
    aspect = base.hidden_dim / base.num_layers

    def cost(shape: Shape) -> float:
        found = num_body_parameters(model_of(options, shape))
        size = abs(math.log(found / parameters))
        return SIZE_WEIGHT * size + abs(math.log(shape.hidden_dim / shape.num_layers / aspect))

    return min(_candidates(options, base, parameters), key=cost)


def _candidates(options: ModelOptions, base: Shape, parameters: float) -> Iterator[Shape]:
    """Yield candidate shapes for a model with about this many parameters.

    The first is the base. The others have depths that give nearly the wanted number of parameters,
    and widths from half to twice the width at which the base's proportions are kept.
    """
    yield base
    group = base.num_heads // base.num_kv_heads
    whole = num_body_parameters(model_of(options, base))
    ideal = base.hidden_dim * (parameters / whole) ** (1 / 3)
    step = group * base.head_dim
    first, last = max(1, math.floor(ideal / 2 / step)), math.ceil(2 * ideal / step)
    for count in range(first, last + 1):
        width = count * step
        mlp_dim = round_up(round(base.mlp_dim / base.hidden_dim * width), MLP_MULTIPLE)
        shape = Shape(width, 1, count * group, count, base.head_dim, mlp_dim)
        depth = parameters / num_body_parameters(model_of(options, shape))
        for layers in {max(1, math.floor(depth)), max(1, math.ceil(depth))}:
            yield replace(shape, num_layers=layers)


def ladder_shapes(options: ModelOptions, sizes: int | Sequence[float]) -> list[Shape]:
    """The shapes of a ladder, the smallest first.

    Args:
        options: the model to scale.
        sizes: the number of sizes, with the model itself as the largest; or the number of
            parameters of each size, without embeddings.

    Raises:
        UserError: two sizes give the same shape.
    """
    if isinstance(sizes, int):
        whole = num_body_parameters(model_of(options, shape_of(options)))
        sizes = [whole / SHRINKAGE**power for power in reversed(range(sizes))]
    found: list[Shape] = []
    for size in sorted(sizes):
        shape = scaled(options, size)
        if found and num_body_parameters(model_of(options, shape)) <= num_body_parameters(
            model_of(options, found[-1])
        ):
            raise UserError(
                f"--ladder: with --head_dim {shape.head_dim}, --model {options.model} has the same "
                f"shape for two sizes near {size:,.0f} parameters. Give sizes further apart, or a "
                "smaller --head_dim."
            )
        found.append(shape)
    return found


@dataclass(frozen=True)
class Target:
    """A model whose loss is predicted.

    Attributes:
        name: name of the preset, or of the preset from which the model is scaled.
        parameters: number of parameters, without embeddings.
        flops: training FLOPs per token.
    """

    name: str
    shape: Shape
    parameters: int
    flops: float


def target(name: str, shape: Shape | None, vocab_size: int, length: int) -> Target:
    """Describe a preset, or a preset scaled to `shape`, as a model whose loss is predicted.

    Args:
        length: number of tokens in a sequence, which determines the FLOPs of attention.
    """
    options = preset(name)
    shape = shape or shape_of(options)
    model = model_of(options, shape, vocab_size)
    return Target(name, shape, num_body_parameters(model), train_flops_per_token(model, length))


def preset(name: str) -> ModelOptions:
    """The model options of a preset."""
    names = ModelOptions.__dataclass_fields__
    return ModelOptions(name, **{k: v for k, v in PRESETS[name].items() if k in names})


def scaled_target(parameters: float, vocab_size: int, length: int) -> Target:
    """Describe a model with about this many parameters, scaled from the nearest preset."""
    sizes = {name: target(name, None, vocab_size, length).parameters for name in PRESETS}
    name = min(sizes, key=lambda each: abs(math.log(sizes[each] / parameters)))
    return target(name, scaled(preset(name), parameters), vocab_size, length)
