"""A decoder's architecture, LoRA options and file format, as frozen dataclasses."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

from consyn_jax.errors import UserError, nearest
from consyn_jax.flags import flag
from consyn_jax.integers import divisors, is_whole, round_up

DTYPES = ("float32", "bfloat16", "float16")  # number types of weights, as in config.json
# Fields that must agree with the weights of a model; context, rotation and windows may differ.
WEIGHT_SHAPES = (
    *("hidden_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"),
    *("qk_norm", "tie_embeddings", "qkv_bias", "output_bias", "mlp_bias"),
)
# Types of rotary scaling, by their Hugging Face names, and the fields that each type needs.
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
    """Scaling of the rotary embedding to a longer context; see `model/rope.py`.

    The fields are named as in `rope_scaling` of a Hugging Face config.json.

    Attributes:
        rope_type: A key of `ROPE_TYPES`.
        original_max_position_embeddings: The context length before scaling, in tokens.
        short_factor: For longrope, one factor per rotated pair of a head, for documents up to the
            original context length.
        long_factor: For longrope, the factors for longer documents.
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
                f"The rotary scaling {self.rope_type!r} is not supported. Supported types: "
                f"{', '.join(ROPE_TYPES)}."
            )
        if not isinstance(self.truncate, bool):
            raise UserError("The rotary scaling's `truncate` must be true or false.")
        for name in ROPE_TYPES[self.rope_type]:
            if not getattr(self, name):
                raise UserError(f"The rotary scaling {self.rope_type!r} needs a value for {name}.")
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers if name not in ("rope_type", "truncate") else ():
                if number is not None and not (_is_number(number) and number > 0):
                    raise UserError(
                        f"The rotary scaling {self.rope_type!r} has {name} {number!r}, which must "
                        "be a number above 0."
                    )
        if self.rope_type == "llama3" and self.high_freq_factor == self.low_freq_factor:
            raise UserError(
                "The rotary scaling 'llama3' needs a high_freq_factor above low_freq_factor."
            )


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


@dataclass(frozen=True)
class FileFormat:
    """The format of a model's files, which does not change what the model computes.

    Attributes:
        model_type: The Hugging Face model type of the files; None for the first type that can
            represent the model.
        dtype: The number type of the tensors, one of `DTYPES`.
        other_dtypes: Tensors with another number type, each as "name=type".
        has_tied_head: Whether the files also contain a copy of a tied output embedding.
        config: The config.json that the model was loaded with.
    """

    model_type: str | None = None
    dtype: str = "float32"
    other_dtypes: tuple[str, ...] = ()
    has_tied_head: bool = False
    config: str = "{}"


@dataclass(frozen=True)
class ModelConfig:
    """The complete architecture of a decoder.

    By default: pre-norm, RMSNorm, RoPE, SwiGLU and grouped-query attention, as in Hugging Face's
    `llama`. `qk_norm` adds an RMSNorm on the queries and keys of each head, as in `qwen3`. The
    other options describe the model families in `model/pretrained/families`. Sizes are in elements,
    `context` and `sliding_window` in tokens.

    Attributes:
        qkv_bias: Whether the query, key and value projections have a bias.
        output_bias: Whether the attention output projection has a bias.
        mlp_bias: Whether the gate, up and down projections have a bias.
        window_layers: For each layer, whether it uses the sliding window; None if all layers do.
        rotary_layers: For each layer, whether it rotates queries and keys; None if all layers do.
        rotary_fraction: Share of the elements of a head that are rotated.
        eos_token_id: Id of the end-of-text token; a tuple if several ids end a text.
        generation_config: Text of the checkpoint's generation_config.json, which exports copy.
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
                f"--head_dim {self.head_dim} is odd, but the rotary embedding rotates pairs of "
                "elements. Give an even number."
            )
        if not (_is_number(self.rope_theta) and self.rope_theta > 0):
            raise UserError(f"--rope_theta must be greater than 0, not {self.rope_theta!r}.")
        if not (_is_number(self.norm_eps) and self.norm_eps >= 0):
            raise UserError(f"--norm_eps must be at least 0, not {self.norm_eps!r}.")
        if self.files.dtype not in DTYPES:
            raise UserError(
                f"{self.files.dtype!r} is not a number type for weights. Use {', '.join(DTYPES)}."
            )
        self._check_layers()
        self._check_rotation()

    def _from_json(self) -> None:
        """Restore types that JSON does not have: tuples and nested dataclasses."""
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
            if value is not None:  # None if all are true, so that equal models compare equal
                layers = tuple(map(bool, value))
                object.__setattr__(self, name, None if all(layers) else layers)

    def _check_layers(self) -> None:
        for name, what in (("window_layers", "window"), ("rotary_layers", "rotation")):
            layers = getattr(self, name)
            if layers is not None and len(layers) != self.num_layers:
                raise UserError(
                    f"--num_layers {self.num_layers} does not fit this model, which sets the "
                    f"{what} separately for each of its {len(layers)} layers. Leave "
                    "--num_layers out."
                )
        if self.window_layers is not None and self.sliding_window is None:
            raise UserError(
                "Some layers of this model use a sliding window, but its size is not set. Give "
                "--sliding_window."
            )

    def _check_rotation(self) -> None:
        dim, scaling = self.rotary_dim, self.rope_scaling
        if not 0 < self.rotary_fraction <= 1 or dim < 2 or dim % 2:
            raise UserError(
                f"partial_rotary_factor is {self.rotary_fraction}, but it must rotate an even "
                f"number of the {self.head_dim} elements of a head, at least 2. Change "
                "partial_rotary_factor or --head_dim."
            )
        if scaling is None:
            return
        if scaling.rope_type == "dynamic" and dim == 2:
            raise UserError(
                "The rotary scaling 'dynamic' needs more than 2 rotated elements in a head. Raise "
                "--head_dim or partial_rotary_factor."
            )
        for name in ("short_factor", "long_factor"):
            count = len(getattr(scaling, name))
            if scaling.rope_type == "longrope" and count != dim // 2:
                raise UserError(
                    f"The rotary scaling 'longrope' has {count} values in {name}, but a head of "
                    f"this model rotates {dim // 2} pairs. Give one value for each pair."
                )

    def saved_as(self, dtype: str | None) -> ModelConfig:
        """The configuration with `dtype` for saved weights; if it is None, this configuration."""
        if dtype is None:
            return self
        if dtype not in DTYPES:
            raise UserError(f"{dtype!r} is not a number type for weights. Use {', '.join(DTYPES)}.")
        return replace(self, files=replace(self.files, dtype=dtype, other_dtypes=()))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a text, from generation_config if it names any, else `eos_token_id`.

        >>> sizes = dict.fromkeys(("vocab_size", "hidden_dim", "num_layers", "num_heads"), 8)
        >>> sizes |= dict.fromkeys(("num_kv_heads", "head_dim", "mlp_dim", "context"), 8)
        >>> ModelConfig(**sizes, eos_token_id=5).eos_token_ids
        (5,)
        """
        ids = json.loads(self.generation_config or "{}").get("eos_token_id", self.eos_token_id)
        return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix: the vocabulary size, rounded up to a multiple of 128.

        Any mesh can then split the rows evenly.
        """
        return round_up(self.vocab_size, 128)

    @property
    def rotary_dim(self) -> int:
        """Number of elements of each head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, in tokens; None for a layer without one."""
        layers = self.window_layers or (True,) * self.num_layers
        return tuple(self.sliding_window if has else None for has in layers)


ALL_LINEAR = "all-linear"  # PEFT's name for all matrices of the blocks
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraOptions:
    """Options for training a low-rank adapter (LoRA) while the weights are frozen."""

    lora_rank: int | None = flag(
        None, "rank of an adapter to train while the weights are frozen (no adapter)", math=True
    )
    lora_alpha: float | None = flag(
        None,
        "the adapter's output is multiplied by this number divided by lora_rank (2 x lora_rank)",
        math=True,
    )
    lora_targets: tuple[str, ...] = flag(
        (ALL_LINEAR,),
        f"matrices that get an adapter: {ALL_LINEAR}, or some of {', '.join(LORA_TARGETS)}",
        math=True,
    )
    lora_dropout: float = flag(0.0, "dropout rate of the adapter's input", math=True)
    lora_base_dtype: str = flag(
        "auto",
        "number type of the frozen weights in memory; auto: bfloat16 if the run computes in "
        "bfloat16, otherwise float32; int8 and nf4 (QLoRA) quantise the matrices of the blocks",
        choices=("auto", "float32", "bfloat16", "int8", "nf4"),
        math=True,
    )

    @property
    def is_used(self) -> bool:
        """Whether the run trains an adapter instead of all weights."""
        return self.lora_rank is not None

    @property
    def rank(self) -> int:
        """The rank of an adapter."""
        assert self.lora_rank is not None
        return self.lora_rank

    @property
    def scale(self) -> float:
        """The factor on the adapter's output: alpha divided by the rank."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / self.rank

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the block matrices that get an adapter, in the order of `LORA_TARGETS`."""
        every = ALL_LINEAR in self.lora_targets
        return tuple(
            name.removesuffix("_proj")
            for name in LORA_TARGETS
            if every or name in self.lora_targets
        )

    def check(self) -> None:
        """Check the values, and refuse any that is given without --lora_rank.

        Raises:
            UserError: a value is wrong or has no effect; the message names its flag.
        """
        if not self.is_used:
            given = [name for name, value in vars(NO_LORA).items() if getattr(self, name) != value]
            if given:
                raise UserError(
                    f"--{given[0]} has no effect without an adapter. Give --lora_rank to train "
                    f"one, or leave --{given[0]} out."
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
                    f"--lora_targets {name} has commas. Separate the names by spaces: "
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
