"""The map of the embedding as a picture in the page: a click in it goes to the frame of the nearest point.

viser does not report clicks in pictures. So a script in the page looks the point up, and writes its frame into the
number beside the timeline as if the user had typed it.
"""

from __future__ import annotations

import base64

import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.formats import media
from zoosplat_flows.viewer.project_data import EmbeddingMap

SIDE = 560  # pixels of the map's side
MARGIN = 0.04  # width of the border around the points, in sides
RADIUS = 3  # pixels of a point

# JavaScript of a click: finds the nearest point and puts its frame into the timeline.
ON_CLICK = """
const box = this.getBoundingClientRect(), x = (event.clientX - box.left) / box.width,
  y = (event.clientY - box.top) / box.height;
const bytes = Uint8Array.from(atob(this.dataset.points), c => c.charCodeAt(0));
const points = new Float32Array(bytes.buffer);
let frame = 0, nearest = Infinity;
for (let i = 0; i < points.length; i += 3) {
  const d = (points[i + 1] - x) ** 2 + (points[i + 2] - y) ** 2;
  if (d < nearest) { nearest = d; frame = points[i]; }
}
const label = [...document.querySelectorAll('label')].find(l => l.textContent === this.dataset.timeline);
const input = document.getElementById(label.htmlFor).parentElement.querySelector('input[type=text]');
Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(input, String(frame));
input.dispatchEvent(new Event('input', { bubbles: true }));
"""


def unit_places(embedding: EmbeddingMap) -> npt.NDArray[np.float32]:
    """Places of the frames in the picture.

    Both directions have one scale, because distances in the map mean something.

    Returns:
        [T, 2] float32, x to the right and y down, 0 to 1; NaN for frames that have no place.
    """
    place = np.where(embedding.valid[:, None], embedding.place, np.nan)
    low, high = np.nanmin(place, axis=0), np.nanmax(place, axis=0)
    extent = max(float((high - low).max()), 1e-9)
    unit = 0.5 + (place - (low + high) / 2) / extent * (1 - 2 * MARGIN)
    return np.stack([unit[:, 0], 1 - unit[:, 1]], -1).astype(np.float32)


def draw_map(unit: npt.NDArray[np.float32]) -> media.Picture:
    """Draw points [T, 2], coloured by time from dark to light. Returns [560, 560, 3]."""
    drawn = np.full((SIDE, SIDE, 3), 255, np.uint8)
    shades = np.linspace(0, 255, len(unit)).astype(np.uint8)
    colors = cv2.applyColorMap(shades[None], cv2.COLORMAP_VIRIDIS)[0, :, ::-1]
    for (x, y), color in zip(unit, colors.tolist(), strict=True):
        if np.isfinite(x):
            # OpenCV takes sixteenths of a pixel.
            center = round(float(x * SIDE - 0.5) * 16), round(float(y * SIDE - 0.5) * 16)
            cv2.circle(drawn, center, RADIUS * 16, color, -1, cv2.LINE_AA, 4)
    return drawn


def map_html(unit: npt.NDArray[np.float32], timeline: str) -> str:
    """The element that shows the map and takes clicks.

    Args:
        unit: the result of `unit_places`.
        timeline: label of the slider that takes the frame.
    """
    there = np.flatnonzero(np.isfinite(unit[:, 0]))
    points = np.concatenate([there[:, None], unit[there]], axis=1).astype("<f4")
    source = base64.b64encode(media.encode_png(draw_map(unit))).decode()
    data = base64.b64encode(points.tobytes()).decode()
    return (
        f'<img alt="Map of the embedding" src="data:image/png;base64,{source}" data-points="{data}" '
        f'data-timeline="{timeline}" style="display:block;width:100%;cursor:crosshair" onclick="{ON_CLICK}">'
    )


def marker_html(unit: npt.NDArray[np.float32], t: int) -> str:
    """The element that shows a ring around frame t. It lies over the element above it, which is the map."""
    x, y = unit[t]
    if not np.isfinite(x):
        return "<div></div>"
    ring = f'<circle cx="{x:.4f}" cy="{y:.4f}" r="0.02" fill="none" stroke="#e03131" stroke-width="0.008"/>'
    style = "position:absolute;left:0;bottom:0;width:100%;pointer-events:none"
    return f'<div style="position:relative;height:0"><svg viewBox="0 0 1 1" style="{style}">{ring}</svg></div>'
