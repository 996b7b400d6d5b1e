"""Create the client for a bucket URL; only the library of its provider is imported."""

from __future__ import annotations

from consyn_jax.errors import UserError, brief
from consyn_jax.remote.bucket import Bucket, BucketError, without_keys
from consyn_jax.remote.urls import BucketUrl


def open_bucket(url: BucketUrl) -> Bucket:
    """Create a client for the bucket of `url`, without sending a request.

    Raises:
        UserError: the provider's library is missing, or its configuration is wrong.
    """
    try:
        if url.scheme == "s3":
            from consyn_jax.remote.s3_bucket import S3Bucket

            return S3Bucket(url.bucket)
        from consyn_jax.remote.gcs_bucket import GcsBucket

        return GcsBucket(url.bucket)
    except ImportError as error:
        raise UserError(
            f"{url} needs {error.name}, which is not installed. Install it with: pip install "
            "'consyn_jax[buckets]'"
        ) from error
    except BucketError as error:
        raise UserError(f"{url} {error}. {error.advice}") from error
    except ValueError as error:  # such as an endpoint that is not a URL
        raise UserError(
            f"{url} cannot be opened ({without_keys(brief(error))}). Correct the variables or the "
            "files that configure the tools of the bucket's provider."
        ) from error
