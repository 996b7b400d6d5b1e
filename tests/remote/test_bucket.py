"""Errors of buckets: each says what is wrong, and what to do."""

import pytest

from consyn_jax.remote.bucket import BucketError, no_credentials, refused, unreachable


@pytest.mark.parametrize(
    ("error", "said", "advice"),
    [
        (
            refused(404, "NoSuchBucket", ""),
            "is not there (NoSuchBucket)",
            "Correct the URL, or create",
        ),
        (refused(403, "AccessDenied", ""), "refuses these credentials (AccessDenied)", "Check"),
        (refused(503, "SlowDown", ""), "does not answer now (SlowDown)", "Wait a while"),
        (refused(400, "Odd", "no"), "refuses the request (Odd: no)", "Correct the URL"),
        (unreachable(OSError("refused")), "cannot be reached (refused)", "Check the network"),
        (no_credentials("gcloud"), "needs credentials, and there are none", "Set them up"),
        (BucketError("is odd"), "is odd", "Check the bucket"),
    ],
)
def test_errors_of_buckets_are_clauses_with_advice(
    error: BucketError, said: str, advice: str
) -> None:
    """A clause follows the URL; in a warning of a run, other words follow the clause."""
    assert str(error).startswith(said)
    assert ". " not in str(error)
    assert error.advice.startswith(advice)
    assert error.advice.endswith(", and run the same command again.")
