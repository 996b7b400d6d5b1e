"""The architecture of a decoder as a frozen value, its adapter, and how its files are written."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

from consyn_jax.errors import UserError, nearest
from consyn_jax.flags import flag
from consyn_jax.integers import divisors, is_whole, round_up

DTYPES = ("float32", "bfloat16", "float16")  # of weights in files, as config.json names them
# Scalings of the rotary embedding, by the names of Hugging Face, and the values that each needs.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        *("factor", "original_max_position_embeddings", "low_freq_factor"),
        "high_freq_factor",
    ),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
}


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary embedding to a longer context; see `model/rope.py`.

    The names are those of `rope_scaling` in a Hugging Face config.json.

    Attributes:
        rope_type: A key of `ROPE_TYPES`.
        original_max_position_embeddings: The context before stretching, in tokens.
        short_factor: For longrope, one factor per pair of a head, up to the original context.
        long_factor: The same for documents beyond the original context.
    """

    rope_type: str
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise UserError(
                f"The rotary embedding has scaling {self.rope_type!r}, which is not supported. "
                f"Supported: {', '.join(ROPE_TYPES)}."
            )
        if not isinstance(self.truncate, bool):
            raise UserError("Rotary scaling has a truncate that is neither true nor false.")
        for name in ROPE_TYPES[self.rope_type]:
            if not getattr(self, name):
                raise UserError(f"Rotary scaling {self.rope_type} needs a {name}.")
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers if name not in ("rope_type", "truncate") else ():
                if number is not None and not (_is_number(number) and number > 0):
                    raise UserError(
                        f"Rotary scaling {self.rope_type} has {name} {number!r}, which must be a "
                        "number above 0."
                    )
        if self.rope_type == "llama3" and self.high_freq_factor == self.low_freq_factor:
            raise UserError("Rotary scaling llama3 needs a high_freq_factor above low_freq_factor.")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


@dataclass(frozen=True)
class FileFormat:
    """The format of a model's files, which does not change what the model computes.

    Attributes:
        model_type: The Hugging Face layout of its files; None for the first that can describe it.
        dtype: The number type of its tensors, one of `DTYPES`.
        other_dtypes: Tensors of another type, each as "name=type".
        has_tied_head: The files also hold a copy of a tied output embedding.
        config: The config.json that it came with.
    """

    model_type: str | None = None
    dtype: str = "float32"
    other_dtypes: tuple[str, ...] = ()
    has_tied_head: bool = False
    config: str = "{}"


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder, with every number known.

    Pre-norm, RMSNorm, RoPE, SwiGLU and grouped-query attention: Hugging Face's `llama` layout, or
    `qwen3` if `qk_norm` puts an RMSNorm on the queries and keys of each head; the other options are
    those of the families in `model/pretrained/families`. Sizes are in elements, `context` and
    `sliding_window` in tokens.

    Attributes:
        qkv_bias: Queries, keys and values have a bias.
        output_bias: The output of attention has a bias.
        mlp_bias: Gate, up and down have a bias.
        window_layers: For each layer, whether it has the sliding window; None for all.
        rotary_layers: For each layer, whether queries and keys are rotated; None for all.
        rotary_fraction: The share of each head that is rotated.
        eos_token_id: If it holds several ids, each of them ends a text.
        generation_config: The text of a checkpoint's generation_config.json; exports keep it.
    """

    vocab_size: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    context: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    qk_norm: bool = True
    tie_embeddings: bool = True
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window_layers: tuple[bool, ...] | None = None
    rotary_layers: tuple[bool, ...] | None = None
    rotary_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    files: FileFormat = FileFormat()
    generation_config: str | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._from_json()
        sizes = ("vocab_size", "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "mlp_dim", "context", "sliding_window"):
            size = getattr(self, name)
            if size is not None and not is_whole(size):
                raise UserError(f"--{name} must be a whole number, not {size!r}.")
            if size is not None and size < 1:
                raise UserError(f"--{name} must be at least 1, not {size}.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"--num_heads {self.num_heads} is not a multiple of --num_kv_heads "
                f"{self.num_kv_heads}. Set --num_kv_heads to "
                f"{', '.join(map(str, divisors(self.num_heads)))}."
            )
        if self.head_dim % 2:
            raise UserError(
                f"--head_dim {self.head_dim} is odd, but rotary embeddings rotate pairs of "
                "elements. Make it even."
            )
        if not (_is_number(self.rope_theta) and self.rope_theta > 0):
            raise UserError(f"--rope_theta must be greater than 0, not {self.rope_theta!r}.")
        if not (_is_number(self.norm_eps) and self.norm_eps >= 0):
            raise UserError(f"--norm_eps must be at least 0, not {self.norm_eps!r}.")
        if self.files.dtype not in DTYPES:
            raise UserError(
                f"{self.files.dtype!r} is not a type of weights. Use {', '.join(DTYPES)}."
            )
        self._check_layers()
        self._check_rotation()

    def _from_json(self) -> None:
        """Restore what JSON has no type for: tuples, and the dataclasses inside."""
        kinds: dict[str, Any] = {"rope_scaling": RopeScaling, "files": FileFormat}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                fields = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
                object.__setattr__(self, name, kind(**fields))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("window_layers", "rotary_layers"):
            value = getattr(self, name)
            if value is not None:  # the same for all layers is one value, so that it compares equal
                layers = tuple(map(bool, value))
                object.__setattr__(self, name, None if all(layers) else layers)

    def _check_layers(self) -> None:
        for name, what in (("window_layers", "window"), ("rotary_layers", "rotation")):
            layers = getattr(self, name)
            if layers is not None and len(layers) != self.num_layers:
                raise UserError(
                    f"--num_layers {self.num_layers} does not fit this model, which sets the "
                    f"{what} of each of its {len(layers)} layers. Leave --num_layers out."
                )
        if self.window_layers is not None and self.sliding_window is None:
            raise UserError(
                "Some layers of this model have a sliding window, but it has no size. Give "
                "--sliding_window."
            )

    def _check_rotation(self) -> None:
        dim, scaling = self.rotary_dim, self.rope_scaling
        if not 0 < self.rotary_fraction <= 1 or dim < 2 or dim % 2:
            raise UserError(
                f"A rotary share of {self.rotary_fraction} of heads with {self.head_dim} elements "
                "is not an even number from 2. Change partial_rotary_factor or --head_dim."
            )
        if scaling is None:
            return
        if scaling.rope_type == "dynamic" and dim == 2:
            raise UserError(
                "Rotary scaling dynamic needs more than 2 rotated elements in a head. Give wider "
                "heads or a larger partial_rotary_factor."
            )
        for name in ("short_factor", "long_factor"):
            count = len(getattr(scaling, name))
            if scaling.rope_type == "longrope" and count != dim // 2:
                raise UserError(
                    f"Rotary scaling longrope has {count} values in {name}, and heads of this "
                    f"model rotate {dim // 2} pairs. Give one value for each pair."
                )

    def saved_as(self, dtype: str | None) -> ModelConfig:
        """The same model, written in another number type; None keeps that of its files."""
        if dtype is None:
            return self
        if dtype not in DTYPES:
            raise UserError(f"{dtype!r} is not a type of weights. Use {', '.join(DTYPES)}.")
        return replace(self, files=replace(self.files, dtype=dtype, other_dtypes=()))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text: those of generation_config if it names some.

        >>> sizes = dict.fromkeys(("vocab_size", "hidden_dim", "num_layers", "num_heads"), 8)
        >>> sizes |= dict.fromkeys(("num_kv_heads", "head_dim", "mlp_dim", "context"), 8)
        >>> ModelConfig(**sizes, eos_token_id=5).eos_token_ids
        (5,)
        """
        ids = json.loads(self.generation_config or "{}").get("eos_token_id", self.eos_token_id)
        return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of 128, for any mesh."""
        return round_up(self.vocab_size, 128)

    @property
    def rotary_dim(self) -> int:
        """Elements of each head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, in tokens."""
        layers = self.window_layers or (True,) * self.num_layers
        return tuple(self.sliding_window if has else None for has in layers)


ALL_LINEAR = "all-linear"  # PEFT's name of all matrices of the blocks
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraOptions:
    """A low-rank adapter over frozen weights, instead of training all weights."""

    lora_rank: int | None = flag(
        None, "train an adapter of this rank over the frozen weights (train all weights)", math=True
    )
    lora_alpha: float | None = flag(
        None,
        "LoRA's alpha: the adapter's output is multiplied by alpha / rank (twice the rank)",
        math=True,
    )
    lora_targets: tuple[str, ...] = flag(
        (ALL_LINEAR,),
        f"matrices with an adapter: {ALL_LINEAR}, or some of {', '.join(LORA_TARGETS)}",
        math=True,
    )
    lora_dropout: float = flag(0.0, "dropout rate of the adapter's input", math=True)
    lora_base_dtype: str = flag(
        "auto",
        "type in which the frozen weights are kept; auto: bfloat16 if the run computes in it, "
        "otherwise float32; int8 and nf4 (QLoRA) round the matrices of the blocks",
        choices=("auto", "float32", "bfloat16", "int8", "nf4"),
        math=True,
    )

    @property
    def is_used(self) -> bool:
        """Whether an adapter is trained, and not all weights."""
        return self.lora_rank is not None

    @property
    def rank(self) -> int:
        """The rank of an adapter."""
        assert self.lora_rank is not None
        return self.lora_rank

    @property
    def scale(self) -> float:
        """The factor of the adapter's output."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / self.rank

    @property
    def targets(self) -> tuple[str, ...]:
        """The parameters of a block that have an adapter, in the order of `LORA_TARGETS`."""
        every = ALL_LINEAR in self.lora_targets
        return tuple(
            name.removesuffix("_proj")
            for name in LORA_TARGETS
            if every or name in self.lora_targets
        )

    def check(self) -> None:
        """Check the values, and that there are none without an adapter.

        Raises:
            UserError: a value is wrong; the message names its flag.
        """
        if not self.is_used:
            given = [name for name, value in vars(NO_LORA).items() if getattr(self, name) != value]
            if given:
                raise UserError(
                    f"--{given[0]} is for an adapter. Give --lora_rank for one, or leave "
                    f"--{given[0]} out."
                )
            return
        if self.rank < 1:
            raise UserError(f"--lora_rank must be at least 1, not {self.rank}.")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise UserError(f"--lora_alpha must be a number above 0, not {self.lora_alpha:g}.")
        known = (ALL_LINEAR, *LORA_TARGETS)
        for name in self.lora_targets:
            if "," in name:
                raise UserError(
                    f"--lora_targets {name} is one word. Separate the names by spaces: "
                    f"--lora_targets {name.replace(',', ' ')}."
                )
            if name not in known:
                raise UserError(
                    f"--lora_targets {name} is not known{nearest(name, known)} "
                    f"Known: {', '.join(known)}."
                )
        if not self.targets:
            raise UserError(f"--lora_targets names no matrix. Known: {', '.join(known)}.")


NO_LORA = LoraOptions()  # all weights are trained
