"""Connected components of an animal, against SciPy's labels and by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from zoosplat_model.network import connected_components
from zoosplat_model.network.connected_components import (
    MAX_LOOSE_SHARE,
    SOLID_OPACITY,
    largest_component,
    touches_largest_component,
)

SHAPES = [(6, 7, 5), (20, 9, 40), (17, 20, 70), (1, 1, 1)]
CORNER, CELL = torch.tensor([0.1, 0.2, 0.3]), 0.5


def cloud(shape: tuple[int, int, int], seed: int, loose: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and opacities of Gaussians: a blob amid the cells, and a share of others anywhere, some outside."""
    draw = torch.Generator().manual_seed(seed)
    size = CELL * torch.tensor(shape)
    n = 40 + int(np.prod(shape))
    blob = size / 2 + torch.randn(n, 3, generator=draw).clamp(-2, 2) * size / 12
    others = (1.2 * torch.rand(int(loose * n), 3, generator=draw) - 0.1) * size
    means = CORNER + torch.cat([blob, others])
    return means, torch.rand(len(means), generator=draw)


def by_scipy(means: torch.Tensor, opacities: torch.Tensor, shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    ndimage = pytest.importorskip("scipy.ndimage")
    cells = ((means - CORNER) / CELL).floor().long().clamp_min(0).minimum(torch.tensor(shape) - 1).numpy()
    solid, around = np.zeros(shape, bool), np.ones((3, 3, 3))
    solid[tuple(cells[opacities.numpy() > SOLID_OPACITY].T)] = True
    labels, _ = ndimage.label(solid, around)
    sizes = np.bincount(labels[solid])
    component = labels == sizes.argmax()
    if sizes.max() < (1 - MAX_LOOSE_SHARE) * solid.sum():
        component = np.ones(shape, bool)
    found: NDArray[np.bool_] = ndimage.binary_dilation(component, around)[tuple(cells.T)]
    return found


@pytest.mark.parametrize("loose", [0.003, 0.01, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_belongs_to_the_animal_is_its_largest_component(shape: tuple[int, int, int], loose: float) -> None:
    given = cloud(shape, 0, loose)
    np.testing.assert_array_equal(touches_largest_component(*given, CORNER, CELL, shape), by_scipy(*given, shape))


def test_a_long_tail_belongs_to_it_and_a_speck_does_not() -> None:
    solid = torch.zeros(40, 24, 20, dtype=torch.bool)
    solid[4:14, 4:14, 4:14] = True
    speck = torch.zeros_like(solid)
    for i in range(26):  # by its corners only
        solid[13 + i, 13 - i % 2, 13] = True
    speck[20, 20, 2:5] = True
    assert torch.equal(largest_component(solid), solid)
    assert torch.equal(largest_component(solid | speck), solid)


def test_masks_that_cut_the_animal_take_nothing_from_it() -> None:
    solid = torch.zeros(16, 8, 8, dtype=torch.bool)
    solid[:12], solid[13:] = True, True
    assert largest_component(solid).all()
    assert largest_component(torch.zeros(4, 4, 4, dtype=torch.bool)).all()


KERNELS = """
import sys
import numpy as np, torch
from zoosplat_model.network import connected_components
given = np.load(sys.argv[1])
shape, corner, cell = tuple(given["shape"].tolist()), torch.from_numpy(given["corner"]), float(given["cell"])
means, opacities = (torch.from_numpy(given[name]) for name in ("means", "opacities"))
connected_components.BLOCK_WORDS = 64  # so that a component takes several rounds
np.save(sys.argv[2], connected_components._touches_largest_component(means, opacities, corner, cell, shape))
"""


@pytest.mark.parametrize(("shape", "loose"), [((9, 8, 30), 0.003), ((6, 7, 5), 0.5)])
def test_kernels_in_triton_s_interpreter(tmp_path: Path, shape: tuple[int, int, int], loose: float) -> None:
    pytest.importorskip("triton")
    means, opacities = cloud(shape, 1, loose)
    given, found = tmp_path / "given.npz", tmp_path / "found.npy"
    np.savez(given, means=means, opacities=opacities, shape=shape, corner=CORNER, cell=CELL)
    command = [sys.executable, "-c", KERNELS, str(given), str(found)]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    expected = by_scipy(means, opacities, shape)
    assert expected.all() == (loose > 0.1)
    np.testing.assert_array_equal(np.load(found), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("shape", [*SHAPES, (48, 40, 32), (90, 80, 100)])
def test_kernels_agree_with_plain_functions(shape: tuple[int, int, int]) -> None:
    for seed, loose in enumerate((0.0, 0.001, 0.003, 0.01, 0.5)):
        means, opacities = cloud(shape, seed, loose)
        expected = touches_largest_component(means, opacities, CORNER, CELL, shape)
        found = connected_components._touches_largest_component(
            means.cuda(), opacities.cuda(), CORNER.cuda(), CELL, shape
        )
        np.testing.assert_array_equal(found.cpu(), expected)
        # The kernels are of float32, so this is the plain function there.
        slower = touches_largest_component(
            means.double().cuda(), opacities.double().cuda(), CORNER.double().cuda(), CELL, shape
        )
        np.testing.assert_array_equal(slower.cpu(), expected)
