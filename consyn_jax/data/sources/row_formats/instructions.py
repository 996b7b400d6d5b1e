"""Read rows with a prompt and its answer as plain text, under given keys or in Alpaca's format."""

from __future__ import annotations

from consyn_jax.data.sources.row_formats.fields import BadRow, json_type, text_of

# Alpaca's prompts: Taori et al., 2023, https://github.com/tatsu-lab/stanford_alpaca. The newline at
# the end of the prompt is that of the `text` field in the dataset tatsu-lab/alpaca.
_OPENING = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
ALPACA = f"{_OPENING}. {_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
ALPACA_WITH_INPUT = (
    f"{_OPENING}, paired with an input that provides further context. {_REQUEST}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def completion(row: dict, prompt_keys: str, completion_key: str) -> tuple[str, str]:
    """Read (prompt, answer) under the given keys; join several prompt texts by blank lines.

    Raises:
        BadRow: a key is missing, or the answer is blank.
    """
    names = (
        [prompt_keys] if prompt_keys in row else [name.strip() for name in prompt_keys.split(",")]
    )
    prompts = [text_of(row, name) for name in names]
    return "\n\n".join(filter(None, prompts)), _answer(row, completion_key)


def alpaca(row: dict) -> tuple[str, str]:
    """Read (prompt, answer) of an Alpaca row; the prompt is built by the original template.

    Raises:
        BadRow: a field is missing or not text, or the row has earlier turns or a system prompt,
            which the template cannot include.
    """
    for name in ("history", "system"):
        if row.get(name):
            raise BadRow(
                f"holds {json_type(row[name])} under {name!r}, which Alpaca's prompt cannot "
                "include; write the row as messages."
            )
    instruction = text_of(row, "instruction")
    given = "" if row.get("input") is None else text_of(row, "input")
    template = ALPACA_WITH_INPUT if given.strip() else ALPACA
    prompt = template.format(instruction=instruction, input=given)
    return prompt, _answer(row, "output")


def _answer(row: dict, key: str) -> str:
    answer = text_of(row, key)
    if not answer.strip():
        raise BadRow(f"holds no text under the key {key!r}, so there is nothing to train on.")
    return answer
