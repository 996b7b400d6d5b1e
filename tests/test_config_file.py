"""Reading `--config` files."""

from pathlib import Path

import pytest

from consyn_jax import config_file
from consyn_jax.config_file import describe, read_config_file
from consyn_jax.errors import UserError
from consyn_jax.resolve import resolve


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("lr: 1\nepochs: [1", r":\d+ is not YAML"),
        ("- lr\n", "must consist of `setting: value` lines"),
        ("1: 2\n", "must consist of `setting: value` lines"),
        ("!!python/object/apply:os.system ['touch opened']\n", "is not YAML"),
        (f"max_steps: {5001 * '1'}\n", r"recipe\.yaml has a number of more than 4,300 digits"),
        ("lr: 2026-13-40\n", r"is not YAML \(month must be in 1\.\.12"),
        (5000 * "[", "is nested too deeply"),
        ("#" * ((1 << 24) + 1), "has more than 16,777,216 characters"),
    ],
)
def test_an_invalid_config_file_is_refused(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=words):
        read_config_file(file)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_config_file(tmp_path / "gone.yaml")
    file.write_text("")
    assert read_config_file(file) == {}


def test_a_file_may_be_as_long_as_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_file, "LARGEST", 5)
    file = tmp_path / "recipe.yaml"
    file.write_text("lr: 1")
    assert read_config_file(file) == {"lr": 1}
    file.write_text("lr: 10")
    with pytest.raises(UserError, match="has more than 5 characters"):
        read_config_file(file)


def test_a_long_list_stays_in_its_line_and_is_read_back(tmp_path: Path) -> None:
    """Wrapped by the YAML library, its second line would begin a setting."""
    names = tuple(f"corpora/a part with a long name/{number}.jsonl" for number in range(40))
    run, origins = resolve({"model": "haiku", "data": list(names)})
    text = describe(run, origins)
    assert sum(line.startswith("data: [") and names[-1] in line for line in text.split("\n")) == 1
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert tuple(read_config_file(file)["data"]) == names
