"""What a user names as a model, and the weights that come of it."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from small_runs import CONFIG, MESH, SIZES, same, trained

from consyn_jax.distributed.mesh import build_mesh
from consyn_jax.errors import UserError
from consyn_jax.inference.model_source import find_source
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.tokenization import BPETokenizer


@pytest.fixture
def copy(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # people give relative paths
    return Path(shutil.copytree(run, "copy"))


@pytest.mark.slow
def test_a_run_gives_final_then_best_then_its_newest_checkpoint(copy: Path) -> None:
    final = find_source(copy)
    assert final.taken == f"final/ of the run {copy}"
    assert final.tokenizer is not None
    assert final.tokenizer.vocab_size == 259
    weights = final.parameters()
    (copy / "final").rename(copy / "best")
    assert find_source(copy).taken == f"best/ of the run {copy}"
    shutil.rmtree(copy / "best")
    newest = find_source(copy)
    assert newest.taken == f"step 4 of the run {copy}"
    assert (newest.run, newest.step) == (copy, 4)
    same(newest.parameters(), weights)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="has saved nothing yet"):
        find_source(copy)


def test_a_checkpoint_knows_its_architecture_and_tokenizer(copy: Path) -> None:
    shutil.rmtree(copy / "final")
    by_flag, by_path = find_source(copy, 2), find_source(copy / "checkpoints" / "2")
    for source in (by_flag, by_path):
        kept = {name: getattr(CONFIG, name) for name in SIZES} | {"qkv_bias": True}
        assert {name: getattr(source.config, name) for name in kept} == kept
        assert source.config.sliding_window == 9
        assert source.taken == f"step 2 of the run {copy}"
        assert source.tokenizer is not None
    assert by_flag.model().tokenizer is not None
    same(by_flag.parameters(), by_path.parameters())


@pytest.mark.parametrize("name", ["final", "checkpoints/4"])
def test_weights_come_onto_a_mesh_and_in_a_smaller_type(run: Path, name: str) -> None:
    source, mesh = find_source(run / name), build_mesh(MESH, jax.devices()[:4])
    whole = source.parameters()
    parts = source.parameters(mesh, jnp.bfloat16)
    assert parts["layers"]["gate"].addressable_shards[0].data.shape == (2, 16, 24)
    same(parts, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), whole))


@pytest.mark.slow
def test_schedule_free_training_gives_its_average(tmp_path: Path) -> None:
    trained(tmp_path, optimizer="schedule_free_adamw", learning_rate=1e-2)
    exported = find_source(tmp_path / "final").parameters()
    same(find_source(tmp_path, 4).parameters(), exported)
    mesh = build_mesh(MESH, jax.devices()[:4])
    halves = find_source(tmp_path, 4).parameters(mesh, jnp.bfloat16)
    same(halves, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exported))


def test_a_run_of_an_earlier_version_goes_by_its_exports_and_flags(copy: Path) -> None:
    old = yaml.safe_load((copy / "config.yaml").read_text())
    known = find_source(copy, 4).config
    del old["derived"]["architecture"], old["derived"]["generation_config"]
    (copy / "config.yaml").write_text(yaml.safe_dump(old))
    assert find_source(copy, 4).config.qkv_bias
    shutil.rmtree(copy / "final")
    by_flags = find_source(copy, 4)
    assert by_flags.config.hidden_dim == known.hidden_dim
    assert by_flags.config.eos_token_id == known.eos_token_id == 258
    with pytest.raises(UserError, match="holds another model: params/layers/k_bias is"):
        by_flags.parameters()  # no flag says that queries have biases


def test_the_files_of_a_directory_are_read_only_when_they_are_asked_for(run: Path) -> None:
    final = run / "final"
    source = find_source(final)
    assert (source.run, source.step, source.directory) == (None, None, final)
    same(source.model().parameters, ConsynLMHeadModel.from_pretrained(final).parameters)
    assert source.generation_defaults == {
        "bos_token_id": 257,
        "eos_token_id": 258,
        "pad_token_id": 256,
    }
    assert source.chat_template is None


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("verse", None, "is the name of an architecture, for which no weights are published"),
        ("nothing", None, "nothing is not a model: no such directory"),
        ("Some/Model", 4, "--step 4 is for a local run, not for Some/Model"),
        ("run", 3, "has no checkpoint of step 3. Its checkpoints are: 2, 4"),
        ("run/final", 2, "--step 2 is for a run, but run/final is not one"),
        ("run/checkpoints", None, "contains the checkpoints of a run. Give run, with --step"),
        ("run/checkpoints/2", 4, "is already a checkpoint. Leave --step out"),
        ("run/logs", None, "has neither a config.json nor the config.yaml of a run"),
        ("run/final/model.safetensors", None, "a file of weights without its configuration"),
        (
            "run/model.gguf",
            None,
            "is a GGUF file, which consyn-convert writes but no command reads",
        ),
    ],
)
def test_what_is_no_model_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int | None, message: str
) -> None:
    copy = copy.rename(copy.with_name("run"))
    (copy / "logs").mkdir(exist_ok=True)
    (copy / "model.gguf").touch()
    with pytest.raises(UserError, match=message):
        find_source(name, step)


def test_links_out_of_a_model_or_run_are_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("{}")
    for name, place in (("final/generation_config.json", copy / "final"), ("config.yaml", copy)):
        kept = (copy / name).read_bytes()
        (copy / name).unlink()
        (copy / name).symlink_to(tmp_path / "theirs")
        with pytest.raises(UserError, match=f"{Path(name).name} is a link to .*theirs"):
            find_source(place)
        (copy / name).unlink()
        (copy / name).write_bytes(kept)


def test_damage_is_named(copy: Path) -> None:
    array = next(f for f in (copy / "checkpoints/4/state").rglob("*") if f.stat().st_size > 9000)
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 1
    array.write_bytes(data)
    with pytest.raises(UserError, match=r"4 is damaged: .* is not what was written"):
        find_source(copy, 4).parameters()
    (copy / "final/tokenizer.json").write_text(BPETokenizer().to_json())
    with pytest.raises(UserError, match="has 49,152 tokens, but the model has only 259"):
        find_source(copy)
    config = json.loads((copy / "final/config.json").read_text())
    (copy / "final/config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(UserError, match="model_type 'bert', which is not supported"):
        find_source(copy)


def test_a_renamed_checkpoint_is_refused(copy: Path) -> None:
    (copy / "checkpoints/4").rename(copy / "checkpoints/5")
    for source in (find_source(copy, 5), find_source(copy / "checkpoints/5")):
        with pytest.raises(UserError, match="the name of step 5, but contains the state of step 4"):
            source.parameters()
