"""Who may read or write behind a URL: an answer that says no as one line, with where that kind of URL takes its
credentials from."""

from collections.abc import Iterator
from typing import Any

from fastmae.errors import InputError

MISSING, FORBIDDEN = (404, 410), (401, 403)
"""HTTP status codes."""
WITHOUT_CREDENTIALS = (
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"),  # botocore
    *("DefaultCredentialsError", "RefreshError"),  # google-auth
    "LocalTokenNotFoundError",  # huggingface_hub
)
"""Errors that are raised before anything was asked for. Their packages need not be installed."""
_AMAZON = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_GOOGLE = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
_HUB = "run `hf auth login`, or set HF_TOKEN"
CREDENTIALS = {
    "s3": f"{_AMAZON}; for a public bucket FSSPEC_S3_ANON=true",
    "gs": f"{_GOOGLE}; for a public bucket FSSPEC_GS_TOKEN=anon",
    "gcs": f"{_GOOGLE}; for a public bucket FSSPEC_GCS_TOKEN=anon",
    "hf": f"{_HUB} to a token that may do this",
}
"""Protocol -> how to give credentials."""


class MissingFileError(InputError):
    """The URL has no such file, or we may not read it: a bucket that can't be listed says 'forbidden' for both."""


def refusal(error: BaseException, url: str) -> MissingFileError | None:
    """What an answer that no retry can mend says, as an error of ours; None for any other failure.

    Args:
        error: what a file system has raised.
        url: what was asked for.
    """
    protocol = url.partition("://")[0]
    credentials = CREDENTIALS.get(protocol, f"give the credentials that {protocol}:// takes")
    links = list(_chain(error))
    statuses = {_status(link) for link in links}
    if any(type(link).__name__ in WITHOUT_CREDENTIALS for link in links):
        return MissingFileError(f"{url}: no credentials were found; {credentials}")
    if any(isinstance(link, PermissionError) for link in links) or statuses & {*FORBIDDEN}:
        # The hub answers so for repositories that are not there, too: it tells nobody which private ones exist.
        is_hidden = protocol == "hf" and 401 in statuses
        return MissingFileError(
            f"{url}: {'no such repository, or no permission' if is_hidden else 'no permission'}; {credentials}"
        )
    if any(isinstance(link, FileNotFoundError) for link in links) or statuses & {*MISSING}:
        if any("bucket does not exist" in str(link) for link in links):
            return MissingFileError(f"{url}: no such bucket; check the address, or make the bucket first")
        private = f"; if it is private, {_HUB}" if protocol == "hf" else ""
        return MissingFileError(
            f"{url}: no such file; check the address, and that the whole store was copied there{private}"
        )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was made from."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: Any) -> int | None:
    """The HTTP status that an error of aiohttp, gcsfs or huggingface_hub carries."""
    response = getattr(error, "response", None)  # of botocore a dict
    for holder, name in ((error, "status"), (error, "code"), (response, "status_code")):
        value = getattr(holder, name, None)  # one after the other: aiohttp warns of its `code`
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
