"""The end of a run: the sample, the best model, the last event, and what an export refuses."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError

from consyn_jax.config import EvaluationOptions
from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.checkpointing.best_evaluation import Selection
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.logging.console import Console
from consyn_jax.training.logging.metrics import MetricsLog
from consyn_jax.training.run import ending
from consyn_jax.training.run.ending import best_model, record_end, sample
from consyn_jax.training.run.export import export_model
from consyn_jax.training.run.live_report import LiveReport
from consyn_jax.training.run.model_manifest import seal
from consyn_jax.training.run.recording import Recorder

SMALL = ModelConfig(
    vocab_size=259,
    hidden_dim=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=8,
    context=64,
)


@pytest.mark.parametrize(("tokens", "drawn"), [(200, 63), (20, 20)])
def test_a_sample_fits_the_context_and_is_drawn_with_the_seed(
    tokens: int, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = BPETokenizer.bytes()
    model = Mock(spec=ConsynLMHeadModel, config=SMALL)
    model.generate.return_value = jnp.array([[ord("o"), ord("k")]])
    made = Mock(return_value=model)
    monkeypatch.setattr(ConsynLMHeadModel, "from_parameters", made)
    monkeypatch.setattr(ending, "SAMPLE_TOKENS", tokens)
    assert sample(SMALL, {"w": 1}, tokenizer, 5) == "ok"
    made.assert_called_once_with(SMALL, {"w": 1})
    ((prompt, length), how) = model.generate.call_args
    first = next(i for i in (tokenizer.first_id, tokenizer.eos_token_id) if i is not None)
    np.testing.assert_array_equal(prompt, [[first]])
    assert (length, how) == (drawn, {"temperature": 0.8, "top_k": 50, "seed": 5})


@pytest.fixture
def recorder() -> Mock:
    console = Mock(spec=Console)
    recorder = Mock(spec=Recorder, progress=Progress(), console=console, log=Mock())
    recorder.sources_taken.return_value = {"sources": {"a": 3}}
    return recorder


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("draws", [True, False, None])
@pytest.mark.parametrize("best_step", [6, None])
def test_the_last_event_has_the_best_step_and_the_losses_are_drawn_if_wanted(
    writes: bool,
    draws: bool | None,
    best_step: int | None,
    recorder: Mock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = Mock()
    monkeypatch.setattr(ending, "draw_losses", drawn)
    recorder.progress.selection = Selection(best_step=best_step)
    if not writes:
        recorder.log = None
    report = Mock(spec=LiveReport)
    record_end(tmp_path, report, recorder, **({} if draws is None else {"draws": draws}))
    given = [((tmp_path, recorder),)] if writes and draws is not False else []
    assert drawn.call_args_list == given
    best = {} if best_step is None else {"best_step": 6}
    recorder.event.assert_called_once_with("finish", {**best, "sources": {"a": 3}})
    assert report.finish.called
    assert recorder.flush.called


def test_the_losses_of_the_log_are_drawn(
    recorder: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MetricsLog(tmp_path) as log:
        line = log.write(1, 8, {"train/loss": 2.0})
    drawn = Mock()
    monkeypatch.setattr(ending, "write_loss_plot", drawn)
    ending.draw_losses(tmp_path, recorder)
    drawn.assert_called_once_with([line], tmp_path / "loss.png")
    assert not recorder.console.warn.called
    for error, reason in (
        (OSError(errno.ENOSPC, "No space left on device"), "(No space left on device)"),
        (TypeError("a defect"), "(TypeError: a defect)"),
    ):
        drawn.side_effect = error
        ending.draw_losses(tmp_path, recorder)
        assert reason in recorder.console.warn.call_args.args[0]


def choice(path: Path, recorder: Mock, *, is_wanted: bool = True) -> Path | None:
    return best_model(path, EvaluationOptions(load_best_model_at_end=is_wanted), recorder)


def test_the_best_model_is_exported_if_it_is_wanted_and_whole(
    tmp_path: Path, recorder: Mock
) -> None:
    best = tmp_path / "best"
    assert choice(tmp_path, recorder) is None
    assert not recorder.console.warn.called, "there was never a best model"
    recorder.progress.selection = Selection(best_step=6)
    assert choice(tmp_path, recorder) is None
    assert recorder.console.warn.call_args.args[0].startswith(f"{best} was deleted, so final/ has")
    best.mkdir()
    (best / "config.json").write_text("{}")
    assert choice(tmp_path, recorder) == best
    assert "exported by an older version" in recorder.console.warn.call_args.args[0]
    assert recorder.console.warn.call_count == 2
    seal(best)
    assert choice(tmp_path, recorder) == best
    assert choice(tmp_path, recorder, is_wanted=False) is None
    (best / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"best/config\.json is not what was written, so this"):
        choice(tmp_path, recorder)
    assert choice(tmp_path, recorder, is_wanted=False) is None
    assert recorder.console.warn.call_count == 2


def saving(error: Exception | None) -> Any:
    def save(directory: Path, config: ModelConfig, params: Any) -> None:
        assert (config, params) == (SMALL, {"w": 1})
        if str(error) != "strange":  # which comes before the first file
            directory.mkdir(parents=True)
            (directory / "model.safetensors").write_bytes(b"weights")
        if error is not None:
            raise error

    return save


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("strange"), "strange"),
        (SafetensorError("I/O error: File too large (os error 27)"), "File too large"),
        (SafetensorError("a defect"), None),
    ],
)
def test_a_model_that_cannot_be_written_leaves_the_old_one(
    error: Exception, reason: str | None, tmp_path: Path
) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "old").touch()
    with pytest.raises(UserError if reason else SafetensorError) as refused:
        export_model(tmp_path / "best", SMALL, {"w": 1}, None, save=saving(error))
    if reason:
        assert f"/best could not be written: {reason}. " in str(refused.value)
        assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["best", "best/old"]


def test_a_tokenizer_is_exported_for_the_family_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    tokenizer = Mock(spec=BPETokenizer)
    tokenizer.save.side_effect = lambda place, family: order.append(family)

    def facts(weights: Mapping[str, str]) -> str:
        return json.dumps(sorted(weights))

    def before() -> None:
        order.append("before" if not (tmp_path / "final").exists() else "late")

    export_model(tmp_path / "final", SMALL, {"w": 1}, tokenizer, before, facts, saving(None))
    assert order == ["qwen3", "before"]
    assert json.loads((tmp_path / "final/provenance.json").read_text()) == ["model.safetensors"]
