"""Descriptors of Gaussians that a turn about the vertical does not change."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zoosplat_model.gaussians import Gaussians

# The rings are coarse on purpose, because the descriptor has to change in proportion as the animal moves: a part of the
# animal that leaves one narrow ring for the next changes it suddenly. Four radii and three heights predict the
# keypoints of the synthetic mouse better than eight and six (benchmarks/embedding.py).
RADII = 4  # rings from the centre outwards
HEIGHTS = 3  # rings from below to above
ORDERS = 4  # Fourier coefficients of each ring besides the mean
TALLEST = 0.5  # height of the outer rings above and below the centre, over the radius
CHANNELS = 9  # numbers of a Gaussian that are summed, see `_channels`
UNSURE = 0.05  # length below which a direction of reference counts for less, over that of a pure direction

POLAR = 4  # polar angles of the virtual cameras
AZIMUTHS = 8  # azimuths of the virtual cameras
DEGREE = 3  # highest degree of the spherical harmonics
DISTANCE = 4.0  # distance of the virtual cameras from the centre, over the radius
PIXELS = 224  # side of their pictures: the size that ResNet-18 was trained with


# -- the Gaussians themselves ---------------------------------------------------------------------------------------
def cylinder_size() -> int:
    """Length of `cylinder_descriptor`."""
    rings = RADII * HEIGHTS
    return rings * (CHANNELS * (2 * ORDERS + 1) + ORDERS)


def cylinder_descriptor(gaussians: Gaussians, radius_m: float) -> Tensor:
    """Moments of density, colour and surface orientation on rings about the vertical, independent of the heading.

    On each ring, which is soft in radius and height, density (opacity), colour (less the animal's mean) and the
    covariance of the Gaussians in their local radial, tangential and vertical directions are functions of the azimuth.
    Their Fourier coefficients are sums over the Gaussians in closed form, without bins of the angle, so that a turn by
    `a` multiplies the coefficient of order n by exp(-i n a) exactly. The descriptor keeps what such a turn leaves
    unchanged. One part is each coefficient relative to the animal's own directions, as in a bispectrum; these are its
    long axis and the side of it that reaches farther. The imaginary part of such a coefficient tells left from right.
    The other part is the magnitudes of the density's coefficients, which remain where those directions are uncertain.

    Args:
        gaussians: N, in the animal's frame: z up, the origin anywhere near the animal. Float32 or float64.
        radius_m: radius of the outermost ring, metres; Gaussians beyond it count as if they were on it.

    Returns:
        [`cylinder_size()`] shares of the whole opacity.
    """
    x, y, z, weights = _places(gaussians)
    x, y, z = x / radius_m, y / radius_m, z / radius_m
    flat = x.square() + y.square()
    # exp(-i phi) itself is not used, because it is not smooth on the axis.
    turn = torch.complex(x, -y) / (flat + (0.5 / (RADII - 1)) ** 2).sqrt()
    rings = (_hats(flat.sqrt(), RADII, 0.0, 1.0)[:, :, None] * _hats(z, HEIGHTS, -TALLEST, TALLEST)[:, None]).flatten(1)
    powers = [torch.ones_like(turn)]
    for _ in range(ORDERS):
        powers.append(powers[-1] * turn)
    phases = torch.view_as_real(torch.stack(powers, 1))  # [N, 1 + orders, 2]
    values = _channels(gaussians, weights, turn)[:, :, None, None] * phases[:, None]
    # Products of real matrices take a single kernel.
    sums = ((rings * weights[:, None]).T @ values.flatten(1)).view(-1, CHANNELS, 1 + ORDERS, 2)
    coefficients = torch.view_as_complex(sums.contiguous())
    relative = coefficients * _directions(x, y, flat, weights).conj()
    return torch.cat(
        [relative.real.flatten(), relative.imag[..., 1:].flatten(), coefficients[:, 0, 1:].abs().flatten()]
    )


def _places(gaussians: Gaussians) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and y relative to the opacity's centroid, z as it is, and shares of the opacity, [N] each."""
    weights = gaussians.opacities / gaussians.opacities.sum().clamp_min(1e-12)
    x, y, z = gaussians.means.unbind(1)
    return x - (weights * x).sum(), y - (weights * y).sum(), z, weights


def _hats(values: Tensor, count: int, lowest: float, highest: float) -> Tensor:
    """[N, count] shares of `count` evenly spaced knots in values [N]: linear, and 1 together."""
    knots = torch.arange(count, dtype=values.dtype, device=values.device)
    places = ((values - lowest) * ((count - 1) / (highest - lowest))).clamp(0, count - 1)
    return (1 - (places[:, None] - knots).abs()).clamp_min(0)


def _channels(gaussians: Gaussians, weights: Tensor, turn: Tensor) -> Tensor:
    """The [N, 9] values that are summed: 1, three colours, and five numbers of the covariance scaled to trace 1."""
    colors = gaussians.colors - (weights[:, None] * gaussians.colors).sum(0)
    w, x, y, z = gaussians.quats.unbind(1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    variances = gaussians.scales.square()
    axes = torch.stack([torch.stack(row, 1) for row in rows], 1) * variances.sqrt()[:, None]
    covariance = axes @ axes.transpose(1, 2) / variances.sum(1).clamp_min(1e-20)[:, None, None]
    # The local directions turn with the place, so that the numbers stay the same when the animal turns.
    steep = torch.complex(covariance[:, 0, 2], covariance[:, 1, 2]) * turn
    level = torch.complex((covariance[:, 0, 0] - covariance[:, 1, 1]) / 2, covariance[:, 0, 1]) * turn * turn
    upright = covariance[:, 2, 2] - 1 / 3
    return torch.stack(
        [torch.ones_like(upright), *colors.unbind(1), upright, steep.real, steep.imag, level.real, level.imag], 1
    )


def _directions(x: Tensor, y: Tensor, flat: Tensor, weights: Tensor) -> Tensor:
    """The [1 + orders] complex numbers of about unit length that a turn multiplies as it does the coefficients.

    Order 2 is the long axis, which has no front. The side that reaches farther has one, but is less certain: it only
    says which end of the axis is meant.
    """
    place = torch.complex(x, -y)
    side = _unit((weights * flat * place).sum(), (weights * flat * flat.sqrt()).sum())
    axis = _unit((weights * place * place).sum(), (weights * flat).sum())
    end = (side + axis * side.conj()) / 2
    found = [torch.ones_like(axis), end]
    for _ in range(ORDERS - 1):
        found.append(found[-2] * axis)
    return torch.stack(found)


def own_direction(gaussians: Gaussians) -> Tensor:
    """Radians [] about +z from the centroid to the end of the long axis that reaches farther: mostly a tail."""
    x, y, _, weights = _places(gaussians)
    return -_directions(x, y, x.square() + y.square(), weights)[1].angle()


def _unit(value: Tensor, scale: Tensor) -> Tensor:
    """A complex number scaled to length 1, and to less where it is small against the scale."""
    return value / (value.abs().square() + (UNSURE * scale).square()).sqrt().clamp_min(1e-20)


# -- pictures from all round ----------------------------------------------------------------------------------------
def sphere_cameras(radius_m: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cameras on a sphere, looking at its middle, the ball of `radius_m` filling the picture.

    Returns:
        world-to-camera [32, 4, 4] and intrinsics [32, 3, 3] (calibration pixels of 224 x 224): four Gauss-Legendre
        polar angles, the lowest camera first, by eight azimuths.
    """
    heights, _ = np.polynomial.legendre.leggauss(POLAR)
    poses = []
    for height in heights:
        for k in range(AZIMUTHS):
            azimuth, across = 2 * math.pi * k / AZIMUTHS, math.sqrt(1 - height**2)
            outwards = np.array([across * math.cos(azimuth), across * math.sin(azimuth), height])
            right = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
            pose = np.eye(4, dtype=np.float32)
            pose[:3, :3] = [right, np.cross(-outwards, right), -outwards]
            pose[2, 3] = DISTANCE * radius_m
            poses.append(pose)
    focal = PIXELS / 2 * math.sqrt(DISTANCE**2 - 1)
    middle = (PIXELS - 1) / 2
    intrinsics = np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1]], dtype=np.float32)
    return np.stack(poses), np.repeat(intrinsics[None], POLAR * AZIMUTHS, axis=0)


def harmonics() -> npt.NDArray[np.complex64]:
    """[10, 32] weights that turn values at the cameras of `sphere_cameras` into spherical-harmonic coefficients.

    Rows: degrees l = 0 to 3, in each the orders m = 0 to l (those below 0 are their conjugates). Orthonormal harmonics,
    exact for functions of degree up to 3 (Gauss-Legendre quadrature by the trapezoidal rule).
    """
    heights, areas = np.polynomial.legendre.leggauss(POLAR)
    azimuths = 2 * math.pi * np.arange(AZIMUTHS) / AZIMUTHS
    rows = []
    for degree in range(DEGREE + 1):
        for order in range(degree + 1):
            # The associated Legendre polynomial from derivatives of the Legendre polynomial.
            polynomial = np.polynomial.Legendre.basis(degree)
            slope = polynomial.deriv(order) if order else polynomial
            legendre = (1 - heights**2) ** (order / 2) * slope(heights)
            scale = (2 * degree + 1) / (4 * math.pi) * math.factorial(degree - order) / math.factorial(degree + order)
            area = areas * 2 * math.pi / AZIMUTHS
            wave = np.exp(-1j * order * azimuths)
            rows.append((math.sqrt(scale) * (area * legendre)[:, None] * wave).ravel())
    return np.stack(rows).astype(np.complex64)


def turned(gaussians: Gaussians, angle: Tensor) -> Gaussians:
    """The Gaussians turned by `angle` [] radians about the vertical through the origin, means and orientations."""
    return gaussians.to_world(gaussians.means.new_zeros(3), angle)


def upright(gaussians: Gaussians) -> Gaussians:
    """The Gaussians with their own centroid at the origin in x and y, and their own direction along x."""
    x, y, z, _ = _places(gaussians)
    centered = gaussians._replace(means=torch.stack([x, y, z], 1))
    return turned(centered, -own_direction(gaussians))
