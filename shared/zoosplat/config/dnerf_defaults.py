"""What a configuration of a D-NeRF scene need not say, because every such scene has the same."""

from __future__ import annotations

from typing import Any

SPLITS = ("train", "test")  # The cameras of a scene, as D-NeRF (Pumarola 2021) names them.
TRANSFORMS_FILES = tuple(f"transforms_{split}.json" for split in SPLITS)  # Their files, relative to data.directory.
HELD_OUT_CAMERA = 1  # Index of the camera `test` in SPLITS.
# Scene units: the edge of the cube in which the readers of 3D and 4D Gaussian splatting draw their first points.
SCENE_EDGE = 2.6
GRID_SIZE = 112  # Voxels along that edge; the default of crop.grid_size.


def with_dnerf_defaults(raw: Any) -> Any:
    """A raw configuration with what every D-NeRF scene has, if its `ingest.source` is dnerf; any other as it is.

    The two cameras are `train` and `test`; `test` is held out. What the configuration says itself is kept.
    """
    if not isinstance(raw, dict) or not isinstance(ingest := raw.get("ingest"), dict):
        return raw
    if ingest.get("source") != "dnerf":
        return raw
    sections: dict[str, dict[str, Any]] = {
        "data": {
            "videos": TRANSFORMS_FILES,
            "masks": TRANSFORMS_FILES,
            "camera_names": SPLITS,
            "calibration": TRANSFORMS_FILES[0],
            "up": (0.0, 0.0, 1.0),
        },
        "center_rotation": {"ell": SCENE_EDGE},
        "crop": {"ell": SCENE_EDGE, "grid_size": GRID_SIZE, "volume_idx": ((0, GRID_SIZE),) * 3},
        "render": {"camera": HELD_OUT_CAMERA},
    }
    filled = {"holdout_views": (HELD_OUT_CAMERA,), **raw}
    for name, values in sections.items():
        given = raw.get(name, {})
        filled[name] = {**values, **given} if isinstance(given, dict) else given
    return filled
