import struct
from pathlib import Path

import pytest
from logged_runs import CASES, run

from consyn_jax.training.logging.loss_plot import write_loss_plot


@pytest.mark.parametrize("case", CASES)
def test_the_plot_is_a_png_of_a_sensible_size(tmp_path: Path, case: str) -> None:
    path = tmp_path / "loss.png"
    write_loss_plot(CASES[case], path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 1000 < width < 2000
    assert 600 < height < 1200
    assert 8_000 < len(data) < 500_000


def test_the_plot_does_not_change_matplotlibs_settings(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.rcParams["lines.linewidth"] = 7.0
    try:
        write_loss_plot(run(3), tmp_path / "loss.png")
        assert matplotlib.rcParams["lines.linewidth"] == 7.0
    finally:
        matplotlib.rcdefaults()
