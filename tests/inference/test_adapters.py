"""A run that trains an adapter, as a model: its exports, its checkpoints, and both merged."""

from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import CONFIG, ROWS

from consyn_jax.cli import convert, train
from consyn_jax.errors import UserError
from consyn_jax.inference.model_source import find_source
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import Params
from consyn_jax.tokenization import BPETokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    base = ConsynLMHeadModel.from_config(CONFIG)
    base.save_pretrained(place / "base", BPETokenizer.bytes())
    (place / "text.txt").write_text("\n".join(str(row) for row in ROWS) * 4)
    argv = f"--checkpoint {place / 'base'} --data {place / 'text.txt'} --lora_rank 4 --lr 1e-2"
    argv += " --max_steps 4 --save_steps 2 --batch_size 8 --max_tokens 32 --quiet"
    argv += f" --validation_fraction 0 --logging_backend none --output {place / 'run'}"
    assert train.main(argv.split()) == 0
    return place / "run"


def same(one: Params, other: Params) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), one, other)


@pytest.mark.slow
def test_a_run_is_the_base_with_its_adapter(run: Path) -> None:
    source = find_source(run)
    assert source.taken == f"final/ of the run {run}, an adapter over {source.base}"
    assert Path(str(source.base)) == (run.parent / "base").resolve()
    assert source.tokenizer is not None
    params = source.parameters()
    base = ConsynLMHeadModel.from_pretrained(run.parent / "base").parameters
    assert not np.allclose(params["layers"]["q"], base["layers"]["q"])
    same(find_source(run, 4).parameters(), params)
    assert not np.allclose(find_source(run, 2).parameters()["layers"]["q"], params["layers"]["q"])


@pytest.mark.slow
def test_an_adapter_is_merged_when_asked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main([str(run), "--output", str(tmp_path / "merged")]) == 2
    assert "is an adapter over" in capsys.readouterr().err
    base = str(run.parent / "base")
    assert convert.main([base, "--merge_lora", "--output", str(tmp_path / "merged")]) == 2
    assert convert.main([str(run), "--merge_lora", "--output", str(tmp_path / "merged")]) == 0
    merged = ConsynLMHeadModel.from_pretrained(tmp_path / "merged")
    same(merged.parameters, find_source(run).parameters())
    assert "peft" not in (tmp_path / "merged" / "README.md").read_text()


def test_another_model_in_the_place_of_the_base_is_refused(run: Path) -> None:
    weights = run.parent / "base" / "model.safetensors"
    kept = weights.read_bytes()
    try:
        other = ConsynLMHeadModel.from_config(CONFIG, seed=9)
        other.save_pretrained(run.parent / "base", BPETokenizer.bytes())
        for step in (None, 4):
            with pytest.raises(UserError, match="an adapter that was trained on other weights"):
                find_source(run, step)
    finally:
        weights.write_bytes(kept)


def test_training_does_not_start_from_an_adapter(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", str(run / "final"), "--output", str(tmp_path / "more")]
    assert train.main(argv) == 2
    assert "--merge_lora" in capsys.readouterr().err
