"""Which failures of an S3 request can pass, and the sentence for each that cannot."""

from __future__ import annotations

from typing import Any

from rayft.errors import StorageError
from rayft.storage.store import not_found

RETRY_CODES = frozenset(
    {
        "SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException", "RequestLimitExceeded",
        "TooManyRequests", "BandwidthLimitExceeded", "InternalError", "ServiceUnavailable", "RequestTimeout",
        "RequestTimeoutException", "OperationAborted", "ConditionalRequestConflict", "BadDigest", "IncompleteBody",
        "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "TransactionInProgress",
    }
)  # fmt: skip
_FULL_CODES = frozenset(
    {
        "XMinioStorageFull", "InsufficientStorage", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "EntityTooLarge",
        "507",
    }
)  # fmt: skip
_DENIED_CODES = frozenset(
    {
        "AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken",
        "InvalidToken", "AccountProblem", "403", "401",
    }
)  # fmt: skip
_MISSING_CODES = frozenset({"NoSuchKey", "404", "NotFound"})


class Passing(Exception):
    """A failure that the service reports inside a successful response, and that may pass."""


def fatal(error: BaseException, operation: str) -> BaseException | None:
    """What to raise where no retry can help; None where one can; `error` itself if it is no storage failure at all."""
    import botocore.exceptions as boto
    import urllib3.exceptions
    from botocore.parsers import ResponseParserError

    if isinstance(error, boto.ClientError):
        return _fatal_response(error, operation)
    credentials = boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError
    if isinstance(error, (*credentials, boto.ProfileNotFound)):
        return StorageError(
            f"{operation} failed: no usable AWS credentials ({describe(error)}).",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role for this machine.",
        )
    passing = (
        Passing,
        OSError,
        boto.HTTPClientError,
        boto.ConnectionError,
        boto.IncompleteReadError,
        boto.ResponseStreamingError,
        boto.FlexibleChecksumError,
        urllib3.exceptions.HTTPError,
        ResponseParserError,  # a response cut in its XML
    )
    if isinstance(error, passing):
        return None
    if isinstance(error, boto.BotoCoreError):
        return StorageError(
            f"{operation} failed: {describe(error)}.", "Check the storage URI and the AWS settings."
        )
    return error


def is_damage(error: BaseException | None) -> bool:
    """Whether the content did not match the checksum that the service keeps with the object."""
    from botocore.exceptions import FlexibleChecksumError

    return isinstance(error, FlexibleChecksumError)


def describe(error: Any) -> str:
    """The error in one line: what the service answered, else its class and text."""
    response = getattr(error, "response", None)
    if response is not None:  # the text of botocore's own message counts retries that it does not make
        return f"{code_and_status(error)[0]} {response.get('Error', {}).get('Message', '')}".strip().rstrip(
            "."
        )
    return f"{type(error).__name__} {' '.join(str(error).split())}".rstrip(".")


def code_and_status(error: Any) -> tuple[str, int]:
    """The S3 error code and the HTTP status of a botocore `ClientError`."""
    response = error.response
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code", "")), int(status)


def _fatal_response(error: Any, operation: str) -> BaseException | None:
    code, status = code_and_status(error)
    detail = describe(error)
    if code in _FULL_CODES or status == 507:
        return StorageError(
            f"{operation} failed: the storage is full ({detail}).",
            "Free space or raise the quota, or keep fewer checkpoints, then start again: what was committed is kept.",
        )
    if code == "NoSuchBucket":
        return StorageError(
            f"{operation} failed: the bucket does not exist.", "Create it or correct the storage URI."
        )
    if code in _DENIED_CODES or status in (401, 403):
        return StorageError(
            f"{operation} was denied ({detail}).",
            "Give these credentials list, get, put and delete on the bucket, or set others in the AWS variables.",
        )
    if code in _MISSING_CODES:
        return not_found("s3://" + operation.partition("s3://")[2])
    if code == "NotImplemented" or status == 501:
        return StorageError(
            f"{operation} failed: the service does not implement it ({detail}).",
            "Use a service with conditional writes (AWS S3, MinIO, Ceph Squid or later, R2).",
        )
    if code in RETRY_CODES or status >= 500 or status == 429:
        return None
    return StorageError(
        f"{operation} failed: {detail} (HTTP {status}).", "Check the storage URI and the AWS settings."
    )
