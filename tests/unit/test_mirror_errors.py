"""The mirror's URL, and what a failed request to it means."""

from __future__ import annotations

from typing import Any

import pytest
from boto3.exceptions import Boto3Error, S3UploadFailedError  # type: ignore[import-untyped]
from botocore import exceptions as aws  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

from cluster.core.errors import Cancelled, ClusterError
from cluster.models.mirror_answers import asking, mirror_error
from cluster.models.refusals import Refused, Rule
from cluster.models.settings import parse_s3
from cluster.models.sources import Absent, Changed, Denied, SourceDown

SECRET = "wJalrXUtnFEMI"


def refusal(code: str | None, status: int | None, **headers: str) -> Exception:
    """As botocore raises it; the message repeats what was sent, as some servers' do."""
    answer: dict[str, Any] = {
        "Error": {"Code": code, "Message": f"you sent {SECRET}\nand more"},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},
    }
    error: Exception = aws.ClientError(answer, "GetObject")
    return error


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/", ("bucket", "")),
        ("s3://bucket/prefix", ("bucket", "prefix")),
        ("s3://my.bucket-1/a/b_c/d.e/", ("my.bucket-1", "a/b_c/d.e")),
    ],
)
def test_a_mirrors_url(url: str, parts: tuple[str, str]) -> None:
    assert parse_s3(url) == parts


@pytest.mark.parametrize(
    "url",
    [
        "",
        "bucket/prefix",
        "https://bucket/prefix",
        "S3://bucket/prefix",
        "s3:/bucket/prefix",
        "s3://",
        "s3:///prefix",
        "s3://ab",
        f"s3://{'b' * 64}",
        f"s3://key:{SECRET}@bucket/prefix",
        f"s3://bucket/prefix?token={SECRET}",
        f"s3://bucket/prefix#{SECRET}",
        "s3://bucket/a b",
        "s3://bucket/a\n",
        "s3://bücket/a",
    ],
)
def test_what_is_no_mirrors_url(url: str) -> None:
    with pytest.raises(ValueError, match="expected s3://") as caught:
        parse_s3(url)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "status", "meant"),
    [
        ("AccessDenied", 403, Denied),
        ("SomethingNew", 403, Denied),
        ("403", 403, Denied),
        ("Unauthorized", 401, Denied),
        ("SignatureDoesNotMatch", 403, Denied),
        ("InvalidAccessKeyId", 403, Denied),
        ("ExpiredToken", 400, Denied),
        ("InvalidToken", 400, Denied),
        ("TokenRefreshRequired", 400, Denied),
        ("NoSuchBucket", 404, Denied),
        ("NoSuchKey", 404, Absent),
        ("404", 404, Absent),
        (None, 410, Absent),
        ("PreconditionFailed", 412, Changed),
        ("412", 412, Changed),
        ("InvalidRange", 416, Changed),
        ("SlowDown", 503, SourceDown),
        ("ServiceUnavailable", 503, SourceDown),
        ("InternalError", 500, SourceDown),
        ("TooManyRequests", 429, SourceDown),
        ("RequestTimeout", 400, SourceDown),
        ("PermanentRedirect", 301, SourceDown),
        (None, None, SourceDown),
        ("\x1b[31m\nred", 500, SourceDown),
    ],
)
def test_refusing_answers(code: str | None, status: int | None, meant: type[ClusterError]) -> None:
    error = mirror_error("base:org/name", refusal(code, status))
    assert type(error) is meant
    assert not isinstance(error, Absent) or not error.certain
    assert str(error).startswith("base:org/name: the mirror says ")
    assert str(error).isprintable()
    assert SECRET not in str(error)


def test_an_answer_without_its_parts() -> None:
    assert type(mirror_error("x", aws.ClientError({}, "GetObject"))) is SourceDown


@pytest.mark.parametrize(
    ("error", "meant"),
    [
        (aws.NoCredentialsError(), Denied),
        (aws.PartialCredentialsError(provider="env", cred_var="secret"), Denied),
        (aws.ProfileNotFound(profile="none"), Denied),
        (aws.UnauthorizedSSOTokenError(), Denied),
        (aws.CredentialRetrievalError(provider="p", error_msg=SECRET), SourceDown),
        (aws.EndpointConnectionError(endpoint_url="http://x"), SourceDown),
        (aws.ConnectTimeoutError(endpoint_url="http://x"), SourceDown),
        (aws.ReadTimeoutError(endpoint_url="http://x"), SourceDown),
        (aws.ResponseStreamingError(error="cut"), SourceDown),
        (aws.IncompleteReadError(actual_bytes=1, expected_bytes=2), SourceDown),
        (aws.HTTPClientError(error=SECRET), SourceDown),
        (aws.ParamValidationError(report="odd"), SourceDown),
        (ResponseParserError(SECRET), SourceDown),
        (Boto3Error(SECRET), SourceDown),
        (OSError(SECRET), SourceDown),
        (ValueError(SECRET), SourceDown),
        (KeyError(SECRET), SourceDown),
    ],
)
def test_failures_without_an_answer(error: Exception, meant: type[ClusterError]) -> None:
    with pytest.raises(meant) as caught, asking("lora:a/b"):
        raise error
    assert type(caught.value) is meant
    assert str(caught.value).startswith("lora:a/b: ")
    assert type(error).__name__ in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("code", "meant"), [("AccessDenied", Denied), ("SlowDown", SourceDown)])
def test_a_failed_upload_means_what_the_answer_means(code: str, meant: type[ClusterError]) -> None:
    """boto3 says only in the error's context what the server said."""
    with pytest.raises(meant, match=code), asking("x"):
        try:
            raise refusal(code, 400)
        except aws.ClientError:
            raise S3UploadFailedError("failed")  # noqa: B904 - as boto3 does


def test_a_failed_upload_without_an_answer() -> None:
    assert type(mirror_error("x", S3UploadFailedError("failed"))) is SourceDown


@pytest.mark.parametrize(
    ("said", "patience"), [("7", 7.0), ("999999", 3600.0), ("-1", None), ("soon", None)]
)
def test_how_long_to_wait(said: str, patience: float | None) -> None:
    error = mirror_error("x", refusal("SlowDown", 503, **{"retry-after": said}))
    assert isinstance(error, SourceDown)
    assert error.retry_after == patience


@pytest.mark.parametrize(
    "error", [Cancelled("x"), Refused(Rule.NAME, "x"), Changed("x"), RuntimeError("a bug")]
)
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, asking("x"):
        raise error
    assert caught.value is error
