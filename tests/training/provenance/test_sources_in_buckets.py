"""Sources in a bucket: they are named by their URLs, and are not downloaded to be compared."""

from pathlib import Path

from consyn_jax.training.provenance import data_check
from consyn_jax.training.provenance.findings import Findings

URL = "s3://corpora/set/a.jsonl"
ENTRIES = [
    {"name": URL, "kind": "jsonl", "sha256": ["0" * 64]},
    {"name": "s3://corpora/set/b.jsonl", "kind": "jsonl", "sha256": ["1" * 64]},
]


def test_the_pages_of_documents_say_that_they_were_not_compared() -> None:
    assert data_check.changed_sources(ENTRIES[:1]) == {
        URL: f"{URL} is in a bucket, so it cannot be compared with what was prepared."
    }


def test_a_verification_says_that_they_were_not_compared(tmp_path: Path) -> None:
    found = Findings()
    data_check._check_sources(ENTRIES, tmp_path, found)
    assert found.unchecked == [f"data: in a bucket, and not downloaded: {URL} and 1 more object"]
    assert found.differs == []
