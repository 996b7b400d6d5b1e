import sys
import unicodedata
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from consyn_jax.data.preparation import cleaning
from consyn_jax.data.preparation.cleaning import clean

# Plain text, with enough characters that cleaning removes or composes to be neighbours.
texts = st.text(
    st.characters()
    | st.sampled_from("ae\x00\x0c\x85\u0301\u0323\ufeff\u1100\u1161\u11a8\uac00\u212b")
)
all_rules = st.tuples(st.sampled_from(["nfc", "none"]), st.sampled_from(["remove", "keep"]))
letters = st.sampled_from("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


@given(text=texts, rules=all_rules)
@example(text="e\x00\u0301", rules=("nfc", "remove"))
@example(text="\ufeff\x00\ufeffa", rules=("nfc", "remove"))
def test_cleaning_a_second_time_changes_nothing(text: str, rules: tuple[str, str]) -> None:
    cleaned, _ = clean(text, *rules)
    assert clean(cleaned, *rules) == (cleaned, {})


@given(a=texts, letter=letters, b=texts, rules=all_rules)
def test_a_text_cut_before_a_letter_can_be_cleaned_in_parts(
    a: str, letter: str, b: str, rules: tuple[str, str]
) -> None:
    b = letter + b
    assert clean(a, *rules)[0] + clean(b, *rules)[0] == clean(a + b, *rules)[0]


@given(text=texts, rules=all_rules)
def test_cleaning_follows_the_unicode_definitions(text: str, rules: tuple[str, str]) -> None:
    normalize, control_characters = rules
    expected, removed = text, 0
    if control_characters == "remove":
        expected = "".join(
            c for c in text if c in "\t\n\r" or unicodedata.category(c) != "Cc"
        ).lstrip("\ufeff")
        removed = len(text) - len(expected)
    composed = unicodedata.normalize("NFC", expected) if normalize == "nfc" else expected
    counts = {"control_characters": removed, "normalized": int(composed != expected)}
    assert clean(text, *rules) == (
        composed,
        {name: count for name, count in counts.items() if count},
    )


def test_clean_text_comes_back_as_the_same_object() -> None:
    text = "Plain text,\r\n\twith “quotes”, é, 日本 and 한국."
    assert clean(text)[0] is text


def test_characters_that_are_skipped_never_change() -> None:
    """No character outside `_MAY_CHANGE` combines, changes under NFC, or composes with the one
    before it."""
    every = [chr(i) for i in range(sys.maxunicode + 1)]
    seconds = {
        chr(int(d.split()[1], 16))
        for d in map(unicodedata.decomposition, every)
        if d.count(" ") == 1 and d[0] != "<"
    }
    seconds |= {
        chr(i) for i in range(0x1161, 0x1200)
    }  # Hangul vowels and finals compose by arithmetic
    for c in every:
        if not cleaning._MAY_CHANGE.match(c):
            assert not unicodedata.combining(c), hex(ord(c))
            assert unicodedata.is_normalized("NFC", c), hex(ord(c))
            assert c not in seconds, hex(ord(c))


def test_only_inserted_characters_of_real_text_are_cleaned(shared_data: Path) -> None:
    text = (shared_data / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
    assert clean(text) == (text, {})
    assert clean("\ufeff" + text.replace(".", ".\x0c")) == (
        text,
        {"control_characters": text.count(".") + 1},
    )
    decomposed = unicodedata.normalize("NFD", text)
    assert decomposed != text
    assert clean(decomposed) == (text, {"normalized": 1})
    assert clean(decomposed, normalize="none") == (decomposed, {})
