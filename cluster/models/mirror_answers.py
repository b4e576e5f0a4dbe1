"""What S3's failures mean to a source, and the one place where they are told.

By boto3's types and S3's codes; an error's own text decides nothing and is never shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from boto3.exceptions import Boto3Error, S3UploadFailedError  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    LoginError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
)
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from cluster.core.errors import ClusterError
from cluster.models.http_read import MOST_PATIENCE
from cluster.models.sources import Absent, Changed, Denied, SourceDown

_DENYING: Final = frozenset(
    {
        "AccessDenied",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidToken",
        "NoSuchBucket",
        "RequestExpired",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
_NO_CREDENTIALS: Final = (
    LoginError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
)
# What botocore lets through of an answer that isn't S3's has no common base.
_BROKEN: Final = (
    BotoCoreError,
    ClientError,
    Boto3Error,
    ResponseParserError,
    HTTPError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
)


def mirror_error(what: str, error: BaseException) -> ClusterError:
    """What a failed request means. Its own text isn't shown: it may repeat what was sent."""
    if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, ClientError):
        error = error.__context__
    if isinstance(error, ClientError):
        return _refusing_answer(what, error)
    kind = type(error).__name__
    if isinstance(error, _NO_CREDENTIALS):
        return Denied(f"{what}: no credentials for the mirror ({kind})")
    return SourceDown(f"{what}: the mirror doesn't answer as it should ({kind})")


def _refusing_answer(what: str, error: ClientError) -> ClusterError:
    meta = error.response.get("ResponseMetadata") or {}
    status = meta.get("HTTPStatusCode")
    code = str((error.response.get("Error") or {}).get("Code"))
    shown = code if re.fullmatch(r"[\w.-]{1,60}", code, re.ASCII) else status
    said = f"{what}: the mirror says {shown}"
    if code in _DENYING or status in {401, 402, 403, 451}:
        return Denied(said)
    if code in {"PreconditionFailed", "InvalidRange"} or status in {412, 416}:
        return Changed(said)
    if code in {"NoSuchKey", "NotFound", "404"} or status in {404, 410}:
        return Absent(said)
    patience = str((meta.get("HTTPHeaders") or {}).get("retry-after"))
    if re.fullmatch(r"\d{1,6}", patience, re.ASCII):
        return SourceDown(said, min(float(patience), MOST_PATIENCE))
    return SourceDown(said)


@contextmanager
def asking(what: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise mirror_error(what, error) from error
