"""Chat models that were fine-tuned by the command answer chats afterwards as they did before."""

import filecmp
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Run

sys.path.append(str(Path(__file__).parents[1] / "tokenization"))
from published import CHAT, chat_model

FLAGS: list[object] = ["--max_tokens", "32", "--batch_size", "4", "--lr", "1e-4", "--quiet"]
FLAGS += ["--logging_backend", "none", "--save_steps", "100", "--logging_steps", "10"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    lines = [
        f"Line {i} of a text says hello to the world, <|im_end|> and so on." for i in range(60)
    ]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return tmp_path / "text.txt"


def prompts(directory: Path) -> list[Any]:
    """What transformers makes of chats and texts with a model's files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    with_answer = [*CHAT, {"role": "assistant", "content": "It is 4."}]
    return [
        chat,
        tokenizer.apply_chat_template(with_answer, return_dict=False),
        tokenizer("Hello <s> world")["input_ids"],
        tokenizer("<|im_start|>user <|eot_id|>")["input_ids"],
        [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        [tokenizer.model_max_length, tokenizer.split_special_tokens],
    ]


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
@pytest.mark.parametrize("flag", ["--checkpoint", "--model"])
def test_a_fine_tuned_chat_model_answers_chats(
    kind: str, flag: str, text: Path, here: Callable[..., Run], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    before = chat_model(tmp_path / "before", kind)
    run = here(tmp_path / "run", *FLAGS, flag, before, "--data", text, "--max_steps", "20")
    assert run.code == 0, run.said
    final = run.path / "final"
    assert prompts(final) == prompts(before)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert filecmp.cmp(before / name, final / name, shallow=False), name
    theirs = [GenerationConfig.from_pretrained(path).to_dict() for path in (before, final)]
    assert theirs[0] == theirs[1]
    configs = [json.loads((path / "config.json").read_text()) for path in (before, final)]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "model_type"):
        assert configs[0][name] == configs[1][name], name
    model = AutoModelForCausalLM.from_pretrained(final)
    prompt = torch.tensor([prompts(final)[0]])
    answer = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert prompt.shape[1] < answer.shape[1] <= prompt.shape[1] + 8
    assert model.generation_config.eos_token_id == theirs[0]["eos_token_id"]
    before_model = AutoModelForCausalLM.from_pretrained(before)
    pairs = zip(model.parameters(), before_model.parameters(), strict=True)
    changed = [not torch.equal(*pair) for pair in pairs]
    assert any(changed), "nothing was trained"
