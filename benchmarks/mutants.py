"""Show that the tests notice a cut wire: harmful changes drawn by mutmut, and what survives.

    pip install mutmut coverage       # coverage in the environment of the tests
    python benchmarks/mutants.py --count 100 --output mutants.json

Each mutant is one change of one line in the code between a flag and what it controls, the loop,
export and restore: an argument removed or replaced by None, another number, operator or constant,
a value not assigned. Texts are not changed. The plain tests run once with coverage.py, which
records for each line the test files that run it, also in processes that tests start. A mutant then
runs against those files, the quick ones first; no other file can notice it. A line that only runs
at import (a default, a table) runs against all files. Compiled programs are kept between mutants,
so most tests take a third of their usual time.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = "consyn_jax"
MUTATED = [
    "config.py",
    "flags.py",
    "resolve.py",
    "optimizer_config.py",
    "config_file.py",
    "cli/train.py",
    "cli/choices/model_choice.py",
    "cli/choices/training_data.py",
    "cli/arguments.py",
    "training/*.py",
    "training/run/*.py",
    "training/checkpointing/*.py",
    "training/optim/*.py",
    "model/pretrained/*.py",
]
# For every process: coverage.py begins with it.
SITE = "import coverage; coverage.process_startup()"
# A plugin of pytest. Coverage contexts are test files, also in processes that tests start. With
# SELECTED, only those files are collected, and run in that order.
PLUGIN = """
import os, pathlib, time
import pytest

SELECTED = os.environ.get("SELECTED", "").split()
LOG = os.environ.get("SECONDS_LOG")

def pytest_ignore_collect(collection_path, config):
    if SELECTED and collection_path.suffix == ".py" and collection_path.name != "__init__.py":
        return str(collection_path.relative_to(config.rootpath)) not in SELECTED or None

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    if SELECTED:
        items.sort(key=lambda item: SELECTED.index(item.nodeid.partition("::")[0]))

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if LOG is None:
        return (yield)
    import coverage
    path, began = item.nodeid.partition("::")[0], time.perf_counter()
    os.environ["TEST_FILE"] = path
    coverage.Coverage.current().switch_context(path)
    try:
        return (yield)
    finally:
        with open(LOG, "a") as log:
            log.write(f"{time.perf_counter() - began:.2f} {path}\\n")
"""
COVERAGE = """
[run]
source_pkgs = consyn_jax
parallel = true
relative_files = true
patch = fork, _exit
data_file = {data}
context = ${{TEST_FILE-}}
"""
# These look at the text of the code, not at what it does.
OF_THE_TEXT = {"tests/test_structure.py", "tests/test_messages.py"}
NOT_DRAWN = {"operator_string"}
LIMIT_S = 2400


@dataclass
class Mutant:
    """One change of one file.

    Attributes:
        outcome: "killed" or "survived", after the run.
        test: the first test that failed.
    """

    path: str
    line: int
    change: list[str]
    source: str = field(repr=False)
    outcome: str = ""
    test: str = ""


class _NoTexts(ast.NodeTransformer):
    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.Constant:
        return ast.Constant(None)

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(None) if isinstance(node.value, str) else node


def without_texts(source: str) -> str:
    """The program, with None for each text."""
    return ast.dump(_NoTexts().visit(ast.parse(source)))


def drawn(count: int, seed: int) -> Iterator[Mutant]:
    """Draw mutants that are other programs, each place in the code alike."""
    from mutmut.mutation import file_mutation, mutators

    file_mutation.mutation_operators = [
        pair for pair in mutators.mutation_operators if pair[1].__name__ not in NOT_DRAWN
    ]
    every = []
    for path in sorted({path for glob in MUTATED for path in (ROOT / PACKAGE).glob(glob)}):
        module, mutations, *_ = file_mutation.create_mutations(str(path), path.read_text())
        every += [(path, module, mutation) for mutation in mutations]
    random.Random(seed).shuffle(every)
    print(f"{len(every):,} mutants")
    for path, module, mutation in every:
        source = module.deep_replace(mutation.original_node, mutation.mutated_node).code
        if without_texts(source) == without_texts(module.code):
            continue
        before, after = module.code.splitlines(), source.splitlines()
        diff = list(difflib.unified_diff(before, after, n=0, lineterm=""))
        line = int(diff[2].split()[1].lstrip("-").split(",")[0])
        yield Mutant(path.relative_to(ROOT).as_posix(), line, diff[3:], source)
        count -= 1
        if not count:
            return


@dataclass
class Coverage:
    """Which test files run a line, from one run of the plain tests.

    Attributes:
        files: by path and line.
        seconds: of each test file in that run.
    """

    files: dict[str, dict[int, list[str]]]
    seconds: Mapping[str, float]

    def tests_of(self, path: str, line: int) -> list[str]:
        """The test files that can notice a change of a line: the module's own, then quick ones."""
        seen = [each for each in self.files.get(path, {}).get(line, []) if each]
        is_import = not seen or "" in self.files[path][line]
        chosen = set(self.seconds if is_import else seen) - OF_THE_TEXT
        own = f"test_{Path(path).stem}.py"
        return sorted(chosen, key=lambda test: (Path(test).name != own, self.seconds[test]))


def covered(tree: Path, python: str, cache: Path) -> Coverage:
    """Run the plain tests with coverage, or read what an earlier call with this cache recorded."""
    record, log = cache / "coverage.json", cache / "seconds.txt"
    if not record.exists():
        (cache / "coverage").mkdir()
        settings = cache / "coverage.ini"
        settings.write_text(COVERAGE.format(data=cache / "coverage" / "data"))
        (cache / "site").mkdir()
        (cache / "site" / "sitecustomize.py").write_text(SITE)
        more = {"COVERAGE_PROCESS_START": str(settings), "SECONDS_LOG": str(log)}
        paths = [str(tree), str(cache), str(cache / "site"), os.environ.get("PYTHONPATH", "")]
        more["PYTHONPATH"] = os.pathsep.join(paths)
        command = [python, "-m", "pytest", "-n2", "-p", "selection", "-p", "no:cacheprovider"]
        with (cache / "coverage.log").open("w") as output:
            start([*command, "tests"], tree, cache, more, stdout=output).wait()
        tool, rc, found = [python, "-m", "coverage"], f"--rcfile={settings}", cache / "all.json"
        start([*tool, "combine", "-q", rc], tree, cache, {}).wait()
        start([*tool, "json", "-q", rc, "--show-contexts", f"-o{found}"], tree, cache, {}).wait()
        contexts = {
            path: about["contexts"]
            for path, about in json.loads(found.read_text())["files"].items()
        }
        record.write_text(json.dumps(contexts))
    seconds: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        took, _, path = line.partition(" ")
        seconds[path] += float(took)
    files = {
        path: {int(line): tests for line, tests in lines.items()}
        for path, lines in json.loads(record.read_text()).items()
    }
    return Coverage(files, seconds)


def start(
    command: list[str], tree: Path, cache: Path, more: dict[str, str], **options: Any
) -> subprocess.Popen[str]:
    """Start a command in a copy of the code, in a process group of its own."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree), str(cache), os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "CONSYN_TEST_DATA": str(ROOT.parent / "shared" / "data"),
    }
    return subprocess.Popen(
        command, cwd=tree, env=environment | more, text=True, process_group=0, **options
    )


def first_failure(tests: list[str], tree: Path, python: str, cache: Path) -> str | None:
    """Run tests until one fails, and return its name."""
    plugins = ["-p", "selection", "-p", "no:cacheprovider"]
    command = [python, "-m", "pytest", "-x", *plugins, "-rfE", "--tb=no", "tests"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with start(command, tree, cache, {"SELECTED": " ".join(tests)}, **pipes) as process:
        try:
            output = process.communicate(timeout=LIMIT_S)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "no end"
    if process.returncode == 0:
        return None
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0][:200] if failed else output[-200:]


def judge(
    mutant: Mutant, coverage: Coverage, trees: SimpleQueue[Path], python: str, cache: Path
) -> Mutant:
    """Run one mutant in a free copy of the code, unless an earlier call with this cache has."""
    verdicts = cache / "verdicts.jsonl"
    key = [mutant.path, mutant.line, mutant.change]
    for line in verdicts.read_text().splitlines() if verdicts.exists() else ():
        known = json.loads(line)
        if known["key"] == key:
            mutant.outcome, mutant.test = known["outcome"], known["test"]
            return mutant
    tree = trees.get()
    place = tree / mutant.path
    original = place.read_text(encoding="utf-8")
    try:
        place.write_text(mutant.source, encoding="utf-8")
        tests = coverage.tests_of(mutant.path, mutant.line)
        failed = first_failure(tests, tree, python, cache)
        mutant.outcome, mutant.test = ("killed", failed) if failed else ("survived", "")
    finally:
        place.write_text(original, encoding="utf-8")
        trees.put(tree)
    with verdicts.open("a") as record:
        verdict = {"key": key, "outcome": mutant.outcome, "test": mutant.test}
        record.write(json.dumps(verdict) + "\n")
    print(
        mutant.outcome,
        f"{mutant.path}:{mutant.line}",
        *mutant.change,
        mutant.test,
        sep="\n  ",
        flush=True,
    )
    return mutant


def main() -> None:
    """Draw, judge, and record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--python", default=sys.executable, help="of the environment with the tests"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, help="a directory for compiled programs, kept")
    parser.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args()
    mutants = list(drawn(chosen.count, chosen.seed))
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(chosen.workers) as pool:
        cache = chosen.cache or Path(folder, "programs")
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(chosen.workers):
            tree = Path(folder, str(number))
            subprocess.run(["git", "clone", "-q", str(ROOT), str(tree)], check=True)
            trees.put(tree)
        cache = cache.absolute()
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "selection.py").write_text(PLUGIN)
        coverage = covered(tree, chosen.python, cache)
        work = partial(judge, coverage=coverage, trees=trees, python=chosen.python, cache=cache)
        judged = list(pool.map(work, mutants))
    survivors = sum(mutant.outcome == "survived" for mutant in judged)
    rows = [
        {key: value for key, value in asdict(each).items() if key != "source"} for each in judged
    ]
    record = {"commit": commit, "seed": chosen.seed, "survivors": survivors, "rows": rows}
    chosen.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{survivors} of {len(judged)} survived.")


if __name__ == "__main__":
    main()
