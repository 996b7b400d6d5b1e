"""Turn errors of the Hugging Face libraries into messages for the user."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from consyn_jax.data.sources.huggingface.hub_names import HubName
from consyn_jax.errors import UserError, brief


class OutOfReachError(Exception):
    """The Hub cannot be reached; a cached copy may still be usable."""


@contextmanager
def hub_errors(hub: HubName) -> Iterator[None]:
    """Silence the Hugging Face libraries in a `with` block, and translate their errors.

    Raises:
        OutOfReachError: the Hub or the network did not respond.
        UserError: any other error of the libraries.
    """
    import datasets
    import huggingface_hub.utils

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        huggingface_hub.utils.logging.set_verbosity(huggingface_hub.utils.logging.CRITICAL)
        try:
            yield
        except (UserError, OutOfReachError):
            raise
        except Exception as error:  # the libraries raise errors of their dependencies
            raise _explained(error, hub) from error


def _explained(error: Exception, hub: HubName) -> UserError | OutOfReachError:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain, name = _causes(error), hub.repository
    text = " ".join(map(str, chain))

    def has(*kinds: type[Exception]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if has(GatedRepoError) or "is a gated dataset" in text:
        return UserError(
            f"The dataset {name} is gated. Ask for access at "
            f"https://huggingface.co/datasets/{name}, then log in with `hf auth login`."
        )
    if has(RevisionNotFoundError):
        return UserError(
            f"The dataset {name} has no revision {hub.revision!r}. "
            "Give one of its branches, tags or commits."
        )
    if has(RepositoryNotFoundError, DatasetNotFoundError):
        return UserError(
            f"There is no dataset {name} on the Hugging Face Hub, or it is private. "
            "Check the name, or try `hf auth login`."
        )
    if "Dataset scripts are no longer supported" in text:
        return UserError(
            f"The dataset {name} needs a script from its repository, and such scripts are never "
            f"run. Try {name}@refs/convert/parquet, which may have the rows as Parquet files."
        )
    answered = any(isinstance(e, HfHubHTTPError) and not _is_out_of_reach(e) for e in chain)
    if not answered and any(map(_is_out_of_reach, chain)):
        return OutOfReachError(brief(error))
    cause = brief(chain[-1] if str(chain[-1]) else error)
    return UserError(
        f"The dataset {name} cannot be read: {cause}. Correct the cause, or download the files of "
        "the dataset and give their directory."
    )


def _causes(error: Exception) -> list[Exception]:
    """Return `error` and the chain of its causes."""
    chain: list[Exception] = []
    cause: BaseException | None = error
    while isinstance(cause, Exception) and cause not in chain:
        chain.append(cause)
        has_cause = cause.__cause__ or cause.__suppress_context__
        cause = cause.__cause__ if has_cause else cause.__context__
    return chain


def _is_out_of_reach(error: Exception) -> bool:
    """Whether the error means that the Hub or the network did not respond."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return error.response is None or error.response.status_code >= 500
    # Compare class names, because versions of `huggingface_hub` use three different HTTP libraries.
    transport = any(
        kind.__name__ in ("TransportError", "RequestException") for kind in type(error).__mro__
    )
    return transport or isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError)
