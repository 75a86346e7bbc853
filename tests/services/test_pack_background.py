"""Windows over plates: raw pictures whole, and places where an animal may be that a mask does not show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import cv2
import numpy as np

from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.storage import schema
from zoosplat_pack import ops

if TYPE_CHECKING:
    from tests.conftest import Recording


def test_empty_boxes_are_filled_by_hand() -> None:
    boxes = np.zeros((5, 3, 4), np.int32)
    boxes[0, 0], boxes[4, 0] = [10, 20, 14, 30], [50, 40, 54, 50]
    boxes[2, 1] = [6, 8, 10, 10]
    filled = ops.fill_empty_boxes(boxes, (100, 80))
    # Camera 0: from the centre (12, 25) to (52, 45). Camera 1 has one box, camera 2 none.
    assert filled[:, 0].tolist() == [[10, 20, 14, 30], [22, 30] * 2, [32, 35] * 2, [42, 40] * 2, [50, 40, 54, 50]]
    assert filled[[0, 4], 1].tolist() == [[8, 9] * 2] * 2
    assert (filled[:, 2] == [50, 40, 50, 40]).all()
    assert ops.window_origins(filled, (16, 16), (100, 80))[1, 0].tolist() == [14, 22]


def test_windows_over_plates_are_raw_pictures(recording: Recording, stages: Any, tmp_path: Path) -> None:
    folder = recording.copy(tmp_path / "recording")
    plates = []
    for c in range(4):
        with av.open(str(folder / f"videos/{c}.mp4")) as file:
            frames = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
        plates.append(np.median(frames, axis=0).astype(np.uint8))
        cv2.imwrite(str(folder / f"plate{c}.png"), plates[c][..., ::-1])
    names = [f"plate{c}.png" for c in range(4)]
    found = {}
    for kind, changes in (("white", {}), ("raw", {"data__backgrounds": names})):
        project = str(tmp_path / kind)
        recording.write_project(Path(project), folder, ingest__max_frames=6, **changes)
        for stage in ("ingest", "pack"):
            outcome = stages(stage, project)
            assert (outcome.status, outcome.err) == (0, "")
        found[kind] = open_run(Project.at(project))
    white, raw = (run.open_input("pack") for run in found.values())
    # The masks are one and the same, and so are the windows; without plates nothing is stored of them.
    assert found["white"].result("ingest").id == found["raw"].result("ingest").id
    assert found["white"].result("pack").id != found["raw"].result("pack").id
    assert "plate" not in white
    for key in ("mask", "origin"):
        np.testing.assert_array_equal(schema.read(white, key), schema.read(raw, key))
    light = schema.read(raw, "light")
    np.testing.assert_allclose(light[..., 0], 1, atol=0.02)
    assert not light[..., 1:].any()
    plate, rgb, origin = (schema.read(raw, key) for key in ("plate", "rgb", "origin"))
    np.testing.assert_array_equal(plate, np.stack(plates))
    on_white = schema.read(white, "rgb")
    assert (on_white == 255).all(-1).mean() > 0.3
    height, width = rgb.shape[2:4]
    for c in range(4):
        with av.open(str(folder / f"videos/{c}.mp4")) as file:
            for t, frame in zip(range(6), file.decode(video=0), strict=False):
                x, y = origin[t, c]
                expected = frame.to_ndarray(format="rgb24")[y : y + height, x : x + width].astype(int)
                # Swscale interpolates chroma otherwise, which shows at edges.
                assert np.abs(rgb[t, c] - expected).mean() < 3
                near = (on_white[t, c] != 255).any(-1)
                np.testing.assert_array_equal(rgb[t, c][near], on_white[t, c][near])
