"""The embedding's map as a picture in the page: a click in it goes to the frame of the nearest point.

The browser looks the point up itself and writes its frame into the number beside the timeline, as if it were typed:
viser's pictures report no clicks.
"""

from __future__ import annotations

import base64

import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.formats import media
from zoosplat_flows.viewer.data import Embedding

SIDE = 560  # pixels
MARGIN = 0.04  # of the side, round the points
RADIUS = 3  # pixels of a point

CLICKED = """
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


def unit_places(embedding: Embedding) -> npt.NDArray[np.float32]:
    """Places [T, 2] in the picture, x to the right and y down, 0 to 1; NaN for frames that have none.

    One scale for both directions, as distances in the map mean something.
    """
    place = np.where(embedding.valid[:, None], embedding.place, np.nan)
    low, high = np.nanmin(place, axis=0), np.nanmax(place, axis=0)
    extent = max(float((high - low).max()), 1e-9)
    unit = 0.5 + (place - (low + high) / 2) / extent * (1 - 2 * MARGIN)
    return np.stack([unit[:, 0], 1 - unit[:, 1]], -1).astype(np.float32)


def picture(unit: npt.NDArray[np.float32]) -> media.Picture:
    """The points [T, 2], coloured by time from dark to light; [560, 560, 3]."""
    drawn = np.full((SIDE, SIDE, 3), 255, np.uint8)
    shades = np.linspace(0, 255, len(unit)).astype(np.uint8)
    colors = cv2.applyColorMap(shades[None], cv2.COLORMAP_VIRIDIS)[0, :, ::-1]
    for (x, y), color in zip(unit, colors.tolist(), strict=True):
        if np.isfinite(x):
            # Sixteenths of a pixel.
            center = round(float(x * SIDE - 0.5) * 16), round(float(y * SIDE - 0.5) * 16)
            cv2.circle(drawn, center, RADIUS * 16, color, -1, cv2.LINE_AA, 4)
    return drawn


def html(unit: npt.NDArray[np.float32], timeline: str) -> str:
    """The picture that is clicked in. `timeline` is the label of the slider that takes the frame."""
    there = np.flatnonzero(np.isfinite(unit[:, 0]))
    points = np.concatenate([there[:, None], unit[there]], axis=1).astype("<f4")
    source = base64.b64encode(media.encode_png(picture(unit))).decode()
    data = base64.b64encode(points.tobytes()).decode()
    return (
        f'<img alt="Map of the embedding" src="data:image/png;base64,{source}" data-points="{data}" '
        f'data-timeline="{timeline}" style="display:block;width:100%;cursor:crosshair" onclick="{CLICKED}">'
    )


def marker(unit: npt.NDArray[np.float32], t: int) -> str:
    """A ring round frame t, laid over the element above, which is the picture."""
    x, y = unit[t]
    if not np.isfinite(x):
        return "<div></div>"
    ring = f'<circle cx="{x:.4f}" cy="{y:.4f}" r="0.02" fill="none" stroke="#e03131" stroke-width="0.008"/>'
    style = "position:absolute;left:0;bottom:0;width:100%;pointer-events:none"
    return f'<div style="position:relative;height:0"><svg viewBox="0 0 1 1" style="{style}">{ring}</svg></div>'
