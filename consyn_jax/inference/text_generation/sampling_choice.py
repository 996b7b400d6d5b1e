"""Choose the sampling of a command from its flags and the model's generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from consyn_jax.errors import UserError
from consyn_jax.inference.text_generation.generation_options import SamplingOptions
from consyn_jax.model.generation.draws import Sampling

MAX_TOKENS = 256
FILTERS = ("top_k", "top_p", "min_p")
OFF: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
# Keys of generation_config.json that change sampling in transformers and are not supported here.
UNSUPPORTED = (
    *("num_beams", "no_repeat_ngram_size", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "forced_bos_token_id", "min_new_tokens"),
)
NEUTRAL: tuple[Any, ...] = (None, 0, 1, 0.0, 1.0, [])


class SamplingChoice(NamedTuple):
    """The sampling settings, and notes for the user.

    Attributes:
        notes: Sentences about settings in the model's generation_config.json.
    """

    sampling: Sampling
    max_tokens: int
    notes: tuple[str, ...]


def choose_sampling(options: SamplingOptions, defaults: Mapping[str, Any]) -> SamplingChoice:
    """Merge the flags with the defaults of the model.

    As in transformers, decoding is greedy by default, unless generation_config.json sets do_sample.
    The flags --top_k, --top_p and --min_p turn on sampling, by default at temperature 1.

    Args:
        defaults: The content of generation_config.json.

    Raises:
        UserError: A value is out of range, or decoding is greedy although a filter or several texts
            per prompt are requested.
    """
    given = {name: getattr(options, name) for name in (*FILTERS, "temperature")}
    filters = [name for name in FILTERS if given[name] is not None]
    if given["temperature"] == 0 and filters:
        raise UserError(
            f"--{filters[0]} has no effect at --temperature 0, which always takes the likeliest "
            "token. Leave one of the two flags out."
        )
    draws = bool(defaults.get("do_sample"))
    theirs = {name: defaults[name] for name in given if draws and defaults.get(name) is not None}
    values = {name: given[name] if given[name] is not None else theirs.get(name) for name in given}
    if values["temperature"] is None:
        values["temperature"] = 1.0 if draws or filters else 0.0
    penalty = options.repetition_penalty
    theirs |= {n: defaults[n] for n in ("repetition_penalty",) if defaults.get(n) is not None}
    if penalty is None:
        penalty = theirs.get("repetition_penalty", 1.0)
    if not values["temperature"] and options.num_return_sequences > 1:
        raise UserError(
            f"--num_return_sequences {options.num_return_sequences} would repeat one text, "
            "because decoding is greedy. Add --temperature 1, or leave --num_return_sequences out."
        )
    values |= {name: None for name in FILTERS if values[name] == OFF[name]}
    sampling = _checked({**values, "repetition_penalty": penalty, "seed": options.seed})
    used = [
        f"{name} {value}"
        for name, value in theirs.items()
        if getattr(options, name) is None and (values | {"repetition_penalty": penalty})[name]
    ]
    notes = [f"From the model's generation_config.json: {', '.join(used)}."] if used else []
    odd = [name for name in UNSUPPORTED if defaults.get(name) not in NEUTRAL]
    if odd:
        notes.append(
            f"The model's generation_config.json sets {', '.join(odd)}, which is not supported "
            "and has no effect."
        )
    max_tokens = options.max_tokens or defaults.get("max_new_tokens") or MAX_TOKENS
    return SamplingChoice(sampling, int(max_tokens), tuple(notes))


def _checked(values: Mapping[str, Any]) -> Sampling:
    try:
        return Sampling(**values)
    except UserError as error:
        raise UserError(f"--{error}") from error


def described(sampling: Sampling) -> str:
    """Describe the sampling settings in a few words."""
    names = ("temperature", *FILTERS)
    values = [f"{name} {getattr(sampling, name):g}" for name in names if getattr(sampling, name)]
    if not sampling.temperature:
        values = ["the likeliest token"]
    if sampling.repetition_penalty != 1:
        values.append(f"repetition_penalty {sampling.repetition_penalty:g}")
    return ", ".join(values)
