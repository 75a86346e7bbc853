"""Stage render: model, images.zarr, tracking.zarr, crop.zarr -> renders/."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoosplat.errors import UserError
from zoosplat.formats import media
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage
from zoosplat.storage import objects, urls
from zoosplat_model.carving import project
from zoosplat_model.frames import Frame, FrameReader, open_reader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.gpu_memory import out_of_memory
from zoosplat_model.predictor import Predictor
from zoosplat_model.registry import open_predictor
from zoosplat_model.rotations import rotation_about_z
from zoosplat_render import ops

MIN_SIDE = 384  # pixels that the shorter side of a picture has at least where its size is left open
MAX_PATHS = 300  # Gaussians whose paths are shown at most
PATH_CANDIDATES = 3000  # Gaussians that these are chosen from
FILM_FPS = 25.0  # frames a second of the films: most animals are recorded too fast to be watched at that rate


def _frames(ctx: Context, reader: FrameReader) -> tuple[int, list[int]]:
    """The kept frame to show and those of the film: from it on, or (frame null) from the start of the test split on."""
    wanted, count = ctx.experiment.render.frame, ctx.experiment.render.sequence_frames
    if wanted is None:
        test = reader.split("test")
        if not test:
            raise UserError("render.frame = null: no test frame has a visual hull; give the index of another frame")
        return test[len(test) // 2], test[:count]
    valid = np.flatnonzero(reader.valid)
    if wanted not in valid:
        near = f"nearest: {valid[np.abs(valid - wanted).argmin()]}" if len(valid) else "and no other frame has one"
        what = "has no visual hull" if wanted < reader.n_frames else f"there are {reader.n_frames} kept frames"
        raise UserError(f"render.frame = {wanted}: {what}; {near}")
    return wanted, [int(t) for t in valid[valid >= wanted][:count]]


class RenderStage(Stage):
    """Stills, an orbit, a film and a PLY file of the model."""

    def prepare(self, ctx: Context) -> Plan:
        reader = open_reader(ctx.run, torch.device("cpu"))
        if ctx.experiment.render.camera >= reader.n_cameras:
            raise UserError(f"render.camera = {ctx.experiment.render.camera}: there are {reader.n_cameras} cameras")
        frame, sequence = _frames(ctx, reader)
        steps = 2 + ctx.experiment.render.orbit_frames + len(sequence)
        return Plan((0, steps), {"frame": frame, "sequence": sequence})

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        with torch.no_grad(), out_of_memory(ctx.run, self.name):
            return self._run(ctx, shard, plan)

    def _run(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        settings = ctx.experiment.render
        predictor = open_predictor(ctx.run, settings.device)
        pictures = _PictureMaker(ctx, predictor, total=shard.stop)
        t, sequence = plan.values["frame"], plan.values["sequence"]
        frame = predictor.reader.frame(t)
        gaussians = pictures.gaussians(frame)
        view = pictures.camera_view(frame)
        place = {"t": t, "frame": t * ctx.experiment.ingest.frame_jump}
        camera = {"camera": predictor.reader.camera_names[settings.camera]}
        sphere = ops.bounding_sphere(_numpy(gaussians.means), _numpy(gaussians.opacities))
        offset = {key: getattr(settings, key) for key in ("angle_offset", "delta_x", "delta_y", "delta_z")}
        ply, shown = f"frame_{t:06d}.ply", [sequence[0], sequence[-1]]
        still, moved = pictures.picture(gaussians, view, settings.camera), moved_in_frame(gaussians, frame, **offset)
        outputs: list[tuple[str, bytes, dict[str, Any]]] = [
            ("still_camera.png", media.encode_png(still), {"kind": "still", **place, **camera}),
            ("still_free.png", media.encode_png(pictures.picture(moved, view)), {"kind": "still", **place, **offset}),
            (
                ply,
                ops.to_ply(*map(_numpy, gaussians[:5])),
                {"kind": "gaussians", **place, "count": len(gaussians.means)},
            ),
            (
                "orbit.mp4",
                media.encode_mp4(pictures.orbit(gaussians, frame, *sphere), FILM_FPS),
                {"kind": "film", **place, "fps": FILM_FPS, "pictures": settings.orbit_frames},
            ),
            (
                "sequence.mp4",
                media.encode_mp4(pictures.sequence(sequence), FILM_FPS),
                {
                    "kind": "film",
                    **camera,
                    "fps": FILM_FPS,
                    "pictures": len(sequence),
                    "t": [sequence[0], sequence[-1]],
                },
            ),
        ]
        if (tracks := pictures.tracks(frame, sequence)) is not None:
            about = {"kind": "paths", "t": shown}
            outputs.append(("trajectories.png", media.encode_png(tracks), about))
        for name, data, _ in outputs:
            objects.write_bytes(urls.join(ctx.run.output_url(self.name), name), data)
        index = {
            "view": {"world_to_camera": _numpy(view[0]).tolist(), "intrinsics": _numpy(view[1]).tolist()},
            "width": pictures.width,
            "height": pictures.height,
            "files": [{"file": name, **about} for name, _, about in outputs],
        }
        objects.write_json(urls.join(ctx.run.output_url(self.name), "index.json"), index)
        return Outcome(len(sequence), figures={"frame": t, "gaussians": len(gaussians.means)})


class _PictureMaker:
    """Makes pictures of one size, and reports how many are made."""

    def __init__(self, ctx: Context, predictor: Predictor, total: int) -> None:
        self.settings, self.predictor, self.reader = ctx.experiment.render, predictor, predictor.reader
        enlarged = -(-MIN_SIDE // min(self.reader.full_width, self.reader.full_height))
        self.width = self.settings.width or self.reader.full_width * enlarged
        self.height = self.settings.height or self.reader.full_height * enlarged
        self._progress, self._done, self._total = ctx.progress, 0, total

    def gaussians(self, frame: Frame) -> Gaussians:
        """Gaussians of a frame in the world, fit to be seen from closer than in training."""
        return self.predictor.gaussians(frame.t).with_low_pass(self.reader.pixel_size_m(frame))

    def camera_view(self, frame: Frame, camera: int | None = None) -> tuple[Tensor, Tensor]:
        """World-to-camera [4, 4] and intrinsics [3, 3] of a camera (None: the one to be shown), its window enlarged to
        fill the picture."""
        camera = self.settings.camera if camera is None else camera
        window = (0, 0, self.reader.width, self.reader.height)
        zoom = torch.as_tensor(media.zoom_matrix(window, self.width, self.height)).to(frame.intrinsics)
        return frame.world_to_camera[camera], zoom @ frame.intrinsics[camera]

    def tracks(self, frame: Frame, sequence: list[int]) -> media.Picture | None:
        """The paths of Gaussians during the film, drawn over the photograph of a held-out view.

        A path shows the motion of the body without the walk: it is relative to the animal's centre and heading, and
        placed where the Gaussian is in `frame`, in which it lies on the mask. Returns None where the Gaussians of one
        frame are not those of another.
        """
        times = [frame.t, *sequence]
        paths = self.predictor.tracks(times, PATH_CANDIDATES)
        if paths is None:
            return None
        there = rotation_about_z(frame.angle)
        placed = []
        for t, points in zip(times, paths, strict=True):
            center, angle = self.reader.pose(t)
            placed.append((points - center) @ rotation_about_z(angle) @ there.T + frame.center)
        wanted = [*self.reader.held_out, self.settings.camera, *self.reader.observed]
        camera = next((c for c in wanted if self.reader.seen[frame.t, c]), self.settings.camera)
        pose, intrinsics = self.camera_view(frame, camera)
        x, y, depth = project(torch.cat(placed).T, pose[None], intrinsics[None])
        pixels = torch.stack([x[0], y[0]], -1).masked_fill(depth[0, :, None] <= 0, torch.nan)
        window = (0, 0, self.reader.width, self.reader.height)
        photo, outside = (
            media.zoom(media.to_uint8(picture.cpu().numpy()), window, self.width, self.height)
            for picture in (frame.composite_on_white()[camera], 1 - frame.mask[camera, ..., None].expand(-1, -1, 3))
        )
        found = _numpy(pixels).reshape(len(times), -1, 2)
        kept = ops.on_mask(found[0], outside[..., 0] < 128)[:MAX_PATHS]
        return ops.draw_tracks(media.to_uint8(0.5 + 0.5 * photo / 255), found[1:, kept])

    def picture(self, gaussians: Gaussians, view: tuple[Tensor, Tensor], camera: int | None = None) -> media.Picture:
        """A view, in the colours of one of the cameras or (None) of the average camera."""
        pose, intrinsics = view
        rgb, _ = self.predictor.render(
            gaussians, pose[None], intrinsics[None], self.width, self.height, cameras=[camera]
        )
        self._done += 1
        self._progress(self._done, self._total, "")
        return media.to_uint8(rgb[0].cpu().numpy())

    def orbit(self, gaussians: Gaussians, frame: Frame, center: ops.Values, radius: float) -> Iterator[media.Picture]:
        """One turn round the animal, from as far as the cameras are, beginning in front of it."""
        cameras = _numpy(frame.world_to_camera)
        eyes = -np.einsum("cij,ci->cj", cameras[:, :3, :3], cameras[:, :3, 3])
        distance = float(np.linalg.norm(eyes - center, axis=1).mean())
        count, first = self.settings.orbit_frames, float(frame.angle)
        poses, intrinsics = ops.orbit(center, radius, distance, first, count, self.width, self.height)
        shared = torch.as_tensor(intrinsics).to(gaussians.means)
        for pose in torch.as_tensor(poses).to(gaussians.means):
            yield self.picture(gaussians, (pose, shared))

    def sequence(self, frames: list[int]) -> Iterator[media.Picture]:
        """Photograph and rendering beside each other, frame by frame, both following the window.

        Where the view is absent, white takes the place of the photograph.
        """
        window, camera = (0, 0, self.reader.width, self.reader.height), self.settings.camera
        for frame in self.reader.prefetch(frames):
            truth = media.to_uint8(frame.composite_on_white()[camera].cpu().numpy())
            if not self.reader.seen[frame.t, camera]:
                truth = np.full_like(truth, 255)
            rendering = self.picture(self.gaussians(frame), self.camera_view(frame), camera)
            yield media.side_by_side([media.zoom(truth, window, self.width, self.height), rendering])


def moved_in_frame(
    gaussians: Gaussians, frame: Frame, angle_offset: float, delta_x: float, delta_y: float, delta_z: float
) -> Gaussians:
    """Gaussians in the world, turned about the vertical through the animal's centre and moved along its own axes.

    In the animal's frame (origin at its centre, x along its heading) a point p becomes Rz(angle_offset) p + delta.

    Args:
        gaussians: in the world.
        frame: gives centre and heading.
        angle_offset: radians.
        delta_x: metres, forwards; delta_y to the left, delta_z up.
        delta_y: see delta_x.
        delta_z: see delta_x.
    """
    angle = frame.angle.new_tensor(angle_offset)
    delta = frame.center.new_tensor([delta_x, delta_y, delta_z])
    center = frame.center - rotation_about_z(angle) @ frame.center
    return gaussians.to_world(center + rotation_about_z(frame.angle) @ delta, angle)


def _numpy(values: Tensor) -> ops.Values:
    return values.double().cpu().numpy()


STAGE = RenderStage("render")
