"""Stage embedding: features.zarr, tracking.zarr, images.zarr -> embedding.zarr, embedding.csv."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from zoosplat.config.sections import Embedding, is_weights_file
from zoosplat.errors import UserError
from zoosplat.formats.csv_table import encode_csv
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage
from zoosplat.stages.runs import Run
from zoosplat.storage import fingerprints, listing, objects, schema, urls
from zoosplat_embedding import ops

MIN_TRAINING_FRAMES = 2  # an embedding of one frame says nothing
CSV_DIGITS = 7  # Significant digits of numbers in the table.
GROUP, CSV = "embedding.zarr", "embedding.csv"


@dataclass(frozen=True)
class Recording:
    """Of a run, the descriptors that are embedded and the positions of the animal.

    Attributes:
        kind: encoder, radius and weights, which descriptors that are embedded together must have in common.
        features: [T, D] float32, NaN where not valid.
        valid: [T] bool, whether the frame has a visual hull.
        train: [T] bool, whether the embedding is fitted to the frame.
        centers: [T, 3] m.
        covariances: [T, 3, 3] m^2.
        headings: [T] rad.
        frames: [T] indices in the video.
        fps: kept frames a second.
    """

    kind: dict[str, Any]
    features: ops.Floats
    valid: ops.Bools
    train: ops.Bools
    centers: ops.Floats
    covariances: ops.Floats
    headings: ops.Floats
    frames: Any
    fps: float

    @classmethod
    def read(cls, run: Run, fit_to: Literal["third", "all"]) -> Recording:
        """Read what a run's stages have written.

        Raises:
            UserError: a stage is missing, its group is damaged, or there are too few training frames.
        """
        group, tracking, images = (run.open_input(stage) for stage in ("features", "center_rotation", "pack"))
        schema.validate(group, "features.zarr", run.output_url("features"))
        features = schema.read(group, "features")
        valid = schema.read(tracking, "valid").astype(bool)
        if len(features) != len(valid):
            where = run.output_url("features")
            raise UserError(f"{where}: {len(features)} frames, tracking has {len(valid)}; run stage features again")
        train = valid & (np.arange(len(valid)) < (len(valid) if fit_to == "all" else len(valid) // 3))
        if train.sum() < MIN_TRAINING_FRAMES:
            part = "" if fit_to == "all" else "the first third of "
            raise UserError(
                f"{run.project.url}: {train.sum()} of {part}{len(valid)} frames have a visual hull, too few to fit an "
                "embedding; keep more frames (ingest.frame_jump, ingest.max_frames) or check the masks"
            )
        jump, fps = int(str(images.attrs["frame_jump"])), float(str(images.attrs["fps"]))
        return cls(
            kind=_kind({**group.attrs}),
            features=features,
            valid=valid,
            train=train,
            centers=schema.read(tracking, "centers"),
            covariances=schema.read(tracking, "covs"),
            headings=schema.read(tracking, "angles"),
            frames=jump * np.arange(len(valid)),
            fps=fps / jump,
        )


def _kind(attributes: dict[str, Any]) -> dict[str, Any]:
    """Encoder, radius and weights of descriptors, from the attributes of their group: see `Recording.kind`."""
    kind: dict[str, Any] = {key: attributes[key] for key in ("encoder", "radius_m", "weights") if key in attributes}
    if is_weights_file(str(kind.get("weights"))):
        # Groups of earlier versions name the file and not its content. A file that is gone is known by its name alone.
        with suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
            kind["weights"] = fingerprints.content_fingerprint(urls.normalize(str(kind["weights"])))
    return kind


def embed(
    recordings: Sequence[Recording], settings: Embedding, progress: Callable[[int], None] = lambda done: None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Embed recordings together.

    Args:
        recordings: of one kind; fitted to the first thirds of all, or to all frames of all.
        settings: as in the configuration.
        progress: called with how many of four steps are done.

    Returns:
        The arrays of embedding.zarr, with a row for each kept frame of each recording, and its attributes.
    """
    valid = np.concatenate([r.valid for r in recordings])
    features = np.concatenate([r.features for r in recordings])
    headings = np.concatenate([r.headings for r in recordings])
    train = np.concatenate([r.train for r in recordings])
    lengths = [len(r.valid) for r in recordings]
    recording = np.repeat(np.arange(len(recordings), dtype=np.int32), lengths)
    t = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    times = np.concatenate([np.arange(len(r.valid)) / r.fps for r in recordings])

    variation = _variation(recordings[0].kind["encoder"], features.shape[1])
    projection = ops.fit(features[valid], headings[valid], train[valid], settings.dimensions, variation)
    embedding = np.full((len(valid), settings.dimensions), np.nan, np.float32)
    embedding[valid] = projection(features[valid])
    progress(1)
    rows = np.flatnonzero(valid)
    near = ops.neighbours(embedding[rows], times[rows], recording[rows], settings.neighbours, settings.apart_s)
    neighbours = np.full((len(valid), settings.neighbours), -1, np.int32)
    neighbours[rows] = np.where(near >= 0, rows[near], -1)
    progress(2)
    state = np.full(len(valid), -1, np.int32)
    state[rows] = ops.states(embedding[rows], settings.states, settings.seed)
    progress(3)
    plane = np.full((len(valid), 2), np.nan, np.float32)
    plane[rows] = ops.plane(embedding[rows], settings.seed)
    progress(4)
    arrays = {
        "embedding": embedding,
        "map": plane,
        "neighbours": neighbours,
        "state": state,
        "valid": valid,
        "recording": recording,
        "t": t,
        "frame": np.concatenate([r.frames for r in recordings]),
        "time": times,
        "center": np.concatenate([r.centers for r in recordings]),
        "heading": headings,
        "speed": np.concatenate([ops.speeds(r.centers, r.fps) for r in recordings]),
        "height": np.concatenate([ops.heights(r.centers, r.covariances, r.valid) for r in recordings]),
    }
    attributes = {
        **recordings[0].kind,
        "descriptor": int(features.shape[1]),
        "fit_to": settings.fit_to,
        "training_frames": int(train.sum()),
        "explained_variance": [round(float(share), 6) for share in projection.explained],
        "heading_removal": projection.strength,
        "heading_r2": [round(value, 4) for value in projection.heading_r2],
        "apart_s": settings.apart_s,
        "states": int(state.max()) + 1,
        "fps": [r.fps for r in recordings],
    }
    return arrays, attributes


def _variation(encoder: str, size: int) -> ops.Floats | None:
    """The variation among animals that `zoosplat_features.animals` measured; None for other encoders and sizes."""
    if encoder != "gaussians":
        return None
    with (importlib.resources.files("zoosplat_embedding") / "animals.npz").open("rb") as file:
        factor = np.load(file, allow_pickle=False)["factor"].astype(np.float64)
    return factor if factor.shape[1] == size else None


def write(folder: str, arrays: dict[str, Any], attributes: dict[str, Any]) -> None:
    """Write embedding.zarr and then embedding.csv into a folder or S3 prefix."""
    n, dimensions = arrays["embedding"].shape
    sizes = {"T": n, "E": dimensions, "k": arrays["neighbours"].shape[1]}
    group = schema.create(urls.join(folder, GROUP), GROUP, sizes, n, attributes)
    for key, values in arrays.items():
        schema.array(group, key)[...] = values
    joint = {"recording": arrays["recording"]} if "recordings" in attributes else {}
    columns = {
        **joint,
        **{key: arrays[key] for key in ("t", "frame", "time")},
        "valid": arrays["valid"].astype(int),
        **{f"center_{axis}": arrays["center"][:, i] for i, axis in enumerate("xyz")},
        **{key: arrays[key] for key in ("heading", "speed", "height", "state")},
        **{f"map_{axis}": arrays["map"][:, i] for i, axis in enumerate("xy")},
        **{f"e{i:02d}": arrays["embedding"][:, i] for i in range(dimensions)},
    }
    objects.write_bytes(
        urls.join(folder, CSV), encode_csv(tuple(columns), zip(*columns.values(), strict=True), CSV_DIGITS)
    )


def _warnings(arrays: dict[str, Any], attributes: dict[str, Any]) -> tuple[str, ...]:
    found = []
    dimensions, fitted = arrays["embedding"].shape[1], sum(share > 0 for share in attributes["explained_variance"])
    if fitted < dimensions:
        frames = attributes["training_frames"]
        found.append(f"{frames} training frames fit {fitted} of {dimensions} dimensions; the others are 0")
    after = attributes["heading_r2"][1]
    if after > ops.MAX_HEADING_R2:
        found.append(f"the heading can be told from the embedding (R2 {after:.2f} at other times)")
    return tuple(found)


class EmbeddingStage(Stage):
    """Embed the descriptors, and derive a map, the most similar frames and states of behaviour."""

    def prepare(self, ctx: Context) -> Plan:
        recording = Recording.read(ctx.run, ctx.experiment.embedding.fit_to)
        return Plan((0, len(recording.valid)))

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        recording = Recording.read(ctx.run, ctx.experiment.embedding.fit_to)
        frames = shard.stop

        def progress(done: int) -> None:
            ctx.progress(done * frames // 5, frames, "")

        arrays, attributes = embed([recording], ctx.experiment.embedding, progress)
        write(ctx.run.result(self.name).data_folder, arrays, attributes)
        ctx.progress(frames, frames, "")
        explained = round(sum(attributes["explained_variance"]), 4)
        figures = {key: attributes[key] for key in ("encoder", "heading_removal", "heading_r2")}
        return Outcome(
            int(recording.valid.sum()),
            _warnings(arrays, attributes),
            {**figures, "explained_variance": explained},
        )


STAGE = EmbeddingStage("embedding")


def embed_together(runs: Sequence[Run], output: str) -> list[str]:
    """Embed recordings of several runs together, with the settings of the first.

    Writes embedding.zarr and then embedding.csv into `output`, a folder or S3 prefix that holds nothing.

    Returns:
        Warnings.

    Raises:
        UserError: a run lacks its features, or their kinds differ; or there are files in `output`.
    """
    held = next(listing.list_files(output), None)
    if held is not None:
        raise UserError(f"{urls.join(output, held)}: is there already; choose an --output that holds no files")
    recordings, settings = [], runs[0].experiment.embedding
    for run in runs:
        recordings.append(Recording.read(run, settings.fit_to))
        first = recordings[0].kind
        for key, value in recordings[-1].kind.items():
            if first.get(key) != value:
                raise UserError(
                    f"{run.project.url}: {key} of the features is {value}, but {first.get(key)} in "
                    f"{runs[0].project.url}; set features.{key.removesuffix('_m')} to the same in both and run stage "
                    "features again"
                )
    arrays, attributes = embed(recordings, settings)
    write(output, arrays, {**attributes, "recordings": [run.project.url for run in runs]})
    return list(_warnings(arrays, attributes))
