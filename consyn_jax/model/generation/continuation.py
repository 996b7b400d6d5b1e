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
from consyn_jax.model.generation.draws import Sampling
from consyn_jax.model.generation.engine import Engine, Request, check_request
from consyn_jax.model.generation.runtime_weights import runtime_weights
from consyn_jax.model.given_ids import checked_prompts
from consyn_jax.model.transformer import Compute, Decoder

if TYPE_CHECKING:
    from consyn_jax.tokenization import BPETokenizer

MOST_SLOTS = 32  # texts that are continued at the same time


def generate(
    model: Decoder,
    prompts: Any,
    max_new_tokens: int = 128,
    *,
    compute: Compute,
    tokenizer: Callable[[], BPETokenizer | None] = lambda: None,
    eos_token_id: int | Sequence[int] | None = None,
    stop_at_eos: bool = True,
    **sampling: Any,
) -> Any:
    """Continue prompts by up to `max_new_tokens` tokens each, by default with the likeliest ones.

    Args:
        prompts: Ids [B, T], lists of ids of any lengths, or texts.
        compute: The number type and attention of the products.
        tokenizer: Returns the tokenizer, or None; called only for texts.
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
    encoded = _encoded(prompts, tokenizer) if is_text else checked_prompts(prompts, vocab_size)
    ends = _ends(model, eos_token_id) if stop_at_eos else ()
    requests = [Request(ids, max_new_tokens, row) for row, ids in enumerate(encoded)]
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
        return _decoded(prompts, texts, encoded, tokenizer)
    return _rectangle(texts, ends) if is_array else texts


def _check_call(prompts: Any, max_new_tokens: Any, sampling: Mapping[str, Any]) -> Any:
    """The prompts, as an array or a list; `Sampling` must have the other arguments."""
    if isinstance(prompts, Mapping):
        raise UserError(
            "Prompts are a dict, but must be texts or rows of ids. Pass its 'input_ids' as lists "
            "without padding."
        )
    known = {field.name for field in fields(Sampling)}
    for name in sampling.keys() - known:
        hint = "" if name != "attention_mask" else " and lists of ids without padding"
        raise UserError(
            f"generate takes no {name}. Give prompts{hint}, max_new_tokens, compute, eos_token_id, "
            f"stop_at_eos, {', '.join(sorted(known))}."
        )
    is_number = isinstance(max_new_tokens, int) and not isinstance(max_new_tokens, bool)
    if not is_number or max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be a whole number from 1, not {max_new_tokens!r}.")
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
        is_id = isinstance(found, int | np.integer) and not isinstance(found, bool)
        if not is_id or not 0 <= found < model.config.vocab_size:
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
