"""Messages for rows from Python that cannot be: each names the place and what to do."""

import re
from typing import Any

import numpy as np
import pytest

from consyn_jax.errors import UserError
from consyn_jax.tokenization.token_ids import check_fields

TOKENIZER = r"vocabulary ends at 259\. Use the tokenizer that the model was made with\.$"
PADDING = r"put any id there, and give every batch an attention_mask with 0 at padding\.$"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": [1, 5000, 2]}, r"^Row 3 has token id 5,000 in input_ids at position 1, "),
    ({"input_ids": [1, 260]}, TOKENIZER),
    ({"input_ids": [1, -1, 2]}, r"^Row 3 has token id -1 in input_ids at position 1, but ids beg"),
    ({"input_ids": [1, 2, -7]}, r"-7 in input_ids at position 2, .*" + PADDING),
    ({"input_ids": [1, -1], "attention_mask": [1, 0]}, PADDING),
    ({"input_ids": [-100, 2]}, r"^Row 3 has -100 in input_ids at position 0, which only labels"),
    ({"input_ids": [[1, 2], [3, 400]]}, r"^Row 3, row 1, has token id 400 in input_ids at pos"),
    ({"input_ids": np.array([[1, 2], [3, 2**40]])}, r"has token id 1,099,511,627,776"),
    ({"input_ids": [[1, 2], [3]], "labels": [[1, -1], [999]]}, r"row 1, has token id 999 in lab"),
    (
        {"input_ids": [1.5, 2.0]},
        r"has 1\.5 in input_ids at position 0, but ids are whole numbers\. Pass",
    ),
    (
        {"input_ids": np.array([1, 2], np.float16)},
        r"has 1\.0 in .* as int32 or int64, as the token",
    ),
    ({"input_ids": [True, False]}, r"has True in input_ids at position 0"),
    (
        {"input_ids": ["a", "b"]},
        r"^Row 3 has a str instead of a number in input_ids at position 0\. Give",
    ),
    ({"input_ids": [[[1]], [[2]]]}, r"^Row 3, row 0, has input_ids of shape \(1, 1\)\. Give the"),
    ({"input_ids": 5}, r"^Row 3 has input_ids of shape \(\)\. Give the ids of one row as a list"),
    ({"input_ids": [1, 2], "labels": [260, -100]}, r"^Row 3 has token id 260 in labels at posi"),
    ({"input_ids": [1, 2], "labels": [-2, -1]}, r"label -2 at position 0, .* target with -100\.$"),
    ({"input_ids": [1, 2], "labels": [1.0, 2.0]}, r"labels of float64, but labels are token ids"),
    ({"input_ids": [1, 2], "labels": [1]}, r"labels of shape \(1,\) for 2 input_ids\. Give one"),
    ({"input_ids": [1, 2], "labels": 1}, r"labels of shape \(\) for 2 input_ids\. Give one label"),
    ({"input_ids": [1, 2], "labels": [1, 2, 3]}, r"with -100 where a token is not a target\.$"),
    (
        {"input_ids": [[1], [2]], "labels": [1, 2]},
        r"^Row 3 has several rows of input_ids, but its labels are not a list of rows\. Give",
    ),
    ({"input_ids": [[1], [2]], "labels": [[1]]}, r"^Row 3 has 1 rows of labels for 2 rows"),
    ({"input_ids": [[1], [2, 3]], "labels": [[1], [2]]}, r"^Row 3, row 1, has labels of shape"),
    ({"input_ids": [1, 2], "loss_mask": [1]}, r"loss_mask of shape \(1,\) for 2 .* others\.$"),
    ({"input_ids": [1, 2], "loss_mask": [1, 0.5]}, r"has 0\.5 in loss_mask at position 1\. Give 1"),
    ({"input_ids": [1, 2], "loss_mask": [1, 2]}, r"has 2 in loss_mask at position 1\. Give 1"),
    ({"input_ids": [1, 2], "attention_mask": [1] * 3}, r"attention_mask of .* 0 for padding; "),
    ({"input_ids": [1, 2], "attention_mask": [0, -np.inf]}, r"has -inf in attention_mask at pos"),
    ({"input_ids": [1, 2], "segment_ids": [1, -1]}, r"has -1 in segment_ids .* 0 for padding\.$"),
    ({"input_ids": [1, 2], "segment_ids": [1, np.nan]}, r"has nan in segment_ids at position 1"),
    ({"input_ids": [1, 2], "position_ids": [0]}, r"position_ids of shape .* position_ids out\.$"),
    ({"input_ids": [1, 2], "position_ids": [0, 0.5]}, r"has 0\.5 in position_ids at position 1"),
    ({"input_ids": [1] * 4, "position_ids": [0, 1, 3, 4]}, r"^Row 3 .* first at position 2\."),
    ({"input_ids": [1] * 4, "position_ids": [3, 2, 1, 0]}, r"first at position 1\."),
    ({"input_ids": [1] * 4, "position_ids": [0, 1, 1, 2]}, r"first at position 2\."),
    ({"input_ids": [1] * 3, "position_ids": [-1, 0, 1]}, r"restart .* first at position 0\."),
    ({"input_ids": [1] * 3, "position_ids": [0, 0, 0]}, r"restart .* first at position 1\."),
    ({"input_ids": [1, 2], "attention_mask": [1, 2]}, r"has 2 in attention_mask at .* segment_ids"),
    ({"input_ids": None}, r"^Row 3 has no input_ids\. Give the ids of its tokens\.$"),
    ({"input_ids": [1, None]}, r"has a NoneType instead of a number in input_ids at position 1"),
    ({"input_ids": [1, 2**70]}, r"input_ids with a number of 71 bits at position 1\."),
    ({"input_ids": np.array(["a"])}, r"^Row 3 has input_ids of type <U1, not numbers\."),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_row_that_cannot_be_is_answered_with_its_place_and_a_remedy(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_fields(fields, 260, "Row 3")
    assert re.search(message, str(caught.value)), str(caught.value)
    assert str(caught.value).count(". ") == 1
    with pytest.raises(UserError):
        check_fields(fields, None if "Use the tok" not in str(caught.value) else 260, "Row 3")


def test_what_fits_passes() -> None:
    for ids in ([0, 259], np.array([[0, 259]], np.int64), np.array([[0], [259]], np.uint16)):
        check_fields({"input_ids": ids, "x": [[-7]], "labels": None}, 260, "")
    full = {
        "labels": np.array([[-100, -1]]),
        "loss_mask": [[True, False]],
        "attention_mask": np.array([[1.0, 0.0]]),
        "segment_ids": [[2, 0]],
        "position_ids": [[0, -1]],
    }
    check_fields({"input_ids": [[0, 259]], **full}, 260, "")
    check_fields({"input_ids": [], "labels": []}, 260, "")
