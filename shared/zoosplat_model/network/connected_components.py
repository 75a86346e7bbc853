"""Which Gaussians hang together: an animal is one connected component, and what floats beside it is an error.

Gaussians are sorted into cells. Solid cells that touch each other, also at edges and corners, belong to one component.
On a GPU a single block of threads fills the component in a grid of bits, a word for 32 cells, while other streams go on
with other frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoosplat_model import triton_support
from zoosplat_model.carving.window_minimum import window_minimum

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

SOLID_OPACITY = 0.3  # opacity above which a Gaussian makes its cell solid
MAX_LOOSE_SHARE = 0.05  # share of the solid cells outside the largest component; with more, masks have cut the animal
BLOCK_GAUSSIANS = 128  # Gaussians of a block of threads
BLOCK_WORDS = 2048  # words of the bit grid that the filling block handles at once
FILL_WARPS = 16  # warps of the filling block
WORD_BITS = 32  # cells of a word
AXES = (-1, -2, -3)


def touches_largest_component(
    means: Tensor, opacities: Tensor, corner: Tensor, cell_m: float, shape: Sequence[int]
) -> Tensor:
    """Whether each Gaussian lies in or beside the largest component, [M] bool; all, where none has 95% of the cells.

    Args:
        means: [M, 3] metres; those outside the grid count to the nearest cell.
        opacities: [M] 0 to 1.
        corner: [3] metres, the corner of the grid of cells.
        cell_m: edge of a cell, metres.
        shape: number of cells along x, y and z.
    """
    if triton_support.supports(_probe, means):
        return _touches_largest_component(means, opacities, corner, cell_m, shape)
    places = ((means - corner) / cell_m).floor().unbind(1)
    x, y, z = (place.clamp(0, n - 1).long() for place, n in zip(places, shape, strict=True))
    solid = means.new_zeros(shape).index_put((x, y, z), (opacities > SOLID_OPACITY).to(means.dtype), accumulate=True)
    beside = window_minimum(torch.where(largest_component(solid > 0), 0.0, 1.0), 3, AXES)
    return beside[x, y, z] == 0


def largest_component(solid: Tensor) -> Tensor:
    """The cells [n1, n2, n3] of the component with 95% of the `solid` cells (bool), or all cells where none has that.

    Labels spread from cell to cell until nothing changes, but at most n1 + n2 + n3 cells far.
    """
    n = solid.numel()
    cells = torch.arange(n, device=solid.device, dtype=torch.float32).view(solid.shape)  # exact up to 2^24
    labels = torch.where(solid, cells, n)
    for _ in range(sum(solid.shape)):
        spread = torch.where(solid, window_minimum(labels, 3, AXES), n)
        if not solid.is_cuda and torch.equal(spread, labels):  # on a GPU the comparison would wait for the device
            break
        labels = spread
    labels = labels.long()
    sizes = labels.new_zeros(n + 1).scatter_add(0, labels.flatten(), solid.flatten().long())
    size, largest = sizes.max(0)
    return (labels == largest) | (size < ((1 - MAX_LOOSE_SHARE) * solid.sum()).clamp_min(1))


def _probe(cuda: torch.device) -> None:
    corner = torch.zeros(3, device=cuda)
    _touches_largest_component(corner[None], torch.ones(1, device=cuda), corner, 1.0, (1, 1, 1))


def _touches_largest_component(
    means: Tensor, opacities: Tensor, corner: Tensor, cell_m: float, shape: Sequence[int]
) -> Tensor:
    """`touches_largest_component` of float32 tensors on one CUDA device, with the kernels."""
    n1, n2, n3 = shape
    m, words = len(means), triton.cdiv(n3, WORD_BITS)
    n = n1 * n2 * words
    means, opacities, corner = means.contiguous(), opacities.contiguous(), corner.contiguous()
    solid, component = torch.zeros(2, n, dtype=torch.int32, device=means.device)
    found = torch.empty(m, dtype=torch.bool, device=means.device)
    blocks = (triton.cdiv(m, BLOCK_GAUSSIANS),)
    of_cells = (m, float(cell_m), n1, n2, n3, words)
    _mark_solid[blocks](means, opacities, corner, solid, *of_cells, SOLID_OPACITY, BLOCK_GAUSSIANS)
    chunk = min(BLOCK_WORDS, triton.next_power_of_2(n))
    _fill_component[(1,)](solid, component, n, n1, n2, words, 1 - MAX_LOOSE_SHARE, chunk, num_warps=FILL_WARPS)
    _mark_touching[blocks](means, corner, component, found.view(torch.uint8), *of_cells, BLOCK_GAUSSIANS)
    return found


if triton is not None:

    @triton.jit
    def _cell(means_ptr, corner_ptr, i, inside, axis, cell, n):  # type: ignore[no-untyped-def]
        """The cells of the Gaussians i along an axis."""
        off = tl.load(means_ptr + 3 * i + axis, mask=inside, other=0.0) - tl.load(corner_ptr + axis)
        return tl.minimum(tl.maximum(tl.floor(off / cell), 0.0), n - 1.0).to(tl.int32)

    @triton.jit  # type: ignore[untyped-decorator]
    def _mark_solid(  # type: ignore[no-untyped-def]
        means_ptr, opacities_ptr, corner_ptr, solid_ptr, m, cell, n1, n2, n3, words, least, gaussians: tl.constexpr
    ):
        """Set the bits of the cells that hold a solid Gaussian."""
        i = tl.program_id(0) * gaussians + tl.arange(0, gaussians)
        x = _cell(means_ptr, corner_ptr, i, i < m, 0, cell, n1)
        y = _cell(means_ptr, corner_ptr, i, i < m, 1, cell, n2)
        z = _cell(means_ptr, corner_ptr, i, i < m, 2, cell, n3)
        solid = tl.load(opacities_ptr + i, mask=i < m, other=0.0) > least
        bit = (z * 0 + 1) << (z % 32)
        tl.atomic_or(solid_ptr + (x * n2 + y) * words + z // 32, bit, mask=solid)

    @triton.jit  # type: ignore[untyped-decorator]
    def _mark_touching(  # type: ignore[no-untyped-def]
        means_ptr, corner_ptr, component_ptr, found_ptr, m, cell, n1, n2, n3, words, gaussians: tl.constexpr
    ):
        """Mark the Gaussians that lie in a cell of the component or beside one."""
        i = tl.program_id(0) * gaussians + tl.arange(0, gaussians)
        x = _cell(means_ptr, corner_ptr, i, i < m, 0, cell, n1)
        y = _cell(means_ptr, corner_ptr, i, i < m, 1, cell, n2)
        z = _cell(means_ptr, corner_ptr, i, i < m, 2, cell, n3)
        found = z * 0
        for dx in tl.static_range(3):
            for dy in tl.static_range(3):
                for dz in tl.static_range(3):
                    r, s, t = x + (dx - 1), y + (dy - 1), z + (dz - 1)
                    here = (r >= 0) & (r < n1) & (s >= 0) & (s < n2) & (t >= 0) & (t < n3)
                    word = tl.load(component_ptr + (r * n2 + s) * words + t // 32, mask=here, other=0)
                    found |= (word >> (t % 32)) & 1
        tl.store(found_ptr + i, found.to(tl.uint8), mask=i < m)

    @triton.jit
    def _bits(values_ptr, i, n):  # type: ignore[no-untyped-def]
        return tl.load(values_ptr + i, mask=i < n, other=0).to(tl.uint32, bitcast=True)

    @triton.jit
    def _count_bits(bits):  # type: ignore[no-untyped-def]
        """The number of bits that are set in all words."""
        pairs = bits - ((bits >> 1) & 0x55555555)
        fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        eights = (fours + (fours >> 4)) & 0x0F0F0F0F
        return tl.sum(((eights * 0x01010101) >> 24).to(tl.int32), 0)

    @triton.jit  # type: ignore[untyped-decorator]
    def _fill_component(  # type: ignore[no-untyped-def]
        solid_ptr, component_ptr, n, n1, n2, words, share, chunk: tl.constexpr
    ):
        """Fill the component [n] that has this share of the solid cells [n], or all cells where none has it.

        `solid` loses the smaller components on the way.
        """
        lanes = tl.arange(0, chunk)
        total = 0
        for start in range(0, n, chunk):
            total += _count_bits(_bits(solid_ptr, start + lanes, n))
        least = tl.maximum(total * share, 1.0)
        left, size = total, 0
        while (size < least) & (left >= least):
            # Filling starts from the first cell that is left.
            first = n
            for start in range(0, n, chunk):
                i = start + lanes
                first = tl.minimum(first, tl.min(tl.where(_bits(solid_ptr, i, n) != 0, i, n), 0))
            word = tl.load(solid_ptr + first)
            tl.store(component_ptr + first, word & -word)
            tl.debug_barrier()
            changed = 1
            while changed > 0:
                changed = 0
                for start in range(0, n, chunk):
                    i = start + lanes
                    row = i // words
                    x, y, part = row // n2, row % n2, i % words
                    own = _bits(component_ptr, i, n)
                    grown = own
                    for dx in tl.static_range(3):
                        for dy in tl.static_range(3):
                            r, s = x + (dx - 1), y + (dy - 1)
                            here = (i < n) & (r >= 0) & (r < n1) & (s >= 0) & (s < n2)
                            at = component_ptr + (r * n2 + s) * words + part
                            there = tl.load(at, mask=here, other=0).to(tl.uint32, bitcast=True)
                            below = tl.load(at - 1, mask=here & (part > 0), other=0).to(tl.uint32, bitcast=True)
                            above = tl.load(at + 1, mask=here & (part + 1 < words), other=0).to(tl.uint32, bitcast=True)
                            grown |= there | (there << 1) | (there >> 1) | (below >> 31) | (above << 31)
                    grown &= _bits(solid_ptr, i, n)
                    changed += tl.sum((grown != own).to(tl.int32), 0)
                    tl.store(component_ptr + i, grown.to(tl.int32, bitcast=True), mask=i < n)
                    tl.debug_barrier()
            size = 0
            for start in range(0, n, chunk):
                size += _count_bits(_bits(component_ptr, start + lanes, n))
            if size < least:
                left -= size
                for start in range(0, n, chunk):
                    i = start + lanes
                    rest = _bits(solid_ptr, i, n) & ~_bits(component_ptr, i, n)
                    tl.store(solid_ptr + i, rest.to(tl.int32, bitcast=True), mask=i < n)
                    tl.store(component_ptr + i, rest.to(tl.int32, bitcast=True) * 0, mask=i < n)
                tl.debug_barrier()
        if size < least:
            for start in range(0, n, chunk):
                tl.store(component_ptr + start + lanes, lanes * 0 - 1, mask=start + lanes < n)
