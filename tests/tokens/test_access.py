"""What a server's no means, and what the user can do."""

import pytest

from fastmae.tokens.access import CREDENTIALS, refusal


class HttpError(Exception):
    """As gcsfs raises it."""

    def __init__(self, code):
        super().__init__(f"status {code}")
        self.code = code


class NoCredentialsError(Exception):
    """As botocore names it."""


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "url", "line"),
    [
        (NoCredentialsError(), "s3://b/x", "no credentials were found; set AWS_PROFILE"),
        (caused(OSError("wrapped"), NoCredentialsError()), "s3://b/x", "no credentials were found"),
        (PermissionError("AccessDenied"), "s3://b/x", "no permission; set AWS_PROFILE"),
        (HttpError(403), "gs://b/x", "no permission; run `gcloud auth application-default login`"),
        (HttpError(401), "hf://datasets/a/b/x", "no such repository, or no permission; run `hf auth login`"),
        (FileNotFoundError("The specified bucket does not exist"), "s3://b/x", "no such bucket; check the address"),
        (FileNotFoundError("x"), "hf://datasets/a/b/x", "no such file; check the address, and that the whole store"),
        (HttpError(404), "https://h/x", "no such file; check the address"),
    ],
)
def test_a_no_is_one_line_that_names_the_url_and_the_way_out(error, url, line):
    assert str(refusal(error, url)).startswith(f"{url}: {line}")


@pytest.mark.parametrize("error", [OSError("reset by peer"), HttpError(503), TimeoutError()])
def test_what_a_retry_may_mend_is_no_refusal(error):
    assert refusal(error, "s3://b/x") is None


def test_the_way_out_of_a_public_bucket_is_a_setting_that_fsspec_reads():
    assert "FSSPEC_S3_ANON=true" in CREDENTIALS["s3"]
    assert "FSSPEC_GS_TOKEN=anon" in CREDENTIALS["gs"]
