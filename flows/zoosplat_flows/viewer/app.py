"""The page: a 3D scene, a timeline, pictures; drawn by one thread, so that only the newest request costs anything."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import viser
from viser import transforms

from zoosplat.errors import UserError
from zoosplat_flows.viewer import embedding_map
from zoosplat_flows.viewer.data import Camera, Scene, state

LOOK_S = 5.0  # between looks for a new checkpoint or a stage that has finished
TRAIL_S = 2.0  # of the path behind the animal that is drawn thick
TIMELINE = "frame"
OBSERVED, HELD_OUT, TRAIL, HULL = (60, 60, 60), (214, 51, 108), (25, 113, 194), (120, 160, 200)
LAYERS = ("gaussians", "hull", "trail", "cameras")
FILLED = ("/ground", "/trail/whole", "/trail/recent", "/trail/heading", "/hull/points", "/gaussians/splats")
SNAPSHOT_HEIGHT = 480
SPLATS_STEP = 2048
FRUSTUM = 0.12  # of the cameras' median distance from the animal


class Newest:
    """A thread that does what was asked for last, of each kind of work; what was asked for before is forgotten."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._asked: dict[str, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self._busy = self._stopped = False
        self._thread = threading.Thread(target=self._work, name="viewer", daemon=True)
        self._thread.start()

    def ask(self, kind: str, work: Callable[[], None]) -> None:
        with self._changed:
            self._asked[kind] = work
            self._changed.notify_all()

    def overtaken(self, *kinds: str) -> bool:
        """Whether work of these kinds has been asked for meanwhile."""
        return any(kind in self._asked for kind in kinds)

    def wait(self, timeout_s: float) -> bool:
        """Until nothing is left to do; False where it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._asked and not self._busy, timeout_s)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._asked or self._stopped)
                if self._stopped:
                    return
                work = self._asked.pop(next(iter(self._asked)))
                self._busy = True
            try:
                work()
            except Exception as error:
                self._failed(error)


class Viewer:
    """A project in the browser, until `stop`.

    Attributes:
        url: of the page.
    """

    def __init__(self, project: str, host: str, port: int, device: str = "auto", run_id: str | None = None) -> None:
        """Raises UserError where there is no project, or the device does not exist."""
        self._project, self._run_id, self._device = project, run_id, device
        self._state = state(project, run_id)
        self._scene = Scene(project, run_id)
        if device != "auto":  # a wrong one is refused at once; the model is loaded when the page is there
            from zoosplat_model.devices import pick_device

            pick_device(device)
        with contextlib.redirect_stdout(io.StringIO()):  # viser's own announcement
            self._server = viser.ViserServer(
                host, port, verbose=False, label=f"zoosplat: {self._scene.experiment.name}"
            )
        self.url = f"http://{'localhost' if host == '0.0.0.0' else host}:{self._server.get_port()}"
        self._stopping, self._playing = threading.Event(), threading.Event()
        # Any page in the same browser can send viser this request, which shows everything to the internet.
        self._server.request_share_url = lambda verbose=True: None  # type: ignore[method-assign]
        self._shown: tuple[Scene, int] | None = None
        self._aimed = False
        self._worker = Newest(self._failed)
        self._add_controls()
        self._worker.ask("start", self._start)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._play, self._watch)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
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
            # With the hull's points on top, Gaussians could not be seen.
            shown = {name: gui.add_checkbox(name, name != "hull" or not self._scene.has_model) for name in LAYERS}
        with gui.add_folder("The model's own picture"):
            self._snap = gui.add_button("Render from here", icon=viser.Icon.CAMERA)
            self._snapshot = gui.add_image(_blank(8, 8), format="png", visible=False)
        self._panels = [gui.add_panel(), gui.add_panel()]
        with self._panels[0].add_tab("Comparison"):
            self._view = gui.add_dropdown("camera", ["-"])
            self._comparison = gui.add_image(_blank(320, 968), label="photograph, render, difference", format="png")
        with self._panels[1].add_tab("Map"):
            self._map, self._marker = gui.add_html(""), gui.add_html("")
        self._panels[0].float(x=12, y=-12, width=560)
        self._panels[1].float(x=12, y=12, width=240)
        for panel in self._panels:
            panel.visible = False
        self._layers = {
            name: self._server.scene.add_frame(f"/{name}", show_axes=False, visible=box.value)
            for name, box in shown.items()
        }

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
                self._worker.ask("snapshot", lambda: self._take_snapshot(camera))

        for name, box in shown.items():

            def show(_: object, name: str = name, box: viser.GuiCheckboxHandle = box) -> None:
                self._layers[name].visible = box.value
                self._redraw()  # what is not drawn is not computed

            box.on_update(show)

    def _redraw(self) -> None:
        t = int(self._frame.value)
        self._worker.ask("frame", lambda: self._draw(t))

    def _go_to(self, t: int) -> None:
        """Put the timeline there, which draws the frame where it is another one."""
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
            if self._playing.is_set() and self._worker.wait(1.0) and self._scene.n_frames:
                due = time.monotonic() + 1 / self._rate.value
                self._go_to((int(self._frame.value) + 1) % self._scene.n_frames)

    def _watch(self) -> None:
        failing = False
        while not self._stopping.wait(LOOK_S):
            try:
                now = state(self._project, self._run_id)
            except Exception as error:  # such as a server that is being restarted
                self._failed(error)
                failing = True
                continue
            if failing or now != self._state:
                self._state, failing = now, False
                self._worker.ask("open", self._open)

    def _failed(self, error: Exception) -> None:
        """Say so on the page, and go on: it may come right with the next frame or checkpoint."""
        if not isinstance(error, UserError):
            traceback.print_exception(error, file=sys.stderr)
        self._about.content = f"**{error}**" if isinstance(error, UserError) else f"**{type(error).__name__}: {error}**"

    # -- drawing ------------------------------------------------------------------------------------------------
    def _start(self) -> None:
        """Everything but the model, whose libraries alone take seconds to load; then that."""

        def load() -> None:
            self._scene.load_model(self._device)
            self._fill()

        self._fill()
        if self._scene.has_model:
            self._worker.ask("model", load)

    def _open(self) -> None:
        """The project as it is now; until it is loaded, the page shows it as it was."""
        scene = Scene(self._project, self._run_id)
        scene.load_model(self._device)
        self._scene = scene
        self._fill()

    def _fill(self) -> None:
        """What stays from frame to frame."""
        scene, server = self._scene, self._server
        self._shown = None
        with server.atomic():
            for name in FILLED:
                server.scene.remove_by_name(name)
            names = [_title(camera) for camera in _held_out_first(scene.cameras)]
            if names and names != list(self._view.options):
                self._view.options = names
            self._panels[0].visible = self._snap.visible = scene.predictor is not None
            self._panels[1].visible = scene.embedding is not None
            if scene.embedding is not None:
                self._unit = embedding_map.unit_places(scene.embedding)
                self._map.content = embedding_map.html(self._unit, TIMELINE)
            if scene.cameras:
                self._draw_cameras()
            if scene.centers is not None:
                path = np.stack([scene.centers[:-1], scene.centers[1:]], 1)
                thin: dict[str, Any] = {"thickness": 1.0, "thickness_units": "screen"}
                if len(path):
                    server.scene.add_line_segments("/trail/whole", path.astype(np.float32), (170, 170, 170), **thin)
                reach = _reach(scene)
                middle = (float(scene.centers[:, 0].mean()), float(scene.centers[:, 1].mean()), scene.floor_m)
                server.scene.add_grid(
                    "/ground", 2 * reach, 2 * reach, cell_size=reach / 10, section_size=reach / 2, position=middle
                )
            self._frame.max = max(1, scene.n_frames - 1)
            self._go_to(min(int(self._frame.value), max(0, scene.n_frames - 1)))
        self._redraw()

    def _draw_cameras(self) -> None:
        scene, add = self._scene, self._server.scene
        reach = _reach(scene)
        look_at = scene.centers.mean(axis=0) if scene.centers is not None else np.zeros(3)
        self._frusta = []
        for i, camera in enumerate(scene.cameras):
            frustum = add.add_camera_frustum(
                f"/cameras/{i}",
                camera.fov_rad,
                camera.aspect,
                scale=FRUSTUM * reach,
                thickness=1.5,
                thickness_units="screen",
                color=HELD_OUT if camera.held_out else OBSERVED,
                image=_blank(8, 8),
                format="jpeg",
                jpeg_quality=85,
                wxyz=transforms.SO3.from_matrix(camera.to_world).wxyz,
                position=camera.position,
                cast_shadow=False,
                receive_shadow=False,
            )
            self._frusta.append(frustum)

            def look_through(event: viser.SceneNodePointerEvent[Any], camera: Camera = camera) -> None:
                view = event.client.camera
                with event.client.atomic():
                    view.wxyz, view.position = transforms.SO3.from_matrix(camera.to_world).wxyz, camera.position
                    view.fov = camera.fov_rad

            frustum.on_click(look_through)
        eye = look_at + np.array([-0.55, -0.55, 0.4]) * reach
        first = self._server.initial_camera
        first.position, first.look_at, first.near = eye, look_at, 0.01 * reach
        if not self._aimed:
            for client in self._server.get_clients().values():  # who has opened the page before there was anything
                client.camera.position, client.camera.look_at = eye, look_at
            self._aimed = True

    def _draw(self, t: int) -> None:
        """Frame t, what is quick first; given up where another has been asked for."""
        if not 0 <= t < self._scene.n_frames:
            self._about.content = self._words(0)
            return
        for _ in self._steps(t):
            if self._worker.overtaken("frame", "open"):
                return

    def _steps(self, t: int) -> Iterator[None]:
        scene, server, layers = self._scene, self._server, self._layers
        new = self._shown != (scene, t)
        self._shown = None
        if new:
            with server.atomic():
                self._about.content = self._words(t)
                if scene.embedding is not None:
                    self._marker.content = embedding_map.marker(self._unit, t)
                if scene.centers is not None:
                    self._draw_trail(t)
                for frustum, picture in zip(self._frusta, scene.pictures(t), strict=True):
                    frustum.image = picture
            yield
        if not scene.has_hull(t):
            self._hide("/hull/points")
        elif layers["hull"].visible:
            with server.atomic():
                self._draw_hull(t)
            yield
        if not scene.has_gaussians(t):
            self._hide("/gaussians/splats")
            self._comparison.image = _blank(320, 968)
        else:
            if layers["gaussians"].visible:
                with server.atomic():
                    self._draw_splats(t)
                yield
            names = [_title(camera) for camera in scene.cameras]
            self._comparison.image = scene.comparison(t, names.index(self._view.value))
        server.flush()
        self._shown = scene, t

    def _draw_trail(self, t: int) -> None:
        scene = self._scene
        assert scene.centers is not None
        assert scene.angles is not None
        first = int(np.searchsorted(scene.times_s, scene.times_s[t] - TRAIL_S))
        recent, size = scene.centers[first : t + 1], 0.2 * _reach(scene)
        nose = scene.centers[t] + size * np.array([math.cos(scene.angles[t]), math.sin(scene.angles[t]), 0])
        behind = np.stack([recent[:-1], recent[1:]], 1).astype(np.float32)
        ahead = np.stack([scene.centers[t], nose])[None].astype(np.float32)
        add, get = self._server.scene, self._server.scene.get_handle_by_name
        # Nodes are changed, not made again: in the browser that is quicker, and they do not flicker.
        path, arrow = get("/trail/recent"), get("/trail/heading")
        if isinstance(path, viser.LineSegmentsHandle) and isinstance(arrow, viser.ArrowsHandle):
            path.visible = len(behind) > 0
            if len(behind):
                path.points = behind
            arrow.points = ahead
        else:
            some = behind if len(behind) else ahead
            add.add_line_segments(
                "/trail/recent", some, TRAIL, thickness=4.0, thickness_units="screen", visible=len(behind) > 0
            )
            radii: dict[str, Any] = {"shaft_radius": 0.015, "head_radius": 0.04, "head_length": 0.12}
            add.add_arrows("/trail/heading", ahead, TRAIL, **{key: size * part for key, part in radii.items()})

    def _draw_hull(self, t: int) -> None:
        scene = self._scene
        assert scene.centers is not None
        assert scene.angles is not None
        hull, turn = scene.hull(t), transforms.SO3.from_z_radians(float(scene.angles[t])).wxyz
        handle = self._server.scene.get_handle_by_name("/hull/points")
        if isinstance(handle, viser.PointCloudHandle):
            handle.points, handle.wxyz, handle.position = hull.points, turn, scene.centers[t]
            handle.visible = True
        else:
            self._server.scene.add_point_cloud(
                "/hull/points",
                hull.points,
                HULL,
                point_size=0.6 * hull.voxel_m,
                precision="float32",
                wxyz=turn,
                position=scene.centers[t],
            )

    def _draw_splats(self, t: int) -> None:
        splats = self._scene.splats(t)
        handle = self._server.scene.get_handle_by_name("/gaussians/splats")
        held = len(handle.centers) if isinstance(handle, viser.GaussianSplatHandle) else 0
        # viser's page never frees the buffers of another number of Gaussians: invisible ones fill them up.
        missing = max(held, -(-len(splats.means) // SPLATS_STEP) * SPLATS_STEP) - len(splats.means)
        values = [
            np.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1))
            for v in (splats.means, splats.covariances, splats.colors, splats.opacities)
        ]
        if isinstance(handle, viser.GaussianSplatHandle):
            handle.set_gaussians(*values)
            handle.position = splats.origin
            handle.visible = True
        else:
            self._server.scene.add_gaussian_splats(
                "/gaussians/splats", *values, scale=splats.voxel_m, position=splats.origin
            )

    def _hide(self, name: str) -> None:
        node = self._server.scene.get_handle_by_name(name)
        if node is not None:
            node.visible = False

    def _take_snapshot(self, camera: viser.CameraHandle) -> None:
        t = int(self._frame.value)
        if self._scene.has_gaussians(t):
            width = max(1, round(SNAPSHOT_HEIGHT * min(camera.aspect, 2.0)))
            to_world = transforms.SO3(camera.wxyz).as_matrix().astype(float)
            self._snapshot.image = self._scene.from_anywhere(
                t, camera.position, to_world, camera.fov, width, SNAPSHOT_HEIGHT
            )
            self._snapshot.visible = True

    def _words(self, t: int) -> str:
        """What is shown, and what is not there yet."""
        scene, words = self._scene, []
        if not scene.n_frames:
            words.append("Nothing to show yet: stage ingest has not finished. This page fills by itself.")
        else:
            words.append(f"frame {scene.video_frames[t]} of the video, {scene.times_s[t]:.2f} s")
            if scene.valid is not None and not scene.valid[t]:
                words.append("no visual hull in this frame")
            if scene.predictor is not None:
                state = ", still training" if scene.training else ""
                words.append(f"model after {scene.predictor.step} steps{state}")
            elif not scene.has_model:
                words.append("no model yet; it is shown from its first checkpoint on")
            elif not scene.notes:
                words.append("loading the model ...")
        return "  \n".join([*words, *(f"**{note}**" for note in scene.notes)])


def _reach(scene: Scene) -> float:
    """Median distance of the cameras from the middle of the animal's path, metres."""
    middle = scene.centers.mean(axis=0) if scene.centers is not None else np.zeros(3)
    return float(np.median([np.linalg.norm(camera.position - middle) for camera in scene.cameras]))


def _held_out_first(cameras: list[Camera]) -> list[Camera]:
    return sorted(cameras, key=lambda camera: not camera.held_out)


def _title(camera: Camera) -> str:
    return f"{camera.name} (held out)" if camera.held_out else camera.name


def _blank(height: int, width: int) -> Any:
    return np.full((height, width, 3), 255, np.uint8)


def serve(project: str, host: str, port: int, device: str, run_id: str | None = None) -> None:
    """Until it is interrupted. Raises UserError where there is no project, or the device does not exist."""
    viewer = Viewer(project, host, port, device, run_id)
    print(f"{viewer.url}  (Ctrl-C ends)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    viewer.stop()
