"""`generate`: continue prompts, given as token ids or as text, and return the full sequences."""

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
# Advice for arguments of transformers' `generate` that this function does not have.
ELSEWHERE = {
    "attention_mask": "Pass lists of ids without padding, which may have any lengths.",
    "do_sample": "Pass temperature=1.0 to sample tokens. Without it, decoding is greedy.",
    "generation_config": "Pass each setting as an argument, such as temperature=0.8.",
    "input_ids": "Pass the ids first: generate(input_ids).",
    "inputs": "Pass the prompts first: generate(prompts).",
    "max_length": "Pass max_new_tokens, which does not count the prompt.",
    "num_return_sequences": "Repeat the prompt, and pass a temperature: generate([text] * 3, "
    "temperature=1.0).",
    "pad_token_id": "Pass lists of ids without padding, which may have any lengths.",
    "tokenizer": "Texts are encoded by the model's tokenizer. To use another one, encode the "
    "prompts with it and pass lists of ids.",
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
    """Continue each prompt by up to `max_new_tokens` tokens, by default by greedy decoding.

    Args:
        prompts: Ids [B, T], lists of ids of any lengths, or texts.
        compute: The dtype and the attention backend to compute with.
        own_tokenizer: Returns the model's tokenizer, or None; called only for texts.
        eos_token_id: The id, or several ids, that end a text; by default those of the model.
        stop_at_eos: Whether a text stops at such an id; if not, it has `max_new_tokens` new tokens.
        sampling: The fields of `Sampling`, such as temperature and seed.

    Returns:
        The prompts with their continuations, in the form of `prompts`. An array has shape
        [B, T + n] with n <= `max_new_tokens`, and its shorter rows are filled with the first end
        id. The continuation of a text contains no special tokens.

    Raises:
        UserError: A prompt is empty, an id is outside the vocabulary, prompt and new tokens exceed
            the model's context, or the prompts are texts and the model has no tokenizer.
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
    """Check the arguments of `generate`, and return the prompts as an array or a list."""
    if isinstance(prompts, Mapping):
        raise UserError(
            "The prompts are a dict, but must be texts or rows of ids. Pass its 'input_ids' as "
            "lists without padding."
        )
    known = sorted(field.name for field in fields(Sampling))
    for name in [name for name in sampling if name not in known]:
        arguments = ("max_new_tokens", "compute", "eos_token_id", "stop_at_eos", *known)
        remedy = ELSEWHERE.get(name, f"The arguments are prompts, {', '.join(arguments)}.")
        raise UserError(f"generate takes no {name}. {remedy}")
    given = [name for name in FILTERS if sampling.get(name) is not None]
    if given and sampling.get("temperature", 0) == 0:
        raise UserError(
            f"{given[0]} has no effect at temperature 0, where the likeliest token is chosen. Pass "
            f"temperature=1.0, or leave {given[0]} out."
        )
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be a whole number from 1, not {max_new_tokens!r}.")
    if isinstance(prompts, bytes):
        raise UserError("The prompts are bytes. Pass text: prompts.decode().")
    if not isinstance(prompts, Iterable):
        raise UserError(
            f"Prompts of type {type(prompts).__name__} are not supported. Pass a text, a list of "
            "texts, or rows of ids."
        )
    found: Any = prompts if hasattr(prompts, "ndim") else list(prompts)
    if not len(found):
        raise UserError("There are no prompts. Pass at least one prompt.")
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
                f"eos_token_id must be one or several ids of the vocabulary, from 0 to "
                f"{model.config.vocab_size - 1:,}, not {found!r}."
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
            "The model has no tokenizer, so it cannot continue text. Pass token ids, or load the "
            "model from a directory that has a tokenizer."
        )
    return found


def _encoded(texts: Sequence[str], tokenizer: Callable[[], Any]) -> list[list[int]]:
    known = _known(tokenizer)
    return [prompt_ids(text, known) for text in texts]


def prompt_ids(text: str, tokenizer: BPETokenizer) -> list[int]:
    """Encode a prompt; put BOS before it if the tokenizer puts BOS before documents.

    An empty prompt becomes BOS. If the tokenizer has no BOS, it becomes EOS, because each document
    in such training data follows an EOS.
    """
    begin = [] if tokenizer.first_id is None else [tokenizer.first_id]
    first = (tokenizer.first_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return begin + tokenizer.encode(text) or [next(i for i in first if i is not None)]


def _decoded(
    prompts: Sequence[str], texts: list[list[int]], encoded: list[list[int]], tokenizer: Any
) -> list[str]:
    """Each prompt, unchanged, followed by the decoded text of its new tokens.

    Args:
        texts: Ids of each prompt with its new tokens.
        encoded: Ids of each prompt.
    """
    known, found = _known(tokenizer), []
    for prompt, ids, before in zip(prompts, texts, encoded, strict=True):
        old, whole = known.decode(before), known.decode(ids)
        found.append(prompt + whole[len(old) :] if whole.startswith(old) else whole)
    return found
