"""Ids and targets against TRL's `assistant_only_loss`, for the five templates that most models use.

The templates of Llama 3, Qwen2.5 and Qwen3, and their marked variants, are those in the trl package;
SmolLM2's and ChatML's are in chat_families.py, and marked there as TRL marks Qwen's.
"""

from pathlib import Path
from typing import Any

import pytest
from chat_families import (
    CHATML_TEMPLATE,
    FAMILIES,
    MARKED_CHATML,
    MARKED_SMOLLM2,
    SMOLLM2,
    TOOLS,
    conversations,
)
from hypothesis import HealthCheck, given, settings

from consyn_jax.tokenization.chat import known_templates
from consyn_jax.tokenization.chat.chat_encoder import GIVEN, ChatEncoder
from consyn_jax.tokenization.chat.turns import Chat

pytestmark = pytest.mark.slow
OWN = {"smollm2": (SMOLLM2, MARKED_SMOLLM2), "chatml": (CHATML_TEMPLATE, MARKED_CHATML)}
EXAMPLES = settings(
    max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def templates(name: str) -> tuple[str, str]:
    """The template of a family, and how TRL marks it."""
    if name in OWN:
        return OWN[name]
    import trl
    from trl.chat_template_utils import get_training_chat_template

    source = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    marked = get_training_chat_template(FAMILIES[name].theirs(source))
    assert marked is not None
    return source, marked


def encoded(encoder: ChatEncoder, messages: list[dict], tools: Any) -> tuple[list[int], list[int]]:
    plain = [{name: v for name, v in message.items() if v is not None} for message in messages]
    made = encoder.encode(Chat(plain, [m["role"] == "assistant" for m in plain], tools))
    assert made.targets[0] == GIVEN
    return made.ids, [0, *made.targets[1:].tolist()]


def trl_ids(
    theirs: Any, marked: str, messages: list[dict], tools: Any
) -> tuple[list[int], list[int]]:
    made = theirs.apply_chat_template(
        messages,
        tools=tools,
        chat_template=marked,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return made["input_ids"], made["assistant_masks"]


@pytest.mark.parametrize("marks", ["by the template", "by us"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_targets_are_trls(name: str, marks: str) -> None:
    family, (source, marked) = FAMILIES[name], templates(name)
    theirs = family.theirs(source)
    encoder = ChatEncoder(family.ours, source if marks == "by us" else marked)

    @EXAMPLES
    @given(conversations(calls=name not in OWN), TOOLS)
    def check(messages: list[dict], tools: Any) -> None:
        assert encoded(encoder, messages, tools) == trl_ids(theirs, marked, messages, tools)

    check()


def test_turns_found_by_difference_alone_are_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3 writes earlier turns without reasoning, and nothing here knows its template."""
    monkeypatch.setattr(known_templates, "_MARKS", {})
    family, (source, marked) = FAMILIES["qwen3"], templates("qwen3")
    theirs, encoder = family.theirs(source), ChatEncoder(family.ours, source)

    @EXAMPLES
    @given(conversations(calls=True), TOOLS)
    def check(messages: list[dict], tools: Any) -> None:
        assert encoded(encoder, messages, tools) == trl_ids(theirs, marked, messages, tools)

    check()


@pytest.mark.filterwarnings("ignore")  # of transformers and TRL about each other
@pytest.mark.parametrize("name", FAMILIES)
def test_the_trainer_of_trl_learns_the_same_tokens(name: str, tmp_path: Path) -> None:
    """Rows through `SFTTrainer` itself, not only its templates."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    family, (source, marked) = FAMILIES[name], templates(name)
    theirs = family.theirs(marked if name in OWN else source)
    rows = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "it " * i}]
        * (1 + i % 3)
        for i in range(1, 9)
    ]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(theirs),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        assistant_only_loss=True,
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    dataset = Dataset.from_dict({"messages": rows})
    trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=theirs)
    encoder = ChatEncoder(family.ours, source)
    for row, made in zip(rows, trainer.train_dataset, strict=True):
        ids, targets = encoded(encoder, row, None)
        labels = [i if target else -100 for i, target in zip(ids, targets, strict=True)]
        assert (ids, labels) == (list(made["input_ids"]), list(made["labels"]))
