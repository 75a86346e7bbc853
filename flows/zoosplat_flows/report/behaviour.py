"""The section of a report on behaviour: the map of the embedding, states over time, and frames that are alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from zoosplat.config.experiment import Experiment
from zoosplat.formats import media
from zoosplat.stages.runs import Run
from zoosplat.storage import schema
from zoosplat_flows.execution.stage_states import StageState
from zoosplat_flows.report import plots
from zoosplat_flows.report.pictures import jpeg_data_uri

Section = dict[str, Any]  # the values that the template of a section shows

PHOTO_SIDE = 132  # pixels of a photograph in a row of several
ALIKE_ROWS, ALIKE_PICTURES = 8, 6  # rows of frames that are alike, and pictures in a row
STATE_PICTURES = 8  # pictures of a state
ALBUM_FRAMES = 8  # frames by which the album's camera is chosen


def behaviour_section(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Section:
    """Facts, map, explained variance, ethogram, states, and frames with their neighbours."""
    group = run.open_input("embedding")
    keys = ("valid", "map", "neighbours", "state", "time", "speed", "height")
    valid, places, neighbours, state, time_s, speed, height = (schema.read(group, key) for key in keys)
    attributes: Any = group.attrs
    shares, (before, after) = np.array(attributes["explained_variance"]), attributes["heading_r2"]
    facts = {
        "descriptor": f"{attributes['encoder']}, {attributes['descriptor']} numbers a frame",
        "dimensions": f"{len(shares)}, fitted to {attributes['training_frames']} frames"
        f"{' of the first third' if attributes.get('fit_to', 'third') == 'third' else ''}",
        "explained": f"{100 * shares.sum():.1f} % of their variance",
        "heading": f"R2 of telling it at other times {before:.2f} before, {after:.2f} after its removal (weight "
        f"{attributes['heading_removal']:g})",
    }
    colourings = {"time (s)": time_s, "speed (cm/s)": 100 * speed, "height (cm)": 100 * height}
    album = _PhotoAlbum(run)
    rows = np.flatnonzero(valid & (neighbours[:, 0] >= 0))
    asked = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), ALIKE_ROWS)).round().astype(int))]
    alike = []
    for t in map(int, asked):
        near = [int(other) for other in neighbours[t, : ALIKE_PICTURES - 1] if other >= 0]
        times = ", ".join(f"{time_s[other]:.2f}" for other in near)
        alike.append({"data": album.strip([t, *near]), "time": f"{time_s[t]:.2f}", "times": times})
    state_values = [_state_values(album, state, time_s, k) for k in range(int(state.max(initial=-1)) + 1)]
    return {
        "facts": facts,
        "explained": plots.plot_explained_variance(shares),
        "maps": plots.plot_maps(places[valid], {name: values[valid] for name, values in colourings.items()}),
        "alike": alike,
        "ethogram": plots.plot_ethogram(time_s, state),
        "states": state_values,
    }


def _state_values(album: _PhotoAlbum, state: npt.NDArray[np.int32], time_s: npt.NDArray[np.float64], k: int) -> Section:
    """What is shown of state k: its share of the time, and pictures of the first second of its longest bout."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], state == k, [False])).astype(int)))
    starts, stops = edges[::2], edges[1::2]
    longest = int((stops - starts).argmax())
    start, stop = int(starts[longest]), int(stops[longest])
    stop = min(stop, int(np.searchsorted(time_s, time_s[start] + 1.0)) + 1)
    frames = np.unique(np.linspace(start, stop - 1, STATE_PICTURES).round().astype(int))
    step = float(time_s[1] - time_s[0]) if len(time_s) > 1 else 0.0
    return {
        "state": k,
        "share": f"{100 * (state == k).sum() / max((state >= 0).sum(), 1):.0f} %",
        "bouts": len(starts),
        "median": f"{np.median(stops - starts) * step:.2f}",
        "from": f"{time_s[start]:.2f}",
        "to": f"{time_s[stop - 1]:.2f}",
        "data": album.strip([int(t) for t in frames]),
    }


class _PhotoAlbum:
    """Photographs of the animal from one camera, the one that sees it largest."""

    def __init__(self, run: Run) -> None:
        self.images = run.open_input("pack")
        mask, self.seen = schema.array(self.images, "mask"), schema.read_seen(self.images)
        some = np.linspace(0, mask.shape[0] - 1, ALBUM_FRAMES).round().astype(int)
        areas = [np.asarray(mask[int(t)]).sum((1, 2)) * self.seen[t] for t in some]
        self.camera = int(np.median(areas, axis=0).argmax())

    def strip(self, frames: list[int]) -> str:
        """Photographs of kept frames beside each other, as a data URI."""
        return jpeg_data_uri(media.side_by_side([self._photograph(t) for t in frames]))

    def _photograph(self, t: int) -> media.Picture:
        """The animal in frame t, cut out and scaled to [132, 132, 3]."""
        mask = np.asarray(schema.array(self.images, "mask")[t, self.camera]) & self.seen[t, self.camera]
        picture = np.asarray(schema.array(self.images, "rgb")[t, self.camera])
        ys, xs = np.nonzero(mask)
        if not len(xs):
            ys, xs = (np.array([0, n - 1]) for n in mask.shape)
        half = 0.6 * max(int(np.ptp(xs)), int(np.ptp(ys)), 8)
        x, y = (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2
        return media.zoom(picture, (x - half, y - half, x + half, y + half), PHOTO_SIDE, PHOTO_SIDE)
