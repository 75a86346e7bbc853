"""Embedding of descriptors: arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.manifold import TSNE

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int32]

CANDIDATES = 200  # principal components that the embedding is chosen from
FOLDS = 5  # parts of contiguous frames, each of which is predicted from the others
# Added to each descriptor's variance, in mean variances: descriptors that hardly change are noise and shall count less.
VARIANCE_FLOOR = 10.0
MAX_HEADING_R2 = 0.05  # R2 of the heading above which the heading is removed
REMOVAL_STRENGTHS = (0.0, 1.0, 10.0, 1e6)  # weights of the removal that are tried, in this order
VARIATION_FRAMES = 1.0  # the variation among animals counts as much as so many training frames
RIDGE_PENALTY = 1e-3  # penalty of the ridge regression, divided by the sum of squares
SPEED_SECONDS = 0.1  # seconds over which speed is measured
MAX_MAPPED = 20_000  # frames that make the map; further frames are placed among them
BLOCK_FRAMES = 1024  # frames whose distances to all others are in memory at once


# -- linear -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Projection:
    """The linear map from descriptors to an embedding: `((x - mean) / scale) @ matrix`.

    Attributes:
        mean, scale: [D].
        matrix: [D, E]; columns that the training frames do not suffice for are 0.
        explained: [E] share of the training frames' (standardised) variance, falling.
        strength: weight of the removal of the heading; 0 where nothing had to be removed.
        heading_r2: R2 with which frames at other times predict the heading, [before, after] its removal.
    """

    mean: Floats
    scale: Floats
    matrix: Floats
    explained: Floats
    strength: float
    heading_r2: tuple[float, float]

    def __call__(self, features: Floats) -> Floats:
        """Map descriptors [N, D] to their embedding [N, E] float32."""
        return np.asarray(((features - self.mean) / self.scale) @ self.matrix, dtype=np.float32)


def fit(
    features: Floats, headings: Floats, train: Bools, dimensions: int, variation: Floats | None = None
) -> Projection:
    """Fit an embedding that says as much as it can about the descriptors and nothing about the heading.

    Descriptors are standardised, those that hardly change less so, and reduced to principal components. These are the
    components of the training frames and, as if that were one more frame, of animals in general: otherwise there would
    be no direction for what an animal does only after the training frames.

    Of the components, adversarial PCA (Carson, Talbot, Carlson: AugmentedPCA, arXiv 2201.02547) takes the orthonormal
    directions W with the largest tr W'(C - s B)W. C is the components' covariance, and B the part of C that is linear
    in the heading's cosine and sine in the training frames. The weight s is the smallest of 0, 1, 10 and 10^6 at which
    ridge regression does not predict the heading in a fifth of the frames from the other four (R2 of at most 0.05). So
    a posture that the animal happened to take while it headed east is removed only if it predicts east at other times.

    Args:
        features: [N, D], rows in their order.
        headings: [N] radians.
        train: [N] which rows standardisation, components and directions are computed from; at least two.
        dimensions: E.
        variation: [R, D] how descriptors vary among animals: rows whose Gram matrix is their covariance, up to a
            factor. Default: the variation among animals is not known.
    """
    mean = features[train].mean(0, dtype=np.float64)
    variance = features[train].var(0, dtype=np.float64)
    scale = np.sqrt(variance + VARIANCE_FLOOR * variance.mean())
    scale[scale == 0] = 1
    standard = ((features - mean) / scale).astype(np.float32)
    rows = standard[train]
    if variation is not None:
        others = variation / scale
        of_each = (rows**2).sum() / len(rows) / max(float((others**2).sum()), 1e-30)
        rows = np.concatenate([rows, others * np.sqrt(VARIATION_FRAMES * of_each)])
    _, lengths, directions = np.linalg.svd(rows, full_matrices=False)
    rank = int((lengths > 1e-5 * max(lengths[0], 1e-30)).sum())
    kept = directions[: min(rank, max(CANDIDATES, dimensions))].T.astype(np.float64)  # [D, P]
    scores, known = standard @ kept, rows[train.sum() :] @ kept
    target = np.stack([np.cos(headings), np.sin(headings)], 1)
    before = cross_validated_r2(scores[:, :dimensions], target)
    strength, after = 0.0, before
    axes: Floats = np.eye(kept.shape[1])
    for strength in REMOVAL_STRENGTHS:
        axes = adversarial_axes(scores[train], target[train], strength, known)[:, :dimensions]
        after = cross_validated_r2(scores @ axes, target)
        if after <= MAX_HEADING_R2:
            break
    order = np.argsort(-(scores[train] @ axes).var(0), kind="stable")
    chosen = kept @ axes[:, order]
    # The sign of an axis means nothing; a fixed one makes the result the same everywhere.
    if chosen.size:
        chosen *= np.sign(chosen[np.abs(chosen).argmax(0), np.arange(chosen.shape[1])])
    matrix = np.zeros((features.shape[1], dimensions))
    matrix[:, : chosen.shape[1]] = chosen
    explained = (standard[train] @ matrix).var(0) / max(float(standard[train].var(0).sum()), 1e-30)
    return Projection(mean, scale, matrix, explained, strength, (before, after))


def adversarial_axes(scores: Floats, target: Floats, strength: float, known: Floats | None = None) -> Floats:
    """The [P, P] orthonormal directions of adversarial PCA, the best first: eigenvectors of C - strength B.

    Args:
        scores: [N, P].
        target: [N, K] values that the directions shall not predict.
        strength: of B, the covariance of the part of `scores` that is linear in `target`.
        known: [R, P] further rows, of mean 0, that count in C and not in B.
    """
    centered, aims = scores - scores.mean(0), target - target.mean(0)
    covariance, cross = centered.T @ centered, centered.T @ aims
    if known is not None:
        covariance = covariance + known.T @ known
    linear = cross @ np.linalg.pinv(aims.T @ aims) @ cross.T
    _, vectors = np.linalg.eigh(covariance - strength * linear)
    return np.asarray(vectors[:, ::-1])


def cross_validated_r2(scores: Floats, target: Floats) -> float:
    """R2 of ridge regression from `scores` [N, P] to all columns of `target` [N, K] together.

    Each of five contiguous parts of the rows is predicted by a regression that is fitted to the other four.
    """
    n = len(scores)
    if n < 2 * FOLDS:
        return 0.0
    found = np.zeros_like(target)
    for fold in np.array_split(np.arange(n), FOLDS):
        rest = np.setdiff1d(np.arange(n), fold)
        mean, aim = scores[rest].mean(0), target[rest].mean(0)
        x = scores[rest] - mean
        gram = x.T @ x
        gram += RIDGE_PENALTY * (np.trace(gram) + 1e-30) * np.eye(len(gram))
        found[fold] = aim + (scores[fold] - mean) @ np.linalg.solve(gram, x.T @ (target[rest] - aim))
    spread = ((target - target.mean(0)) ** 2).sum()
    return float(1 - ((target - found) ** 2).sum() / spread) if spread > 0 else 0.0


# -- similar frames -----------------------------------------------------------------------------------------------
def neighbours(embedding: Floats, times_s: Floats, recording: Ints, count: int, apart_s: float) -> Ints:
    """The [N, count] rows most similar to each row, the nearest first; -1 where there are no more.

    Args:
        embedding: [N, E].
        times_s: [N] seconds in the recording.
        recording: [N]; rows of different recordings are never near in time.
        count: of neighbours.
        apart_s: seconds; rows of one recording have to be as far apart.
    """
    n = len(embedding)
    found = np.full((n, count), -1, np.int32)
    squares = (embedding**2).sum(1)
    for start in range(0, n, BLOCK_FRAMES):
        rows = slice(start, min(start + BLOCK_FRAMES, n))
        distances = squares[rows, None] + squares - 2 * embedding[rows] @ embedding.T
        near = np.abs(times_s[rows, None] - times_s) < apart_s
        np.fill_diagonal(near[:, start:], True)
        distances[near & (recording[rows, None] == recording)] = np.inf
        best = np.argpartition(distances, min(count, n - 1), axis=1)[:, :count] if n > count else np.arange(n)[None]
        best = np.broadcast_to(best, (distances.shape[0], best.shape[1]))
        values = np.take_along_axis(distances, best, 1)
        order = np.argsort(values, axis=1, kind="stable")
        best, values = np.take_along_axis(best, order, 1), np.take_along_axis(values, order, 1)
        found[rows, : best.shape[1]] = np.where(np.isfinite(values), best, -1)
    return found


def states(embedding: Floats, count: int, seed: int) -> Ints:
    """The [N] cluster of each row by k-means, 0 being the most frequent; few rows make fewer clusters than `count`."""
    k = min(count, len(np.unique(embedding, axis=0)))
    labels = KMeans(k, n_init=4, random_state=seed).fit_predict(embedding)
    order = np.argsort(-np.bincount(labels, minlength=k), kind="stable")
    rank = np.empty(k, np.int32)
    rank[order] = np.arange(k)
    return np.asarray(rank[labels], dtype=np.int32)


def plane(embedding: Floats, seed: int) -> Floats:
    """A map [N, 2] float32 in which neighbours stay neighbours: t-SNE (van der Maaten 2008) from two dimensions.

    Of more than 20,000 rows, 20,000 evenly spaced ones make the map. Each other row lies where the most similar of
    these lies.
    """
    n = len(embedding)
    if n < 5:
        return np.asarray(np.pad(embedding, ((0, 0), (0, 2)))[:, :2], dtype=np.float32)
    chosen = np.unique(np.linspace(0, n - 1, min(n, MAX_MAPPED)).round().astype(int))
    some = embedding[chosen]
    first = np.asarray(some[:, :2] if some.shape[1] > 1 else np.pad(some, ((0, 0), (0, 1))), dtype=np.float32)
    first = first / max(float(first[:, 0].std()), 1e-12) * 1e-4
    perplexity = min(30.0, (len(some) - 1) / 3)
    placed = TSNE(2, perplexity=perplexity, init=first, random_state=seed).fit_transform(some)
    if len(some) == n:
        return np.asarray(placed, dtype=np.float32)
    result = np.empty((n, 2), np.float32)
    squares = (some**2).sum(1)
    for start in range(0, n, BLOCK_FRAMES):
        rows = slice(start, min(start + BLOCK_FRAMES, n))
        result[rows] = placed[(squares - 2 * embedding[rows] @ some.T).argmin(1)]
    return result


# -- the animal in space ------------------------------------------------------------------------------------------
def speeds(centers_m: Floats, fps: float) -> Floats:
    """Horizontal speed [T], m/s, over a tenth of a second round each frame.

    Args:
        centers_m: [T, 3].
        fps: kept frames a second.
    """
    n = len(centers_m)
    half = max(1, round(SPEED_SECONDS * fps / 2))
    before, after = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half, n - 1)
    way = np.linalg.norm(centers_m[after, :2] - centers_m[before, :2], axis=1)
    return np.asarray(way / np.maximum(after - before, 1) * fps)


def heights(centers_m: Floats, covariances_m2: Floats, valid: Bools) -> Floats:
    """Height [T], m, of the animal's top above the floor.

    The top is two standard deviations of the hull above its centre. The floor is the first percentile of what is as far
    below the centre.

    Args:
        centers_m: [T, 3].
        covariances_m2: [T, 3, 3] of the hulls.
        valid: [T] frames that the floor is computed from.
    """
    reach = 2 * np.sqrt(np.maximum(covariances_m2[:, 2, 2], 0))
    bottoms = (centers_m[:, 2] - reach)[valid]
    floor = float(np.percentile(bottoms, 1)) if len(bottoms) else 0.0
    return np.asarray(centers_m[:, 2] + reach - floor)
