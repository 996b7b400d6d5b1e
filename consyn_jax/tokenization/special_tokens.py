"""Find the tokens with the roles BOS, EOS and PAD.

If a file assigns a token to a role, that token is used; null means that there is none. Otherwise
the post-processor in the tokenizer.json decides: BOS is the token that it puts before a text, and
EOS is the token that it puts after a text. Without such a post-processor, an added special token
with a well-known name gets the role. An ordinary vocabulary entry never gets a role by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from consyn_jax.errors import UserError

PAD, BOS, EOS = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")

Roles = Mapping[str, str | None]
"""Role -> token, or None if no token has the role. For a role that is not a key, the tokenizer.json
decides.
"""

# Names in published tokenizers. The first name that is an added special token is used.
# fmt: off
KNOWN_NAMES: Mapping[str, Sequence[str]] = {
    "bos_token": (
        BOS, "<|begin_of_text|>", "<|startoftext|>", "<|begin▁of▁sentence|>", "<s>", "<bos>",
        "[BOS]",
    ),
    "eos_token": (
        EOS, "<|end_of_text|>", "<|endoftext|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "[EOS]",
    ),
    "pad_token": (PAD, "<|finetune_right_pad_id|>", "<|padding|>", "<pad>", "[PAD]"),
}
# fmt: on


def find_special_tokens(
    content: Mapping[str, Any], vocabulary: Mapping[str, int], named: Roles
) -> dict[str, str | None]:
    """Find the token of each role; None for roles without a token.

    Args:
        content: content of the tokenizer.json.
        vocabulary: ids of all tokens, by token.
        named: tokens of the roles that the tokenizer's files assign explicitly.

    Raises:
        UserError: a named token is not in the vocabulary, or no token can end a text.
    """
    special = [token["content"] for token in content["added_tokens"] if token["special"]]
    front = template_token(content.get("post_processor"), front=True)
    back = template_token(content.get("post_processor"), front=False)
    found: dict[str, str | None] = {}
    for role, known in KNOWN_NAMES.items():
        if role in named:
            found[role] = _named(role, named[role], vocabulary)
            continue
        by_place = {"bos_token": front, "eos_token": back}.get(role)
        if by_place is not None and by_place not in vocabulary:
            raise UserError(
                f"The tokenizer.json puts {by_place!r} around texts, but its vocabulary has no "
                "such token. Download or save it again."
            )
        found[role] = by_place or next((name for name in known if name in special), None)
    if found["eos_token"] is None:
        raise UserError(_no_end(named))
    if special == [found["eos_token"]]:  # a single special token has all roles, as in GPT-2
        found |= dict.fromkeys(found.keys() - named.keys(), special[0])
    return found


def begins_documents(content: Mapping[str, Any], roles: Roles, add_bos: bool | None) -> bool:
    """Whether to put BOS before documents.

    True if the tokenizer itself puts BOS before texts. Also true if BOS is the same token as EOS:
    in the pretraining data of such models (GPT-2, for example), every document follows an EOS.

    Args:
        add_bos: `add_bos_token` of tokenizer_config.json, which overrides the post-processor; None
            if it is not set.
    """
    bos = roles["bos_token"]
    if bos is None or bos == roles["eos_token"]:
        return bos is not None
    if add_bos is not None:
        return add_bos
    return template_token(content.get("post_processor"), front=True) == bos


def template_token(processor: Any, front: bool) -> str | None:
    """Return the token that a post-processor puts before a text (`front`) or after it.

    >>> template_token({"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]}, True)
    '<s>'
    """
    if not isinstance(processor, Mapping):
        return None
    if processor.get("type") == "Sequence":
        tokens = [template_token(part, front) for part in processor.get("processors", ())]
        return next(filter(None, tokens), None)
    if processor.get("type") == "TemplateProcessing":
        single = processor.get("single") or [{}]
        token = single[0 if front else -1].get("SpecialToken", {}).get("id")
        return token if isinstance(token, str) else None
    pair = processor.get("cls" if front else "sep")
    return pair[0] if isinstance(pair, list) and pair and isinstance(pair[0], str) else None


def _named(role: str, name: str | None, vocabulary: Mapping[str, int]) -> str | None:
    if name is not None and name not in vocabulary:
        raise UserError(
            f"The tokenizer's {role} {name!r} is not in its vocabulary. Correct its "
            "tokenizer_config.json."
        )
    return name


def _no_end(named: Roles) -> str:
    if "eos_token" in named:
        reason = "eos_token is null in its tokenizer_config.json"
    else:
        tried = ", ".join(KNOWN_NAMES["eos_token"])
        reason = f"none of its added special tokens is {tried}"
    return (
        f"The tokenizer has no end-of-text token ({reason}). Name its eos_token in a "
        "tokenizer_config.json in the same directory."
    )
