"""Masks over raw pictures, in the viewer: what is drawn, which views come first, and the panel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
from made_masks import (
    ABSENT,
    CAMERAS,
    FIRST_COLUMN,
    HEIGHT,
    JUMP,
    KEPT,
    LAST_COLUMN,
    TOOK_NO_PART,
    WIDTH,
    made_agreement,
    run_with_made_masks,
)

from zoosplat.errors import UserError
from zoosplat_flows.least_agreeing import least_agreeing_views

viewer = pytest.importorskip("zoosplat_flows.viewer.app", reason="viser is not installed; pip install zoosplat[view]")
from zoosplat_flows.viewer.mask_overlays import MaskOverlays, part_round  # noqa: E402
from zoosplat_flows.viewer.project_data import ProjectData  # noqa: E402

if TYPE_CHECKING:
    from tests.conftest import Recording

OUTLINE = np.array([255, 60, 90])  # RGB


@pytest.fixture(scope="module")
def project(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose masks were made by hand. Not to be written to."""
    return Path(run_with_made_masks(recording, tmp_path_factory.mktemp("overlays") / "project").project.url)


@pytest.fixture(scope="module")
def overlays(project: Path) -> MaskOverlays:
    found = ProjectData(str(project)).mask_overlays
    assert found is not None
    return found


def raw(recording: Recording, t: int, camera: int) -> Any:
    """The picture of a kept frame, as FFmpeg converts it: [H, W, 3] int."""
    with av.open(str(recording.folder / f"videos/{camera}.mp4")) as film:
        for number, frame in enumerate(film.decode(video=0)):
            if number == t * JUMP:
                return frame.to_ndarray(format="rgb24").astype(int)
    raise AssertionError


def test_the_least_agreeing_views_come_first_and_neighbours_once() -> None:
    agreement = np.array([[0.9, 0.3], [0.2, 0.5], [0.1, 0.4], [0.8, np.nan], [0.7, 0.6]], np.float32)
    assert least_agreeing_views(agreement, 9, 1) == [
        (2, 0), (1, 0), (0, 1), (2, 1), (1, 1), (4, 1), (4, 0), (3, 0), (0, 0)
    ]  # fmt: skip
    assert least_agreeing_views(agreement, 9, 2) == [(2, 0), (0, 1), (2, 1), (4, 1), (4, 0), (0, 0)]
    assert least_agreeing_views(agreement, 2, 3) == [(2, 0), (0, 1)]
    assert least_agreeing_views(np.full((3, 2), np.nan, np.float32), 5, 1) == []


def test_probability_tints_the_raw_picture_of_that_frame(overlays: MaskOverlays, recording: Recording) -> None:
    t, camera = 7, 2
    drawn, picture = overlays.draw(t, camera, "probability", whole=True).astype(int), raw(recording, t, camera)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[20:50, FIRST_COLUMN + t : LAST_COLUMN + t] = True
    assert np.abs(drawn - picture)[~mask].max() <= 4  # FFmpeg rounds otherwise
    weight = 0.6 * (200 + t) / 255
    expected = picture * (1 - weight) + OUTLINE * weight
    assert np.abs(drawn - expected)[mask].max() <= 4


def test_the_outline_lies_round_the_mask(overlays: MaskOverlays) -> None:
    t = 3
    drawn = overlays.draw(t, 0, "outline", whole=True)
    factor = drawn.shape[0] // HEIGHT
    red = np.abs(drawn.astype(int) - OUTLINE).max(axis=2) < 25
    rows, columns = (np.flatnonzero(red.any(axis=axis)) for axis in (1, 0))
    for found, edges in ((rows, (20, 50)), (columns, (FIRST_COLUMN + t, LAST_COLUMN + t))):
        np.testing.assert_allclose([found.min(), found.max()], factor * np.array(edges), atol=2)
    inner = red[factor * 22 : factor * 48, factor * (FIRST_COLUMN + t + 2) : factor * (LAST_COLUMN + t - 2)]
    assert not inner.any()


def test_the_part_round_a_mask_holds_it_with_a_margin() -> None:
    mask = np.zeros((300, 400), bool)
    mask[100:200, 350:390] = True
    assert part_round(mask) == (slice(60, 240), slice(310, 400))
    assert part_round(np.zeros((300, 400), bool)) == (slice(0, 300), slice(0, 400))
    mask[...] = False
    mask[5, 5] = True
    assert part_round(mask) == (slice(0, 38), slice(0, 38))


def test_the_page_lists_views_and_goes_to_them(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = viewer.Viewer(str(project), "localhost", 8231, "cpu")
    panel = page._masks

    def wait_for(words: str) -> None:
        assert any(words in panel._about.content or page._stopping.wait(0.05) for _ in range(400)), panel._about.content

    try:
        wait_for("kept frame 0: agreement 0.90")
        assert panel._panel.visible
        assert list(panel._camera.options) == [str(c) for c in range(CAMERAS)]
        lines = list(panel._list.options)[1:]
        values = made_agreement()
        known = [f"{values[t, c]:.2f}: camera {c}, kept frame {t}" for t, c in [ABSENT, (KEPT - 1, 0)]]
        assert lines[:2] == known
        assert len(lines) == KEPT * CAMERAS - 1
        panel._list.value = lines[0]
        wait_for("kept frame 4: agreement 0.10, **left out**")
        assert (page._frame.value, panel._camera.value) == (ABSENT[0], str(ABSENT[1]))
        shown = panel._image.image
        page._go_to(TOOK_NO_PART[0])
        wait_for("kept frame 5: took no part")
        assert not np.array_equal(panel._image.image, shown)

        def refuse(*arguments: Any) -> None:
            raise UserError("data.videos[2] = gone.mp4: no such file")

        monkeypatch.setattr(page._data, "mask_overlay", refuse)
        panel._whole.value = True
        wait_for("gone.mp4: no such file")
        panel._kind.value = "nothing"
        assert any(panel._about.content == "" or page._stopping.wait(0.05) for _ in range(400))
    finally:
        page.stop()
