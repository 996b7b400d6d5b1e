from pathlib import Path

import pytest

from consyn_jax.config import UserError
from consyn_jax.training.config_file import read_config_file


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("lr: 1\nepochs: [1", r":\d+ is not YAML"),
        ("- lr\n", "must consist of `setting: value` lines"),
        ("1: 2\n", "must consist of `setting: value` lines"),
        ("!!python/object/apply:os.system ['touch opened']\n", "is not YAML"),
    ],
)
def test_a_config_file_that_is_none_is_refused_in_words(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=words):
        read_config_file(file)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_config_file(tmp_path / "gone.yaml")
    file.write_text("")
    assert read_config_file(file) == {}
