"""Failures of the storage, translated into errors that tell the user what to do.

Failures are recognized by exception types, error numbers and S3's codes, never by words of a message, which may come
from any library. The exception is obstore: it gives the answer of an S3 server only in the messages of its own errors.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

from zoosplat.errors import Unreachable, UserError

# S3's codes for credentials that AWS refuses with status 400. Other refusals have status 401 or 403.
_REFUSAL_CODES = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
# HTTP statuses of a server that cannot serve now.
_UNAVAILABLE_STATUSES = (429, 500, 502, 503, 504)
# HTTP status of a MinIO server without space.
_FULL_STATUS = 507
# Folder of a project that holds the results, as PROJECT/results/STAGE/RESULT.
_RESULTS = "results"

P = ParamSpec("P")
R = TypeVar("R")


def name_url_in_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose first argument is a URL: storage failures become UserErrors that name the URL.

    Other exceptions pass unchanged, such as FileNotFoundError.
    """

    @wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            known = as_user_error(error, str(args[0]))
            if known is None or known is error:
                raise
            raise known from error

    return named


def as_user_error(error: BaseException, url: str) -> UserError | None:
    """The UserError for a storage failure at a URL; None if the error is no storage failure.

    A UserError is returned as it is.
    """
    if isinstance(error, UserError):
        return error
    where = os.environ.get("AWS_ENDPOINT_URL", "the S3 endpoint")
    for seen in _causes(error):
        if _has_no_answer(seen):
            return Unreachable(f"{url}: {where} cannot be reached; start the server or correct AWS_ENDPOINT_URL")
        if isinstance(seen, _credential_errors()):
            return _refused_error(url)
        if (answer := _status_and_code(seen)) is not None:
            return _answer_error(*answer, url, where)
        if isinstance(seen, OSError) and seen.__cause__ is None:  # With a cause, s3fs has translated S3's answer.
            return _local_error(seen, url)
    return None


def is_unreachable(error: BaseException) -> bool:
    """Whether an S3 server does not answer, or answers that it cannot serve now."""
    return any(
        _has_no_answer(seen) or (_status_and_code(seen) or (0, ""))[0] in _UNAVAILABLE_STATUSES
        for seen in _causes(error)
    )


def is_other_answer(error: BaseException) -> bool:
    """Whether obstore reports an answer that it has no own exception for, such as a range beyond the object's end."""
    return isinstance(error, _loaded_types("obstore.exceptions", "GenericError")) and not is_unreachable(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the chain of its causes. Contexts are left out, because they may have nothing to do with it."""
    passed: list[BaseException] = []
    while error is not None and error not in passed:
        yield error
        passed.append(error)
        error = error.__cause__


def _loaded_types(module: str, *names: str) -> tuple[type[BaseException], ...]:
    """Exception types of a module; none if nothing has imported it, since importing takes time."""
    loaded = sys.modules.get(module)
    return tuple(getattr(loaded, name) for name in names) if loaded is not None else ()


def _has_no_answer(error: BaseException) -> bool:
    """Whether the error says that a request got no answer."""
    if isinstance(error, _loaded_types("obstore.exceptions", "GenericError")):
        return " - HTTP error: " in str(error)
    return isinstance(
        error,
        (
            *_loaded_types("botocore.exceptions", "ConnectionError", "HTTPClientError"),
            *_loaded_types("aiohttp.client_exceptions", "ClientConnectionError", "ClientPayloadError"),
            *_loaded_types("fsspec.exceptions", "FSTimeoutError"),
        ),
    )


def _credential_errors() -> tuple[type[BaseException], ...]:
    names = "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"
    return _loaded_types("botocore.exceptions", *names, "SSOError")


def _status_and_code(error: BaseException) -> tuple[int, str] | None:
    """HTTP status and S3's code of a server's answer that the error reports; None if it reports none."""
    if isinstance(error, _loaded_types("botocore.exceptions", "ClientError")):
        response = getattr(error, "response", {})
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return int(status), str(response.get("Error", {}).get("Code", ""))
    if isinstance(error, _loaded_types("obstore.exceptions", "PermissionDeniedError", "UnauthenticatedError")):
        return 403, ""
    if isinstance(error, _loaded_types("obstore.exceptions", "BaseError")):
        found, code = (re.search(words, str(error)) for words in (r" status code: (\d{3})\b", r"<Code>(\w+)</Code>"))
        return (int(found[1]), code[1] if code else "") if found else None
    return None


def _answer_error(status: int, code: str, url: str, where: str) -> UserError | None:
    if code == "NoSuchBucket":
        return no_bucket_error(url)
    if code == "InvalidBucketName":
        return UserError(f"{url}: the server does not take this for the name of a bucket; use another one")
    if status in (401, 403) or code in _REFUSAL_CODES:
        return _refused_error(url)
    if status == _FULL_STATUS:
        return UserError(f"{url}: no space left on the S3 server; free some and run again, finished work is kept")
    if status in _UNAVAILABLE_STATUSES:
        return Unreachable(f"{url}: {where} cannot serve now ({code or status}); run again, finished work is kept")
    return None


def _refused_error(url: str) -> UserError:
    return UserError(f"{url}: access refused by the S3 server; check the credentials (AWS_ACCESS_KEY_ID, ...)")


def no_bucket_error(url: str) -> UserError:
    return UserError(f"{url}: the bucket does not exist; create it first")


def _local_error(error: OSError, url: str) -> UserError | None:
    where = str(error.filename or url)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{url}: no space left; free some and run again, finished work is kept")
    if error.errno == errno.EROFS:
        return UserError(f"{where}: read-only file system; choose another folder")
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(f"{where}: permission denied; make it accessible")
    return None


def damaged_result_error(url: str, what: str) -> UserError:
    """The error for a file of a result that is not as its stage wrote it.

    Args:
        url: the file. Its stage is named if it lies in PROJECT/results/STAGE/RESULT, as all but old results do.
        what: predicate of the message, such as "is missing".
    """
    parts = url.split("/")
    stages = [
        f"stage {stage}" for folder, stage, _ in zip(parts, parts[1:], parts[2:], strict=False) if folder == _RESULTS
    ]
    return UserError(f"{url} {what}; run {stages[-1] if stages else 'the stage that wrote it'} with --force")
