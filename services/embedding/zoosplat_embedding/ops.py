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

CANDIDATES = 200  # components that the embedding is chosen from
FOLDS = 5  # of contiguous frames, on which it is tried whether the heading can be told
FLOOR = 10.0  # added to variances, in means of them: what hardly changes is noise, and is not to count as much
TELLS = 0.05  # R2 of the heading from which on it is removed
STRENGTHS = (0.0, 1.0, 10.0, 1e6)
ANIMALS = 1.0  # training frames that the variation among animals counts as much as
RIDGE = 1e-3  # of the sum of squares
SPEED_S = 0.1  # over which speed is taken
MOST_MAPPED = 20_000  # frames that make the map; more are placed among them
BLOCK = 1024  # frames whose distances to all others are held at once


# -- linear ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Projection:
    """From descriptors to an embedding: `((x - mean) / scale) @ matrix`.

    Attributes:
        mean, scale: [D].
        matrix: [D, E]; columns that the training frames do not suffice for are 0.
        explained: [E] share of the training frames' (standardised) variance, falling.
        strength: how much weight the removal of the heading has got; 0: it could not be told.
        heading_r2: how well it can be told from frames at other times, [before, after] its removal.
    """

    mean: Floats
    scale: Floats
    matrix: Floats
    explained: Floats
    strength: float
    heading_r2: tuple[float, float]

    def __call__(self, features: Floats) -> Floats:
        """[N, D] to [N, E] float32."""
        return np.asarray(((features - self.mean) / self.scale) @ self.matrix, dtype=np.float32)


def fit(
    features: Floats, headings: Floats, train: Bools, dimensions: int, variation: Floats | None = None
) -> Projection:
    """Fit an embedding that says as much as it can about the descriptors and nothing about the heading.

    Descriptors are standardised (those that hardly change less so), reduced to their principal components (of the
    training frames and, as if they were one frame more, of animals in general: what an animal does later than in the
    training frames would have no direction otherwise), and of these adversarial PCA (Carson, Talbot, Carlson:
    AugmentedPCA, arXiv 2201.02547) takes the directions W, orthonormal, with the largest tr W'(C - s B)W, where C is
    the components' covariance and B the part of it that is linear in the heading's cosine and sine in the training
    frames. The weight s is the smallest of 0, 1, 10 and 10^6 at which
    ridge regression does not tell the heading of a fifth of the frames from the other four (R2 of 0.05). So a posture
    that the animal happened to take while it headed east is not removed, unless it tells east at other times too.

    Args:
        features: [N, D], rows in their order.
        headings: [N] radians.
        train: [N] which rows standardisation, components and directions come from; at least two.
        dimensions: E.
        variation: [R, D] how descriptors vary among animals: rows whose Gram matrix is their covariance, up to a
            factor. Default: not known.
    """
    mean = features[train].mean(0, dtype=np.float64)
    variance = features[train].var(0, dtype=np.float64)
    scale = np.sqrt(variance + FLOOR * variance.mean())
    scale[scale == 0] = 1
    standard = ((features - mean) / scale).astype(np.float32)
    rows = standard[train]
    if variation is not None:
        others = variation / scale
        of_each = (rows**2).sum() / len(rows) / max(float((others**2).sum()), 1e-30)
        rows = np.concatenate([rows, others * np.sqrt(ANIMALS * of_each)])
    _, lengths, directions = np.linalg.svd(rows, full_matrices=False)
    rank = int((lengths > 1e-5 * max(lengths[0], 1e-30)).sum())
    kept = directions[: min(rank, max(CANDIDATES, dimensions))].T.astype(np.float64)  # [D, P]
    scores, known = standard @ kept, rows[train.sum() :] @ kept
    target = np.stack([np.cos(headings), np.sin(headings)], 1)
    before = told(scores[:, :dimensions], target)
    strength, after = 0.0, before
    axes: Floats = np.eye(kept.shape[1])
    for strength in STRENGTHS:
        axes = adversarial_axes(scores[train], target[train], strength, known)[:, :dimensions]
        after = told(scores @ axes, target)
        if after <= TELLS:
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
    """[P, P] orthonormal directions of adversarial PCA, the best first: eigenvectors of C - strength B.

    Args:
        scores: [N, P].
        target: [N, K] what they shall not tell.
        strength: of B, the covariance of the part of `scores` that is linear in `target`.
        known: [R, P] rows of mean 0 that C is of too, and B is not.
    """
    centered, aims = scores - scores.mean(0), target - target.mean(0)
    covariance, cross = centered.T @ centered, centered.T @ aims
    if known is not None:
        covariance = covariance + known.T @ known
    linear = cross @ np.linalg.pinv(aims.T @ aims) @ cross.T
    _, vectors = np.linalg.eigh(covariance - strength * linear)
    return np.asarray(vectors[:, ::-1])


def told(scores: Floats, target: Floats) -> float:
    """R2 (of all columns together) of ridge regression of `target` [N, K], on contiguous fifths not fitted on."""
    n = len(scores)
    if n < 2 * FOLDS:
        return 0.0
    found = np.zeros_like(target)
    for fold in np.array_split(np.arange(n), FOLDS):
        rest = np.setdiff1d(np.arange(n), fold)
        mean, aim = scores[rest].mean(0), target[rest].mean(0)
        x = scores[rest] - mean
        gram = x.T @ x
        gram += RIDGE * (np.trace(gram) + 1e-30) * np.eye(len(gram))
        found[fold] = aim + (scores[fold] - mean) @ np.linalg.solve(gram, x.T @ (target[rest] - aim))
    spread = ((target - target.mean(0)) ** 2).sum()
    return float(1 - ((target - found) ** 2).sum() / spread) if spread > 0 else 0.0


# -- what is alike --------------------------------------------------------------------------------------------------
def neighbours(embedding: Floats, times_s: Floats, recording: Ints, count: int, apart_s: float) -> Ints:
    """[N, count] the most alike rows of each, nearest first; -1 where there are no more.

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
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
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
    """[N] cluster of each row (k-means), the most frequent being 0; fewer clusters than `count` where rows are few."""
    k = min(count, len(np.unique(embedding, axis=0)))
    labels = KMeans(k, n_init=4, random_state=seed).fit_predict(embedding)
    order = np.argsort(-np.bincount(labels, minlength=k), kind="stable")
    rank = np.empty(k, np.int32)
    rank[order] = np.arange(k)
    return np.asarray(rank[labels], dtype=np.int32)


def plane(embedding: Floats, seed: int) -> Floats:
    """[N, 2] a map in which neighbours stay neighbours: t-SNE (van der Maaten 2008), from the first two dimensions.

    Of more than 20,000 rows some, evenly spaced, make the map; the others lie where the most alike of these does.
    """
    n = len(embedding)
    if n < 5:
        return np.asarray(np.pad(embedding, ((0, 0), (0, 2)))[:, :2], dtype=np.float32)
    chosen = np.unique(np.linspace(0, n - 1, min(n, MOST_MAPPED)).round().astype(int))
    some = embedding[chosen]
    first = np.asarray(some[:, :2] if some.shape[1] > 1 else np.pad(some, ((0, 0), (0, 1))), dtype=np.float32)
    first = first / max(float(first[:, 0].std()), 1e-12) * 1e-4
    perplexity = min(30.0, (len(some) - 1) / 3)
    placed = TSNE(2, perplexity=perplexity, init=first, random_state=seed).fit_transform(some)
    if len(some) == n:
        return np.asarray(placed, dtype=np.float32)
    result = np.empty((n, 2), np.float32)
    squares = (some**2).sum(1)
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        result[rows] = placed[(squares - 2 * embedding[rows] @ some.T).argmin(1)]
    return result


# -- where it is ----------------------------------------------------------------------------------------------------
def speeds(centers_m: Floats, fps: float) -> Floats:
    """[T] horizontal speed, m/s, over a tenth of a second round each frame.

    Args:
        centers_m: [T, 3].
        fps: kept frames a second.
    """
    n = len(centers_m)
    half = max(1, round(SPEED_S * fps / 2))
    before, after = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half, n - 1)
    way = np.linalg.norm(centers_m[after, :2] - centers_m[before, :2], axis=1)
    return np.asarray(way / np.maximum(after - before, 1) * fps)


def heights(centers_m: Floats, covariances_m2: Floats, valid: Bools) -> Floats:
    """[T] height, m, of the animal's top (two standard deviations of its hull above its centre) above the floor, which
    is as far below the lowest centre. Shapes [T, 3], [T, 3, 3], [T]."""
    reach = 2 * np.sqrt(np.maximum(covariances_m2[:, 2, 2], 0))
    bottoms = (centers_m[:, 2] - reach)[valid]
    floor = float(np.percentile(bottoms, 1)) if len(bottoms) else 0.0
    return np.asarray(centers_m[:, 2] + reach - floor)
