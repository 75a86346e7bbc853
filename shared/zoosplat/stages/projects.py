"""The folder or S3 prefix of a project.

PROJECT/runs/<run id>/   the records of runs, see `zoosplat.stages.runs`
PROJECT/results/         what stages have made, see `zoosplat.stages.results`
PROJECT/latest.json      the run that is shown when none is named
PROJECT/latest/          on local disks: links to that run's results under their plain names
"""

from __future__ import annotations

from dataclasses import dataclass

from zoosplat.storage import listing, objects, urls

RUNS = "runs"  # The folder of the runs' records.
LATEST = "latest.json"  # The file that names the run that was begun last.
LATEST_LINKS = "latest"  # The folder of links to that run's results.
LEGACY_CONFIG = "experiment.yaml"  # The configuration in a project of the layout before runs.
LEGACY_RUN = "before-runs"  # The id of the one run that such a project amounts to.


@dataclass(frozen=True)
class Project:
    """A folder or S3 prefix that holds the runs and results of an experiment."""

    url: str

    @classmethod
    def at(cls, url: str) -> Project:
        """The project at a path or URL, whether or not anything is there. Raises UserError as `urls.normalize`."""
        return cls(urls.normalize(url))

    def path(self, *parts: str) -> str:
        """URL of a file or folder in it."""
        return urls.join(self.url, *parts)

    def run_ids(self) -> list[str]:
        """Ids of all runs, the oldest first: an id begins with the time when the run was begun."""
        return sorted(name for name in listing.list_folders(self.path(RUNS)) if not name.startswith("."))

    def exists(self) -> bool:
        """Whether there is a project, of today's layout or of the one before."""
        return self.latest_id() is not None or self.is_legacy()

    def is_legacy(self) -> bool:
        """Whether it is of the layout before runs: one experiment.yaml, and marks in `_marks`."""
        return objects.read_json(self.path(LATEST)) is None and objects.exists(self.path(LEGACY_CONFIG))

    def latest_id(self) -> str | None:
        """Id of the run that was begun last; None where there is none."""
        latest = objects.read_json(self.path(LATEST))
        return None if latest is None else str(latest["run"])
