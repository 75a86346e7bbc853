"""Draws a project in viser's 3D scene: cameras, path, hull and Gaussians."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import viser
from viser import transforms

from zoosplat.formats import media
from zoosplat_flows.viewer.camera_frustum import CameraFrustum
from zoosplat_flows.viewer.project_data import ProjectData

LAYERS = ("gaussians", "hull", "trail", "cameras")  # parts of the scene that the user shows and hides
# Nodes that stay from frame to frame, or are changed with each frame. They are removed when another run is shown.
NODES = ("/ground", "/trail/whole", "/trail/recent", "/trail/heading", "/hull/points", "/gaussians/splats")
OBSERVED, HELD_OUT = (60, 60, 60), (214, 51, 108)  # colours of cameras, RGB
PATH, TRAIL, HULL = (170, 170, 170), (25, 113, 194), (120, 160, 200)  # colours of these, RGB
TRAIL_S = 2.0  # seconds of the path behind the animal that are drawn thick
FRUSTUM = 0.12  # size of the cameras, over their median distance from the animal
ARROW = 0.2  # length of the arrow along the heading, over the same distance
SPLATS_STEP = 2048  # the number of Gaussians that the browser holds is a multiple of this


class SceneDrawer:
    """Draws into the scene of a server.

    Attributes:
        layers: handle of each layer, whose `visible` shows or hides it.
    """

    def __init__(self, server: viser.ViserServer, visible: dict[str, bool]) -> None:
        """Add the layers; `visible` says of each whether it is shown at first."""
        self._server, self._scene = server, server.scene
        self.layers = {
            name: self._scene.add_frame(f"/{name}", show_axes=False, visible=shown) for name, shown in visible.items()
        }
        self._frusta: list[viser.CameraFrustumHandle] = []
        self._has_aimed = False

    def clear(self) -> None:
        """Remove everything that is not a camera; cameras are replaced by `draw_cameras`."""
        for name in NODES:
            self._scene.remove_by_name(name)

    def draw_cameras(self, data: ProjectData) -> None:
        """Draw the cameras, and look at the animal the first time. A click on a camera looks through it."""
        distance_m = median_distance_m(data)
        look_at = data.centers.mean(axis=0) if data.centers is not None else np.zeros(3)
        self._frusta = []
        for i, camera in enumerate(data.cameras):
            frustum = self._scene.add_camera_frustum(
                f"/cameras/{i}",
                camera.fov_rad,
                camera.aspect,
                scale=FRUSTUM * distance_m,
                thickness=1.5,
                thickness_units="screen",
                color=HELD_OUT if camera.held_out else OBSERVED,
                image=blank_picture(8, 8),
                format="jpeg",
                jpeg_quality=85,
                wxyz=transforms.SO3.from_matrix(camera.to_world).wxyz,
                position=camera.position,
                cast_shadow=False,
                receive_shadow=False,
            )
            self._frusta.append(frustum)

            def look_through(event: viser.SceneNodePointerEvent[Any], camera: CameraFrustum = camera) -> None:
                view = event.client.camera
                with event.client.atomic():
                    view.wxyz, view.position = transforms.SO3.from_matrix(camera.to_world).wxyz, camera.position
                    view.fov = camera.fov_rad

            frustum.on_click(look_through)
        eye = look_at + np.array([-0.55, -0.55, 0.4]) * distance_m
        first = self._server.initial_camera
        first.position, first.look_at, first.near = eye, look_at, 0.01 * distance_m
        if not self._has_aimed:
            # Clients that have opened the page before there was anything to see.
            for client in self._server.get_clients().values():
                client.camera.position, client.camera.look_at = eye, look_at
            self._has_aimed = True

    def draw_pictures(self, pictures: list[media.Picture]) -> None:
        """Put a picture into the frustum of each camera."""
        for frustum, picture in zip(self._frusta, pictures, strict=True):
            frustum.image = picture

    def draw_path(self, data: ProjectData) -> None:
        """Draw the ground and the whole path of an animal that has been tracked."""
        assert data.centers is not None
        path = np.stack([data.centers[:-1], data.centers[1:]], 1)
        if len(path):
            self._scene.add_line_segments(
                "/trail/whole", path.astype(np.float32), PATH, thickness=1.0, thickness_units="screen"
            )
        distance_m = median_distance_m(data)
        middle = (float(data.centers[:, 0].mean()), float(data.centers[:, 1].mean()), data.floor_m)
        self._scene.add_grid(
            "/ground",
            2 * distance_m,
            2 * distance_m,
            cell_size=distance_m / 10,
            section_size=distance_m / 2,
            position=middle,
        )

    def draw_trail(self, data: ProjectData, t: int) -> None:
        """Draw the last seconds of the path before frame t, and an arrow along the heading."""
        assert data.centers is not None
        assert data.angles is not None
        first = int(np.searchsorted(data.times_s, data.times_s[t] - TRAIL_S))
        recent, length_m = data.centers[first : t + 1], ARROW * median_distance_m(data)
        nose = data.centers[t] + length_m * np.array([math.cos(data.angles[t]), math.sin(data.angles[t]), 0])
        behind = np.stack([recent[:-1], recent[1:]], 1).astype(np.float32)
        ahead = np.stack([data.centers[t], nose])[None].astype(np.float32)
        get = self._scene.get_handle_by_name
        # Nodes are changed rather than made again: that is quicker in the browser, and they do not flicker.
        path, arrow = get("/trail/recent"), get("/trail/heading")
        if isinstance(path, viser.LineSegmentsHandle) and isinstance(arrow, viser.ArrowsHandle):
            path.visible = len(behind) > 0
            if len(behind):
                path.points = behind
            arrow.points = ahead
        else:
            points = behind if len(behind) else ahead
            self._scene.add_line_segments(
                "/trail/recent", points, TRAIL, thickness=4.0, thickness_units="screen", visible=len(behind) > 0
            )
            sizes: dict[str, Any] = {"shaft_radius": 0.015, "head_radius": 0.04, "head_length": 0.12}
            self._scene.add_arrows(
                "/trail/heading", ahead, TRAIL, **{key: length_m * part for key, part in sizes.items()}
            )

    def draw_hull(self, data: ProjectData, t: int) -> None:
        """Draw the visual hull of a frame that has one."""
        assert data.centers is not None
        assert data.angles is not None
        hull, turn = data.hull(t), transforms.SO3.from_z_radians(float(data.angles[t])).wxyz
        handle = self._scene.get_handle_by_name("/hull/points")
        if isinstance(handle, viser.PointCloudHandle):
            handle.points, handle.wxyz, handle.position = hull.points, turn, data.centers[t]
            handle.visible = True
        else:
            self._scene.add_point_cloud(
                "/hull/points",
                hull.points,
                HULL,
                point_size=0.6 * hull.voxel_m,
                precision="float32",
                wxyz=turn,
                position=data.centers[t],
            )

    def hide_hull(self) -> None:
        """Hide the hull, in a frame that has none."""
        self._hide("/hull/points")

    def draw_gaussians(self, data: ProjectData, t: int) -> None:
        """Draw the Gaussians of a frame that has them."""
        splats = data.splats(t)
        handle = self._scene.get_handle_by_name("/gaussians/splats")
        held = len(handle.centers) if isinstance(handle, viser.GaussianSplatHandle) else 0
        # viser's page never frees the buffers of another number of Gaussians. So invisible ones keep the number.
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
            self._scene.add_gaussian_splats("/gaussians/splats", *values, scale=splats.voxel_m, position=splats.origin)

    def hide_gaussians(self) -> None:
        """Hide the Gaussians, in a frame that has none."""
        self._hide("/gaussians/splats")

    def _hide(self, name: str) -> None:
        node = self._scene.get_handle_by_name(name)
        if node is not None:
            node.visible = False


def median_distance_m(data: ProjectData) -> float:
    """Median distance of the cameras from the middle of the animal's path, metres."""
    middle = data.centers.mean(axis=0) if data.centers is not None else np.zeros(3)
    return float(np.median([np.linalg.norm(camera.position - middle) for camera in data.cameras]))


def blank_picture(height: int, width: int) -> media.Picture:
    """A white picture [height, width, 3]."""
    return np.full((height, width, 3), 255, np.uint8)
