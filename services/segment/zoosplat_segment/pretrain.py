"""Train the network that comes with the package on random scenes: how `masks.safetensors` was made.

    python -m zoosplat_segment.pretrain OUT.safetensors [--animals 1600] [--minutes 6] [--start-from FILE]

In every step the network first segments each view alone. These masks carve a hull, and the hull tells each view what
the others see, as in the stage itself. Then the network is trained on views with and without that prior.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from zoosplat_segment import hull
from zoosplat_segment.network import NO_PRIOR, MaskNetwork, build_network
from zoosplat_segment.scenes import SIZE, SceneBatch, SceneComposer
from zoosplat_segment.sprites import render_many

SCENES, VIEWS = 12, 5  # scenes of a step, and views of a scene
GRID, RAYS, SAMPLES = 48, 64, 64  # voxels along an edge, rays along a picture's edge, places on a ray
LEARNING_RATE = 2e-3  # of AdamW at its highest
AVERAGING = 0.998  # share of the averaged weights that a step keeps
REPORT_STEPS = 200  # steps between the figures that are printed
THIN, THIN_WEIGHT = 21, 4.0  # pixels; neighbourhood by which parts are thin, and what they weigh more
TEST_SCENES = 24  # scenes that are never trained on


def views_alone(model: MaskNetwork, batch: SceneBatch) -> Tensor:
    """[B, V, s, s] masks that each view gives without the others."""
    return predict(model, batch, torch.full_like(batch.target, NO_PRIOR)).float().sigmoid()


def predict(model: MaskNetwork, batch: SceneBatch, prior: Tensor) -> Tensor:
    """[B, V, s, s] logits."""
    flat: Tensor = model(
        batch.frame.flatten(0, 1), batch.plate.flatten(0, 1), batch.noise.flatten(), prior.flatten(0, 1)[:, None]
    )
    return flat.view(batch.target.shape)


@torch.no_grad()
def priors(masks: Tensor, batch: SceneBatch, trusted: Tensor, jitter: Tensor) -> Tensor:
    """What the other views say of each, as the stage computes it.

    Args:
        masks: [B, V, s, s] of the views alone.
        batch: the scenes.
        trusted: [B, V] bool, the views that take part.
        jitter: [B, 3] shift of the cube against the animal, in halves of its edge.

    Returns:
        [B, V, s, s] 0 to 1.
    """
    scenes, views = masks.shape[:2]
    voxels = hull.cube_voxels(GRID, masks.device)
    step = SIZE // RAYS
    line = torch.arange(RAYS, device=masks.device) * step + (step - 1) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    half = (batch.reach * 1.15)[:, None]
    center = batch.center + jitter * half
    world = center[:, None] + half[..., None] * voxels
    pose, focal = batch.world_to_camera, batch.intrinsics[..., 0, 0]
    middle = batch.intrinsics[..., :2, 2]
    turn = pose[..., :3, :3]
    seen = torch.einsum("bvij,bnj->bvni", turn, world) + pose[:, :, None, :3, 3]
    pixels = focal[..., None, None] * seen[..., :2] / seen[..., 2:].clamp_min(1e-3) + middle[:, :, None]
    footprints = (focal * 2 * half / GRID / seen[..., 2].mean(-1)).mean(1).tolist()
    shown = ((pixels > -0.5) & (pixels < SIZE - 0.5)).all(-1)
    values = torch.stack(
        [hull.sample_views(masks[b], pixels[b], shown[b], max(1, round(footprints[b]))) for b in range(scenes)], 1
    )
    flags = trusted.T[:, :, None].expand_as(values)
    sure = hull.leave_one_out(values.flatten(1), flags.flatten(1)).view(views, scenes, *(GRID,) * 3)
    xy = (torch.stack([x, y], -1) - middle[:, :, None, None]) / focal[..., None, None, None]
    rays = F.normalize(torch.cat([xy, torch.ones_like(xy[..., :1])], -1), dim=-1)
    directions = torch.einsum("bvji,bvhwj->bvhwi", turn, rays)
    origins = -torch.einsum("bvji,bvj->bvi", turn, pose[..., :3, 3])
    points = hull.ray_points(
        origins[:, :, None, None], directions, center[:, None, None, None], half[:, None, None, None], SAMPLES
    )
    small = hull.look(sure.transpose(0, 1).flatten(0, 1).contiguous(), points.flatten(0, 1))
    return F.interpolate(small.view(scenes, views, RAYS, RAYS), size=SIZE, mode="bilinear", align_corners=False)


def draw_priors(composer: SceneComposer, masks: Tensor, batch: SceneBatch) -> Tensor:
    """Priors with views left out, cubes that are not centred, and none at all for half of the views."""
    shape = batch.noise.shape
    trusted = torch.rand(shape, generator=composer.random, device=masks.device) < 0.85
    jitter = 0.1 * torch.randn(shape[0], 3, generator=composer.random, device=masks.device)
    found = priors(masks, batch, trusted, jitter)
    none = torch.rand(shape, generator=composer.random, device=masks.device) < 0.5
    return torch.where(none[..., None, None], torch.full_like(found, NO_PRIOR), found)


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, in which thin parts weigh more, plus 1 - soft IoU, the mean over pictures [n, ..., s, s]."""
    logits = logits.float()
    flat = target.flatten(0, -3)[:, None]
    around = F.avg_pool2d(flat, THIN, 1, THIN // 2).view(target.shape)
    # Legs and tails are animal with little animal around them; what is beside the animal is background with some.
    weight = 1 + THIN_WEIGHT * (target * (1 - around) + (1 - target) * around)
    entropy = (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).mean((-1, -2))
    soft = logits.sigmoid()
    both, either = (soft * target).sum((-1, -2)), (soft + target - soft * target).sum((-1, -2))
    shown = (target.sum((-1, -2)) > 4).float()
    return (4 * entropy + shown * (1 - both / either.clamp_min(1))).mean()


@torch.no_grad()
def evaluate(model: MaskNetwork, tests: list[SceneBatch]) -> tuple[float, float, float]:
    """Mean IoU of the views alone, with the other views, and with them twice."""
    model.eval()
    figures = []
    for batch in tests:
        alone = views_alone(model, batch)
        trusted = torch.ones_like(batch.noise, dtype=torch.bool)
        still = torch.zeros_like(batch.center)
        together = predict(model, batch, priors(alone, batch, trusted, still)).float().sigmoid()
        twice = predict(model, batch, priors(together, batch, trusted, still)).float().sigmoid()
        truth = batch.target > 0.5
        shown = truth.sum((-1, -2)) > 30
        rows = []
        for found in (alone, together, twice):
            mask = found > 0.5
            iou = (mask & truth).sum((-1, -2)) / (mask | truth).sum((-1, -2)).clamp_min(1)
            rows.append(iou[shown].mean())
        figures.append(torch.stack(rows))
    first, second, third = torch.stack(figures).mean(0).tolist()
    return first, second, third


def pretrain(
    composer: SceneComposer, tests: list[SceneBatch], seconds: float, start_from: str | None, out: str
) -> MaskNetwork:
    """Train for some seconds; returns the network with averaged weights."""
    device = composer.device
    first = MaskNetwork().state_dict() if start_from is None else load_file(start_from)
    model, averaged = build_network(first, device), build_network(first, device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-3)
    step, losses, spent, began = 0, torch.zeros((), device=device), 0.0, time.monotonic()
    with Progress() as progress:
        bar = progress.add_task("pretraining", total=seconds)
        while spent < seconds:
            batch = composer.compose(SCENES, VIEWS)
            warm = min(1.0, step / 200)
            rate = warm * LEARNING_RATE * (1 - spent / seconds) ** 0.9
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16):
                averaged.eval()
                with torch.no_grad():
                    alone = views_alone(averaged, batch)
                prior = draw_priors(composer, alone, batch)
                model.train()
                loss = mask_loss(predict(model, batch, prior), batch.target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            keep = min(AVERAGING, step / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - keep)
                for kept, new in zip(averaged.buffers(), model.buffers(), strict=True):
                    kept.copy_(new)
            losses += loss.detach()
            step += 1
            if step % 20 == 0:
                spent = time.monotonic() - began
                progress.update(bar, completed=spent)
            if step % REPORT_STEPS == 0:
                mean = float(losses) / REPORT_STEPS
                losses.zero_()
                figures = evaluate(averaged, tests) if step % (5 * REPORT_STEPS) == 0 else ()
                progress.console.print(f"step {step}, {spent:.0f} s: loss {mean:.4f} {figures}")
                save(averaged, out)
    progress.console.print(f"{step} steps: {evaluate(averaged, tests)}")
    return averaged


def save(model: MaskNetwork, path: str) -> None:
    """Write the weights, in half precision."""
    values = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    save_file(
        {key: value.cpu().contiguous(memory_format=torch.contiguous_format) for key, value in values.items()}, path
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--animals", type=int, default=1600)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--start-from")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    began = time.monotonic()
    tests_of = SceneComposer(render_many(32, first=1 << 20), device, 1)
    tests = [tests_of.compose(4, VIEWS) for _ in range(TEST_SCENES // 4)]
    composer = SceneComposer(render_many(chosen.animals), device, 2 + chosen.seed)
    print(f"{chosen.animals} animals rendered in {time.monotonic() - began:.0f} s", flush=True)
    model = pretrain(composer, tests, 60 * chosen.minutes, chosen.start_from, chosen.out)
    save(model, chosen.out)


if __name__ == "__main__":
    main()
