import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_directories import DERIVED, begin, holds_run, run

from consyn_jax.errors import UserError
from consyn_jax.training.run.identity import (
    check_schedule,
    describe_derived,
    differences,
    read_run_config,
)
from consyn_jax.training.run.opening import open_run_directory


def test_flags_that_do_not_change_the_mathematics_may_change(tmp_path: Path) -> None:
    begin(tmp_path)
    config, _ = run(
        tmp_path,
        save_steps=7,
        logging_backend="none",
        mesh="data=8",
        gradient_checkpointing="full",
        quiet=True,
    )
    assert holds_run(config)


@pytest.mark.parametrize(
    ("flags", "derived", "words"),
    [
        (
            {"lr": 0.1, "beta1": 0.8, "dropout": 0.1},
            {},
            ["--beta1 was 0.9 and is 0.8", "--dropout was 0.0 and is 0.1"],
        ),
        ({"hidden_dim": 64}, {}, ["--hidden_dim was 128 and is 64", "--head_dim was 32 and is 16"]),
        (
            {"logits_dtype": "bfloat16"},
            {},
            ["--logits_dtype was float32 and is bfloat16"],
        ),
        ({}, {"data": "other"}, ["the training data changed"]),
        ({}, {"tokenizer": None}, ["the tokenizer changed"]),
        ({}, {"vocab_size": 300}, ["the vocabulary was 259 and is 300"]),
        ({}, {"weights": "new"}, []),
        (
            {},
            {"weights": "new", "requests": "xyz"},
            ["the requests of --eval_requests, by which the best model is selected, changed"],
        ),
        (
            {},
            {"sequences_per_step": 16},
            ["batch_size x gradient_accumulation_steps was 8 and is 16"],
        ),
    ],
)
def test_another_run_is_told_apart_difference_by_difference(
    flags: dict[str, Any], derived: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    begin(tmp_path)
    config, _ = run(tmp_path, **flags)
    found = differences(
        yaml.safe_load((tmp_path / "config.yaml").read_text()), config, DERIVED | derived
    )
    assert found == words
    if not words:
        assert holds_run(config, DERIVED | derived)
        return
    with pytest.raises(UserError) as caught:
        open_run_directory(config, DERIVED | derived)
    message = str(caught.value)
    assert f"--output {tmp_path} holds another run: " in message
    assert all(word in message for word in words)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"just a text", b"lr: 1.0\n"])
def test_a_damaged_config_yaml_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(
        UserError, match=r"is not YAML|is not UTF-8|is damaged|is not the configuration of a run"
    ):
        open_run_directory(run(tmp_path)[0], DERIVED)


def test_a_config_yaml_of_any_size_is_not_read_whole(tmp_path: Path) -> None:
    """Found by the search for trees of strangers: a MemoryError."""
    with (tmp_path / "config.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="cannot be read: it has 1,099,511,627,776 bytes, too many"):
        read_run_config(tmp_path / "config.yaml")


@pytest.mark.timeout(300)
def test_a_config_yaml_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Found by the search for trees of strangers: --replay_step had no end."""
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="cannot be read: it is not a regular file"):
        read_run_config(tmp_path / "config.yaml")


def test_a_config_yaml_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """Found by the search for trees of strangers: --replay_step read where it led to."""
    (tmp_path / "elsewhere").write_text("derived: {}\n")
    (tmp_path / "config.yaml").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match="cannot be read: it is a symbolic link, which is not followed"
    ):
        read_run_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("recorded", "flag", "by_data", "words"),
    [
        ("cut", None, "cut", []),  # a run of before the default followed from the data
        ("cut", "cut", "cut", []),
        (None, "cut", "cut", []),
        ("cut", None, "whole", ["--packing was cut and is whole, which --packing cut keeps"]),
        ("cut", "whole", "whole", ["--packing was cut and is whole"]),
        (None, None, "whole", []),
    ],
)
def test_packing_is_compared_by_its_effect(
    recorded: str | None, flag: str | None, by_data: str, words: list[str], tmp_path: Path
) -> None:
    begin(tmp_path)
    old = yaml.safe_load((tmp_path / "config.yaml").read_text()) | {"packing": recorded}
    config, _ = run(tmp_path, packing=flag)
    assert differences(old, config, DERIVED | {"packing": by_data}) == words
    if recorded is None:
        old["derived"]["packing"] = "cut"
        words = ["--packing was cut and is whole"] if by_data == "whole" else []
        found = differences(old, config, DERIVED | {"packing": by_data})
        assert [text.partition(",")[0] for text in found] == words


def test_initial_weights_are_compared_if_both_runs_know_theirs(tmp_path: Path) -> None:
    begin(tmp_path)
    old, config = yaml.safe_load((tmp_path / "config.yaml").read_text()), run(tmp_path)[0]
    old["derived"]["weights"] = "old"
    assert differences(old, config, DERIVED) == []
    assert differences(old, config, DERIVED | {"weights": "old"}) == []
    changed = differences(old, config, DERIVED | {"weights": "new"})
    assert changed == ["the initial weights changed"]


def test_a_length_that_the_data_decides_is_compared_once_the_data_is_read(tmp_path: Path) -> None:
    begin(tmp_path)
    old = yaml.safe_load((tmp_path / "config.yaml").read_text())
    old |= {"max_tokens": 64, "sliding_window": 16}
    config = run(tmp_path, max_tokens=32, sliding_window=16)[0]
    unknown = replace(config, data=replace(config.data, max_tokens=None))
    assert differences(old, config, None) == ["--max_tokens was 64 and is 32"]
    assert differences(old, unknown, None) == []
    assert differences(old, unknown, DERIVED) == ["--max_tokens was 64 and is None"]
    other = run(tmp_path)[0]
    unknown = replace(other, data=replace(other.data, max_tokens=None))
    assert differences(old, unknown, None) == ["--sliding_window was 16 and is None"]


def test_a_schedule_is_compared_step_by_step(tmp_path: Path) -> None:
    """At the step from which the run resumes, unless it has no more to do."""
    begin(tmp_path)
    old, same = yaml.safe_load((tmp_path / "config.yaml").read_text()), run(tmp_path)[0]
    check_schedule(old, same, DERIVED, 100)
    other = run(tmp_path, lr=0.1)[0]
    for config, total in ((other, 100), (same, 99)):
        with pytest.raises(UserError, match="holds a run with another schedule"):
            check_schedule(old, config, {"total_steps": total}, 50)
        over = replace(config, saving=replace(config.saving, overwrite_schedule=True))
        check_schedule(old, over, {"total_steps": total}, total)
        with pytest.raises(UserError, match=rf"already at step {total + 1}, past the {total} st"):
            check_schedule(old, over, {"total_steps": total}, total + 1)
    with pytest.raises(UserError, match=r"another schedule: --lr was .* and is 0\.1; the learn"):
        check_schedule(old, other, DERIVED, 50)


def test_derived_values_are_shown_briefly_by_name() -> None:
    shown = describe_derived({"data": 40 * "a", "total_steps": 7, "packing": "cut"})
    assert shown == {"the training data": 16 * "a", "the number of steps": "7"}
