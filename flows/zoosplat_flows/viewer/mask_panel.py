"""The panel of the page that shows masks over the raw pictures, and lists the views that agree least."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import viser

from zoosplat.errors import UserError
from zoosplat_flows.viewer.mask_overlays import KINDS, MaskOverlays
from zoosplat_flows.viewer.project_data import ProjectData
from zoosplat_flows.viewer.scene_drawer import blank_picture

NOTHING = "nothing"  # choice of what is shown, with which no video is read
LIST_HEAD = "go to ..."  # first line of the list of views, which stands for none


class MaskPanel:
    """The panel, which is hidden while a project has no masks that stage segment has made.

    Args:
        server: of the page.
        redraw: called when something else is to be shown of the same frame.
        go_to: called with a kept frame that is to be shown.
    """

    def __init__(self, server: viser.ViserServer, redraw: Callable[[], None], go_to: Callable[[int], None]) -> None:
        self._overlays: MaskOverlays | None = None
        self._panel = server.gui.add_panel()
        with self._panel.add_tab("Masks"):
            self._camera = server.gui.add_dropdown("mask of camera", ["-"])
            self._kind = server.gui.add_dropdown("show", (*KINDS, NOTHING))
            self._whole = server.gui.add_checkbox("whole picture", False)
            self._list = server.gui.add_dropdown(
                "least agreeing", [LIST_HEAD], hint="The views whose masks agree least with the others, worst first"
            )
            self._about = server.gui.add_markdown("")
            self._image = server.gui.add_image(blank_picture(8, 8), format="jpeg", jpeg_quality=90)
        self._panel.float(x=-12, y=-12, width=420)
        self._panel.visible = False

        def changed(_: object) -> None:
            redraw()

        self._camera.on_update(changed)
        self._kind.on_update(changed)
        self._whole.on_update(changed)

        @self._list.on_update
        def _(_: object) -> None:
            if self._overlays is None or self._list.value == LIST_HEAD:
                return
            t, camera = self._overlays.least_agreeing[self._lines().index(self._list.value)]
            self._camera.value = self._overlays.names[camera]  # type: ignore[misc]  # as in `Viewer._go_to`
            go_to(t)
            redraw()  # the frame may be the same

    def fill(self, overlays: MaskOverlays | None) -> None:
        """Show what stays from frame to frame; None hides the panel."""
        self._overlays = overlays
        self._panel.visible = overlays is not None
        if overlays is None:
            return
        for handle, options in ((self._camera, overlays.names), (self._list, [LIST_HEAD, *self._lines()])):
            if options != list(handle.options):
                handle.options = options

    def draw(self, data: ProjectData, t: int) -> None:
        """Show kept frame t. What cannot be read is said in the panel."""
        overlays = self._overlays
        if overlays is None or self._kind.value == NOTHING:
            self._about.content = ""
            return
        camera = overlays.names.index(self._camera.value)
        try:
            self._image.image = data.mask_overlay(t, camera, self._kind.value, self._whole.value)
        except UserError as error:
            self._about.content, self._image.image = f"**{error}**", blank_picture(8, 8)
            return
        self._about.content = f"kept frame {t}: {_agreement_words(overlays, t, camera)}"

    def _lines(self) -> list[str]:
        """A line for each view of the list."""
        assert self._overlays is not None
        overlays = self._overlays
        return [
            f"{overlays.agreement[t, c]:.2f}: camera {overlays.names[c]}, kept frame {t}"
            for t, c in overlays.least_agreeing
        ]


def _agreement_words(overlays: MaskOverlays, t: int, camera: int) -> str:
    agreement = overlays.agreement[t, camera]
    words = f"agreement {agreement:.2f}" if np.isfinite(agreement) else "took no part"
    return words if overlays.seen[t, camera] else f"{words}, **left out**"
