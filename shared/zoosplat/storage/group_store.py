"""A zarr store that checks the objects of a group when they are read.

zarr reads a missing object as fill values, and it does not name a damaged one. zoosplat writes all objects, even those
of fill values, and each ends with a checksum. A loss can therefore be recognized and named.
"""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.storage import LocalStore, ObjectStore, WrapperStore

from zoosplat.storage import writing
from zoosplat.storage.durability import sync_later
from zoosplat.storage.errors import damaged_result_error, is_other_answer, no_bucket_error

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer, BufferPrototype

# Offset and size of a chunk that was not written, in the index of a shard (zarr's specification of sharding).
ABSENT = np.uint64(2**64 - 1)

# With chunks of fill values written too, a missing object always means a loss. zarr reads this setting when it opens
# an array.
zarr.config.set({"array.write_empty_chunks": True})


class GroupStore(WrapperStore[Store]):
    """The store of a group, which returns only objects that are whole.

    Attributes:
        url: folder or prefix of the group.
        complete: whether every chunk must be there. It is False for a group that is being written, and for one of a
            version that left out chunks of fill values. There, a missing chunk reads as fill values.

    Raises:
        UserError: when an object is read that is missing, cut short or damaged by its checksum. It names the object.
    """

    def __init__(self, store: Store, url: str, *, complete: bool) -> None:
        super().__init__(store)
        self.url, self.complete = url, complete
        # Number of chunks in a shard of every opened array whose chunks end with a checksum; 0 without sharding.
        self._chunks: dict[str, int] = {}

    def __str__(self) -> str:
        return self.url

    def _with_store(self, store: Store) -> GroupStore:
        return GroupStore(store, self.url, complete=self.complete)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            found = await self._store.get(key, prototype, byte_range)
        except Exception as error:
            if not is_other_answer(error) or _fits(byte_range, await self._store.getsize(key)):
                raise
            raise damaged_result_error(f"{self.url}/{key}", "is cut short") from error
        array, _, chunk = key.partition("/c/")
        if not chunk:
            if found is not None and key.endswith("zarr.json"):
                self._note_checksums(key, found.to_bytes())
            return found
        if found is None:
            if self.complete:
                raise damaged_result_error(f"{self.url}/{key}", "is missing")
        elif array in self._chunks:
            n_chunks = 0 if byte_range is not None else self._chunks[array]
            if not _is_whole(found.as_numpy_array(), n_chunks):
                raise damaged_result_error(f"{self.url}/{key}", "is damaged")
        return found

    async def set(self, key: str, value: Buffer) -> None:
        writing.check()
        if isinstance(self._store, LocalStore):
            await self._store.set(key, value)
            sync_later(self._store.root / key, self._store.root)
            return
        try:
            await self._store.set(key, value)
        except FileNotFoundError as error:
            raise no_bucket_error(self.url) from error

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        writing.check()
        await self._store.set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        writing.check()
        await self._store.delete(key)

    async def delete_dir(self, prefix: str) -> None:
        writing.check()
        await self._store.delete_dir(prefix)

    def read_part(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes of an object from offset `start`, which counts from the end if it is negative.

        The bytes must end with their checksum. Threads use this for many small reads, because each read through zarr's
        event loop takes 1 ms of Python.

        Raises:
            FileNotFoundError: there is no such object, in a group that need not be complete.
            UserError: it is missing, cut short or damaged.
        """
        try:
            data = _read_part(self._store, key, start, length)
        except FileNotFoundError:
            if not self.complete:
                raise
            raise damaged_result_error(f"{self.url}/{key}", "is missing") from None
        except Exception as error:
            wanted: ByteRequest = SuffixByteRequest(-start) if start < 0 else RangeByteRequest(start, start + length)
            if not is_other_answer(error) or _fits(wanted, _size(self._store, key)):
                raise
            raise damaged_result_error(f"{self.url}/{key}", "is cut short") from error
        if not _is_whole(np.frombuffer(data, np.uint8), 0):
            raise damaged_result_error(f"{self.url}/{key}", "is damaged")
        return data

    def _note_checksums(self, key: str, metadata: bytes) -> None:
        """Note from an array's metadata whether its chunks end with a checksum, and how many lie in a shard."""
        try:
            described: dict[str, Any] = json.loads(metadata)
        except ValueError as error:
            raise damaged_result_error(f"{self.url}/{key}", "is damaged") from error
        if described.get("node_type") != "array":
            return
        codecs, n_chunks = described["codecs"], 0
        if codecs[0]["name"] == "sharding_indexed":
            sharding = codecs[0]["configuration"]
            shard, chunk = described["chunk_grid"]["configuration"]["chunk_shape"], sharding["chunk_shape"]
            codecs, n_chunks = sharding["codecs"], math.prod(n // m for n, m in zip(shard, chunk, strict=True))
        if codecs[-1]["name"] == "crc32c":
            self._chunks[key.removesuffix("/zarr.json")] = n_chunks


def _read_part(store: Store, key: str, start: int, length: int) -> bytes:
    if isinstance(store, LocalStore):
        with open(store.root / key, "rb") as file:
            n = os.fstat(file.fileno()).st_size
            file.seek(max(0, n + start) if start < 0 else start)
            return file.read(length)
    import obstore

    assert isinstance(store, ObjectStore)
    if start < 0:
        return bytes(obstore.get(store.store, key, options={"range": {"suffix": -start}}).bytes())[:length]
    return bytes(obstore.get_range(store.store, key, start=start, length=length))


def _size(store: Store, key: str) -> int:
    import obstore

    assert isinstance(store, ObjectStore)
    return int(obstore.head(store.store, key)["size"])


def _fits(wanted: ByteRequest | None, n: int) -> bool:
    """Whether a range lies within an object of n bytes."""
    if isinstance(wanted, RangeByteRequest):
        return wanted.end <= n
    if isinstance(wanted, SuffixByteRequest):
        return wanted.suffix <= n
    return not isinstance(wanted, OffsetByteRequest) or wanted.offset < n


def _is_whole(data: npt.NDArray[np.uint8], n_chunks: int) -> bool:
    """Whether the checksums are right: of one chunk or index if `n_chunks` is 0, else of a shard of `n_chunks`.

    A shard ends with its index, which holds offset and size of every chunk as little-endian uint64 and a CRC32C.
    """
    index = data[-16 * n_chunks - 4 :] if n_chunks else data
    if len(index) < 4 or google_crc32c.value(index[:-4]) != int.from_bytes(index[-4:].tobytes(), "little"):
        return False
    if not n_chunks:
        return True
    chunks = np.frombuffer(index[:-4].tobytes(), "<u8").reshape(-1, 2)
    return all(_is_whole(data[int(offset) : int(offset + n)], 0) for offset, n in chunks if offset != ABSENT)
