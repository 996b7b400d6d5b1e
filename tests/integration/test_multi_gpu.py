"""`benchmarks/multi_gpu.py` rehearsed on two simulated devices."""

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def multi_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, as the script has it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import multi_gpu

    return multi_gpu


@pytest.mark.slow
def test_settings_change_how_a_step_runs_and_not_what_it_computes(multi_gpu: Any) -> None:
    host = multi_gpu.Host(tiny=True)
    names = ("layers in a loop", "one process for each device")
    runs = [
        host.run(2, "fsdp=2", 4, steps=2, setting=setting)
        for setting in (multi_gpu.DEFAULT, *(multi_gpu.SETTINGS[name] for name in names))
    ]
    for found in runs[1:]:
        assert "failed" not in found, found
        assert found["losses"] == pytest.approx(runs[0]["losses"], rel=1e-6)
        assert found["tokens"] == runs[0]["tokens"]


@pytest.mark.slow
def test_a_failure_is_a_row_with_the_error(multi_gpu: Any) -> None:
    found = multi_gpu.Host(tiny=True).run(2, "fsdp=3", 4, steps=1)
    assert "fsdp=3" in found["failed"]
