"""Find the tokens with the roles BOS, EOS and PAD.

If a file names the token of a role, that token has the role; null means that no token has it.
Otherwise the tokenizer.json decides: BOS is the token that its post-processor puts before a text,
and EOS the token that it puts at the end. Failing that, an added special token with a well-known
name gets the role. An ordinary vocabulary entry never gets a role by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from consyn_jax.errors import UserError

PAD, BOS, EOS = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")

Roles = Mapping[str, str | None]
"""Role -> token; None: no token has the role. A missing role is determined by the tokenizer.json.
"""

# Names in published tokenizers; the first name that is an added special token is taken.
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
    """Find the token of each role, or None.

    Args:
        content: content of the tokenizer.json.
        vocabulary: ids of all tokens, by token.
        named: roles that files assign explicitly.

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
    if special == [found["eos_token"]]:  # the only one has all roles, as in GPT-2
        found |= dict.fromkeys(found.keys() - named.keys(), special[0])
    return found


def begins_documents(content: Mapping[str, Any], roles: Roles, add_bos: bool | None) -> bool:
    """Whether BOS is put in front of documents.

    True if the tokenizer itself puts it there, or if BOS is the same token as EOS, as with GPT-2:
    in pretraining, every document then follows an EOS.

    Args:
        add_bos: `add_bos_token` of tokenizer_config.json, which overrides the post-processor.
    """
    bos = roles["bos_token"]
    if bos is None or bos == roles["eos_token"]:
        return bos is not None
    if add_bos is not None:
        return add_bos
    return template_token(content.get("post_processor"), front=True) == bos


def template_token(processor: Any, front: bool) -> str | None:
    """The token that a post-processor in a tokenizer.json puts before a text, or at its end.

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
        reason = "its tokenizer_config.json says that eos_token is null"
    else:
        tried = ", ".join(KNOWN_NAMES["eos_token"])
        reason = f"looked for {tried} among its added special tokens"
    return (
        f"The tokenizer has no end-of-text token ({reason}). Name its eos_token in a "
        "tokenizer_config.json in the same directory."
    )
