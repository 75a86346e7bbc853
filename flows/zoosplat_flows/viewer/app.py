"""The page of a project: a 3D scene, a timeline and pictures.

One thread draws all of it, so that only the newest request costs time.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import viser
from viser import transforms

from zoosplat.errors import UserError
from zoosplat_flows.viewer import embedding_map
from zoosplat_flows.viewer.camera_frustum import CameraFrustum
from zoosplat_flows.viewer.mask_panel import MaskPanel
from zoosplat_flows.viewer.newest_task_thread import NewestTaskThread
from zoosplat_flows.viewer.project_data import ProjectData, project_state
from zoosplat_flows.viewer.scene_drawer import LAYERS, SceneDrawer, blank_picture

WATCH_EVERY_S = 5.0  # seconds between looks for a new checkpoint or a stage that is done
TIMELINE = "frame"  # label of the slider that holds the frame; the map of the embedding finds the slider by it
SNAPSHOT_HEIGHT = 480  # pixels
SNAPSHOT_ASPECT = 2.0  # the largest width of a snapshot over its height
COMPARISON_SIZE = (320, 968)  # height and width of the picture that `draw_comparison` draws, pixels


class Viewer:
    """A project in the browser, until `stop`.

    Attributes:
        url: of the page.
    """

    def __init__(self, project: str, host: str, port: int, device: str = "auto", run_id: str | None = None) -> None:
        """Open a project and start the page.

        Args:
            project: path or URL of the project.
            host: address to listen at.
            port: port to listen at, or the next one that is free.
            device: auto, cpu, cuda or cuda:0.
            run_id: id of a run, or its beginning; None: the latest run.

        Raises:
            UserError: there is no project, or the device does not exist.
        """
        self._project, self._run_id, self._device = project, run_id, device
        self._state = project_state(project, run_id)
        self._data = ProjectData(project, run_id)
        if device != "auto":  # refused at once where it does not exist, though the model is loaded later
            from zoosplat_model.devices import pick_device

            pick_device(device)
        with contextlib.redirect_stdout(io.StringIO()):  # viser's own announcement
            self._server = viser.ViserServer(host, port, verbose=False, label=f"zoosplat: {self._data.experiment.name}")
        self.url = f"http://{'localhost' if host == '0.0.0.0' else host}:{self._server.get_port()}"
        self._stopping, self._playing = threading.Event(), threading.Event()
        # Any page in the same browser can send viser this request, which shows everything to the internet.
        self._server.request_share_url = lambda verbose=True: None  # type: ignore[method-assign]
        self._shown: tuple[ProjectData, int] | None = None
        self._worker = NewestTaskThread(self._failed)
        self._add_controls()
        self._worker.request("start", self._start)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._play, self._watch)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the page and its threads."""
        self._stopping.set()
        self._playing.set()
        for thread in self._threads:
            thread.join()
        self._worker.stop()
        self._server.stop()

    # -- controls -----------------------------------------------------------------------------------------------
    def _add_controls(self) -> None:
        gui = self._server.gui
        gui.configure_theme(show_logo=False, show_share_button=False)  # sharing would go through somebody's server
        self._frame = gui.add_slider(TIMELINE, 0, 1, 1, 0)
        self._play_button = gui.add_button("Play", icon=viser.Icon.PLAYER_PLAY)
        self._rate = gui.add_slider(
            "frames/s", 1, 60, 1, 10, hint="At most: a frame is waited for where it takes longer"
        )
        self._about = gui.add_markdown("")
        with gui.add_folder("Show"):
            # Points of the hull would hide the Gaussians.
            shown = {name: gui.add_checkbox(name, name != "hull" or not self._data.has_model) for name in LAYERS}
        with gui.add_folder("The model's own picture"):
            self._snap = gui.add_button("Render from here", icon=viser.Icon.CAMERA)
            self._snapshot = gui.add_image(blank_picture(8, 8), format="png", visible=False)
        self._panels = [gui.add_panel(), gui.add_panel()]
        with self._panels[0].add_tab("Comparison"):
            self._view = gui.add_dropdown("camera", ["-"])
            self._comparison = gui.add_image(
                blank_picture(*COMPARISON_SIZE), label="photograph, render, difference", format="png"
            )
        with self._panels[1].add_tab("Map"):
            self._map, self._marker = gui.add_html(""), gui.add_html("")
        self._panels[0].float(x=12, y=-12, width=560)
        self._panels[1].float(x=12, y=12, width=240)
        for panel in self._panels:
            panel.visible = False
        self._masks = MaskPanel(self._server, self._redraw, self._go_to)
        self._drawer = SceneDrawer(self._server, {name: box.value for name, box in shown.items()})

        @self._frame.on_update
        def _(_: object) -> None:
            self._redraw()

        @self._view.on_update
        def _(_: object) -> None:
            self._redraw()

        @self._play_button.on_click
        def _(_: object) -> None:
            self._set_playing(not self._playing.is_set())

        @self._snap.on_click
        def _(event: viser.GuiEvent[Any]) -> None:
            if event.client is not None:
                camera = event.client.camera
                self._worker.request("snapshot", lambda: self._take_snapshot(camera))

        for name, box in shown.items():

            def show(_: object, name: str = name, box: viser.GuiCheckboxHandle = box) -> None:
                self._drawer.layers[name].visible = box.value
                self._redraw()  # a layer that is hidden was not computed

            box.on_update(show)

    def _redraw(self) -> None:
        t = int(self._frame.value)
        self._worker.request("frame", lambda: self._draw(t))

    def _go_to(self, t: int) -> None:
        """Move the timeline to frame t, which draws the frame if it is another one."""
        self._frame.value = t  # type: ignore[misc]  # viser's setter is hidden from mypy by a decorator

    def _set_playing(self, on: bool) -> None:
        (self._playing.set if on else self._playing.clear)()
        self._play_button.label = "Pause" if on else "Play"
        self._play_button.icon = viser.Icon.PLAYER_PAUSE if on else viser.Icon.PLAYER_PLAY

    def _play(self) -> None:
        due = 0.0
        while True:
            self._playing.wait()
            if self._stopping.wait(max(0.0, due - time.monotonic())):
                return
            if self._playing.is_set() and self._worker.wait(1.0) and self._data.n_frames:
                due = time.monotonic() + 1 / self._rate.value
                self._go_to((int(self._frame.value) + 1) % self._data.n_frames)

    def _watch(self) -> None:
        failing = False
        while not self._stopping.wait(WATCH_EVERY_S):
            try:
                now = project_state(self._project, self._run_id)
            except Exception as error:  # such as a server that is being restarted
                self._failed(error)
                failing = True
                continue
            if failing or now != self._state:
                self._state, failing = now, False
                self._worker.request("open", self._open)

    def _failed(self, error: Exception) -> None:
        """Show an error on the page, and go on: the next frame or checkpoint may be right."""
        if not isinstance(error, UserError):
            traceback.print_exception(error, file=sys.stderr)
        self._about.content = f"**{error}**" if isinstance(error, UserError) else f"**{type(error).__name__}: {error}**"

    # -- drawing ------------------------------------------------------------------------------------------------
    def _start(self) -> None:
        """Show everything but the model, then load the model: its libraries alone take seconds to load."""

        def load() -> None:
            self._data.load_model(self._device)
            self._fill()

        self._fill()
        if self._data.has_model:
            self._worker.request("model", load)

    def _open(self) -> None:
        """Open the project as it is now. Until it is loaded, the page shows it as it was."""
        data = ProjectData(self._project, self._run_id)
        data.load_model(self._device)
        self._data = data
        self._fill()

    def _fill(self) -> None:
        """Show what stays from frame to frame, and the frame."""
        data, server = self._data, self._server
        self._shown = None
        with server.atomic():
            self._drawer.clear()
            names = [_title(camera) for camera in _held_out_first(data.cameras)]
            if names and names != list(self._view.options):
                self._view.options = names
            self._panels[0].visible = self._snap.visible = data.predictor is not None
            self._panels[1].visible = data.embedding is not None
            self._masks.fill(data.mask_overlays)
            if data.embedding is not None:
                self._map_places = embedding_map.unit_places(data.embedding)
                self._map.content = embedding_map.map_html(self._map_places, TIMELINE)
            if data.cameras:
                self._drawer.draw_cameras(data)
            if data.centers is not None:
                self._drawer.draw_path(data)
            self._frame.max = max(1, data.n_frames - 1)
            self._go_to(min(int(self._frame.value), max(0, data.n_frames - 1)))
        self._redraw()

    def _draw(self, t: int) -> None:
        """Draw frame t, quick parts first. It is given up where another frame is requested."""
        if not 0 <= t < self._data.n_frames:
            self._about.content = self._words(0)
            return
        for _ in self._draw_parts(t):
            if self._worker.is_requested("frame", "open"):
                return

    def _draw_parts(self, t: int) -> Iterator[None]:
        """Draw the parts of frame t; after each the caller may give up."""
        data, drawer = self._data, self._drawer
        new = self._shown != (data, t)
        self._shown = None
        if new:
            with self._server.atomic():
                self._about.content = self._words(t)
                if data.embedding is not None:
                    self._marker.content = embedding_map.marker_html(self._map_places, t)
                if data.centers is not None:
                    drawer.draw_trail(data, t)
                drawer.draw_pictures(data.pictures(t))
            yield
        if not data.has_hull(t):
            drawer.hide_hull()
        elif drawer.layers["hull"].visible:
            with self._server.atomic():
                drawer.draw_hull(data, t)
            yield
        if not data.has_gaussians(t):
            drawer.hide_gaussians()
            self._comparison.image = blank_picture(*COMPARISON_SIZE)
        else:
            if drawer.layers["gaussians"].visible:
                with self._server.atomic():
                    drawer.draw_gaussians(data, t)
                yield
            view = [_title(camera) for camera in data.cameras].index(self._view.value)
            shown = data.is_seen(t, view)
            self._comparison.image = data.comparison(t, view) if shown else blank_picture(*COMPARISON_SIZE)
        yield
        self._masks.draw(data, t)  # last, because a frame of a video has to be decoded
        self._server.flush()
        self._shown = data, t

    def _take_snapshot(self, camera: viser.CameraHandle) -> None:
        """Show the model's own picture from a client's camera."""
        t = int(self._frame.value)
        if self._data.has_gaussians(t):
            width = max(1, round(SNAPSHOT_HEIGHT * min(camera.aspect, SNAPSHOT_ASPECT)))
            to_world = transforms.SO3(camera.wxyz).as_matrix().astype(float)
            self._snapshot.image = self._data.render_from(
                t, camera.position, to_world, camera.fov, width, SNAPSHOT_HEIGHT
            )
            self._snapshot.visible = True

    def _words(self, t: int) -> str:
        """What is shown of frame t, and what does not exist yet, as Markdown."""
        data, words = self._data, []
        if not data.n_frames:
            words.append("Nothing to show yet: stage ingest has not finished. This page fills by itself.")
        else:
            words.append(f"frame {data.video_frames[t]} of the video, {data.times_s[t]:.2f} s")
            if data.valid is not None and not data.valid[t]:
                words.append("no visual hull in this frame")
            if data.predictor is not None:
                state = ", still training" if data.training else ""
                words.append(f"model after {data.predictor.step} steps{state}")
            elif not data.has_model:
                words.append("no model yet; it is shown from its first checkpoint on")
            elif not data.notes:
                words.append("loading the model ...")
        return "  \n".join([*words, *(f"**{note}**" for note in data.notes)])


def _held_out_first(cameras: list[CameraFrustum]) -> list[CameraFrustum]:
    return sorted(cameras, key=lambda camera: not camera.held_out)


def _title(camera: CameraFrustum) -> str:
    return f"{camera.name} (held out)" if camera.held_out else camera.name


def serve(project: str, host: str, port: int, device: str, run_id: str | None = None) -> None:
    """Show a project until Ctrl-C. Arguments and errors as for `Viewer`."""
    viewer = Viewer(project, host, port, device, run_id)
    print(f"{viewer.url}  (Ctrl-C ends)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    viewer.stop()
