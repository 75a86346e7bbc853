"""A power cut: what a mark speaks of is on disk before the mark can be.

A program writes a result while each of its writes, syncs and renames is logged. At moments of that log the worst that a
file system may do is made of it: marks are there, but nothing else that was not synced. A reader must find whole what a
mark speaks of.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoosplat.errors import UserError
from zoosplat.storage import groups, listing, objects, schema, urls

T, BLOCK = 11, 4
SHARED = {
    "rgb": np.arange(T * 2 * 6 * 5 * 3, dtype=np.uint32).reshape(T, 2, 6, 5, 3).astype(np.uint8),
    "mask": np.arange(T * 2 * 6 * 5).reshape(T, 2, 6, 5) % 3 == 0,
    "origin": np.arange(T * 2 * 2, dtype=np.int32).reshape(T, 2, 2),
}
WHOLE = {"intrinsics": np.full((2, 3, 3), 7.0), "world_to_camera": np.full((2, 4, 4), 8.0)}
SHARDS = [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]


def is_mark(path: str) -> bool:
    return path.endswith(".json") and not path.endswith("zarr.json")


def write_result(url: str) -> None:
    """As a stage does: an empty group, a plan, blocks and a mark for each shard, what needs them all, the last mark."""
    where = urls.join(url, "images.zarr")
    schema.create(where, "images.zarr", {"T": T, "C": 2, "h": 6, "w": 5}, BLOCK, {})
    objects.write_json(urls.join(url, "plan.json"), {})
    group = groups.open_group(where, write=True)
    for i, (start, stop) in enumerate(SHARDS):
        for key, values in SHARED.items():
            schema.write_block(group, key, start, values[start:stop])
        objects.write_json(urls.join(url, "shards", f"{i}.json"), {})
    for key, values in WHOLE.items():
        schema.array(group, key)[...] = values
    objects.write_json(urls.join(url, "done.json"), listing.manifest(where))


def check_result(url: str) -> list[str]:
    """Read what the marks say is there. Returns the marks."""
    marks = [name for name in listing.list_files(url) if is_mark(name)]
    if not marks:
        return []
    done = "done.json" in marks
    group = groups.open_group(urls.join(url, "images.zarr"), complete=True)
    schema.validate(group, "images.zarr", url)
    for i, (start, stop) in enumerate(SHARDS):
        if done or f"shards/{i}.json" in marks:
            for key, values in SHARED.items():
                np.testing.assert_array_equal(schema.read(group, key, start, stop), values[start:stop])
    if done:
        for key, values in WHOLE.items():
            np.testing.assert_array_equal(schema.read(group, key), values)
        expected: dict[str, Any] = objects.read_json(urls.join(url, "done.json")) or {}
        assert set(expected) == schema.expected_files(group)
        listing.check_manifest(urls.join(url, "images.zarr"), expected)
    return marks


# -- what a disk may hold -----------------------------------------------------------------------------------------
@dataclass
class Node:
    """A file or folder, whatever its name is at the time.

    Attributes:
        is_synced: whether its content is on disk; of a folder that is a matter of its entries.
        last_name: its last one, by which its content can be found when all is over.
    """

    is_folder: bool
    is_synced: bool
    last_name: str


@dataclass
class Disk:
    """What programs see, and which of it is on disk, after the first lines of a log.

    Attributes:
        seen: every file and folder by its path.
        on_disk: those whose entry in their folder is on disk.
    """

    seen: dict[str, Node] = field(default_factory=dict)
    on_disk: dict[str, Node] = field(default_factory=dict)

    def apply(self, operation: str, path: str, target: str) -> None:
        if operation in ("create", "mkdir"):
            self.seen.setdefault(path, Node(operation == "mkdir", False, path))
        elif operation == "rename":
            self.seen[target] = self.seen.pop(path)
            self.seen[target].last_name = target
        elif operation == "remove":
            self.seen.pop(path, None)
        elif operation == "sync" and path in self.seen and not self.seen[path].is_folder:
            self.seen[path].is_synced = True
        elif operation == "sync":
            entries = {name: node for name, node in self.seen.items() if os.path.dirname(name) == path}
            self.on_disk = {name: n for name, n in self.on_disk.items() if os.path.dirname(name) != path} | entries
        if operation in ("create", "write") and path in self.seen:
            self.seen[path].is_synced = False

    def survivors(self) -> Iterator[tuple[str, Node]]:
        """What a power cut leaves: no entry that is not on disk, and nothing below it, except for marks."""
        for name, node in sorted(self.seen.items()):
            folders = [str(folder) for folder in Path(name).parents if str(folder) in self.seen]
            if is_mark(name) or all(self.on_disk.get(each) is self.seen[each] for each in (name, *folders)):
                yield name, node


@dataclass(frozen=True)
class Written:
    """A result that was written, and the log of it."""

    folder: Path
    log: list[tuple[str, str, str]]

    def after_power_cut(self, step: int, folder: Path) -> str:
        """What may be left of it when the power fails before a step of the log; its URL."""
        disk = Disk()
        for line in self.log[:step]:
            disk.apply(*line)
        survivors = [(name, node, node.is_synced) for name, node in disk.survivors()]
        for line in self.log[step:]:
            disk.apply(*line)  # for the last name of each file, under which its content is found now
        folder.mkdir()
        for name, node, is_synced in survivors:
            path = folder / os.path.relpath(name, self.folder)
            if node.is_folder:
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                # Without its last sync a file may be there with nothing in it.
                path.write_bytes(Path(node.last_name).read_bytes() if is_synced else b"")
        return str(folder / "result")

    def marks(self) -> list[int]:
        """The steps after which a mark may be on disk."""
        renames = [i for i, (operation, _, target) in enumerate(self.log) if operation == "rename" and is_mark(target)]
        return [i + 1 for i in renames]


@pytest.fixture(scope="module")
def disk_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that logs."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("disk_log") / "disk_log.so"
    source = Path(__file__).with_name("disk_log.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def write_logged(library: Path, folder: Path, before: str = "") -> Written:
    """Write a result in another process. `before`: Python to be run first."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_power_cut\n"
    program += f"{before}\ntest_power_cut.write_result(sys.argv[2])"
    data, log = folder / "data", folder / "log"
    data.mkdir()
    subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent), str(data / "result")],
        env={**os.environ, "LD_PRELOAD": str(library), "DISK_LOG": str(log), "DISK_LOG_BELOW": str(data)},
        check=True,
    )
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    return Written(data, [(operation, path, target) for operation, path, target in lines])


def test_marks_speak_of_what_is_on_disk(disk_log: Path, tmp_path: Path) -> None:
    written = write_logged(disk_log, tmp_path)
    assert len(check_result(str(written.folder / "result"))) == 5
    marks, rng = written.marks(), random.Random(0)
    assert len(marks) == 5
    for step in (*marks, *rng.sample(range(len(written.log)), 15)):
        left = written.after_power_cut(step, tmp_path / f"after-{step}")
        assert len(check_result(left)) == sum(mark <= step for mark in marks)
        shutil.rmtree(tmp_path / f"after-{step}")
    # The last mark is on disk itself when the program goes on.
    disk = Disk()
    for line in written.log:
        disk.apply(*line)
    assert {name for name, node in disk.on_disk.items() if is_mark(name) and node.is_synced} == {
        name for name in disk.seen if is_mark(name)
    }


@pytest.mark.parametrize(
    "before",
    [
        "import zoosplat.storage.objects as objects; objects.sync_written = lambda: None",
        "import os; os.fsync = lambda opened: None",
    ],
    ids=["blocks are not synced", "nothing is synced"],
)
def test_it_would_be_noticed(before: str, disk_log: Path, tmp_path: Path) -> None:
    """The test before this one fails where it should."""
    written = write_logged(disk_log, tmp_path, before)
    left = written.after_power_cut(written.marks()[-1], tmp_path / "after")
    with pytest.raises((UserError, FileNotFoundError)):
        check_result(left)
