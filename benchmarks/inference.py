"""Measures the time of reconstructing a frame on one GPU, from the carved volume to rendered views and with carving.

    python benchmarks/inference.py [--set model.base_filters=16 ...]

The scene is that of `train_step.py`: 96 x 80 x 64 voxels and 6 views of 288 x 256 pixels. The benchmark prints JSON
lines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from train_step import CAMERAS, Scene, median_ms, settings

from zoosplat_model.rasterize import Rendering
from zoosplat_model.registry import build_splatter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--frames", type=int, default=1, help="frames in a batch")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True
    scene = Scene(device)
    model = build_splatter(scene, settings(args.overrides)).move_to(device).eval()  # type: ignore[arg-type]
    frames = [scene.frame(t) for t in range(args.frames)]
    observed = [model.observe(frame) for frame in frames]
    volumes = torch.stack([model.carve(views) for views in observed])

    def render(carved: torch.Tensor) -> list[Rendering]:
        views = list(range(CAMERAS))
        return [
            model.render(
                gaussians.to_world(frame.center, frame.angle),
                frame.world_to_camera,
                frame.intrinsics,
                scene.width,
                scene.height,
                views,
            )
            for frame, gaussians in zip(frames, model.reconstruct(carved, observed), strict=True)
        ]

    def whole() -> list[Rendering]:
        return render(torch.stack([model.carve(model.observe(frame)) for frame in frames]))

    cases: dict[str, Callable[[], object]] = {
        "volume to 6 views": lambda: render(volumes),
        "pictures to 6 views": whole,
    }
    for name, function in cases.items():
        for _ in range(5):
            function()
        milliseconds = median_ms(function, 50) / len(frames)
        print(json.dumps({"from": name, "frames": len(frames), "ms_a_frame": round(milliseconds, 3)}))


if __name__ == "__main__":
    main()
