"""Where the animal is: the point in space that most of the masks' pieces agree on.

A shadow on a wall, a mirror image, a cable or an arm is seen in some views, but the rays of their pieces do not meet
where the other views also see something. Each pair of pieces of two views proposes the point between its two rays; the
point that most views see as animal wins.
"""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zoosplat_segment.rig import Rig

PIECE = 0.4  # probability from which a pixel belongs to a piece
MAX_PIECES = 4  # pieces of a view that are considered, those of the largest mass
MIN_MASS = 4.0  # pixels of the small pictures; smaller pieces are noise
MAX_GAP = 0.35  # widest gap between two rays that may meet, in edges of the cube
NEARBY = 0.12  # radius round a point in which a view may see the animal, in edges of the cube
MIN_SCORE = 0.5  # sum of the views' votes that a point needs beside the two views that propose it


def pieces(mask: npt.NDArray[np.float32]) -> list[tuple[float, float, float]]:
    """Mass, x and y of the largest pieces of a soft mask [h, w], in its pixels."""
    count, labels, stats, centers = cv2.connectedComponentsWithStats((mask > PIECE).astype(np.uint8))
    found = []
    for i in range(1, count):
        if stats[i, cv2.CC_STAT_AREA] >= MIN_MASS:
            found.append((float(mask[labels == i].sum()), float(centers[i, 0]), float(centers[i, 1])))
    return sorted(found, reverse=True)[:MAX_PIECES]


def locate(
    rig: Rig, masks: Tensor, scale: float, views: list[int], ell_m: float, floor_m: float | None
) -> Tensor | None:
    """The point [3], metres, round which the animal is; None where no two views agree on one.

    Args:
        rig: the cameras.
        masks: [C, h, w] soft masks of whole pictures, downsampled.
        scale: pixels of the picture in a pixel of the masks.
        views: the views that take part.
        ell_m: edge of a cube that has room for the animal, metres.
        floor_m: height of the floor, below which there is nothing; None: it is not known.
    """
    found = {c: pieces(masks[c].cpu().numpy()) for c in views}
    origins, directions, owners = [], [], []
    for c in views:
        if found[c]:
            small = torch.tensor([[x, y] for _, x, y in found[c]], dtype=torch.float32, device=rig.device)
            directions.append(rig.rays_at(c, ((small + 0.5) * scale - 0.5)[None])[0])
            origins.append(rig.centers[c].expand(len(small), 3))
            owners += [c] * len(small)
    if len(set(owners)) < 2:
        return None
    origin, direction = torch.cat(origins), torch.cat(directions)
    pairs = [(i, j) for i, j in itertools.combinations(range(len(owners)), 2) if owners[i] != owners[j]]
    first, second = (torch.tensor(index, device=rig.device) for index in zip(*pairs, strict=True))
    p, q, u, v = origin[first], origin[second], direction[first], direction[second]
    # The shortest segment between two lines.
    w, b = p - q, (u * v).sum(-1)
    d, e = (u * w).sum(-1), (v * w).sum(-1)
    denominator = (1 - b * b).clamp_min(1e-4)
    s, t = (b * e - d) / denominator, (e - b * d) / denominator
    near, far = p + s[:, None] * u, q + t[:, None] * v
    good = ((near - far).norm(dim=-1) < MAX_GAP * ell_m) & (s > 0) & (t > 0)
    points = ((near + far) / 2)[good]
    if floor_m is not None:
        points = points[points[:, 2] > floor_m - 0.1 * ell_m]
    if not len(points):
        return None
    score = _votes(rig, masks, scale, views, points, ell_m)
    best = score.argmax()
    return points[best] if score[best] > 1 + MIN_SCORE else None


def _votes(rig: Rig, masks: Tensor, scale: float, views: list[int], points: Tensor, ell_m: float) -> Tensor:
    """How many views see animal near each point, [N], each by how much of its neighbourhood is animal."""
    pixels, _ = rig.project(points)
    total = torch.zeros(len(points), device=rig.device)
    per_metre = rig.pixels_per_metre(points.mean(0)) / scale
    height, width = masks.shape[1:]
    size = torch.tensor([width, height], dtype=torch.float32, device=rig.device)
    for c in views:
        radius = max(1, int(NEARBY * ell_m * float(per_metre[c])))
        edge = 2 * radius + 1
        rows = F.avg_pool2d(masks[c][None, None], (edge, 1), 1, (radius, 0), count_include_pad=False)
        blurred = F.avg_pool2d(rows, (1, edge), 1, (0, radius), count_include_pad=False)
        place = (pixels[c] + 0.5) / scale
        grid = 2 * place / size - 1
        vote = F.grid_sample(blurred, grid.nan_to_num(-9.0)[None, None], padding_mode="zeros", align_corners=False)[
            0, 0, 0
        ]
        total += (3 * vote).clamp_max(1)
    return total
