"""Command lines: the flags are a reviewed contract, and a mistake gets one sentence."""

import importlib
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consyn_jax import __version__
from consyn_jax.cli import prepare
from consyn_jax.cli.train import main, read_arguments
from consyn_jax.config import RunConfig
from consyn_jax.doctor.doctor_options import DoctorConfig
from consyn_jax.errors import UserError
from consyn_jax.flags import flags
from consyn_jax.inference.conversion.conversion_options import ConvertConfig
from consyn_jax.inference.scoring.evaluation_options import EvaluateConfig
from consyn_jax.inference.text_generation.generation_options import GenerateConfig
from consyn_jax.prepare_config import PrepareConfig
from consyn_jax.reporting.report_options import ReportConfig
from consyn_jax.tuning.tune_options import NOT_HERE, TuneConfig

Tree = type[Any]
COMMANDS = {
    "train": RunConfig,
    "prepare": PrepareConfig,
    "convert": ConvertConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "doctor": DoctorConfig,
    "report": ReportConfig,
    "tune": TuneConfig,
}
REFUSED = {"tune": set(NOT_HERE)}  # no help lists them
SHORT_HELP = ("train", "tune", "prepare", "generate", "evaluate")  # --help lists 15 flags


def command(name: str) -> Callable[[list[str]], int]:
    """The entry point of `consyn-NAME`."""
    main: Callable[[list[str]], int] = importlib.import_module(f"consyn_jax.cli.{name}").main
    return main


def listed(tree: Tree) -> str:
    """Every flag with its aliases, default and choices, a line each."""
    lines = []
    for flag in flags(tree).values():
        names = " ".join(f"--{name}" for name in (flag.name, *flag.aliases))
        lines.append(
            f"{flag.group}: {names} = {flag.default!r}"
            + (f" of {'|'.join(flag.choices)}" if flag.choices else "")
            + (", mathematics" if flag.math else "")
        )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("train", "flags.txt"),
        *((name, f"flags-{name}.txt") for name in COMMANDS if name != "train"),
    ],
)
def test_the_flags_are_the_agreed_ones(name: str, file: str) -> None:
    """A difference changes the contract: rewrite the file with `listed` and say why."""
    assert listed(COMMANDS[name]) == Path(__file__).with_name(file).read_text()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_fits_the_terminal_and_names_every_flag(
    name: str, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as ended:
        command(name)(["--help", "all"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert max(map(len, text.splitlines())) <= int(columns)
    for flag_name, flag in flags(COMMANDS[name]).items():
        if flag_name in REFUSED.get(name, set()):
            continue
        assert re.search(rf"--{flag_name}\b", text), flag_name
        assert not flag.choices or all(choice in text for choice in flag.choices)


@pytest.mark.parametrize("columns", ["60", "80"])
@pytest.mark.parametrize("name", SHORT_HELP)
def test_the_help_of_commands_with_many_flags_is_short(
    name: str, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    common = importlib.import_module(f"consyn_jax.cli.{name}").COMMON
    with pytest.raises(SystemExit) as ended:
        command(name)(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    listed = re.findall(r"^  (?:-h, )?--(\w+)", text, re.MULTILINE)
    assert sorted(listed) == sorted(["help", "version", *common])
    assert len(common) == 15
    assert set(common) <= {"config", "dry_run", *flags(COMMANDS[name])}
    assert re.search(rf"^\d+ more flags: consyn-{name} --help all$", text, re.MULTILINE)
    if columns == "80":
        assert max(map(len, text.splitlines())) <= 80
    with pytest.raises(SystemExit):
        command(name)(["-h", "all"])
    whole = capsys.readouterr().out
    refused = REFUSED.get(name, set())
    named = set(re.findall(r"^  --(\w+)", whole, re.MULTILINE))
    assert set(flags(COMMANDS[name])) - refused <= named
    assert not refused & named
    assert len(text.splitlines()) < (0.33 if name in ("train", "tune") else 1) * len(
        whole.splitlines()
    )
    assert "more flags" not in whole


def test_help_of_something_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", "lr"]) == 2
    assert "--help takes no value except all, not 'lr'" in capsys.readouterr().err


LOADED = """
import importlib, sys
try:
    importlib.import_module("consyn_jax.cli." + sys.argv[1]).main(sys.argv[2:])
finally:
    print("jax" in sys.modules, "numpy" in sys.modules, file=sys.stderr)
"""


def _seconds_of_children() -> float:
    """Processor time, which other load does not lengthen."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        *(
            ["train", *words]
            for words in (
                ["--help"],
                ["--help", "all"],
                ["--version"],
                ["--print_config"],
                ["--lrr", "3"],
                ["--scheduler", "x"],
                ["--model", "x"],
            )
        ),
        *(
            ["prepare", *words]
            for words in (
                ["--help"],
                ["--version"],
                ["--print_config"],
                ["--outputs", "x"],
                ["--test_fraction", "1"],
            )
        ),
        *(["convert", *words] for words in (["--help"], ["x", "--outputs", "y"])),
        *(["evaluate", *words] for words in (["--help"], ["x", "--strid", "8"])),
        *(["report", *words] for words in (["--help"], ["x", "--outputs", "y"], [])),
        *(["tune", *words] for words in (["--help"], ["--search", "lrr=1:2"], [])),
    ],
)
def test_commands_that_do_not_need_jax_do_not_import_it(argv: list[str], tmp_path: Path) -> None:
    began = _seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "False False"
    # 0.1 s; the bound that matters is the line above.
    assert _seconds_of_children() - began < 5
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["train", "prepare"])
def test_missing_data_is_reported_without_importing_jax(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, name, "--data", "/no/such"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert "/no/such in --data does not exist" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("False ")


@pytest.mark.parametrize("name", COMMANDS)
def test_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(name)(["--version"])
    assert capsys.readouterr().out == f"consyn-{name} {__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["--batch_size", "4", "--learning_rate", "1e-4"],
        ["--batch-size", "4", "--learning-rate", "1e-4"],
        ["--batch_size=4", "--lr=1e-4"],
        ["--batch-size=16", "--lr", "3", "--batch_size", "4", "--lr", "1e-4"],
    ],
)
def test_flags_can_be_written_in_several_ways(argv: list[str]) -> None:
    config, origins, _ = read_arguments(argv)
    assert (config.budget.batch_size, config.optimizer.lr, origins["lr"]) == (4, 1e-4, "flag")


def test_a_list_that_is_given_twice_has_the_values_of_both() -> None:
    config, _, _ = read_arguments(["--data", "a", "b", "--data", "c", "--lr", "1", "--lr", "2"])
    assert (config.data.data, config.optimizer.lr) == (("a", "b", "c"), 2.0)
    with pytest.raises(UserError, match="--search has lr twice"):
        importlib.import_module("consyn_jax.cli.tune").read_arguments(
            ["--data", "a", "--search", "lr=1e-3:1e-2", "--search", "lr=1e-3:1e-2"]
        )


def test_bare_flags_have_a_value() -> None:
    config, _, _ = read_arguments(
        ["--quiet", "--overwrite", "false", "--gradient_checkpointing", "--data", "a", "b"]
    )
    assert (
        config.logging.quiet,
        config.saving.overwrite,
        config.hardware.gradient_checkpointing,
        config.data.data,
    ) == (True, False, "full", ("a", "b"))


def test_values_may_begin_with_a_dash() -> None:
    assert read_arguments(["--wandb_run_name=-x-"])[0].logging.wandb_run_name == "-x-"
    with pytest.raises(UserError, match=r"^--lr must be greater than 0, not -0\.001\.$"):
        read_arguments(["--lr", "-1e-3"])
    with pytest.raises(
        UserError, match=r"^--min_lr_ratio must be at least 0 and below 1, not -0\.5\.$"
    ):
        read_arguments(["--min-lr-ratio", "-.5"])
    assert (
        prepare.read_arguments(["--document_separator", "---", "--quiet"])[
            0
        ].data.document_separator
        == "---"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--learning_rat", "1"],
            "There is no flag --learning_rat; did you mean --learning_rate? See consyn-train "
            "--help.",
        ),
        (["--zzz"], "There is no flag --zzz. See consyn-train --help."),
        (["-lr", "3"], "There is no flag -lr; did you mean --lr? See consyn-train --help."),
        (
            ["--lr"],
            "--lr needs a value; write a value that begins with a dash as --lr=VALUE. See "
            "consyn-train "
            "--help.",
        ),
        (
            ["--data"],
            "--data needs at least one value; write a value that begins with a dash as "
            "--data=VALUE. "
            "See consyn-train --help.",
        ),
        (
            ["corpus.txt"],
            "'corpus.txt' belongs to no flag; give files to read with --data. See consyn-train "
            "--help.",
        ),
        (
            ["--lr", "1", "2"],
            "'2' belongs to no flag; give files to read with --data. See consyn-train --help.",
        ),
        (["--quiet", "corpus.txt"], "--quiet must be true or false, not 'corpus.txt'."),
    ],
)
def test_an_invalid_command_line_is_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr() == ("", f"consyn-train: {message}\n")


def printed(argv: list[str], capsys: pytest.CaptureFixture[str], name: str = "train") -> str:
    assert command(name)([*argv, "--print_config"]) == 0
    return capsys.readouterr().out


def test_print_config_shows_the_origin_of_every_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: haiku\nmixed_precision: no\nlr: 3e-4\n")
    text = printed(["--config", str(recipe), "--seed", "7"], capsys)
    lines = dict(re.findall(r"^(\w+): +(.*)$", text, re.MULTILINE))
    assert set(lines) == set(flags(RunConfig))
    assert re.fullmatch(r"7 +# flag", lines["seed"])
    assert re.fullmatch(rf"0.0003 +# file {re.escape(str(recipe))}", lines["lr"])
    assert re.fullmatch(r"128 +# preset haiku", lines["hidden_dim"])
    assert re.fullmatch(r"8 +# default", lines["batch_size"])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--model", "epic", "--num_heads", "4", "--warmup_steps", "0", "--mixed_precision", "no"],
        [
            "--checkpoint",
            "runs/a: b/final",
            "--data",
            "a b.txt",
            "#c",
            "--wandb_run_name",
            "null",
            "--text_key",
            "yes",
            "--lr",
            "1e-5",
        ],
    ],
)
def test_the_output_of_print_config_is_a_recipe_for_the_same_run(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(printed(argv, capsys))
    assert read_arguments(["--config", str(recipe)])[0] == read_arguments(argv)[0]


def test_the_output_of_print_config_is_a_recipe_for_the_same_preparation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--data",
        "a b",
        "c",
        "--near_duplicates",
        "--document_separator",
        "---\\n",
        "--deduplicate",
        "false",
        "--test_fraction",
        "0.1",
        "--output_dir=x",
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(printed(argv, capsys, "prepare"))
    lines = dict(re.findall(r"^(\w+): +(.*)$", recipe.read_text(), re.MULTILINE))
    assert set(lines) == set(flags(PrepareConfig))
    assert re.fullmatch(r"0.8 +# flag", lines["near_duplicates"])
    assert re.fullmatch(r"0.01 +# default", lines["validation_fraction"])
    assert prepare.read_arguments(["--config", str(recipe)])[0] == prepare.read_arguments(argv)[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--warmup", "1"], "There is no flag --warmup. See consyn-prepare --help."),
        (
            ["--outptu", "x"],
            "There is no flag --outptu; did you mean --output? See consyn-prepare --help.",
        ),
        (
            ["corpus.txt"],
            "'corpus.txt' belongs to no flag; give files to read with --data. See consyn-prepare "
            "--help.",
        ),
        (["--test_fraction", "1.5"], "--test_fraction must be at least 0 and below 1, not 1.5."),
        (["--test_fraction", "-1"], "--test_fraction must be at least 0 and below 1, not -1.0."),
        (
            ["--test_fraction", "0.5", "--validation_fraction", "0.5"],
            "--validation_fraction 0.5 and --test_fraction 0.5 leave nothing to train on. Lower "
            "one of the two fractions.",
        ),
        (
            ["--near_duplicates", "0.2"],
            "--near_duplicates must be a similarity from 0.5 to 1, not 0.2.",
        ),
        *(
            (
                ["--engine", "ray", f"--{name}", ""],
                f"--{name} has an empty value. Give one, or leave --{name} out.",
            )
            for name in (
                *("data", "validation", "tokenizer", "output", "chat_template", "config"),
                *("ray_address", "shared_directory"),
            )
        ),
        (
            ["--tokenizer", "train:10"],
            "--tokenizer train:SIZE must have a size from 260 to 1,000,000, not '10'.",
        ),
    ],
)
def test_invalid_flags_of_consyn_prepare_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(argv) == 2
    assert capsys.readouterr() == ("", f"consyn-prepare: {message}\n")


def test_validation_files_override_the_validation_fraction() -> None:
    prepare.read_arguments(
        ["--validation", "v.txt", "--validation_fraction", "0.5", "--test_fraction", "0.5"]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"recipe\.yaml cannot be read: No such file or directory\. Give a YAML file"),
        (b"lr: [1", r"recipe\.yaml:\d is not YAML \(expected"),
        (b"\xff\x00", r"recipe\.yaml is not UTF-8 text: byte 0 is 0xff"),
        (b"- lr\n", r"recipe\.yaml must consist of `setting: value` lines"),
        (b"3: lr\n", r"recipe\.yaml must consist of `setting: value` lines"),
        (b"lr: 1\nseed: 2\nlr: 2\n", r"recipe\.yaml sets lr twice, in lines 1 and 3"),
        (b"lrr: 1\n", r"lrr \(file .*recipe\.yaml\) is not a setting; did you mean lr\?"),
        (b"lr: fast\n", r"lr \(file .*recipe\.yaml\) must be a number, not 'fast'"),
        (b"model: {hidden_dim: 3}\n", r"model \(file .*recipe\.yaml\) must be text, not"),
        (
            b"batch_size: null\n",
            r"batch_size \(file .*recipe\.yaml\) must be a whole number, not None",
        ),
        (
            b"lr: !!python/object/apply:os.getpid []\n",
            r"recipe\.yaml:1 is not YAML \(could not determine a constructor",
        ),
    ],
)
def test_an_invalid_recipe_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_arguments(["--config", str(recipe)])


def test_an_empty_recipe_is_valid(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_arguments(["--config", str(tmp_path / "empty.yaml")])[0] == read_arguments([])[0]
