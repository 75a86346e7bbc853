"""The connections to an S3 server, which follow the standard credential chain and `AWS_ENDPOINT_URL`.

Plain files go through s3fs. zarr arrays go through obstore, which is several times faster for many objects.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from zoosplat.storage.errors import is_unreachable
from zoosplat.storage.urls import split_s3

if TYPE_CHECKING:
    from zarr.abc.store import Store

# Timeouts of a request of s3fs, in s, and the number of attempts. A server that has never answered is reported after
# less than 30 s of them.
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 8
ATTEMPTS = 3
# Timeout in s of one whole put or get of an array's block.
REQUEST_TIMEOUT_S = 60
# Time in s for which a server that has answered before is waited for: it may restart, or its node may move.
OUTAGE_S = 30
# Time in s between two attempts during an outage.
PAUSE_S = 1
# Number of keys in one listing or deletion. It is the limit of S3.
KEYS_AT_ONCE = 1000

_answered_before = False


def expect_answers() -> None:
    """Wait out an outage from the first request on, because the parent process has already reached the server."""
    global _answered_before
    _answered_before = True


@lru_cache(maxsize=1)
def file_system() -> Any:
    """The `s3fs.S3FileSystem` of this process. It caches no listings, and it retries what s3fs gives up at once."""
    import s3fs
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]
    from botocore.handlers import add_expect_header

    class RetryingFileSystem(s3fs.S3FileSystem):  # type: ignore[misc]
        retries = ATTEMPTS
        answered = _answered_before

        async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
            """Send a request, and wait out an outage of a server that has answered before.

            s3fs gives up at once where nothing listens. An endpoint that has never answered is still reported at once.
            """
            waited: float = 0
            while True:
                try:
                    answer = await super()._call_s3(method, *args, **kwargs)
                except Exception as error:
                    if not is_unreachable(error):
                        self.answered = True
                        raise
                    if not self.answered or waited >= OUTAGE_S:
                        raise
                    began = time.monotonic()
                    await asyncio.sleep(PAUSE_S)
                    waited += time.monotonic() - began
                else:
                    self.answered = True
                    return answer

    session = AioSession()
    # With this header a put waits for the server's leave to send, which has no timeout. A stuck server would hold it.
    session.unregister("before-call.s3", add_expect_header)
    return RetryingFileSystem(
        session=session,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"total_max_attempts": 1},  # s3fs has its own retries.
        },
    )


def call(method: str, **arguments: Any) -> Any:
    """The answer to a request of the S3 API that s3fs has no function for. It is retried as s3fs retries its own."""
    from fsspec import asyn

    return asyn.sync(file_system().loop, file_system()._call_s3, method, **arguments)


def list_pages(url: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """The answers of `list_objects_v2` for everything below a URL. `arguments` are further ones of this request."""
    bucket, prefix = split_s3(url.rstrip("/"))
    arguments |= {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "MaxKeys": KEYS_AT_ONCE}
    while True:
        page = call("list_objects_v2", **arguments)
        yield page
        if not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


@lru_cache(maxsize=1)
def boto3_session() -> tuple[Any, str | None, str]:
    """The boto3 session of this process, the URL of the endpoint and the region. The endpoint is None on AWS."""
    import boto3

    session = boto3.Session()
    client = session.client("s3", region_name=session.region_name or "us-east-1")
    endpoint = str(client.meta.endpoint_url)
    return session, None if endpoint.endswith("amazonaws.com") else endpoint, session.region_name or "us-east-1"


def array_store(url: str, *, read_only: bool) -> Store:
    """A zarr store of the objects below a URL.

    Raises:
        NoCredentialsError: the credential chain holds none.
    """
    from botocore.exceptions import NoCredentialsError
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    bucket, prefix = split_s3(url)
    session, endpoint, region = boto3_session()
    if session.get_credentials() is None:
        raise NoCredentialsError
    store = S3Store(
        bucket,
        prefix=prefix or None,
        endpoint=endpoint,
        region=region,
        virtual_hosted_style_request=endpoint is None,
        credential_provider=Boto3CredentialProvider(session),
        client_options={
            "allow_http": True,
            "connect_timeout": f"{CONNECT_TIMEOUT_S}s",
            "timeout": f"{REQUEST_TIMEOUT_S}s",
        },
        retry_config={
            "max_retries": 2 * OUTAGE_S,
            "retry_timeout": timedelta(seconds=OUTAGE_S),
            "backoff": {"max_backoff": timedelta(seconds=PAUSE_S)},
        },
    )
    return ObjectStore(store, read_only=read_only)
