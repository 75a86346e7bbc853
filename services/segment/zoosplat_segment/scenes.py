"""Random scenes with a random animal: what a network that has to find any animal is trained on.

A scene is seen by V cameras. In each, a random background is the plate, and the frame is the same background in other
light, with the animal, its shadow on the floor, its reflections, and what else moves: cables, arms, droppings, things
that were pushed. Nothing here is a photograph; the ranges below are wide enough for real rooms, cages and glass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoosplat_segment.sprites import Sprites

SIZE = 256  # pixels; edge of a training picture
LARGE, SMALL = (0.5, 1.3), (0.14, 0.5)  # scales of a sprite, as in a window round the animal and in a whole frame
LARGE_SHARE = 0.65  # share of the scenes with a large animal


@dataclass(frozen=True)
class SceneBatch:
    """B scenes in V views, square pictures of `SIZE` pixels.

    Attributes:
        frame, plate: [B, V, 3, s, s] 0 to 1.
        noise: [B, V] standard deviation of frame minus plate where nothing happened.
        target: [B, V, s, s] share of each pixel that the animal covers and nothing hides.
        intrinsics: [B, V, 3, 3] pixels of these pictures.
        world_to_camera: [B, V, 4, 4] metres.
        center: [B, 3] metres; middle of the animal.
        reach: [B] metres; half the edge of a cube that holds it.
    """

    frame: Tensor
    plate: Tensor
    noise: Tensor
    target: Tensor
    intrinsics: Tensor
    world_to_camera: Tensor
    center: Tensor
    reach: Tensor


class SceneComposer:
    """Draws scenes with the animals of a set of sprites, all on one device."""

    def __init__(self, sprites: Sprites, device: torch.device, seed: int) -> None:
        self.device = device
        self.rgba = torch.from_numpy(sprites.rgba).to(device)
        self.intrinsics, self.poses, self.points = (
            torch.as_tensor(v, dtype=torch.float32, device=device)
            for v in (sprites.intrinsics, sprites.world_to_camera, sprites.points)
        )
        self.random = torch.Generator(device).manual_seed(seed)
        y, x = torch.meshgrid(*[torch.arange(SIZE, device=device, dtype=torch.float32)] * 2, indexing="ij")
        self.x, self.y = x, y

    # -- random numbers -------------------------------------------------------------------------------------------
    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.random, device=self.device)

    def _log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.exp(self._uniform(float(torch.tensor(low).log()), float(torch.tensor(high).log()), *shape))

    def _chance(self, probability: float, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.random, device=self.device) < probability).float()

    def _field(self, n: int, channels: int, coarsest: int, octaves: int, falloff: Tensor) -> Tensor:
        """[n, channels, s, s] fractal noise of about unit amplitude; `falloff` [n] is the ratio between octaves."""
        out = torch.zeros(n, channels, SIZE, SIZE, device=self.device)
        amplitude, total = torch.ones(n, device=self.device), torch.zeros(n, device=self.device)
        for octave in range(octaves):
            cells = min(coarsest << octave, SIZE)
            grid = torch.randn(n, channels, cells, cells, generator=self.random, device=self.device)
            mode = "bicubic" if cells < SIZE else "nearest"
            grown = F.interpolate(grid, size=SIZE, mode=mode, **({} if cells == SIZE else {"align_corners": False}))
            out += amplitude.view(-1, 1, 1, 1) * grown
            total += amplitude**2
            amplitude = amplitude * falloff
        return out / total.sqrt().view(-1, 1, 1, 1)

    # -- shapes ---------------------------------------------------------------------------------------------------
    def _capsule(self, a: Tensor, b: Tensor, radius: Tensor, soft: Tensor) -> Tensor:
        """[n, s, s] coverage of capsules from a [n, 2] to b [n, 2], `radius` [n], edges `soft` [n] pixels wide."""
        d = b - a
        length = (d * d).sum(-1).clamp_min(1e-3)
        px, py = self.x - a[:, 0, None, None], self.y - a[:, 1, None, None]
        t = ((px * d[:, 0, None, None] + py * d[:, 1, None, None]) / length[:, None, None]).clamp(0, 1)
        distance = torch.hypot(px - t * d[:, 0, None, None], py - t * d[:, 1, None, None])
        return ((radius[:, None, None] - distance) / soft[:, None, None] + 0.5).clamp(0, 1)

    def _paint(self, canvas: Tensor, coverage: Tensor, colour: Tensor, on: Tensor) -> Tensor:
        """Canvas [n, 3, s, s] with a colour [n, 3] or [n, 3, s, s] where coverage [n, s, s] is, if `on` [n]."""
        alpha = (coverage * on[:, None, None])[:, None]
        colour = colour[..., None, None] if colour.ndim == 2 else colour
        return canvas * (1 - alpha) + alpha * colour

    def _spots(self, canvas: Tensor, count: int, probability: float, largest: float) -> Tensor:
        n = len(canvas)
        for _ in range(count):
            place = self._uniform(-20, SIZE + 20, n, 2)
            end = place + self._uniform(-1, 1, n, 2) * self._log_uniform(1, largest, n, 1)
            radius, soft = self._log_uniform(0.7, largest, n), self._log_uniform(0.7, 6, n)
            coverage = self._capsule(place, end, radius, soft) * self._uniform(0.3, 1, n, 1, 1)
            canvas = self._paint(canvas, coverage, self._colour(n), self._chance(probability, n))
        return canvas

    def _colour(self, n: int) -> Tensor:
        """[n, 3] colours, from black to white, mostly little saturated."""
        grey = self._uniform(0, 1, n, 1) ** self._log_uniform(0.6, 2, n, 1)
        tint = torch.randn(n, 3, generator=self.random, device=self.device) * self._log_uniform(0.005, 0.25, n, 1)
        return (grey + tint).clamp(0, 1)

    # -- the parts of a scene -------------------------------------------------------------------------------------
    def _background(self, n: int) -> Tensor:
        """[n, 3, s, s] empty rooms, cages and tables."""
        canvas = self._colour(n)[..., None, None].expand(n, 3, SIZE, SIZE)
        amplitude = self._log_uniform(0.01, 0.2, n, 1, 1, 1)
        canvas = canvas + amplitude * self._field(n, 1, 2, 4, self._uniform(0.4, 0.9, n))
        canvas = canvas + 0.2 * amplitude * self._field(n, 3, 2, 3, self._uniform(0.4, 0.9, n))
        for _ in range(3):  # walls, floors and table tops
            angle, offset = self._uniform(-3.1416, 3.1416, n), self._uniform(-120, 120, n)
            side = (self.x - SIZE / 2) * angle.cos().view(-1, 1, 1) + (self.y - SIZE / 2) * angle.sin().view(-1, 1, 1)
            coverage = ((side - offset.view(-1, 1, 1)) / self._log_uniform(0.7, 40, n, 1, 1) + 0.5).clamp(0, 1)
            texture = self._colour(n)[..., None, None] + self._log_uniform(0.004, 0.15, n, 1, 1, 1) * self._field(
                n, 1, 8, 5, self._uniform(0.5, 1.1, n)
            )
            canvas = self._paint(canvas, coverage, texture, self._chance(0.5, n))
        centre, edge = self._uniform(0, SIZE, n, 2), self._uniform(40, 260, n)
        squash = self._uniform(0.2, 1, n).view(-1, 1, 1)
        ring = torch.hypot(self.x - centre[:, 0, None, None], (self.y - centre[:, 1, None, None]) / squash)
        inside = ((edge.view(-1, 1, 1) - ring) / self._log_uniform(1, 10, n, 1, 1)).clamp(0, 1)
        canvas = self._paint(canvas, inside, self._colour(n), self._chance(0.35, n))
        for _ in range(6):  # posts, edges, cables that hang still
            a, b = self._uniform(-60, SIZE + 60, n, 2), self._uniform(-60, SIZE + 60, n, 2)
            upright = self._chance(0.5, n, 1)
            b = torch.cat([torch.where(upright > 0, a[:, :1] + 0.05 * b[:, :1], b[:, :1]), b[:, 1:]], 1)
            coverage = self._capsule(a, b, self._log_uniform(0.6, 14, n), self._log_uniform(0.8, 8, n))
            canvas = self._paint(canvas, coverage, self._colour(n), self._chance(0.4, n))
        period, angle = self._log_uniform(5, 60, n, 1, 1), self._uniform(-3.1416, 3.1416, n, 1, 1)
        phase = (self.x * angle.cos() + self.y * angle.sin()) / period
        bars = ((phase - phase.floor() - 0.5).abs() < self._uniform(0.04, 0.25, n, 1, 1)).float()
        canvas = self._paint(canvas, bars * self._uniform(0.1, 0.9, n, 1, 1), self._colour(n), self._chance(0.12, n))
        canvas = self._spots(canvas, 8, 0.3, 8.0)
        grain = self._field(n, 1, 64, 3, torch.ones(n, device=self.device))  # bedding
        canvas = canvas + self._chance(0.4, n, 1, 1, 1) * self._log_uniform(0.005, 0.08, n, 1, 1, 1) * grain
        return self._blur_some(canvas.clamp(0, 1), 0.4, 3.0)

    def _blur_some(self, canvas: Tensor, probability: float, largest: float) -> Tensor:
        """Blur some of the pictures by Gaussians."""
        n, radius = len(canvas), 6
        sigma = self._log_uniform(0.5, largest, n, 1) * self._chance(probability, n, 1) + 1e-3
        steps = torch.arange(-radius, radius + 1, device=self.device, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(canvas.shape[1], 0)
        flat = canvas.reshape(1, -1, *canvas.shape[2:])
        flat = F.conv2d(
            F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel[:, None, None], groups=len(kernel)
        )
        flat = F.conv2d(
            F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel[:, None, :, None], groups=len(kernel)
        )
        return flat.reshape(canvas.shape)

    def _place(self, animals: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sprites of animals [B] in `views` views, scaled and shifted: RGBA [B, V, 4, s, s], intrinsics, poses."""
        n_views = self.rgba.shape[1]
        chosen = torch.stack(
            [torch.randperm(n_views, generator=self.random, device=self.device)[:views] for _ in animals]
        )
        pick = animals[:, None].expand_as(chosen)
        rgba = self.rgba[pick, chosen].flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        intrinsics, poses = self.intrinsics[pick, chosen].clone(), self.poses[pick, chosen]
        n = len(rgba)
        height, width = rgba.shape[2:]
        large, count = self._chance(LARGE_SHARE, len(animals), 1), len(animals)
        scale = large * self._log_uniform(*LARGE, count, 1) + (1 - large) * self._log_uniform(*SMALL, count, 1)
        scale = (scale * self._uniform(0.85, 1.15, count, views)).flatten()
        half = 70 * scale  # about half the animal's length in pixels
        room = (SIZE / 2 - half).clamp_min(20)
        shift = SIZE / 2 + room[:, None] * self._uniform(-1, 1, n, 2)
        # Pixel (x, y) of the picture shows pixel (x - shift) / scale + middle of the sprite.
        gx = ((self.x - shift[:, 0, None, None]) / scale[:, None, None]) * 2 / width
        gy = ((self.y - shift[:, 1, None, None]) / scale[:, None, None]) * 2 / height
        # A small sprite is averaged before it is sampled.
        levels = [rgba, F.avg_pool2d(rgba, 2), F.avg_pool2d(rgba, 4)]
        grid = torch.stack([gx, gy], -1)
        sampled = [F.grid_sample(level, grid, padding_mode="zeros", align_corners=False) for level in levels]
        level = (-torch.log2(scale)).clamp(0, 2).view(-1, 1, 1, 1)
        lower = torch.where(level < 1, sampled[0], sampled[1])
        upper = torch.where(level < 1, sampled[1], sampled[2])
        mixed = lower + (level - level.floor().clamp_max(1)) * (upper - lower)
        intrinsics[..., 0, 0] *= scale.view(-1, views)
        intrinsics[..., 1, 1] *= scale.view(-1, views)
        middle = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=self.device)
        k_middle = intrinsics[..., :2, 2] - middle
        intrinsics[..., :2, 2] = k_middle * scale.view(-1, views, 1) + shift.view(-1, views, 2)
        return mixed.view(-1, views, 4, SIZE, SIZE), intrinsics, poses

    def _recolour(self, rgba: Tensor, background: Tensor) -> Tensor:
        """The animals in other coats and light, some of them nearly in the colour of the background."""
        b, v = rgba.shape[:2]
        alpha = rgba[:, :, 3:]
        colour = rgba[:, :, :3] / alpha.clamp_min(1e-3)
        colour = colour.clamp(0, 1) ** self._log_uniform(0.5, 2, b, 1, 1, 1, 1)
        gain = self._log_uniform(0.12, 1.3, b, 1, 1, 1, 1) * self._log_uniform(0.8, 1.25, b, v, 1, 1, 1)
        tint = torch.exp(0.12 * torch.randn(b, 1, 3, 1, 1, generator=self.random, device=self.device))
        fur = self._field(b * v, 1, 32, 4, torch.full((b * v,), 0.9, device=self.device)).view(b, v, 1, SIZE, SIZE)
        fur = 1 + self._log_uniform(0.01, 0.25, b, 1, 1, 1, 1) * fur
        flip = self._chance(0.15, b, 1, 1, 1, 1)  # light bellies become dark
        colour = colour * (1 - flip) + (0.9 - 0.8 * colour) * flip
        colour = (colour * gain * tint * fur).clamp(0, 1)
        weight = alpha.sum((-1, -2), keepdim=True).clamp_min(1)
        behind = (background * alpha).sum((-1, -2), keepdim=True) / weight
        mean = (colour * alpha).sum((-1, -2), keepdim=True) / weight
        nearness = self._chance(0.25, b, 1, 1, 1, 1) * self._uniform(0.3, 0.9, b, 1, 1, 1, 1)
        shifted = behind + (colour - mean) * (1 - 0.6 * nearness) + (mean - behind) * (1 - nearness)
        colour = torch.where(nearness > 0, shifted, colour).clamp(0, 1)
        return torch.cat([colour * alpha, alpha], 2)

    def _shadow(self, animals: Tensor, intrinsics: Tensor, poses: Tensor) -> Tensor:
        """[B, V, s, s] how dark the floor is where the animal shades it, from 0 to 1, alike for all views."""
        b, v = intrinsics.shape[:2]
        points = self.points[animals]
        lean = self._uniform(-1.2, 1.2, b, 1, 2)
        floor = torch.cat([points[..., :2] + lean * points[..., 2:], torch.zeros_like(points[..., 2:])], -1)
        seen = torch.einsum("bvij,bpj->bvpi", poses[..., :3, :3], floor) + poses[:, :, None, :3, 3]
        pixels = torch.einsum("bvij,bvpj->bvpi", intrinsics, seen)
        xy = pixels[..., :2] / pixels[..., 2:].clamp_min(1e-3)
        small = SIZE // 2
        cell = ((xy + 0.5) / 2).floor().long()
        good = ((cell >= 0) & (cell < small)).all(-1) & (seen[..., 2] > 0.05)
        index = (cell[..., 1].clamp(0, small - 1) * small + cell[..., 0].clamp(0, small - 1)).view(b * v, -1)
        counts = torch.zeros(b * v, small * small, device=self.device)
        counts.scatter_add_(1, index, good.float().view(b * v, -1))
        dark = F.max_pool2d((counts > 0).float().view(-1, 1, small, small), 3, 1, 1)
        full = F.interpolate(dark, size=SIZE, mode="bilinear", align_corners=False)
        # The lamp is small for one half of the scenes, whose shadows are sharp, and large for the others.
        soft = self._blur_some(self._blur_some(full, 0.5, 6.0), 1.0, 4.0)
        return soft.clamp(0, 1).view(b, v, SIZE, SIZE)

    def _compress(self, pictures: Tensor) -> Tensor:
        """[n, 3, s, s] as a codec leaves them: coefficients of 8 x 8 blocks are quantised, coarsely in colour."""
        n = len(pictures)
        k = torch.arange(8, device=self.device, dtype=torch.float32)
        basis = torch.cos((2 * k[None] + 1) * k[:, None] * torch.pi / 16) * 0.5
        basis[0] *= 0.5**0.5
        luma = (pictures * torch.tensor([0.299, 0.587, 0.114], device=self.device).view(1, 3, 1, 1)).sum(
            1, keepdim=True
        )
        chroma = pictures - luma
        soft = F.interpolate(F.avg_pool2d(chroma, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
        blocks = luma.view(n, SIZE // 8, 8, SIZE // 8, 8).permute(0, 1, 3, 2, 4)
        coded = basis @ blocks @ basis.T
        step = self._log_uniform(0.01, 0.12, n, 1, 1, 1, 1) * (1 + 0.4 * (k[:, None] + k[None]))
        coded = torch.where((k[:, None] + k[None]) == 0, coded, step * torch.round(coded / step))
        plain = (basis.T @ coded @ basis).permute(0, 1, 3, 2, 4).reshape(n, 1, SIZE, SIZE)
        on = self._chance(0.6, n, 1, 1, 1)
        return torch.where(on > 0, plain + soft, pictures)

    @torch.no_grad()
    def compose(self, scenes: int, views: int) -> SceneBatch:
        """Compose scenes of so many views each."""
        n = scenes * views
        animals = torch.randint(len(self.rgba), (scenes,), generator=self.random, device=self.device)
        background = self._background(n)
        grey = self._chance(0.35, scenes, 1, 1, 1, 1)
        rgba, intrinsics, poses = self._place(animals, views)
        room = background.view(scenes, views, 3, SIZE, SIZE)
        rgba = self._recolour(rgba, room)
        colour, alpha = rgba[:, :, :3].flatten(0, 1), rgba[:, :, 3].flatten(0, 1)

        # The frame is the background in other light, with a shadow and reflections.
        frame, plate = background, background
        patches = 1 + self._chance(0.4, n, 1, 1, 1) * 0.06 * self._field(
            n, 1, 2, 2, torch.full((n,), 0.6, device=self.device)
        )
        shade = self._shadow(animals, intrinsics, poses).flatten(0, 1)[:, None]
        depth = (
            (self._chance(0.8, scenes, 1) * self._uniform(0.05, 0.65, scenes, 1)).expand(-1, views).reshape(n, 1, 1, 1)
        )
        frame = frame * patches * (1 - depth * shade)
        contact = F.avg_pool2d(F.max_pool2d(alpha[:, None], 5, 1, 2), 13, 1, 6).roll(3, 2)
        frame = frame * (1 - self._chance(0.5, n, 1, 1, 1) * self._uniform(0, 0.4, n, 1, 1, 1) * contact)
        for dimension in (1, 2):  # in the floor, and in a wall of glass
            both = self._mirror_image(torch.cat([colour, alpha[:, None]], 1), dimension)
            weight = (self._chance(0.2, n) * self._uniform(0.05, 0.55, n)).view(-1, 1, 1, 1)
            frame = frame * (1 - weight * both[:, 3:]) + weight * both[:, :3]

        # What else differs: things that moved, droppings, a ghost of an animal in the plate.
        frame = self._spots(frame, 5, 0.35, 4.0)
        plate = self._spots(plate, 4, 0.3, 5.0)
        other = torch.roll(rgba, 1, 0).flatten(0, 1)
        drift = torch.randint(-90, 90, (2,), generator=self.random, device=self.device).tolist()
        ghost = torch.roll(other, drift, (2, 3)) * self._chance(0.12, n, 1, 1, 1)
        plate = plate * (1 - ghost[:, 3:]) + ghost[:, :3]

        # The animal, blurred where it moves.
        moving = self._blur_some(torch.cat([colour, alpha[:, None]], 1), 0.5, 2.0)
        frame = frame * (1 - moving[:, 3:]) + moving[:, :3]
        target = moving[:, 3]
        frame, target = self._occluders(frame, target)
        soft = self._blur_some(torch.cat([frame, plate, target[:, None]], 1), 0.3, 1.2)
        frame, plate, target = soft[:, :3], soft[:, 3:6], soft[:, 6]

        # The camera: colours, exposure, noise, compression.
        pair = torch.stack([frame, plate], 1).view(scenes, views, 2, 3, SIZE, SIZE)
        tint = torch.exp(0.1 * torch.randn(scenes, views, 1, 3, 1, 1, generator=self.random, device=self.device))
        pair = (pair * tint * self._log_uniform(0.5, 1.4, scenes, views, 1, 1, 1, 1)).clamp(0, 1)
        pair = pair ** self._log_uniform(0.6, 1.5, scenes, views, 1, 1, 1, 1)
        level = pair.mean(3, keepdim=True).expand_as(pair)
        pair = pair * (1 - grey[..., None]) + level * grey[..., None]
        frame, plate = pair[:, :, 0].flatten(0, 1), pair[:, :, 1].flatten(0, 1)
        frame = frame * (1 + 0.03 * torch.randn(n, 1, 1, 1, generator=self.random, device=self.device))
        sigma = self._log_uniform(0.003, 0.05, n)
        grain = torch.randn(n, 3, SIZE, SIZE, generator=self.random, device=self.device)
        grain = torch.where(self._chance(0.5, n, 1, 1, 1) > 0, grain, grain[:, :1])
        grain = self._blur_some(grain, 0.5, 1.0)
        frame = self._compress((frame + sigma.view(-1, 1, 1, 1) * grain).clamp(0, 1)).clamp(0, 1)
        plate = (
            plate + 0.15 * sigma.view(-1, 1, 1, 1) * torch.randn(plate.shape, generator=self.random, device=self.device)
        ).clamp(0, 1)
        noise = sigma * self._log_uniform(0.7, 1.5, n)

        center = self.points[animals].mean(1)
        reach = (self.points[animals] - center[:, None]).abs().amax((1, 2)) * 1.2
        shape = (scenes, views)
        return SceneBatch(
            frame.view(*shape, 3, SIZE, SIZE),
            plate.view(*shape, 3, SIZE, SIZE),
            noise.view(shape),
            target.view(*shape, SIZE, SIZE),
            intrinsics,
            poses,
            center,
            reach,
        )

    def _mirror_image(self, rgba: Tensor, dimension: int) -> Tensor:
        """RGBA [n, 4, s, s] flipped down (1) or sideways (2), which touches what it mirrors or stands beside it."""
        n = len(rgba)
        spans = (rgba[:, 3] > 0.5).any(3 - dimension)
        end = SIZE - 1 - spans.flip(1).float().argmax(1)
        gap = torch.randint(-4, 30, (n,), generator=self.random, device=self.device)
        # Pixel i of the image shows pixel 2 * end + gap - i of the animal.
        index = (2 * end + gap)[:, None] - torch.arange(SIZE, device=self.device)
        index = torch.where((index >= 0) & (index <= end[:, None]), index, -1)
        shape = (n, 1, SIZE, 1) if dimension == 1 else (n, 1, 1, SIZE)
        image = rgba.gather(dimension + 1, index.clamp_min(0).view(shape).expand_as(rgba))
        return self._blur_some(image * (index >= 0).view(shape), 0.6, 3.0)

    def _occluders(self, frame: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cables and arms before and behind the animal; what they hide is not the animal's."""
        n = len(frame)
        for kind in range(3):
            on = self._chance((0.2, 0.12, 0.1)[kind], n)
            before = self._chance(0.5, n)[:, None, None]
            radius = self._log_uniform(0.8, 4, n) if kind < 2 else self._log_uniform(8, 40, n)
            colour, soft = self._colour(n), self._log_uniform(0.8, 3, n)
            place = self._uniform(0, SIZE, n, 2) * torch.tensor([1.0, 0.0], device=self.device) - 5
            heading = self._uniform(0.3, 2.8, n)
            coverage = torch.zeros_like(target)
            for _ in range(6 if kind < 2 else 2):
                length = self._uniform(15, 50, n) * (1 if kind < 2 else 2)
                end = place + length[:, None] * torch.stack([heading.cos(), heading.sin()], 1)
                coverage = torch.maximum(coverage, self._capsule(place, end, radius, soft))
                place, heading = end, heading + self._uniform(-0.5, 0.5, n)
            turns = torch.randint(4, (1,), generator=self.random, device=self.device).item()
            coverage = torch.rot90(coverage, int(turns), (1, 2)) * on[:, None, None]
            visible = coverage * (1 - target * (1 - before))
            texture = colour[..., None, None] * (
                1 + 0.1 * self._field(n, 1, 8, 3, torch.full((n,), 0.7, device=self.device))
            )
            frame = frame * (1 - visible[:, None]) + visible[:, None] * texture.clamp(0, 1)
            target = target * (1 - coverage * before)
        return frame, target
