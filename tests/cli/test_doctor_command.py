"""`consyn-doctor` from the command line, on this machine and on bad ones."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_port

from consyn_jax.cli import doctor
from consyn_jax.doctor import examination
from consyn_jax.doctor.gpu_facts import DriverState, read_driver
from consyn_jax.doctor.machine_findings import Finding, lines


def test_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Right in every line, on a machine without a GPU."""
    assert doctor.main(["--quick", "--json", "--output", str(tmp_path / "run")]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {each["name"]: each for each in report["checks"]}
    assert report["fit"]
    driver = read_driver()
    if not (driver.count or driver.version or driver.on_the_bus):
        assert found["GPU"]["status"] == "warn"
        assert not {"driver", "GPUs", "ECC", "NVLink", "CUDA plugin", "cuDNN"} & found.keys()
    assert found["devices"]["found"] == "8 x cpu (cpu)"
    assert found["machine"]["found"].startswith(f"{len(os.sched_getaffinity(0))} core")
    total = shutil.disk_usage(tmp_path).total
    assert f"of {total / 1e9:.1f} GB" in found["disk space"]["found"]
    assert found["file locks"]["status"] == "pass"
    assert found["hosts"]["found"].startswith("n/a")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_is_a_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = DriverState("470.57.02", (11, 4), devices=1, on_the_bus=1)
    monkeypatch.setattr(examination, "read_driver", lambda: old)
    assert doctor.main(["--quick", "--output", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "fail  CUDA plugin" in out
    assert "none is installed, so JAX does not see GPUs" in out
    assert "-> Install it: pip install -U 'jax[cuda13]'." in out
    assert err.startswith("consyn-doctor: Not fit for training: CUDA plugin")
    assert err.count("\n") == 1


def test_lines_fit_a_terminal_and_keep_their_columns() -> None:
    shown = lines(
        [
            Finding("disk", "pass", "word " * 40),
            Finding("ECC", "fail", "3 errors", "Reset " * 30, host="node7"),
        ]
    )
    assert max(map(len, shown)) <= 100
    assert shown[0].startswith("pass  disk               word")
    assert any(line.startswith("fail  ECC                node7: 3 errors") for line in shown)
    assert shown[-1] == "2 checks: 1 pass, 1 fail."


def test_a_wrong_flag_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--outptu", "x"]) == 2
    assert "did you mean --output?" in capsys.readouterr().err


def test_help_imports_no_jax() -> None:
    program = (
        "import sys\nfrom consyn_jax.cli.doctor import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_two_processes_report_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Process 0 has the findings of both; threads play the processes."""
    import socket

    def machine(_: Any) -> list[Finding]:
        return [Finding("disk", "pass", "fine")]

    monkeypatch.setattr(examination, "examine_machine", machine)
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    port = free_port()

    def one(number: int) -> list[Finding]:
        argv = ["--distributed", "--coordinator_address", f"localhost:{port}"]
        argv += ["--num_processes", "2", "--process_id", str(number)]
        return examination.examine(doctor.read_arguments(argv))

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(one, range(2))
    assert second == []
    assert [(each.name, each.status) for each in first] == [
        ("clocks", "pass"),
        ("network", "pass"),
        ("disk", "pass"),
    ]
    assert first[2].host == "localhost"
