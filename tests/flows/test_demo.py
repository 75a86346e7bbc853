"""What `zoosplat demo` says about the masks that it has made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from made_masks import ABSENT, CAMERAS, JUMP, KEPT, made_segments, run_with_made_masks

from zoosplat_flows.commands.demo import describe_ious, mask_ious

if TYPE_CHECKING:
    from tests.conftest import Recording


def test_made_masks_are_compared_with_the_true_ones(recording: Recording, tmp_path: Path) -> None:
    made = made_segments()["probability"] >= 128
    expected = np.empty((KEPT, CAMERAS))
    for c in range(CAMERAS):
        with av.open(str(recording.folder / f"masks/{c}.mp4")) as film:
            pictures: list[Any] = [frame.to_ndarray(format="gray") for frame in film.decode(video=0)]
        true = np.stack(pictures[: KEPT * JUMP : JUMP]) > 127
        expected[:, c] = (made[:, c] & true).sum(axis=(1, 2)) / (made[:, c] | true).sum(axis=(1, 2))
    expected[ABSENT] = np.nan
    run = run_with_made_masks(recording, tmp_path / "project")
    found = mask_ious(run, recording.folder / "masks")
    np.testing.assert_allclose(found, expected, atol=0.01)  # grey pixels at the rims may be rounded otherwise
    assert np.nanmax(expected) > 0.1


def test_a_camera_that_is_always_left_out_is_the_worst_one() -> None:
    words = describe_ious(np.array([[0.9, np.nan], [0.8, np.nan]]))
    assert words.endswith("IoU 0.850 in the mean, 0.000 in the worst camera (1); 2 of 4 views left out")
