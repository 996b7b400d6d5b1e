"""Names of datasets of the Hub."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.sources.huggingface.hub_names import HubName, parse_hub_name


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("wikitext", HubName("wikitext")),
        ("allenai/c4:en", HubName("allenai/c4", config="en")),
        ("allenai/c4:en:validation", HubName("allenai/c4", config="en", split="validation")),
        ("a/b::test", HubName("a/b", split="test")),
        ("a/b@v1.0:20231101.en", HubName("a/b", "v1.0", "20231101.en")),
        ("a/b.c_d-e@refs/pr/3", HubName("a/b.c_d-e", "refs/pr/3")),
    ],
)
def test_names_of_the_hub(spec: str, name: HubName) -> None:
    assert parse_hub_name(spec) == name
    assert parse_hub_name(str(name)) == name


@pytest.mark.parametrize(
    "spec",
    ["", "/a/b", "./a", "../a", "a/", "a/b/c", "a b", "a--b/c", "a..b", "-a/b", "a/b.", "a.git",
     "a/*", "é/b", "x" * 97, "~/a", "C:\\data", "a/b@", "a/b@x y", "a/b@../x", "a/b:", "a/b:c:",
     "a/b:c:d:e", "a/b:c/d", "a/b:c:train[:5]", "hf://datasets/a/b"],
)  # fmt: skip
def test_names_that_no_dataset_can_have(spec: str) -> None:
    assert parse_hub_name(spec) is None


@given(st.text("ab/@:.-_1", max_size=12))
def test_names_are_parsed_back(spec: str) -> None:
    name = parse_hub_name(spec)
    assert name is None or parse_hub_name(str(name)) == name
