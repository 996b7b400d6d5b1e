"""Any foreign file is read or refused with a message.

`python tests/fuzzing/search.py --minutes 60` is a longer, coverage-guided search.
"""

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from targets import TARGETS, attempt, npz, seeds

SLOW = {"rows", "text", "weights", "weights_index", "checksums", "tree"}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    return seeds(tmp_path_factory.mktemp("seeds"))


def changed(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """`data` with pieces replaced; a change is (position, length, replacement)."""
    for where, length, piece in changes:
        at = where % (len(data) + 1)
        data = data[:at] + piece + data[at + length :]
    return data


PIECES = st.one_of(
    st.binary(max_size=6),
    st.sampled_from(
        [
            b"null",
            b"-1",
            b"1e999",
            b"99999999999999999999",
            b"[]",
            b"{}",
            b'""',
            b"../../etc/passwd",
            b"\x00",
            b"\xff\xfe",
            b"NaN",
            b"true",
        ]
    ),
    st.sampled_from(
        [
            b"[" * 3000,
            b"!!python/object/apply:os.system [true]",
            b"&a [*a]",
            b"\xef\xbb\xbf",
            "\ud7ff\u2028".encode(),
            b"\x80\x04",
            b"x" * 5000,
        ]
    ),
)
CHANGES = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 40), PIECES), max_size=4)


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_are_taken(
    name: str, examples: dict[str, list[bytes]], tmp_path: Path
) -> None:
    for number, data in enumerate(examples[name]):
        here = tmp_path / str(number)
        here.mkdir()
        said = attempt(name, data, here)
        assert said is None or name in ("run_config", "checksums", "weights", "weights_index"), said


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_taken_or_refused(
    name: str, examples: dict[str, list[bytes]], tmp_path: Path
) -> None:
    @settings(
        max_examples=15 if name in SLOW else 60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(examples[name]), CHANGES, st.integers(0, 10_000))
    def search(data: bytes, changes: list[tuple[int, int, bytes]], keep: int) -> None:
        attempt(name, changed(data, changes)[: keep if keep < 3000 else None], tmp_path)

    search()


DERIVED = b"\nderived: {total_steps: 10, data: x, sequences_per_step: 8, vocab_size: 32}\n"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("run_config", b"model: haiku\noptimizer: " + b"x" * 5000 + DERIVED),
        ("run_config", b"model: haiku\n? " + b"[" * 3000 + DERIVED),
        ("run_config", b"model: haiku\nlr: 2001-05-40" + DERIVED),
        ("recipe", b"lr: 2001-05-40\n"),
        ("progress", b'{"' + b"x" * 5000 + b'": 1}'),
        ("checksums", b"0" * 32 + b"  " + b"[" * 3000 + b"\n"),
    ],
)
def test_findings_of_earlier_searches(name: str, data: bytes, tmp_path: Path) -> None:
    assert attempt(name, data, tmp_path) is not None


def test_a_batch_marked_as_encrypted_is_damaged(tmp_path: Path) -> None:
    """Found by the search: `zipfile` raises a RuntimeError."""
    data = bytearray(npz())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    assert "is damaged (ValueError: input_ids is compressed or encrypted)" in (
        attempt("bundle_batch", bytes(data), tmp_path) or ""
    )
