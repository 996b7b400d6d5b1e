"""`generate`: continue prompts to the end, as ids or as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from consyn_jax.errors import UserError
from consyn_jax.integers import is_whole
from consyn_jax.model.generation.draws import Sampling
from consyn_jax.model.generation.engine import Engine, Request, check_request
from consyn_jax.model.generation.runtime_weights import runtime_weights
from consyn_jax.model.given_values import checked_prompts
from consyn_jax.model.transformer import Compute, Decoder

if TYPE_CHECKING:
    from consyn_jax.tokenization import BPETokenizer

MOST_SLOTS = 32  # texts that are continued at the same time
FILTERS = ("top_k", "top_p", "min_p")
# What to do instead of giving an argument of transformers' `generate`.
ELSEWHERE = {
    "attention_mask": "Pass lists of ids without padding, which may have any lengths.",
    "do_sample": "Give temperature=1.0 to draw tokens, or leave it out for the likeliest ones.",
    "generation_config": "Give its values, such as temperature=0.8, themselves.",
    "input_ids": "Pass the ids first: generate(input_ids).",
    "inputs": "Pass the prompts first: generate(prompts).",
    "max_length": "Give max_new_tokens, which does not count the prompt.",
    "num_return_sequences": "Repeat the prompt, and give a temperature: generate([text] * 3).",
    "pad_token_id": "Pass lists of ids without padding, which may have any lengths.",
    "tokenizer": "Texts need the model's own; with another one, pass lists of its ids.",
}


def generate(
    model: Decoder,
    prompts: Any,
    max_new_tokens: int | np.integer,
    compute: Compute,
    own_tokenizer: Callable[[], BPETokenizer | None] = lambda: None,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    stop_at_eos: bool = True,
    **sampling: Any,
) -> Any:
    """Continue prompts by up to `max_new_tokens` tokens each, by default with the likeliest ones.

    Args:
        prompts: Ids [B, T], lists of ids of any lengths, or texts.
        compute: The number type and attention of the products.
        own_tokenizer: Returns the model's tokenizer, or None; called only for texts.
        eos_token_id: Each of these ids ends a text; by default the model's.
        stop_at_eos: False continues after such an id.
        sampling: The fields of `Sampling`, such as temperature and seed.

    Returns:
        Prompts with their continuations, in the form of `prompts`: ids [B, T + n] with n <=
        `max_new_tokens`, shorter rows filled with the first end id; lists of ids; or texts without
        special tokens.

    Raises:
        UserError: An empty prompt, an id outside the vocabulary, more positions than the model's
            context, or texts for a model without a tokenizer.
    """
    prompts = _check_call(prompts, max_new_tokens, sampling)
    chosen = Sampling(**sampling)
    is_text, is_array = _is_texts(prompts), hasattr(prompts, "ndim")
    vocab_size = model.config.vocab_size
    encoded = _encoded(prompts, own_tokenizer) if is_text else checked_prompts(prompts, vocab_size)
    ends = _ends(model, eos_token_id) if stop_at_eos else ()
    new_tokens = int(max_new_tokens)
    requests = [Request(ids, new_tokens, row) for row, ids in enumerate(encoded)]
    for request in requests:  # before the weights are copied
        check_request(request, model.config.context)
    params = nnx.to_pure_dict(nnx.split(model)[1])
    weights = runtime_weights(model.config, params, compute.dtype)
    slots = max(1, min(len(requests), MOST_SLOTS))
    engine = Engine(model.config, weights, slots, chosen, attention=compute.attention, ends=ends)
    texts = [list(ids) for ids in encoded]
    for piece in engine.run(requests):
        texts[piece.request] += piece.tokens
    if is_text:
        return _decoded(prompts, texts, encoded, own_tokenizer)
    return _rectangle(texts, ends) if is_array else texts


def _check_call(prompts: Any, max_new_tokens: Any, sampling: Mapping[str, Any]) -> Any:
    """The prompts, as an array or a list; `Sampling` must have the other arguments."""
    if isinstance(prompts, Mapping):
        raise UserError(
            "Prompts are a dict, but must be texts or rows of ids. Pass its 'input_ids' as lists "
            "without padding."
        )
    known = sorted(field.name for field in fields(Sampling))
    for name in [name for name in sampling if name not in known]:
        arguments = ("max_new_tokens", "compute", "eos_token_id", "stop_at_eos", *known)
        remedy = ELSEWHERE.get(name, f"Its arguments are prompts, {', '.join(arguments)}.")
        raise UserError(f"generate takes no {name}. {remedy}")
    given = [name for name in FILTERS if sampling.get(name) is not None]
    if given and sampling.get("temperature", 0) == 0:
        raise UserError(
            f"{given[0]} has no effect at temperature 0, which takes the likeliest token. Give "
            f"temperature=1.0, or leave {given[0]} out."
        )
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be a whole number from 1, not {max_new_tokens!r}.")
    if isinstance(prompts, bytes):
        raise UserError("The prompts are bytes. Pass text: prompts.decode().")
    if not isinstance(prompts, Iterable):
        raise UserError(
            f"Prompts of type {type(prompts).__name__} are not supported. Give a text, texts, or "
            "rows of ids."
        )
    found: Any = prompts if hasattr(prompts, "ndim") else list(prompts)
    if not len(found):
        raise UserError("There are no prompts. Give at least one.")
    return found


def _is_texts(prompts: Any) -> bool:
    return not hasattr(prompts, "ndim") and all(isinstance(prompt, str) for prompt in prompts)


def _ends(model: Decoder, given: int | Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        return model.config.eos_token_ids
    ids = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for found in ids:
        if not is_whole(found) or not 0 <= found < model.config.vocab_size:
            raise UserError(
                f"eos_token_id must be an id of the vocabulary, from 0 to "
                f"{model.config.vocab_size - 1:,}, or several, and not {found!r}."
            )
    return tuple(map(int, ids))


def _rectangle(texts: list[list[int]], ends: tuple[int, ...]) -> jax.Array:
    longest = max(map(len, texts))
    filler = ends[0] if ends else 0
    rows = [ids + [filler] * (longest - len(ids)) for ids in texts]
    return jnp.array(np.array(rows, np.int32))


def _known(tokenizer: Callable[[], BPETokenizer | None]) -> BPETokenizer:
    found = tokenizer()
    if found is None:
        raise UserError(
            "The model came without a tokenizer, so it cannot continue text. Give ids, or load it "
            "from a directory that has one."
        )
    return found


def _encoded(texts: Sequence[str], tokenizer: Callable[[], Any]) -> list[list[int]]:
    known = _known(tokenizer)
    return [prompt_ids(text, known) for text in texts]


def prompt_ids(text: str, tokenizer: BPETokenizer) -> list[int]:
    """Encode a prompt, after the token that begins a document if the tokenizer adds one.

    An empty prompt becomes that token, else BOS, else EOS: without BOS, texts begin after EOS.
    """
    begin = [] if tokenizer.first_id is None else [tokenizer.first_id]
    first = (tokenizer.first_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return begin + tokenizer.encode(text) or [next(i for i in first if i is not None)]


def _decoded(
    prompts: Sequence[str], texts: list[list[int]], encoded: list[list[int]], tokenizer: Any
) -> list[str]:
    """Each prompt, unchanged, followed by the text of its new tokens."""
    known, found = _known(tokenizer), []
    for prompt, ids, before in zip(prompts, texts, encoded, strict=True):
        old, whole = known.decode(before), known.decode(ids)
        found.append(prompt + whole[len(old) :] if whole.startswith(old) else whole)
    return found
