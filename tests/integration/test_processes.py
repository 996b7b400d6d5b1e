"""Several processes of `consyn-train` as one run, over gloo, and what happens if one fails."""

import json
import re
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from free_ports import free_port
from transformers import AutoModelForCausalLM

from consyn_jax.distributed.process_group import CONTINUE_ADVICE, LOST

from .conftest import Run
from .nursery import FLAGS, SLOW, TRACKED, Child, Nursery, held, trained

OFTEN = ["--eval_steps", "3", "--save_steps", "2"]
EARLY = [
    "--early_stopping_patience",
    "1",
    "--early_stopping_min_delta",
    "0.2",
    "--early_stopping_min_steps",
    "6",
    "--load_best_model_at_end",
]


def who(number: int, child: Child) -> str:
    return f"process {number} (pid {child.pid} on {socket.gethostname()})"


def killed(children: list[Child], victim: int) -> None:
    """Kill one process, and check that the others end within a minute."""
    children[victim].signal(signal.SIGKILL)
    began = time.monotonic()
    for child in children:
        child.wait(60)
    passed = time.monotonic() - began
    print(f"process {victim} of {len(children)} killed: the others ended {passed:.2f} s later")


def sentence(child: Child) -> str:
    """The message of a process, without the noise of gloo and JAX's own report of a death."""
    return "".join(
        line for line in child.said.splitlines(True) if line.startswith("consyn-train: ")
    )


@pytest.mark.slow
def test_one_of_four_is_killed_and_two_continue_the_run_and_stop_early_together(
    nursery: Nursery,
    corpus: Path,
    tmp_path: Path,
) -> None:
    flags, path = [*FLAGS, *OFTEN, *EARLY, "--data", corpus], tmp_path / "run"
    alone = nursery.start(*flags, "--output", tmp_path / "alone")
    four = nursery.together(*flags, "--output", path, processes=4, before=SLOW)
    trained(path, 6, four[0])  # step 4 is saved
    killed(four, 2)
    for number in (0, 1, 3):
        assert four[number].code == LOST, four[number].said
        assert (
            sentence(four[number])
            == f"consyn-train: {who(2, four[2])} is gone, so the run ends. {CONTINUE_ADVICE}\n"
        )
    two = nursery.together(*flags, "--output", path)
    assert [child.wait() for child in two] == [0, 0], [child.said for child in two]
    assert alone.wait() == 0, alone.said
    whole, run = Run(tmp_path / "alone", 0, alone.said), Run(path, 0, two[0].said)

    assert run.events.count("resume") == 1
    assert run.events.count("early_stop") == whole.events.count("early_stop") == 1
    assert [line["step"] for line in run.numbers] == [line["step"] for line in whole.numbers]
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        ours, theirs = (
            [line[name] for line in each.numbers if name in line] for each in (run, whole)
        )
        assert len(ours) >= 2
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(each.path / "final").state_dict()
        for each in (run, whole)
    )
    for name, weights in ours.items():
        np.testing.assert_allclose(weights, theirs[name], rtol=1e-3, atol=1e-5)
    assert [child.said.count("Everything is in") for child in two] == [1, 0]
    assert all((path / name).is_file() for name in ("report.html", "loss.png"))
    config = (path / "config.yaml").read_text()
    assert re.search(
        r"^distributed: false +# default\ncoordinator_address: null +# default\n",
        config,
        re.MULTILINE,
    ), "these flags are of one start and not of the run"
    assert not (path / "lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_is_killed(victim: int, nursery: Nursery, corpus: Path, tmp_path: Path) -> None:
    two = nursery.together(
        *FLAGS, *OFTEN, "--data", corpus, "--output", tmp_path / "run", before=SLOW
    )
    trained(tmp_path / "run", 3, two[0])
    killed(two, victim)
    survivor = two[1 - victim]
    if not victim and survivor.code == -signal.SIGABRT:
        # JAX aborts when process 0 is gone. Usually our message is out by then.
        assert "JAX distributed service detected fatal errors" in survivor.said
        return
    assert survivor.code == LOST, survivor.said
    ended = (
        f"consyn-train: {who(victim, two[victim])} is gone, so the run ends. {CONTINUE_ADVICE}\n"
    )
    assert ended in survivor.said


STOPPER = """
import os
class Stopper:
    def on_step(self, run, values):
        (run.directory / f"called-by-{os.getpid()}").touch()
        if values["step"] == 5:
            run.stop("it has seen enough")
"""


@pytest.mark.slow
def test_a_callback_ends_both_processes_after_the_same_step(
    nursery: Nursery, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "stopper.py").write_text(STOPPER)
    path, before = tmp_path / "run", f"import sys\nsys.path.append({str(tmp_path)!r})"
    named = ["--logging_backend", "stopper:Stopper"]
    flags = [*TRACKED, *OFTEN, "--data", corpus, "--output", path, *named]
    two = nursery.together(*flags, before=before)
    assert [child.wait() for child in two] == [0, 0], [child.said for child in two]
    run = Run(path, 0, two[0].said)
    (stop,) = (line for line in run.lines if line.get("event") == "stop")
    assert (stop["by"], stop["reason"]) == ("Stopper", "it has seen enough")
    assert 5 < stop["step"] <= 8
    assert (run.lines[-1]["event"], run.lines[-1]["step"]) == ("finish", stop["step"])
    assert (path / "checkpoints" / str(stop["step"])).is_dir()
    assert (path / "final" / "model.safetensors").is_file()
    called = [place.name for place in path.glob("called-by-*")]
    assert called == [f"called-by-{two[0].pid}"], "by the process that writes"
    again = nursery.together(*flags, before=before)
    assert [child.wait() for child in again] == [0, 0], [child.said for child in again]
    assert Run(path, 0, "").lines == run.lines


STUCK = """
import time
from consyn_jax.data import loader
from consyn_jax.distributed import launch
inner, meet = loader.BatchLoader.batch, launch.meet
def one(place, *more):
    def batch(self, step):
        if place.process_id == 1 and step == 6: time.sleep(1000)
        return inner(self, step)
    loader.BatchLoader.batch = batch
    return meet(place, *more)
launch.meet = one
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_stuck_process_is_named_and_all_write_their_stacks(
    nursery: Nursery,
    corpus: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "run"
    children = nursery.together(
        *FLAGS,
        *OFTEN,
        "--watchdog_minutes",
        "0.1",
        "--data",
        corpus,
        "--output",
        path,
        before=STUCK,
    )
    assert [child.wait() for child in children] == [LOST, LOST], [child.said for child in children]
    for child in children:
        assert re.search(
            rf"consyn-train: No progress for \d+ s \(a step takes [\d.e-]+ s\)\. "
            rf"The run waits for {re.escape(who(1, children[1]))}, waiting for data at step 7\. "
            r"The others are stepping at step [78]\. The stack traces are in ",
            child.said,
        ), child.said
    about = [json.loads((path / "stacks" / f"rank-{number}.json").read_text()) for number in (0, 1)]
    assert [(each["phase"], each["pid"]) for each in about] == [
        ("stepping", children[0].pid),
        ("waiting for data", children[1].pid),
    ]
    assert "in _loop" in (path / "stacks" / "rank-0.txt").read_text()
    assert "in batch" in (path / "stacks" / "rank-1.txt").read_text()


# ----------------------------------------------------------------------------------- wrong launches

HURRY = ["--rendezvous_seconds", "4"]
ONE_GPU = "import consyn_jax.distributed.launch as launch\nlaunch.visible_gpus = lambda: ['0']\n"


@pytest.mark.slow
def test_a_wrong_launch_ends_each_process_with_one_sentence(
    nursery: Nursery,
    corpus: Path,
    tmp_path: Path,
) -> None:
    def launched(
        *flags: object, address: str = "", number: int, count: int = 2, before: str = ""
    ) -> Child:
        where = [
            "--distributed",
            "--coordinator_address",
            address,
            "--num_processes",
            count,
            "--process_id",
            number,
        ]
        return nursery.start(
            *(*FLAGS, "--output", tmp_path / "run", *where, *flags),
            devices=1,
            before=before,
        )

    def refused(*children: Child, code: int = 2) -> list[str]:
        assert [child.wait() for child in children] == [code] * len(children), [
            child.said for child in children
        ]
        for child in children:
            assert "Traceback" not in child.said
        return [sentence(child) for child in children]

    port = iter([free_port() for _ in range(8)])
    data = ["--data", corpus]

    address = f"localhost:{next(port)}"
    flags = [
        launched(*data, "--lr", 0.1 * (number + 1), address=address, number=number)
        for number in range(2)
    ]
    address = f"localhost:{next(port)}"
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().replace("Document", "Paper"))
    texts = [
        launched("--data", text, address=address, number=number)
        for number, text in enumerate((corpus, other))
    ]
    address = f"localhost:{next(port)}"
    absent = [
        launched("--data", text, address=address, number=number)
        for number, text in enumerate((corpus, tmp_path / "absent.txt"))
    ]
    address = f"localhost:{next(port)}"
    mesh = [
        launched(*data, "--mesh", "data=3", address=address, number=number) for number in range(2)
    ]
    address = f"localhost:{next(port)}"
    versions = [
        launched(*data, address=address, number=0),
        launched(
            *data,
            address=address,
            number=1,
            before="import jax, importlib.metadata as m\n"
            "m.version = lambda name: '0.1' if name == 'jax' else '2'",
        ),
    ]
    address = f"localhost:{next(port)}"
    crowded = [
        launched(*data, address=address, number=number, before=ONE_GPU) for number in range(2)
    ]

    assert set(refused(*flags)) == {
        "consyn-train: The processes of this run differ in --lr: "
        "0.1 in process 0, 0.2 in process 1. "
        "Start all with one command, the same packages and one kind of machine.\n"
    }
    assert all(
        "The processes of this run differ in the training data: " in said
        for said in refused(*texts)
    )
    first, second = refused(*absent)
    assert second.startswith(f"consyn-train: {tmp_path / 'absent.txt'} in --data does not exist.")
    assert first == second.replace("consyn-train: ", f"consyn-train: {who(1, absent[1])}: ")
    assert all(
        "--mesh data=3 is for 3 devices, and there are 2. Make the product of the axes 2." in said
        for said in refused(*mesh)
    )
    assert all("; jax: " in said or " in jax: " in said for said in refused(*versions))
    assert set(refused(*crowded)) == {
        f"consyn-train: {socket.gethostname()} has 2 processes and 1 GPU, which cannot be shared "
        f"evenly. Start one process per GPU, or one per host.\n"
    }

    # Now that no other process starts, these come within seconds of each other.
    hurried, address = [*data, *HURRY], f"localhost:{next(port)}"
    missing = [launched(*hurried, address=address, number=number, count=3) for number in (0, 2)]
    nobody = launched(*hurried, address=f"localhost:{next(port)}", number=1)
    assert all(
        said.startswith("consyn-train: Of 3 processes, process 1 did not connect to localhost:")
        for said in refused(*missing, code=LOST)
    )
    assert all(
        "Process 0 does not answer at --coordinator_address localhost:" in said
        for said in refused(nobody, code=LOST)
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ------------------------------------------------------------------------------ one run, one writer


@pytest.mark.slow
def test_a_second_run_is_refused_a_directory_in_use_but_may_continue_a_dead_run(
    nursery: Nursery,
    corpus: Path,
    tmp_path: Path,
) -> None:
    flags = [*FLAGS, *OFTEN, "--data", corpus, "--output", tmp_path / "run"]
    first = nursery.start(*flags, before=held(5, tmp_path / "never"))
    trained(tmp_path / "run", 1, first)
    second = nursery.start(*flags)
    assert second.wait() == 2
    assert re.fullmatch(
        rf"consyn-train: --output {re.escape(str(tmp_path / 'run'))} is in use by another process: "
        rf"pid {first.pid} on {re.escape(socket.gethostname())}, "
        r"since 20[\d: +-]+\. Wait for that process, or name another directory\.\n",
        second.said,
    ), second.said
    assert first.alive
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert (tmp_path / "run" / "lock").exists()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    third = nursery.start(*flags, before=SLOW)
    trained(tmp_path / "run", 1, third)
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == third.pid
    third.signal(signal.SIGTERM)
    assert third.wait() == 75, third.said
    assert not (tmp_path / "run" / "lock").exists()
