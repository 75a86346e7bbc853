"""Measures what an embedding tells of the pose and of the heading, on a recording whose keypoints are known.

    python benchmarks/embedding.py PROJECT [PROJECT...] --truth truth.npz

`truth.npz` holds keypoints [frames of the video, K, 3] (any unit, any origin), heading [frames] (radians about up) and
up [3] (optional, default +z). Ridge regression predicts two things from the 50 dimensions: the keypoints in the
animal's frame (less their mean, turned by the heading), and the heading's cosine and sine.

The figure is the R2 of all coordinates together, on five folds. `fifths` leaves out a fifth of the recording at a time;
that fifth may be the only one in which the animal shows some behaviour. `half seconds` distributes blocks of half a
second over the folds. The penalty is chosen by the same cross-validation within the other folds.

Two embeddings are measured for comparison. PCA of the keypoints themselves is the upper limit. PCA of occupancy grids
of the visual hulls, in the animal's frame, is what a descriptor has to beat. Both are fitted to the first third, as the
embedding is.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import numpy.typing as npt

from zoosplat.geometry import visual_hull
from zoosplat.geometry.rotations import rotation_between
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.runs import Run
from zoosplat.storage import schema

Floats = npt.NDArray[np.floating[Any]]
DIMENSIONS = 50
PENALTIES = np.logspace(-6, 0, 13)  # penalties of the ridge regression that are tried, over the sum of squares
CELLS = 32  # cells along an edge of the occupancy grid


def ridge(x: Floats, y: Floats, at: Floats, penalties: Floats) -> list[Floats]:
    """Predictions, one array for each penalty, at the rows `at` by a ridge regression that is fitted to x and y."""
    mean, aim = x.mean(0), y.mean(0)
    left, lengths, right = np.linalg.svd(x - mean, full_matrices=False)
    onto, scores = left.T @ (y - aim), (at - mean) @ right.T
    return [aim + scores @ ((lengths / (lengths**2 + p))[:, None] * onto) for p in penalties]


def r2(x: Floats, y: Floats, fold: npt.NDArray[np.int64]) -> float:
    """Cross-validated R2 of all columns of y together. `fold` [N] names the fold that each row belongs to."""
    found = np.zeros_like(y)
    penalties = PENALTIES * ((x - x.mean(0)) ** 2).sum()
    for k in np.unique(fold):
        others = [int(i) for i in np.unique(fold) if i != k]
        errors = np.zeros(len(penalties))
        for inner in others:
            seen, left_out = (fold != k) & (fold != inner), fold == inner
            errors += [((y[left_out] - p) ** 2).sum() for p in ridge(x[seen], y[seen], x[left_out], penalties)]
        best = penalties[[int(errors.argmin())]]
        found[fold == k] = ridge(x[fold != k], y[fold != k], x[fold == k], best)[0]
    return float(1 - ((y - found) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


def principal(values: Floats, train: npt.NDArray[np.bool_]) -> Floats:
    """[N, 50] scores of all rows on the principal components of the training rows."""
    centered = values - values[train].mean(0)
    axes = np.linalg.svd(centered[train], full_matrices=False)[2][:DIMENSIONS]
    return np.asarray(centered @ axes.T)


def occupancy(run: Run) -> Floats:
    """[T, 32^3] occupancy: which cells of the model's cube, in the animal's frame, lie in the observed views' hull."""
    images, tracking, crop = (run.open_input(stage) for stage in ("pack", "center_rotation", "crop"))
    observed = list(run.experiment.observed_views(len(schema.read(images, "intrinsics"))))
    axis = visual_hull.grid_axis(float(str(crop.attrs["ell_m"])), CELLS)
    origins, poses = schema.read(images, "origin"), schema.read(images, "world_to_camera")[observed]
    centers, angles, shifts = (schema.read(tracking, key) for key in ("centers", "angles", "principal_shift"))
    grids = np.zeros((len(centers), CELLS, CELLS, CELLS), np.float32)
    for t in range(len(centers)):
        intrinsics = schema.read(images, "intrinsics")
        intrinsics[:, :2, 2] += shifts[t] - origins[t]
        mask = np.asarray(schema.array(images, "mask")[t])[observed]
        least = visual_hull.min_views(len(observed))
        cells, _ = visual_hull.hull_indices(
            mask, intrinsics[observed], poses, (axis, axis, axis), centers[t], float(angles[t]), least
        )
        grids[t][tuple(np.asarray(cells).T)] = 1
    return grids.reshape(len(grids), -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("projects", nargs="+", metavar="PROJECT")
    parser.add_argument("--truth", required=True, metavar="NPZ")
    args = parser.parse_args()
    runs = [open_run(Project.at(url)) for url in args.projects]
    groups = [run.open_input("embedding") for run in runs]
    frames, valid = schema.read(groups[0], "frame"), schema.read(groups[0], "valid")
    train = (np.arange(len(valid)) < len(valid) // 3)[valid]
    with np.load(args.truth) as truth:
        upright = rotation_between(truth["up"] if "up" in truth else np.array([0.0, 0.0, 1.0]), np.array([0.0, 0, 1]))
        points = truth["keypoints"][frames][valid].astype(float) @ upright.T
        heading = truth["heading"][frames][valid]
    cos, sin = np.cos(heading)[:, None], np.sin(heading)[:, None]
    x, y, z = np.moveaxis(points - points.mean(1, keepdims=True), -1, 0)
    pose = np.concatenate([cos * x + sin * y, cos * y - sin * x, z], 1)
    compass = np.concatenate([cos, sin], 1)

    cases = {str(g.attrs["encoder"]): schema.read(g, "embedding")[valid].astype(float) for g in groups}
    cases["occupancy grids, PCA"] = principal(occupancy(runs[0])[valid], train)
    cases["the pose itself, PCA"] = principal(pose, train)
    times = schema.read(groups[0], "time")[valid]
    folds = {
        "fifths": np.arange(len(times)) * 5 // len(times),
        "half seconds": (times / 0.5).astype(int) % 5,
    }
    print(f"{'':24}" + "".join(f"{f'pose, {name}':>22}" for name in folds) + f"{'heading, fifths':>22}")
    for name, values in cases.items():
        row = [r2(values, pose, fold) for fold in folds.values()]
        row.append(r2(values, compass, folds["fifths"]))
        print(f"{name:24}" + "".join(f"{value:22.3f}" for value in row), flush=True)


if __name__ == "__main__":
    main()
