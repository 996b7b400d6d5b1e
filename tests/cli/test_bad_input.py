"""Wrong input: exit code 2, and one line on stderr with what is wrong, where, and what to do."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from consyn_jax.cli.train import main
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.model.pretrained.config_json import read_config
from consyn_jax.model.pretrained.tensors import hf_tensors
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.resolve import resolve
from consyn_jax.tokenization import BPETokenizer, load_tokenizer
from consyn_jax.training.run.opening import open_run_directory

TINY = [
    "--model",
    "haiku",
    "--max_steps",
    "2",
    "--max_tokens",
    "32",
    "--hidden_dim",
    "32",
    "--num_heads",
    "2",
    "--num_layers",
    "1",
    "--tokenizer",
    "bytes",
    "--quiet",
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the cases below name, made once."""
    place = tmp_path_factory.mktemp("inputs")
    with contextlib.chdir(place):
        make_files()
    return place


@pytest.fixture(autouse=True)
def inputs(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def make_files() -> None:
    Path("good.txt").write_text("words and words. " * 40)
    Path("empty.txt").touch()
    Path("blank.txt").write_text(" \n\t\n")
    Path("binary.txt").write_bytes(b"abc\0def")
    Path("latin1.txt").write_bytes("é".encode("latin-1"))
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n')
    Path("other.jsonl").write_text('{"id": 1, "body": "a"}\n')
    Path("nothing").mkdir()
    Path("dir").mkdir()
    Path("dir/image.png").write_bytes(b"\x89PNG\0")
    for name in ("llama", "gpt2", "run/final"):
        Path(name).mkdir(parents=True)
        Path(name, "config.json").write_text(
            json.dumps({"model_type": "gpt2" if name == "gpt2" else "llama", **SIZES})
        )
    Path("llama/model.safetensors").write_bytes(b"not a checkpoint")
    shutil.copytree("llama", "pickled")
    Path("pickled/model.safetensors").rename("pickled/pytorch_model.bin")
    shutil.copytree("llama", "damaged")
    tensors = hf_tensors(read_config(Path("llama")))
    save_file({t.name: np.ones(t.shape, np.float32) for t in tensors}, "llama/model.safetensors")
    shutil.copytree("llama", "own")
    shutil.copytree("llama", "wide")
    load_tokenizer("default").save("wide")
    shutil.copytree("llama", "incomplete")
    save_file({"model.norm.weight": np.ones(32, np.float32)}, "incomplete/model.safetensors")
    BPETokenizer.train_from_iterator(["some words"], 261).save("own")
    shutil.copytree("llama", "large")
    many = ["some words and others, which all differ in each way that 123 people know. " * 2]
    BPETokenizer.train_from_iterator(many, 301).save("large")


def refused(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Check that `consyn-train` refuses `argv` with one line and exit code 2; return the line."""
    capfd.readouterr()
    assert main(argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("consyn-train: ")
    assert err.count("\n") == 1, err
    assert err[-2] in ".?"
    assert len(re.findall(r"[.?] (?=[A-Z])", err)) <= 2, "more than three sentences"
    assert not Path("output").exists(), "a refused command must leave no files"
    return err.removeprefix("consyn-train: ").rstrip("\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--data god.txt",
            "god.txt in --data does not exist; did you mean good.txt? Give a file, a directory, a "
            "glob, owner/name of a dataset, or 'sample'.",
        ),
        ("--data no/*.txt", "The pattern no/*.txt in --data matches no file."),
        (
            "--data empty.txt",
            "empty.txt is empty. Give text, JSON rows, a table of columns, a Hugging Face dataset or tokens.",
        ),
        (
            "--data blank.txt",
            "There is no text in blank.txt: nothing but white space. Give other --data.",
        ),
        ("--data binary.txt", "binary.txt is binary: byte 3 is NUL."),
        ("--data latin1.txt", "latin1.txt is not UTF-8 text: byte 0 (line 1) is 0xe9."),
        ("--data nothing", "Nothing in the directory nothing can be used: it holds no files."),
        (
            "--data dir",
            "Nothing in the directory dir can be used: image.png is binary: byte 4 is NUL.",
        ),
        (
            "--data broken.jsonl",
            "broken.jsonl:2 is broken JSON (Expecting ',' delimiter, column 13). Fix the row, or "
            "give --on_bad_rows skip.",
        ),
        (
            "--data other.jsonl",
            "other.jsonl:1 has no key 'text'; its keys are 'body', 'id'. Give the key of "
            "the text, as in --text_key body.",
        ),
        (
            "--data good.txt --dataset_type jsonl",
            "good.txt holds text, not JSON rows as --dataset_type jsonl wants. Leave "
            "--dataset_type out.",
        ),
        (
            "--data good.txt --dataset_type sharded",
            "good.txt holds text, not tokens as --dataset_type sharded wants.",
        ),
        ("--data good.txt --validation valid.txt", "valid.txt in --validation does not exist"),
        (
            "--data good.txt --validation good.txt",
            "--validation names all of --data, so nothing is left to train on.",
        ),
        (
            "--batch_size 6 --mesh fsdp=8",
            "--batch_size 6 does not divide over 8 devices (data x fsdp). Use 8.",
        ),
        (
            "--batch_size 6 --auto_batch",
            "--batch_size 6 does not divide over 8 devices (data x fsdp). Use 8.",
        ),
        (
            "--batch_size 12",
            "--batch_size 12 does not divide over 8 devices (data x fsdp). Use 8 or 16.",
        ),
        (
            "--mesh context=8 --max_tokens 20",
            "--max_tokens 20 does not divide over context=8 devices. Use 16 or 24.",
        ),
        (
            "--mesh fsdp=4",
            "--mesh fsdp=4 is for 4 devices, and there are 8. Make the product of the axes 8.",
        ),
        ("--mesh fdsp=8", "--mesh has no axis 'fdsp'; did you mean fsdp?"),
        ("--mesh fsdp=x", "--mesh fsdp must be a whole number of devices, not 'x'."),
        ("--mesh tensor=8", "--mesh tensor=8 does not divide --num_heads 2. Use tensor of 1, 2."),
        (
            "--mesh tensor=8 --num_heads 8 --num_kv_heads 2",
            "--mesh tensor=8 does not divide --num_kv_heads 2.",
        ),
        (
            "--max_tokens 4096",
            "--max_tokens 4096 is above the model's context of 2048 tokens.",
        ),
        (
            "--max_tokens 65 --model llama",
            "--max_tokens 65 is above the model's context of 64 tokens.",
        ),
        (
            "--hidden_dim 33",
            "--hidden_dim 33 is not a multiple of --num_heads 2. Use 32 or 34, or give --head_dim.",
        ),
        ("--num_kv_heads 3", "--num_heads 2 is not a multiple of --num_kv_heads 3."),
        ("--scheduler cosin", "--scheduler 'cosin' is not known; did you mean cosine?"),
        (
            "--model hiaku",
            "--model hiaku is neither a preset nor a path; did you mean haiku? Known: haiku, "
            "verse, stanza, epic.",
        ),
        ("--model nothing", "nothing is not a model: it has no config.json."),
        ("--model good.txt", "good.txt is not JSON"),
        (
            "--model gpt2",
            "gpt2/config.json has model_type 'gpt2', which is not supported. Give a model of "
            "llama, mistral, qwen3, qwen2, ministral, smollm3, phi3.",
        ),
        (
            "--model run",
            "--model run is a run directory, which contains several models. Use run/final or "
            "run/best.",
        ),
        (
            "--checkpoint run --model haiku",
            "--checkpoint run is a run directory, which contains several models.",
        ),
        (
            "--checkpoint haiku",
            "--checkpoint haiku names a preset, which has no weights. Use --model haiku.",
        ),
        (
            "--checkpoint no/such/model --model haiku",
            "no/such/model is not a model: no such directory. Give a directory with config.json ",
        ),
        ("--checkpoint nothing --model haiku", "nothing is not a model: it has no config.json."),
        (
            "--tokenizer nope",
            "There is no tokenizer at nope. Give a tokenizer.json or a directory that contains "
            "one.",
        ),
        ("--tokenizer good.txt", "good.txt: This is not JSON, or it is truncated."),
        ("--output good.txt", "--output good.txt is a file. Name a directory."),
        ("--output good.txt/run", "is a file. Name another directory."),
        ("--output /proc/run", "--output /proc/run cannot be"),
        (
            "--resume 4",
            "--resume 4: output/checkpoints has no checkpoint of that step. Saved steps: none.",
        ),
        ("--epochs 1 --max_steps= --warmup_steps 5", "--max_steps must be a whole number, not ''."),
    ],
)
def test_wrong_input(flags: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert message in refused([*TINY, *flags.split()], capfd)


LLAMA = ["--max_tokens", "32", "--quiet", "--data", "good.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--checkpoint damaged --tokenizer bytes --data /no/such",
            "damaged/model.safetensors cannot be read: ",
        ),
        (
            "--checkpoint incomplete --tokenizer bytes --data /no/such",
            "incomplete lacks 11 tensors: model.embed_tokens.weight, lm_head.weight, ",
        ),
        (
            "--checkpoint wide",
            "The tokenizer has 49,152 tokens, but --checkpoint wide has a vocabulary of 300.",
        ),
        (
            "--checkpoint pickled --tokenizer bytes",
            "pickled has no model.safetensors, only pytorch_model.bin, a pickle, which is never "
            "opened.",
        ),
        (
            "--checkpoint llama",
            "--checkpoint llama has no tokenizer (its files: config.json, model.safetensors). Give "
            "the tokenizer that the model was trained with: --tokenizer and a directory or hub id.",
        ),
        (
            "--model llama",
            "--checkpoint llama has no tokenizer (its files: config.json, model.safetensors).",
        ),
        (
            "--checkpoint llama --tokenizer default",
            "The tokenizer has 49,152 tokens, but --checkpoint llama has a vocabulary of 300.",
        ),
        (
            "--checkpoint large --data /no/such",
            "The tokenizer has 301 tokens, but --checkpoint large has a vocabulary of 300. Remove "
            "the tokens that were added to the checkpoint's tokenizer, or enlarge ",
        ),
        (
            "--checkpoint own --tokenizer bytes",
            "--tokenizer bytes does not fit --checkpoint own, which was trained with another ",
        ),
        (
            "--checkpoint own --tokenizer train:300",
            "--tokenizer train:300 does not fit --checkpoint own, which has a tokenizer.",
        ),
        (
            "--checkpoint llama --tokenizer bytes --hidden_dim 64",
            "--checkpoint llama has hidden_dim 32, not 64.",
        ),
        (
            "--checkpoint llama --model haiku --tokenizer bytes",
            "--checkpoint llama has hidden_dim 32, not 128; num_layers 1, not 4;",
        ),
    ],
)
def test_a_checkpoint_must_fit_the_model_and_the_tokenizer(
    flags: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([*LLAMA, *flags.split()], capfd)


@pytest.mark.slow
def test_the_tokenizer_of_a_store_must_fit_the_checkpoint(
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = prepare(CorpusOptions(data=("good.txt",))).store.directory
    assert (
        "The tokenizer has 49,152 tokens, but --checkpoint llama has a vocabulary of 300."
        in refused(
            ["--checkpoint", "llama", "--max_tokens", "32", "--quiet", "--data", str(made)], capfd
        )
    )


def test_warm_up_must_fit_a_run_counted_in_epochs(capfd: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY[:2], *TINY[4:], "--data", "good.txt", "--epochs", "1", "--warmup_steps", "500"]
    assert re.match(
        r"Warm-up of 500 steps is longer than the run of \d+ steps. Lower --warmup_steps.",
        refused(flags, capfd),
    )


def test_no_device_to_train_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "consyn_jax.cli.train", *TINY, "--data", "good.txt"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "nosuch"},
        check=False,
    )
    assert done.returncode == 2
    assert "consyn-train: JAX finds no device to train on (" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def old_run() -> None:
    """The files of a run with a checkpoint in `old` that refusals look at."""
    config, origins = resolve({"model": "haiku", "output": "old", "lr": 1e-3})
    directory = open_run_directory(config, {"total_steps": 5})
    directory.write_config(config, origins, {"total_steps": 5})
    directory.close()
    Path("old/checkpoints/5").mkdir(parents=True)


@pytest.mark.usefixtures("old_run")
class TestTheDirectoryOfAnotherRun:
    def test_every_difference_is_named_before_the_data_is_read(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        message = refused(
            [
                "--model",
                "haiku",
                "--output",
                "old",
                "--lr",
                "2e-3",
                "--num_layers",
                "2",
                "--data",
                "/no/such",
                "--seed",
                "3",
            ],
            capfd,
        )
        assert (
            "--output old holds another run: --num_layers was 4 and is 2; --seed was 42 and is 3."
            in message
        )
        assert message.endswith(
            "Name another directory, use the old values, or delete that run with --overwrite."
        )

    def test_resume_never(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert "--output old already holds a run." in refused(
            ["--model", "haiku", "--output", "old", "--lr", "1e-3", "--resume", "never"], capfd
        )

    def test_resuming_from_a_step_without_a_checkpoint(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert "has no checkpoint of that step. Saved steps: 5." in refused(
            ["--model", "haiku", "--output", "old", "--lr", "1e-3", "--resume", "4"], capfd
        )

    def test_a_damaged_config(self, capfd: pytest.CaptureFixture[str]) -> None:
        Path("old/config.yaml").write_text("[")
        assert "old/config.yaml is not YAML (expected" in refused(
            ["--model", "haiku", "--output", "old"], capfd
        )

    @pytest.mark.parametrize("flags", ["", "--overwrite"])
    def test_a_config_of_another_program_is_not_touched(
        self, flags: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        Path("old/config.yaml").write_text("database: prod\n")
        assert (
            "old/config.yaml is not the configuration of a run. Name another --output."
            in refused(["--output", "old", *flags.split()], capfd)
        )
        assert Path("old/config.yaml").read_text() == "database: prod\n"

    @pytest.mark.parametrize(
        ("flag", "inside"),
        [("data", "tokenizer"), ("checkpoint", "final"), ("validation", "final/config.json")],
    )
    def test_overwrite_spares_the_input_of_the_new_run(
        self, flag: str, inside: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree("llama", "old/final")
        shutil.copytree("own", "old/tokenizer")
        message = refused(["--output", "old", "--overwrite", f"--{flag}", f"old/{inside}"], capfd)
        assert (
            f"--overwrite would delete --{flag} old/{inside}, which is in --output old." in message
        )
        assert Path("old/final/config.json").is_file()

    def test_metrics_without_a_config(self, capfd: pytest.CaptureFixture[str]) -> None:
        Path("old/config.yaml").rename("old/metrics.jsonl")
        assert "--output old holds a metrics.jsonl without a config.yaml" in refused(
            ["--model", "haiku", "--output", "old"], capfd
        )
