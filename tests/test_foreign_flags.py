"""Names that other trainers have are answered with ours."""

import re
from typing import Any

import pytest

from consyn_jax.cli import prepare
from consyn_jax.cli.train import read_arguments
from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError
from consyn_jax.flags import flags
from consyn_jax.foreign_flags import _KEYWORDS, ELSEWHERE, FOREIGN, advise, named_flags
from consyn_jax.inference.text_generation.generation_options import GenerateConfig
from consyn_jax.resolve import resolve

KNOWN, GENERATE = flags(RunConfig), flags(GenerateConfig)
OURS = {*KNOWN, *(alias for flag in KNOWN.values() for alias in flag.aliases)}


def answer(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        read_arguments(argv)
    return str(caught.value)


def answer_to_keyword(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve(settings, given_as="keyword")
    return str(caught.value)


@pytest.mark.parametrize("name", [*FOREIGN, *_KEYWORDS])
def test_every_advice_names_flags_that_exist_in_at_most_two_sentences(name: str) -> None:
    assert name not in OURS, "a flag of ours needs no advice"
    advice = {**_KEYWORDS, **FOREIGN}[name]
    command = GENERATE if {*named_flags(advice)} <= {*GENERATE} else KNOWN
    assert {*named_flags(advice)} <= {*OURS, *GENERATE, "config"}
    for style in ("flag", "keyword", "file"):
        for value in (None, "3", "x", True):
            text = advise(name, value, command, style)
            assert text is not None or (style != "keyword" and name in _KEYWORDS)
            assert len(re.findall(r"[.] [A-Z]", text or "")) <= 1
            assert not re.search(r"[*\[\]]", text or "")


def test_every_flag_that_python_has_elsewhere_exists() -> None:
    assert set(ELSEWHERE) <= set(KNOWN)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("--num_train_epochs 3", "write --epochs 3."),
        ("--num-train-epochs=2", "write --epochs 2."),
        ("--num_train_epoch 2", "write --epochs 2."),
        ("--bf16", "write --mixed_precision bf16."),
        ("--bf16 True", "write --mixed_precision bf16."),
        ("--bf16 False", "--bf16. Leave it out."),
        ("--fp16", "write --mixed_precision fp16."),
        ("--torch_dtype float32", "write --mixed_precision no."),
        ("--device cuda", "CUDA_VISIBLE_DEVICES=0"),
        ("--gpus 2", "--mesh data=2"),
        ("--report_to wandb", "write --logging_backend wandb."),
        ("--report_to all", "write --logging_backend both."),
        ("--report_to mlflow", "write --logging_backend tensorboard|wandb|both|none|module:Class."),
        ("--block_size 1024", "write --max_tokens 1024."),
        ("--max_seq_length 2048", "write --max_tokens 2048."),
        ("--per_device_train_batch_size 4", "--batch_size 4 counts"),
        ("--per_device_eval_batch_size 4", "evaluations also use --batch_size"),
        ("--resume_from_checkpoint out/checkpoint-500", "--resume STEP"),
        ("--model_name_or_path gpt2", "--checkpoint gpt2 starts from that model's weights"),
        ("--dataset_name wikitext", "write --data wikitext."),
        ("--train_file x.json", "write --data x.json."),
        ("--eval_strategy steps", "--eval_steps N"),
        ("--gradient_checkpointing_kwargs {}", "--gradient_checkpointing none|minimal|attention"),
        ("--lr_scheduler_type linear", "write --scheduler linear."),
        ("--lr_scheduler_type warmup_stable_decay", "write --scheduler wsd."),
        ("--save_total_limit 3", "write --keep_last 3."),
        ("--save_total_limit None", "write --keep_last N."),
        ("--n_layer=6", "write --num_layers 6."),
        ("--max_iters 5000", "write --max_steps 5000."),
        ("--train.max_tokens 1e9", "write --total_tokens 1e9."),
        ("--training.seq_len 512", "write --max_tokens 512."),
        ("--parallelism.tensor_parallel_degree 2", "write --mesh tensor=2."),
        ("--micro-batch-size 4", "write --batch_size 4."),
    ],
)
def test_flags_of_other_trainers_are_answered_with_ours(given: str, written: str) -> None:
    said = answer(*given.split())
    assert said.startswith(f"There is no flag {given.split()[0].split('=')[0]}")
    assert written in said
    assert "did you mean" not in said


def test_the_advice_of_a_renaming_is_taken_by_the_command() -> None:
    for given in (
        "--num_train_epochs 3",
        "--n_embd 1536",
        "--bf16",
        "--report_to all",
        "--optim lion",
    ):
        words = answer(*given.split()).partition("write ")[2].rstrip(".").split()
        read_arguments(words)


def test_names_that_are_the_same_are_flags() -> None:
    config, _, _ = read_arguments(
        [
            "--learning-rate",
            "3e-4",
            "--output_dir",
            "x",
            "--gradient_checkpointing",
            "True",
            "--warmup_ratio",
            "0.1",
        ]
    )
    assert (config.optimizer.lr, config.saving.output) == (3e-4, "x")
    assert config.hardware.gradient_checkpointing == "full"
    config, _, _ = read_arguments(["--gradient_checkpointing", "false"])
    assert config.hardware.gradient_checkpointing == "none"


def test_a_name_that_resembles_none_is_answered_as_before() -> None:
    assert answer("--lrr", "3") == (
        "There is no flag --lrr; did you mean --lr? See consyn-train --help."
    )
    assert answer("--xyzzy") == "There is no flag --xyzzy. See consyn-train --help."


def test_consyn_prepare_names_only_its_own_flags() -> None:
    for given, written in {
        "--dataset_name x": "write --data x.",
        "--bf16": "no flag --bf16.",
    }.items():
        with pytest.raises(UserError) as caught:
            prepare.read_arguments(given.split())
        assert written in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"per_device_train_batch_size": 8}, "batch_size=8 counts"),
        ({"num_train_epochs": 3}, "write epochs=3."),
        ({"bf16": True}, "write mixed_precision='bf16'."),
        ({"report_to": "wandb"}, "write logging_backend='wandb'."),
        ({"gradient_checkpointing_kwargs": {}}, "write gradient_checkpointing='none|minimal"),
        ({"train_dataset": []}, "pass the data set as train_dataloader="),
        ({"resume_from_checkpoint": True}, "train() with the same output_dir=DIR continues"),
        ({"dataset_name": "x"}, "pass the data as train_dataloader="),
        ({"model_name_or_path": "x"}, "the model that you pass determines it"),
        ({"data": "x"}, "pass the data as train_dataloader="),
        ({"hidden_dim": 64}, "the model that you pass determines it"),
        ({"packing": "whole"}, "pass it to get_dataset"),
        ({"distributed": True}, "jax.distributed.initialize"),
    ],
)
def test_keywords_of_other_trainers_are_answered_with_ours(
    settings: dict[str, Any], written: str
) -> None:
    said = answer_to_keyword(**settings)
    assert f"{next(iter(settings))} is not a setting" in said
    assert written in said


def test_a_config_file_of_another_trainer_is_answered_with_our_lines() -> None:
    with pytest.raises(UserError, match=r"num_train_epochs \(file x.yaml\) .* write epochs: 3\."):
        resolve({}, {"num_train_epochs": 3}, file_name="x.yaml")
