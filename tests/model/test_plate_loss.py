"""Training over the plates: the error by hand and its gradient, wrong masks, and that 0 changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.config.training import Train
from zoosplat.errors import UserError
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.storage import groups, schema
from zoosplat_model.frames import FrameReader, open_reader
from zoosplat_model.losses import frame_losses
from zoosplat_train import start_weights
from zoosplat_train.trainer import TRAIN_FIGURES, NetworkTrainer

CPU = torch.device("cpu")
PLATE = TRAIN_FIGURES.index("train_plate_loss")


def add_plates(project: Project) -> None:
    """Lay the animals of a project's pictures over random plates, under a light that changes."""
    group = groups.open_group(open_run(project).output_url("pack"), write=True)
    rgb, mask = schema.read(group, "rgb"), schema.read(group, "mask")
    rng = np.random.default_rng(0)
    plate = rng.integers(30, 200, rgb.shape[1:]).astype(np.uint8)
    gain = np.linspace(0.8, 1.2, len(rgb), dtype=np.float32)
    light = np.zeros((*rgb.shape[:2], 3, 4), np.float32)
    light[..., 0] = gain[:, None, None]
    schema.add_background(group, plate, light)
    schema.array(group, "rgb")[...] = np.where(mask[..., None], rgb, np.rint(plate * gain[:, None, None, None, None]))


def losses_over_plate(rgb: Tensor, alpha: Tensor, mask: Tensor, photo: Tensor, plate: Tensor) -> Tensor:
    truth = photo * mask[..., None] + 1 - mask[..., None]
    return frame_losses(rgb, alpha, truth, mask, 0.0, 0.0, plate_lambda=2.0, photo=photo, background=plate).plate


def test_the_error_over_the_plate_by_hand() -> None:
    # A pixel of opacity 0.25 and colour 0.8, rendered on white, over a plate of 0.4; the photograph shows 0.6.
    alpha, mask = torch.zeros(1, 6, 6), torch.zeros(1, 6, 6)
    alpha[0, 2, 2], mask[0, 2, 2:4] = 0.25, 1
    rgb = torch.ones(1, 6, 6, 3)
    rgb[0, 2, 2] = 0.25 * 0.8 + 0.75
    plate = torch.full((1, 6, 6, 3), 0.4)
    photo = plate.clone()
    photo[0, 2, 2] = 0.6
    truth = photo * mask[..., None] + 1 - mask[..., None]
    found = frame_losses(rgb, alpha, truth, mask, 0.5, 0.0, plate_lambda=2.0, photo=photo, background=plate)
    error = 3 * (0.6 - (0.25 * 0.8 + 0.75 * 0.4)) / 2  # 2 pixels of mask
    assert float(found.plate) == pytest.approx(error, abs=1e-5)
    without = frame_losses(rgb, alpha, truth, mask, 0.5, 0.0)
    assert float(found.total - without.total) == pytest.approx(2 * error, abs=1e-5)
    assert float(without.plate) == 0


def test_its_gradient_and_what_a_wrong_mask_teaches() -> None:
    g = torch.Generator().manual_seed(0)
    rgb, photo, plate = torch.rand(3, 1, 5, 5, 3, generator=g, dtype=torch.float64)
    alpha = torch.rand(1, 5, 5, generator=g, dtype=torch.float64)
    mask = torch.zeros(1, 5, 5, dtype=torch.float64)
    mask[0, :2] = 1
    wrong = mask.flip(1)  # of the same area
    rgb.requires_grad_()
    alpha.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: losses_over_plate(a, b, mask, photo, plate), (rgb, alpha))
    one, other = (
        torch.autograd.grad(losses_over_plate(rgb, alpha, m, photo, plate), (rgb, alpha)) for m in (mask, wrong)
    )
    for gradient, same in zip(one, other, strict=True):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, same, rtol=0, atol=0)


def trained(
    reader: FrameReader, project: Project, steps: int, **settings: float
) -> tuple[NetworkTrainer, list[list[float]]]:
    """A network after some steps on two frames, and the figures of each step."""
    experiment = open_run(project).experiment
    experiment = experiment.model_copy(update={"train": experiment.train.model_copy(update=settings)})
    trainer = NetworkTrainer(reader, experiment, CPU)
    start_weights.load_into(trainer.model, "random")
    frames = [reader.frame(t) for t in (0, 2)]
    views = [reader.observed] * 2
    return trainer, [trainer.step(frames, views, [False, True], 3e-3, i).tolist() for i in range(steps)]


def test_training_over_the_plate(tiny: Project) -> None:
    bare, figures = trained(open_reader(open_run(tiny), CPU), tiny, 4)
    add_plates(tiny)
    reader = open_reader(open_run(tiny), CPU)
    off, same_figures = trained(reader, tiny, 4)
    # Without the error over the plate, the plates are nothing to the training, bit for bit.
    assert figures == same_figures
    for a, b in zip(bare.state(), off.state(), strict=True):
        assert torch.equal(a, b)
    assert all(row[PLATE] == 0 for row in figures)
    on, figures = trained(reader, tiny, 30, plate_lambda=0.5, img_lambda=0.0)
    assert figures[-1][PLATE] < 0.8 * figures[0][PLATE]
    # It is the error over the lit plate, in the mean over the observed views of both frames.
    frame = reader.frame(2)
    with torch.no_grad():
        rendering = on._render(frame, on.model([frame])[0])
        raw = np.asarray(schema.read(open_run(tiny).open_input("pack"), "rgb", 2, 3)[0, reader.observed], float) / 255
        inside = frame.mask[reader.observed].numpy() > 0
        lit = reader.background(2)[reader.observed].numpy()
        np.testing.assert_allclose(lit[~inside], raw[~inside], atol=0.5 / 255 + 1e-6)
        over = rendering.rgb.numpy() - (1 - rendering.alpha.numpy()[..., None]) * (1 - lit)
        expected = (np.abs(over - raw).sum((1, 2, 3)) / inside.sum((1, 2))).mean()
        losses = on._losses(on._frame(on._tensors(frame)), rendering, torch.ones(len(raw), dtype=torch.bool))
    assert float(losses.plate) == pytest.approx(expected, rel=1e-4)
    assert np.isfinite(on.validate([frame], 1)[1]).all()


def test_plates_are_needed(tiny: Project) -> None:
    assert Train().plate_lambda == 0
    config = open_run(tiny).experiment.to_yaml().replace("plate_lambda: 0.0", "plate_lambda: 0.5")
    with pytest.raises(UserError, match=r"train.plate_lambda = 0.5: the cameras' backgrounds are not known"):
        Experiment.from_yaml(config)
    given = config.replace("backgrounds: null", "backgrounds: [a.png, b.png, c.png, d.png, e.png]")
    assert Experiment.from_yaml(given).train.plate_lambda == 0.5
