"""Local files that survive a power cut: folders are made and files are synced before a marker file says so."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Number of threads that sync. A journaling file system commits what is synced together in one transaction.
SYNC_THREADS = 8

# Files of zarr groups that this process has written and not synced yet, each with the folder of its group.
_unsynced: list[tuple[Path, Path]] = []
_sync_lock = threading.Lock()


def sync_later(file: Path, group: Path) -> None:
    """Note a file of a zarr group for the next call of `sync_written`."""
    _unsynced.append((file, group))


def sync_written() -> None:
    """Sync to disk everything that this process has written to zarr groups so far.

    This is called before a marker file says that a group is complete. Syncing each block as it is written took 1 s for
    a recording of 144 small frames, and this takes a tenth of it.
    """
    with _sync_lock:
        written = _unsynced.copy()
        files = {file for file, _ in written}
        # Folders above the group's parent need no sync: if they are lost, the marker file is lost with them.
        folders = {folder for file, group in written for folder in file.parents if folder.is_relative_to(group.parent)}
        if files:
            with ThreadPoolExecutor(SYNC_THREADS) as pool:
                list(pool.map(sync_path, files))
                list(pool.map(sync_path, folders))
        del _unsynced[: len(written)]


def sync_path(path: Path) -> None:
    """Sync a file's content, or a folder's list of names, to disk. A path that has been removed is skipped."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # Some file systems have no fsync.
            raise
    finally:
        os.close(opened)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, and sync the parents of every new folder.

    Raises:
        FileExistsError, NotADirectoryError: a file has the name of the folder or of one of its parents.
    """
    path = Path(os.path.realpath(path))  # mkdir fails at a symbolic link to a folder that does not exist yet.
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(new):
        sync_path(folder.parent)
