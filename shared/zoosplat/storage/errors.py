"""What failures of the storage mean to the user.

Told by types, error numbers and the codes of S3, never by words in a text: those may be anybody's. Only obstore has no
other way to say what an S3 server has answered, and only texts of its own errors are read.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator

from zoosplat.errors import Unreachable, UserError

# With status 400 on AWS, where others that concern credentials have 401 or 403.
_REFUSALS = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_NOT_NOW = (429, 500, 502, 503, 504)
_FULL = 507  # MinIO's


def as_user_error(error: BaseException, url: str) -> UserError | None:
    """What a storage failure means to the user, in one line; None where it is not a storage failure.

    An error that is the user's already is returned as it is.
    """
    if isinstance(error, UserError):
        return error
    where = os.environ.get("AWS_ENDPOINT_URL", "the S3 endpoint")
    for seen in _chain(error):
        if _is_cut_off(seen):
            return Unreachable(f"{url}: {where} cannot be reached; start the server or correct AWS_ENDPOINT_URL")
        if isinstance(seen, _without_credentials()):
            return _refused(url)
        if (answer := _answer(seen)) is not None:
            return _meaning(*answer, url, where)
        if isinstance(seen, OSError) and seen.__cause__ is None:  # else s3fs has translated what S3 answered
            return _local(seen, url)
    return None


def is_unreachable(error: BaseException) -> bool:
    """Whether an S3 server does not answer, or answers that it cannot serve now."""
    return any(_is_cut_off(seen) or (_answer(seen) or (0, ""))[0] in _NOT_NOW for seen in _chain(error))


def is_answer(error: BaseException) -> bool:
    """Whether it is obstore's error for an answer that it has no type for, such as that a range is not there."""
    return isinstance(error, _types("obstore.exceptions", "GenericError")) and not is_unreachable(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from. What was being handled when it was raised may be another story."""
    passed: list[BaseException] = []
    while error is not None and error not in passed:
        yield error
        passed.append(error)
        error = error.__cause__


def _types(module: str, *names: str) -> tuple[type[BaseException], ...]:
    """Exceptions of a library. None where it was not imported: then there can be none, and importing takes time."""
    loaded = sys.modules.get(module)
    return tuple(getattr(loaded, name) for name in names) if loaded is not None else ()


def _is_cut_off(error: BaseException) -> bool:
    """Whether a request had no answer."""
    if isinstance(error, _types("obstore.exceptions", "GenericError")):
        return " - HTTP error: " in str(error)
    return isinstance(
        error,
        (
            *_types("botocore.exceptions", "ConnectionError", "HTTPClientError"),
            *_types("aiohttp.client_exceptions", "ClientConnectionError", "ClientPayloadError"),
            *_types("fsspec.exceptions", "FSTimeoutError"),
        ),
    )


def _without_credentials() -> tuple[type[BaseException], ...]:
    names = "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"
    return _types("botocore.exceptions", *names, "SSOError")


def _answer(error: BaseException) -> tuple[int, str] | None:
    """HTTP status and S3's code that a server has answered with."""
    if isinstance(error, _types("botocore.exceptions", "ClientError")):
        response = getattr(error, "response", {})
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return int(status), str(response.get("Error", {}).get("Code", ""))
    if isinstance(error, _types("obstore.exceptions", "PermissionDeniedError", "UnauthenticatedError")):
        return 403, ""
    if isinstance(error, _types("obstore.exceptions", "BaseError")):
        found, code = (re.search(words, str(error)) for words in (r" status code: (\d{3})\b", r"<Code>(\w+)</Code>"))
        return (int(found[1]), code[1] if code else "") if found else None
    return None


def _meaning(status: int, code: str, url: str, where: str) -> UserError | None:
    if code == "NoSuchBucket":
        return no_bucket(url)
    if code == "InvalidBucketName":
        return UserError(f"{url}: the server does not take this for the name of a bucket; use another one")
    if status in (401, 403) or code in _REFUSALS:
        return _refused(url)
    if status == _FULL:
        return UserError(f"{url}: no space left on the S3 server; free some and run again, finished work is kept")
    if status in _NOT_NOW:
        return Unreachable(f"{url}: {where} cannot serve now ({code or status}); run again, finished work is kept")
    return None


def _refused(url: str) -> UserError:
    return UserError(f"{url}: access refused by the S3 server; check the credentials (AWS_ACCESS_KEY_ID, ...)")


def no_bucket(url: str) -> UserError:
    return UserError(f"{url}: the bucket does not exist; create it first")


def _local(error: OSError, url: str) -> UserError | None:
    where = str(error.filename or url)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{url}: no space left; free some and run again, finished work is kept")
    if error.errno == errno.EROFS:
        return UserError(f"{where}: read-only file system; choose another folder")
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(f"{where}: permission denied; make it accessible")
    return None
