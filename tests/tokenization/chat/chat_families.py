"""Tokenizers with the special tokens of published families, and conversations to write."""

import json
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st

from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.byte_level import BYTE_SYMBOLS, SPLIT_PATTERN, build_json

LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Of Qwen's added tokens these are ordinary ones, `"special": false`.
QWEN_WORDS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
PAIRS = ("th", "he", "in", "er", "an", "\n\n", " t", " a", "ss", "us")


def tokenizer_json(special: tuple[str, ...], words: tuple[str, ...] = (), bos: str = "") -> str:
    """A tokenizer of bytes and a few merges, with added tokens behind them."""
    spelled = [[BYTE_SYMBOLS[byte] for byte in pair.encode()] for pair in PAIRS]
    tokens = [*BYTE_SYMBOLS, *("".join(pair) for pair in spelled), *special, *words]
    merges = [(pair[0], pair[1]) for pair in spelled]
    content = json.loads(build_json(tokens, merges, special, SPLIT_PATTERN))
    for word in words:
        added = {
            **content["added_tokens"][0],
            "id": tokens.index(word),
            "content": word,
            "special": False,
        }
        content["added_tokens"].append(added)
    if bos:
        index = tokens.index(bos)
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
        }
    return json.dumps(content)


# https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, tokenizer_config.json
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct, tokenizer_config.json
LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The default that transformers had, and that many models carry.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LINE = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
_MARKED_LINE = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
)
MARKED_CHATML, MARKED_SMOLLM2 = (
    template.replace(_LINE, _MARKED_LINE) for template in (CHATML_TEMPLATE, SMOLLM2)
)


@dataclass(frozen=True)
class Family:
    json_text: str
    bos: str | None
    eos: str

    @property
    def ours(self) -> BPETokenizer:
        return BPETokenizer(self.json_text, {"bos_token": self.bos, "eos_token": self.eos})

    def theirs(self, template: str | None):  # type: ignore[no-untyped-def]
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(self.json_text),
            bos_token=self.bos,
            eos_token=self.eos,
            chat_template=template,
        )


FAMILIES = {
    "llama3": Family(
        tokenizer_json(LLAMA3, bos="<|begin_of_text|>"), "<|begin_of_text|>", "<|eot_id|>"
    ),
    "qwen2_5": Family(tokenizer_json(CHATML, QWEN_WORDS), None, "<|im_end|>"),
    "qwen3": Family(tokenizer_json(CHATML, QWEN_WORDS), None, "<|im_end|>"),
    "smollm2": Family(tokenizer_json(CHATML), "<|im_start|>", "<|im_end|>"),
    "chatml": Family(tokenizer_json(CHATML), None, "<|im_end|>"),
}

WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Co", "Cn"]), max_size=12
) | st.sampled_from(
    ["\n", "\n\nthe", " a", "the answer is in", "  ", "{{ x }}", "<think>\nso\n</think>\n\nthus"]
)
ARGUMENTS = st.dictionaries(
    st.sampled_from(["city", "days"]), st.integers(-9, 9) | WORDS | st.none() | st.booleans()
)
CALLS = st.lists(
    st.builds(
        lambda name, arguments: {
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        },
        st.sampled_from(["weather", "add"]),
        ARGUMENTS,
    ),
    min_size=1,
    max_size=2,
)
USER = st.builds(lambda text: {"role": "user", "content": text}, WORDS)
SYSTEM = st.builds(lambda text: {"role": "system", "content": text}, WORDS)
TOOL = st.builds(lambda text: {"role": "tool", "content": text}, WORDS)
ANSWER = st.builds(lambda text: {"role": "assistant", "content": text}, WORDS)
TOOLS = st.none() | st.just(
    [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
)


@st.composite
def conversations(draw: st.DrawFn, *, calls: bool) -> list[dict]:
    """System or not, several turns, and tool calls with null content and their results."""
    messages = draw(st.lists(SYSTEM, max_size=1))
    for _ in range(draw(st.integers(1, 4))):
        messages.append(draw(USER))
        if calls and draw(st.booleans()):
            content = draw(st.none() | WORDS)
            messages.append({"role": "assistant", "content": content, "tool_calls": draw(CALLS)})
            messages += draw(st.lists(TOOL, min_size=1, max_size=2))
        messages.append(draw(ANSWER))
    return messages[: len(messages) - draw(st.integers(0, 1))] if len(messages) > 3 else messages


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]
