"""consyn-convert: what is written is whole, is checked, and is what it was made from."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import CONFIG, same

from consyn_jax.cli.convert import main
from consyn_jax.inference.conversion import directories, whole_output
from consyn_jax.inference.model_source import find_source
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.tokenization import BPETokenizer

Convert = Callable[..., tuple[int, str]]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Convert:
    """Run the command in an empty directory; returns its exit code and what it said."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: object) -> tuple[int, str]:
        capfd.readouterr()
        code = main([*map(str, flags)])
        out, err = capfd.readouterr()
        assert out == "", "what a person reads goes to stderr"
        return code, err

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory in bfloat16, as a chat model comes."""
    made = ConsynLMHeadModel.from_config(CONFIG)
    made.save_pretrained(
        tmp_path / "model", BPETokenizer.bytes().with_chat_template(TEMPLATE), "bfloat16"
    )
    generation = '{"eos_token_id": [258, 10], "temperature": 0.6}'
    (tmp_path / "model" / "generation_config.json").write_text(generation)
    return tmp_path / "model"


@pytest.mark.slow
def test_a_directory_keeps_what_it_brought(convert: Convert, model: Path) -> None:
    code, said = convert(model, "--output", "same")
    assert code == 0, said
    assert "the same logits" in said
    for file in model.iterdir():
        assert (Path("same") / file.name).read_bytes() == file.read_bytes(), file.name
    assert {p.name for p in Path("same").iterdir()} - {p.name for p in model.iterdir()} == {
        "README.md",
        "consyn_manifest.json",
    }
    assert not list(Path().glob(".*")), "nothing is left beside it"
    with Path("same/model.safetensors").open("r+b") as file:  # as a faulty disk does
        file.seek(3000)
        file.write(bytes(100))
    code, said = convert("same", "--output", "again")
    assert code == 2
    assert "same is damaged: model.safetensors is not what was written" in said


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_types_and_shards(convert: Convert, model: Path, dtype: str) -> None:
    code, said = convert(model, "--dtype", dtype, "--shard_size", "20KB", "--output", "out")
    assert code == 0, said
    files = sorted(Path("out").glob("*.safetensors"))
    assert len(files) > 2
    values = {name: value for file in files for name, value in load_file(file).items()}
    before = load_file(model / "model.safetensors")
    assert values.keys() == before.keys()
    for name, value in values.items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, before[name].astype(np.float32).astype(dtype))
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == dtype


def test_orbax_is_read_again(convert: Convert, model: Path) -> None:
    assert convert(model, "--to", "orbax", "--output", "arrays")[0] == 0
    source = find_source("arrays")
    assert source.config.files.dtype == "bfloat16"
    assert source.chat_template == TEMPLATE
    assert source.generation_defaults["temperature"] == 0.6
    same(source.parameters(), find_source(model).parameters())
    assert convert("arrays", "--output", "back")[0] == 0
    assert Path("back/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_checkpoint_and_a_mean_of_them(convert: Convert, run: Path) -> None:
    assert convert(run, "--step", 2, "--output", "two")[0] == 0
    assert convert(run, "--output", "four")[0] == 0
    both = [find_source(name).parameters() for name in ("two", "four")]
    code, said = convert(run, "--average", 2, "--output", "mean")
    assert code == 0
    assert f"takes the mean of steps 2, 4 of the run {run}" in said
    mean = jax.tree.map(lambda *p: np.mean([np.asarray(x, np.float64) for x in p], 0), *both)
    found = find_source("mean").parameters()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-7, atol=1e-9), found, mean)
    assert convert(run, "--average", "4,2", "--output", "again")[0] == 0
    same(find_source("again").parameters(), found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "No model is given"),
        (["{run}"], "--output is missing"),
        (["{run}", "out"], "'out' belongs to no flag; name the result with --output."),
        (["{run}", "--output", "{run}"], "exists. Name another"),
        (["{run}", "--output", "file/x"], "cannot be created in"),
        (["{run}", "--output", "x", "--dtype", "q8_0"], "q8_0 needs --to gguf"),
        (["{run}", "--output", "x", "--shard_size", "much"], "--shard_size much is not a size"),
        (["{run}", "--output", "x", "--context", "8"], "--context is for --to gguf"),
        (["{run}", "--output", "x.gguf"], "is the name of a GGUF file, but --to hf writes a dir"),
        (["{run}", "--output", "x", "--to", "orbax", "--shard_size", "1MB"], "is for --to hf"),
        (["{run}", "--output", "x", "--average", "0"], "--average 0 averages nothing"),
        (["{run}", "--output", "x", "--average", "3"], "has fewer checkpoints (steps: 2, 4)"),
        (["{run}", "--output", "x", "--average", "2,3"], "no checkpoint of step 3"),
        (["{run}", "--output", "x", "--average", "2,2"], "a step is given twice"),
        (["{run}", "--output", "x", "--average", "1"], "is one checkpoint. Use --step"),
        (["{run}", "--output", "x", "--average", "all"], "neither a number of checkpoints nor"),
        (["{run}/final", "--output", "x", "--average", "2"], "is not a run"),
        (["{run}", "--output", "x", "--average", "2", "--step", "2"], "do not work together"),
        (["{run}", "--output", "x", "--push_to_hub", "me"], "of the form owner/name"),
        (
            ["{run}", "--output", "x", "--to", "ggml"],
            "--to 'ggml' is not known. Known: hf, gguf, orbax",
        ),
        (["{run}", "--outptu", "x"], "no flag --outptu; did you mean --output?"),
        (["nothing", "--output", "x"], "nothing is not a model: no such directory"),
    ],
)
def test_a_mistake_is_a_sentence(
    convert: Convert, run: Path, flags: list[str], message: str
) -> None:
    Path("file").touch()
    code, said = convert(*(flag.format(run=run) for flag in flags))
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert said.count("\n") == 1
    assert not Path("x").exists()


def test_a_layout_that_is_not_known(convert: Convert, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    code, said = convert(model, "--output", "x")
    assert code == 2
    assert "model_type 'mamba', which is not supported" in said


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_what_is_damaged_while_it_is_written_gets_no_name(
    convert: Convert, model: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    write = getattr(directories, f"write_{to}")

    def faulty(directory: Path, source: object, params: dict[str, object], *more: object) -> None:
        params = {**params, "norm": jnp.zeros_like(params["norm"])}
        write(directory, source, params, *more)

    monkeypatch.setattr(directories, f"write_{to}", faulty)
    code, said = convert(model, "--to", to, "--output", "out")
    assert code == 2
    assert "out was not written: the logits of the new files have a relative error" in said
    assert sorted(p.name for p in Path().iterdir()) == ["model"]


def test_a_full_disk(convert: Convert, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(whole_output.shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    code, said = convert(model, "--output", "out")
    assert code == 2
    assert "needs 0 MB, and 0 MB are free there. Free some" in said


def test_what_is_not_finite_is_not_converted(convert: Convert, model: Path) -> None:
    made = ConsynLMHeadModel.from_pretrained(model)
    broken = {**made.parameters, "norm": made.parameters["norm"].at[3].set(jnp.nan)}
    ConsynLMHeadModel.from_parameters(CONFIG, broken).save_pretrained("broken")
    code, said = convert("broken", "--output", "out")
    assert code == 2
    assert "logits are not finite" in said
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_card_says_what_the_model_is(convert: Convert, run: Path, model: Path) -> None:
    assert convert(run, "--license", "apache-2.0", "--output", "out")[0] == 0
    card = Path("out/README.md").read_text()
    for part in (
        "license: apache-2.0",
        "final/ of the run",
        "| parameters | ",
        "| train/loss | ",
        "| steps | 4 |",
        "| JAX | ",
    ):
        assert part in card
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    assert convert(model, "--output", "theirs")[0] == 0
    card = Path("theirs/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# Theirs\n\n## Conversion\n\nMade with")
    with (model / "README.md").open("wb") as file:
        file.truncate(1 << 40)
    assert convert(model, "--output", "huge")[0] == 0
    assert Path("huge/README.md").stat().st_size < 2 << 20


SLOW_WRITE = """
import sys, time
from consyn_jax.inference.conversion import directories
from consyn_jax.cli.convert import main
write = directories.save_parameters
def slow(directory, *more):
    write(directory, *more)
    open("written", "w").close()
    time.sleep(60)
directories.save_parameters = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_while_writing(convert: Convert, model: Path, number: int) -> None:
    """No name, or a whole model; and the next conversion removes what a kill has left."""
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITE, str(model), "--output", "out"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
    )
    while not Path("written").exists():
        assert child.poll() is None, child.stderr and child.stderr.read()
        time.sleep(0.05)
    child.send_signal(number)
    _, said = child.communicate(timeout=240)
    assert "Traceback" not in said
    assert not Path("out").exists()
    assert Path(".out.new").exists() == (number == signal.SIGKILL)
    code, said = convert("out", "--output", "x")
    assert code == 2
    code, said = convert(model, "--output", "out")
    assert code == 0, said
    assert not Path(".out.new").exists()


ON_SMALL_DISK = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
alone = 0x20000 if os.geteuid() == 0 else 0x10020000  # CLONE_NEWNS, CLONE_NEWUSER
os.makedirs("disk")
mount = libc.unshare(alone) or libc.mount(None, b"/", None, 0x44000, None) or libc.mount(
    b"none", b"disk", b"tmpfs", 0, b"size=32k"
)
if mount:
    os._exit(99)
from consyn_jax.inference.conversion import whole_output
whole_output.SPARE_BYTES = -1 << 40  # somebody else fills the disk after the check
from consyn_jax.cli.convert import main
code = main(sys.argv[1:])
print(os.listdir("disk"), flush=True)
os._exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "orbax", "gguf"])
def test_a_disk_that_fills_up(convert: Convert, model: Path, to: str) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    config = json.loads((model / "config.json").read_text())
    if to == "gguf":  # llama.cpp has no window in a qwen2
        config |= {"use_sliding_window": False, "layer_types": ["full_attention"] * 2}
    (model / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", ON_SMALL_DISK, str(model), "--to", to, "--output", "disk/out"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 99:
        message = "needs to mount a file system of its own"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    assert done.returncode == 2, done.stderr
    assert "could not be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == "[]\n"
