"""What --search says: flags and their values, and one sentence for every mistake."""

import pytest

from consyn_jax.cli.tune import main, read_arguments
from consyn_jax.tuning.search_space import Dimension, parse_search

SEARCH = ["--search", "lr=1e-3:1e-2:log"]


def test_ranges_and_choices_have_the_types_of_their_flags() -> None:
    items = [
        "learning-rate=1e-4:1e-2:log",
        "num_layers=2:6",
        "optimizer=adamw,muon",
        "beta1=0.8,0.9",
    ]
    assert parse_search([*items, "qk_norm=true,false"]) == [
        Dimension("lr", 1e-4, 1e-2, True),
        Dimension("num_layers", 2, 6),
        Dimension("optimizer", choices=("adamw", "muon")),
        Dimension("beta1", choices=(0.8, 0.9)),
        Dimension("qk_norm", choices=(True, False)),
    ]
    assert parse_search(["num_layers=2:6"])[0].is_whole
    assert not parse_search(["lr=1:2"])[0].is_whole


def test_the_text_of_a_dimension_reads_back() -> None:
    for item in ("lr=0.0001:0.01:log", "num_layers=2:6", "optimizer=adamw,muon"):
        assert parse_search([item])[0].text() == item


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--search lrr=1:2", "there is no flag --lrr; did you mean lr?"),
        ("--search foo=1:2", "no flag --foo. consyn-tune --help all lists the flags."),
        ("--search lr=1e-2:1e-3", "empty range: 0.01 is not below 0.001"),
        ("--search lr=1e-3:1e-3", "empty range"),
        ("--search weight_decay=0:1:log", "begins at 0, which has no logarithm"),
        ("--search lr=1:2:linear", "is no range"),
        ("--search lr=1:2:log:log", "is no range"),
        ("--search lr", "has no values"),
        ("--search lr=1e-3", "has only one value"),
        ("--search lr=1e-3,1e-3", "has a value twice"),
        ("--search lr=1e-3:1e-2 lr=1,2", "has lr twice"),
        ("--search lr=a:b", "must be a number, not 'a'"),
        ("--search num_layers=1.5:3", "must be a whole number"),
        ("--search optimizer=adamw,muo", "did you mean muon?"),
        ("--search dropout=0:1", "with --dropout 1 is refused"),
        ("--search beta1=-0.1:0.5", "with --beta1 -0.1 is refused"),
        ("--search optimizer=adamw,sgd", "with --optimizer sgd is refused"),
        ("--search warmup_steps=1:9 --max_steps 5", "with --warmup_steps 9 is refused"),
        ("--search data=a,b", "--data cannot vary"),
        ("--search tokenizer=a,b", "--tokenizer cannot vary"),
        ("--search eval_steps=1:5", "--eval_steps cannot vary"),
        ("--search max_steps=1:5", "--max_steps cannot vary"),
        ("--search output=a,b", "--output cannot vary"),
        ("", "No flag varies"),
        ("--search lr=1:2 --metric eval/los", "did you mean eval/loss?"),
        ("--search lr=1:2 --metric train/loss", "not an evaluation metric"),
        ("--search lr=1:2 --metric eval/rewards/margins", "consyn-tune: --metric eval/rewards"),
        ("--search lr=1:2 --metric eval/loss --metric_for_best_model eval/accuracy", "differ"),
        ("--search lr=1:2 --trials 0", "--trials must be at least 1"),
        ("--search lr=1:2 --time_budget 5", "--time_budget must be a time"),
        ("--search lr=1:2 --time_budget 0s", "--time_budget must be a time"),
        ("--search lr=1:2 --sampler grid", "--sampler grid needs lists of values"),
        ("--search lr=1:2 --sampler best", "is not known"),
        ("--search lr=1:2 --streaming --max_steps 5", "--streaming does not work"),
        ("--search lr=1:2 --distributed", "--distributed does not work"),
        ("--search lr=1:2 --validation_fraction 0", "leaves no data"),
    ],
)
def test_a_mistake_gets_a_sentence_before_the_first_trial(
    flags: str, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(flags.split()) == 2
    said = capfd.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_a_flag_that_varies_has_its_first_value_where_one_is_needed() -> None:
    config, origins, _ = read_arguments(["--search", "optimizer=sgd,adamw", "lr=0.1:1"])
    assert (config.optimizer.optimizer, config.optimizer.lr) == ("sgd", 0.1)
    assert origins["lr"] == "search"
    assert config.study.metric == "eval/loss"


def test_the_metric_is_the_one_that_selects_the_best_evaluation() -> None:
    config, origins, _ = read_arguments([*SEARCH, "--metric", "eval/accuracy"])
    assert config.evaluation.metric_for_best_model == "eval/accuracy"
    config, origins, _ = read_arguments([*SEARCH, "--metric_for_best_model", "eval/accuracy"])
    assert config.study.metric == "eval/accuracy"
    assert origins["metric"] == "metric_for_best_model"
