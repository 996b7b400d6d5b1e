"""URLs of buckets: parsed, and refused by every flag of every command that does not read them."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.cli.arguments import METAVARS
from consyn_jax.errors import UserError
from consyn_jax.flags import flags
from consyn_jax.remote.urls import LOCAL, READ, REMOTE, BucketUrl, parse, understood

SECRET = "AKIAIOSFODNN7EXAMPLE"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/a/b.txt", BucketUrl("s3", "bucket", "a/b.txt")),
        ("S3://bucket", BucketUrl("s3", "bucket", "")),
        ("gs://my-bucket.example/corpus/", BucketUrl("gs", "my-bucket.example", "corpus")),
        ("s3://b1x/Ünï cøde/x", BucketUrl("s3", "b1x", "Ünï cøde/x")),
    ],
)
def test_a_url_has_a_bucket_and_a_key(text: str, url: BucketUrl) -> None:
    assert parse(text) == url


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs/verse", "not a place in a bucket"),
        ("http://bucket/x", "not a place in a bucket"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        (f"s3://{SECRET}:secret@bucket/x", "contains a user name or a key"),
        ("s3://bucket/../x", "path that is not valid"),
        ("s3://bucket/a//b", "path that is not valid"),
        ("s3://bucket/a\nb", "path that is not valid"),
        ("s3://bucket/" + "x" * 1025, "path that is not valid"),
    ],
)
def test_what_is_none_gets_a_sentence_without_keys(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        parse(text, "remote")
    assert SECRET not in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("one", "other", "holds"),
    [
        ("s3://b1x/run", "s3://b1x/run", True),
        ("s3://b1x/run", "s3://b1x/run/final", True),
        ("s3://b1x/run", "s3://b1x/runs", False),
        ("s3://b1x", "s3://b1x/runs", True),
        ("s3://b1x/run", "gs://b1x/run/final", False),
    ],
)
def test_a_place_holds_what_is_below_it(one: str, other: str, holds: bool) -> None:
    assert parse(one).holds(parse(other)) is holds


@pytest.mark.parametrize("name", ["train", "prepare", "convert", "generate", "evaluate", "tune"])
def test_every_flag_with_a_path_is_in_one_of_the_tables(name: str) -> None:
    """A new flag that takes paths says here whether it reads URLs."""
    tree: Any = {
        "train": "config.RunConfig",
        "prepare": "prepare_config.PrepareConfig",
        "convert": "inference.conversion.conversion_options.ConvertConfig",
        "generate": "inference.text_generation.generation_options.GenerateConfig",
        "evaluate": "inference.scoring.evaluation_options.EvaluateConfig",
        "tune": "tuning.tune_options.TuneConfig",
    }[name]
    module, _, tree = tree.rpartition(".")
    places = ("PATH", "DIR", "FILE", "URL")
    for flag in flags(getattr(importlib.import_module(f"consyn_jax.{module}"), tree)).values():
        if flag.type is str and any(place in METAVARS.get(flag.name, "") for place in places):
            assert flag.name in READ | LOCAL | {REMOTE, "storage"}, flag.name


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("train", ["--output", "s3://bucket/x"]),
        ("train", ["--config", "s3://bucket/x.yaml"]),
        ("train", ["--eval_requests", "gs://bucket/x"]),
        ("train", ["--verify", "s3://bucket/x"]),
        ("train", ["--data", "https://example.org/x.txt"]),
        ("prepare", ["--output", "gs://bucket/x"]),
        ("convert", ["--model", "x", "--output", "s3://bucket/x"]),
        ("evaluate", ["x", "--requests", "s3://bucket/x"]),
        ("evaluate", ["x", "--data", "sample", "--page", "s3://bucket/x"]),
        ("generate", ["--model", "x", "--file", "s3://bucket/x"]),
        ("tune", ["--search", "lr=1e-4:1e-2", "--output", "s3://bucket/x"]),
        ("report", ["s3://bucket/run"]),
        ("doctor", ["--output", "s3://bucket/run"]),
    ],
)
def test_a_url_that_is_not_understood_is_refused_by_a_sentence_that_names_remote(
    name: str,
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = importlib.import_module(f"consyn_jax.cli.{name}").main(argv)
    said = capsys.readouterr().err
    assert code == 2
    assert "--remote" in said
    assert "Traceback" not in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_names_of_the_hub_may_be_written_as_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"checkpoint": "hf://owner/name@v1", "data": ("hf://datasets/owner/text", "sample")}
    assert understood(given) == {"checkpoint": "owner/name@v1", "data": ("owner/text", "sample")}
    for flag, url in [("data", "hf://owner/text"), ("checkpoint", "hf://datasets/owner/name")]:
        with pytest.raises(UserError, match="is not of the form hf://"):
            understood({flag: url})
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(UserError, match="because a local path owner/name exists"):
        understood({"tokenizer": "hf://owner/name"})


def test_a_study_has_no_copy_in_a_bucket(capsys: pytest.CaptureFixture[str]) -> None:
    tune = importlib.import_module("consyn_jax.cli.tune").main
    assert tune(["--search", "lr=1e-4:1e-2", "--remote", "s3://bucket/x"]) == 2
    assert "--remote does not work with consyn-tune" in capsys.readouterr().err
