"""Results: what a stage has made, in a folder of its own that is written once and never changed.

    PROJECT/results/<stage>/<result id>/
        request.json   what was asked for: settings, ids of inputs, contents of outside files
        plan.json      what `prepare` decided: shards and their bounds
        shards/        a mark for each shard that is done, and the leases of shards that are worked on
        masks.zarr     the data, under the plain name of the stage's output
        manifest.json  path and size of every file that belongs to a complete result
        done.json      written last; a result without it is not read by any stage

The id of a result is a hash of everything that determines the result. So it is known before anything runs, and equal
ids mean equal results, in whichever project they lie.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from zoosplat.errors import UserError
from zoosplat.stages.registry import STAGES
from zoosplat.storage import objects, urls

Mark = dict[str, Any]
RESULTS = "results"  # The folder of all results in a project.
# Names in the folder of a result.
DONE, PLAN, REQUEST, MANIFEST, SHARDS = "done.json", "plan.json", "request.json", "manifest.json", "shards"


def json_digest(value: Any) -> str:
    """The first 128 bits of the SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Source:
    """A file outside the project that determines a result.

    Attributes:
        url: where it lies.
        fingerprint: names its content, see `fingerprints.content_fingerprint`.
        state: what changes when the file is written, see `fingerprints.stat`; empty where it is not known.
    """

    url: str
    fingerprint: str
    state: str = ""


@dataclass(frozen=True)
class Request:
    """What determines a result.

    Attributes:
        stage: its name.
        version: of the stage.
        settings: dotted keys of the configuration and their values.
        inputs: stage -> id of the result that is read.
        sources: key of the configuration -> file.
        attempt: 0, or how many times the result had been asked for before, with `--force`.
    """

    stage: str
    version: int
    settings: dict[str, Any]
    inputs: dict[str, str]
    sources: dict[str, Source]
    attempt: int = 0

    @property
    def base(self) -> str:
        """What the ids of all attempts at the request begin with: 16 hexadecimal digits."""
        contents = {key: source.fingerprint for key, source in self.sources.items()}
        return json_digest([self.stage, self.version, self.settings, self.inputs, contents])[:16]

    @property
    def id(self) -> str:
        """The result id: 16 hexadecimal digits, and from the second attempt on its number."""
        return self.base if self.attempt == 0 else f"{self.base}-{self.attempt + 1}"

    def to_json(self) -> dict[str, Any]:
        """What request.json holds."""
        return {
            "stage": self.stage,
            "id": self.id,
            "version": self.version,
            "settings": self.settings,
            "inputs": self.inputs,
            "sources": {key: vars(source) for key, source in self.sources.items()},
            "attempt": self.attempt,
        }


def is_result_id(name: str) -> bool:
    """Whether the name of a folder is the id of a request. Results that were adopted may have other names."""
    return re.fullmatch(r"[0-9a-f]{16}(?:-[1-9]\d*)?", name) is not None


def parse_attempt(name: str, base: str) -> int | None:
    """The number of the attempt, from 0, that has the id `name`; None if that is the id of another request."""
    found = re.fullmatch(rf"{base}(?:-([1-9]\d*))?", name)
    if found is None:
        return None
    return int(found[1]) - 1 if found[1] else 0


@dataclass(frozen=True)
class Result:
    """One result of a stage, finished or not.

    Attributes:
        stage: the stage that makes it.
        id: its id.
        folder: URL of its folder, in this project or in another one that is reused.
        data_folder: URL of the folder that holds the data; differs from `folder` where a project of an earlier layout
            was adopted, which moves nothing.
        reused: whether it lies in another project.
    """

    stage: str
    id: str
    folder: str
    data_folder: str
    reused: bool = False
    _mark: dict[str, Mark] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def at(cls, project_url: str, stage: str, result_id: str, *, reused: bool = False) -> Result:
        """The result of that id below a project, whether or not anything of it exists.

        Raises:
            UserError: its mark is of another result, or names a place that may not be read here.
        """
        folder = urls.join(project_url, RESULTS, stage, result_id)
        found = cls(stage, result_id, folder, folder, reused)
        try:
            mark = found.mark()
        except UserError:  # Whoever reads the mark gets the error; until then the run's other results can be read.
            return found
        if mark is None or "data" not in mark:
            return found
        data = str(mark["data"])
        whole = data if data.startswith(("/", "s3://")) else urls.join(project_url, data)
        # The mark may come from someone else, so its URL is checked like one that a user writes: a container must not
        # be led to files of its own.
        return cls(stage, result_id, folder, urls.normalize(whole), reused)

    @property
    def data_url(self) -> str:
        """URL of the group or folder that the stage writes."""
        return urls.join(self.data_folder, STAGES[self.stage].writes)

    def file(self, *parts: str) -> str:
        """URL of a file in its own folder, such as `plan.json`."""
        return urls.join(self.folder, *parts)

    def shard_mark_url(self, index: int, count: int) -> str:
        """URL of the mark of the `index`-th of `count` shards, which says that the shard is done."""
        return self.file(SHARDS, f"{index:05d}-of-{count:05d}.json")

    def shard_lease_url(self, index: int, count: int) -> str:
        """URL of the lease of who works on the `index`-th of `count` shards."""
        return self.file(SHARDS, f"{index:05d}-of-{count:05d}.lease")

    def lease_url(self) -> str:
        """URL of the lease of who prepares or finishes it."""
        return self.file("lease")

    def claim(self, request: Request) -> None:
        """Write the request that it is the result of, unless it is there. From then on its id is taken."""
        if not objects.exists(self.file(REQUEST)):
            objects.write_json(self.file(REQUEST), request.to_json())

    def mark(self) -> Mark | None:
        """Its success mark; None before it is finished. Raises UserError if the mark belongs to another result."""
        if "done" not in self._mark:
            mark = objects.read_json(self.file(DONE))
            if mark is None:
                return None
            if mark.get("id") != self.id:
                raise UserError(
                    f"{self.file(DONE)}: is the mark of {mark.get('id')}; the folder was renamed or mixed up"
                )
            self._mark["done"] = mark
        return self._mark["done"]

    def is_done(self) -> bool:
        """Whether its success mark is there. Raises UserError as `mark`."""
        return self.mark() is not None

    def plan(self) -> Mark | None:
        """What `prepare` wrote; None before that."""
        return objects.read_json(self.file(PLAN))

    def shards_done(self) -> tuple[int, int]:
        """How many shards are done, of how many; (0, 0) before the result is prepared."""
        mark = self.mark()
        if mark is not None:
            count = int(mark.get("shards", 0))
            return count, count
        plan = self.plan()
        if plan is None:
            return 0, 0
        count = len(plan["bounds"]) - 1
        return sum(objects.exists(self.shard_mark_url(i, count)) for i in range(count)), count

    def require(self) -> Mark:
        """Its success mark. Raises UserError if the result is not finished or no longer there."""
        mark = self.mark()
        if mark is not None:
            return mark
        if self.reused:
            raise UserError(
                f"{self.folder}: this result of stage {self.stage}, which is reused from another project, is gone; run "
                "again, and it is found elsewhere or made here"
            )
        raise UserError(f"{self.data_url} is not complete; run stage {self.stage} first")

    def manifest(self) -> dict[str, int] | None:
        """Path below `data_folder` -> bytes of every file of the complete result; None for one that was adopted."""
        return objects.read_json(self.file(MANIFEST))
