"""Measures the median time of a rasteriser's forward and backward pass.

OMP_WAIT_POLICY=passive python benchmarks/rasterize.py --gaussians 4000 --views 4 --size 144 128
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

from zoosplat_model.rasterize import rasterize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaussians", type=int, default=16_000)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=2, default=(288, 256), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--mode", choices=("3d", "2d"), default="3d")
    parser.add_argument("--backend", choices=("torch", "gsplat", "reference"), default="torch")
    parser.add_argument("--opacity", type=float, default=0.5, help="mean opacity, in (0, 1)")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    width, height = args.size
    device = "cuda" if args.backend == "gsplat" else "cpu"

    # A solid ellipsoid that fills about half of the image's width, with Gaussians of 1.5 pixels.
    torch.manual_seed(0)
    n, c, focal = args.gaussians, args.views, 2.0 * width
    inside = torch.nn.functional.normalize(torch.randn(n, 3), dim=-1) * torch.rand(n, 1) ** (1 / 3)
    means = inside * torch.tensor([0.12, 0.08, 0.08])
    scales = torch.exp(0.3 * torch.randn(n, 3)) * 1.5 / focal
    opacities = torch.sigmoid(torch.randn(n) + math.log(args.opacity / (1 - args.opacity)))
    tensors = (means, torch.randn(n, 4), scales, opacities, torch.rand(n, 3))
    means, quats, scales, opacities, colors = (t.to(device).requires_grad_() for t in tensors)
    world_to_camera = torch.eye(4).repeat(c, 1, 1)
    for view in range(c):
        cos, sin = math.cos(2 * math.pi * view / c), math.sin(2 * math.pi * view / c)
        world_to_camera[view, :3] = torch.tensor([[cos, 0, sin, 0], [0, 1, 0, 0], [-sin, 0, cos, 1]])
    intrinsics = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]]).repeat(c, 1, 1)

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    times = []
    for _ in range(args.repeats + 2):
        start = now()
        out = rasterize(
            means,
            quats,
            scales,
            opacities,
            colors,
            world_to_camera.to(device),
            intrinsics.to(device),
            width,
            height,
            background=torch.ones(3, device=device),
            mode=args.mode,
            backend=args.backend,
        )
        middle = now()
        torch.autograd.backward(out.rgb.square().sum() + out.alpha.sum())
        times.append((middle - start, now() - middle))
    forward, backward = (1e3 * statistics.median(column) for column in zip(*times[2:], strict=True))
    print(
        f"{args.backend} {args.mode}: {n} Gaussians, {c} x {width} x {height}, mean alpha {out.alpha.mean():.2f}: "
        f"forward {forward:.1f} ms, backward {backward:.1f} ms"
    )


if __name__ == "__main__":
    main()
