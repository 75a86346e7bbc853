"""The files of a dynamic model, as the published 4D Gaussian Splatting tools read and write them.

    chkpnt_{coarse|fine}_{iteration}.pth           all that a training goes on from, see `DynamicCheckpoint`
    point_cloud/coarse_iteration_{n}/, point_cloud/iteration_{n}/
        point_cloud.ply  deformation.pth  deformation_table.pth  deformation_accum.pth
    cfg_args                                       the settings, as Python's Namespace(...) in text

The files hold only tensors, numbers, strings, dicts, lists and tuples. They are read with `weights_only=True`, so
nothing in them is ever executed.
"""

from __future__ import annotations

import io
import pickle
import re
from argparse import Namespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.formats import ply
from zoosplat.geometry.spherical_harmonics import SH_C0
from zoosplat.storage import listing, objects, urls
from zoosplat_model.dynamic.gaussian_set import GaussianSet
from zoosplat_model.dynamic.hexplane import DeformationField
from zoosplat_model.dynamic.schedule import Phase

CHECKPOINT_NAME = re.compile(r"chkpnt_(coarse|fine)_(\d+)\.pth")


class DynamicCheckpoint(NamedTuple):
    """What a `chkpnt_*.pth` holds, in this order; the file is the pair of this as a plain tuple, and the iteration."""

    active_sh_degree: int
    xyz: Tensor
    deformation: dict[str, Tensor]
    deformation_table: Tensor
    features_dc: Tensor
    features_rest: Tensor
    scaling: Tensor
    rotation: Tensor
    opacity: Tensor
    max_radii2D: Tensor
    xyz_gradient_accum: Tensor
    denom: Tensor
    optimizer: dict[str, Any]
    spatial_lr_scale: float

    def values(self) -> dict[str, Tensor]:
        """The parameters of a `GaussianSet`."""
        return {
            "xyz": self.xyz,
            "f_dc": self.features_dc,
            "f_rest": self.features_rest,
            "scaling": self.scaling,
            "rotation": self.rotation,
            "opacity": self.opacity,
        }


# -- checkpoints --------------------------------------------------------------------------------------------------
def checkpoint_name(phase: Phase, iteration: int) -> str:
    """The file name of a checkpoint."""
    return f"chkpnt_{phase}_{iteration}.pth"


def checkpoints_in(url: str) -> list[tuple[Phase, int]]:
    """Phase and iteration of the checkpoints directly below a URL, oldest first."""
    found = [CHECKPOINT_NAME.fullmatch(name) for name in listing.list_files(url)]
    keys: list[tuple[Phase, int]] = [("coarse" if m[1] == "coarse" else "fine", int(m[2])) for m in found if m]
    return sorted(keys)


def write_checkpoint(
    url: str,
    phase: Phase,
    iteration: int,
    gaussians: GaussianSet,
    field: DeformationField,
    optimizer: torch.optim.Optimizer,
    active_sh_degree: int,
    spatial_lr_scale: float,
) -> None:
    """Write a checkpoint below `url`; a crash leaves the whole file or none."""
    g = gaussians.values()
    held = DynamicCheckpoint(
        active_sh_degree=active_sh_degree,
        xyz=g["xyz"],
        deformation=dict(field.state_dict()),
        deformation_table=gaussians.deformation_table,
        features_dc=g["f_dc"],
        features_rest=g["f_rest"],
        scaling=g["scaling"],
        rotation=g["rotation"],
        opacity=g["opacity"],
        max_radii2D=gaussians.max_radii2D,
        xyz_gradient_accum=gaussians.xyz_gradient_accum,
        denom=gaussians.denom,
        optimizer=_with_plain_rates(optimizer.state_dict()),
        spatial_lr_scale=spatial_lr_scale,
    )
    _save(urls.join(url, checkpoint_name(phase, iteration)), (tuple(held), iteration))


def _with_plain_rates(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state with learning rates as numbers, because on a GPU they are tensors."""
    groups = [{**group, "lr": float(group["lr"]), "capturable": False} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def read_checkpoint(url: str) -> tuple[DynamicCheckpoint, Phase, int]:
    """A checkpoint, its phase and its iteration, on the CPU.

    Raises:
        UserError: there is none, it is damaged, or its name does not tell the phase.
    """
    name = CHECKPOINT_NAME.fullmatch(url.rpartition("/")[2])
    if name is None:
        raise UserError(f"{url}: a checkpoint is called chkpnt_coarse_N.pth or chkpnt_fine_N.pth")
    loaded = _load(url)
    try:
        values, iteration = loaded
        return DynamicCheckpoint(*values), "coarse" if name[1] == "coarse" else "fine", int(iteration)
    except (TypeError, ValueError) as error:
        raise UserError(f"{url}: not a checkpoint of dynamic Gaussians ({error})") from None


def read_newest(url: str, field: DeformationField) -> tuple[dict[str, Tensor], int, Phase, int]:
    """Read the newest checkpoint below a URL; its deformation goes into `field`.

    Returns:
        The parameters of the Gaussians on the CPU, the degree of their harmonics, the phase and the iteration.

    Raises:
        UserError: there is none, it is damaged, or it is of another configuration.
    """
    own = checkpoints_in(url)
    if not own:
        raise UserError(f"{url}: no checkpoint yet; training writes one a minute")
    where = urls.join(url, checkpoint_name(*own[-1]))
    checkpoint, phase, iteration = read_checkpoint(where)
    _fill(field, checkpoint.deformation, where)
    return checkpoint.values(), checkpoint.active_sh_degree, phase, iteration


def _fill(field: DeformationField, state: Any, where: str) -> None:
    try:
        field.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = str(error).splitlines()[-1].strip()
        raise UserError(f"{where}: of another configuration ({first}); run stage train again with --force") from None


# -- results ------------------------------------------------------------------------------------------------------
def folder_of(url: str, phase: Phase, iteration: int) -> str:
    """The folder of a result below a model's URL."""
    return urls.join(url, "point_cloud", ("coarse_iteration_" if phase == "coarse" else "iteration_") + str(iteration))


def write_result(url: str, phase: Phase, iteration: int, gaussians: GaussianSet, field: DeformationField) -> None:
    """Write Gaussians and deformation. The Gaussians come last, so that where their file is, all files are."""
    folder = folder_of(url, phase, iteration)
    _save(urls.join(folder, "deformation.pth"), dict(field.state_dict()))
    _save(urls.join(folder, "deformation_table.pth"), gaussians.deformation_table)
    _save(urls.join(folder, "deformation_accum.pth"), gaussians.deformation_accum)
    objects.write_bytes(urls.join(folder, "point_cloud.ply"), to_ply(gaussians.values()))


def read_result(url: str, phase: Phase, iteration: int, field: DeformationField) -> dict[str, Tensor]:
    """Read the parameters of the Gaussians, on the CPU; the deformation goes into `field`.

    Raises:
        UserError: files are missing, damaged, or of another configuration.
    """
    folder = folder_of(url, phase, iteration)
    where = urls.join(folder, "deformation.pth")
    _fill(field, _load(where), where)
    where = urls.join(folder, "point_cloud.ply")
    try:
        return from_ply(objects.read_bytes(where))
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise UserError(f"{where}: damaged or missing ({error}); run stage train again with --force") from None


def to_ply(values: dict[str, Tensor]) -> bytes:
    """Encode Gaussians as the PLY of 3DGS: logits, logarithms of scales, harmonics channel by channel."""
    v = {name: value.detach().float().cpu().numpy() for name, value in values.items()}
    columns = {name: v["xyz"][:, i] for i, name in enumerate("xyz")}
    columns |= {name: np.zeros(len(v["xyz"]), np.float32) for name in ("nx", "ny", "nz")}
    columns |= {f"f_dc_{i}": v["f_dc"][:, 0, i] for i in range(3)}
    columns |= {f"f_rest_{i}": v["f_rest"][:, i % 15, i // 15] for i in range(45)}
    columns["opacity"] = v["opacity"][:, 0]
    columns |= {f"scale_{i}": v["scaling"][:, i] for i in range(3)}
    columns |= {f"rot_{i}": v["rotation"][:, i] for i in range(4)}
    return ply.encode(columns)


def from_ply(data: bytes) -> dict[str, Tensor]:
    """Decode what `to_ply` wrote.

    Raises:
        ValueError: it is no such PLY.
        KeyError: an attribute is missing.
    """
    columns = ply.decode(data)

    def stack(*names: str) -> Tensor:
        return torch.from_numpy(np.stack([columns[name] for name in names], 1)).float()

    return {
        "xyz": stack("x", "y", "z"),
        "f_dc": stack(*(f"f_dc_{i}" for i in range(3)))[:, None],
        "f_rest": stack(*(f"f_rest_{i}" for i in range(45))).view(-1, 3, 15).mT.contiguous(),
        "opacity": stack("opacity"),
        "scaling": stack(*(f"scale_{i}" for i in range(3))),
        "rotation": stack(*(f"rot_{i}" for i in range(4))),
    }


def read_points(url: str) -> tuple[Tensor, Tensor]:
    """Points [N, 3] and colours [N, 3], 0 to 1, of a PLY file.

    Colours come from red, green and blue or from the constant harmonic; where the file has neither, they are grey.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        columns = ply.decode(objects.read_bytes(url))
        points = np.stack([columns[name] for name in "xyz"], 1)
    except FileNotFoundError:
        raise UserError(f"{url}: no such file; check dynamic.initial_ply") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"{url}: cannot be read as points ({error}); check dynamic.initial_ply") from None
    if "red" in columns:
        colors = np.stack([columns[name] for name in ("red", "green", "blue")], 1) / 255
    elif "f_dc_0" in columns:
        colors = np.stack([columns[f"f_dc_{i}"] for i in range(3)], 1) * SH_C0 + 0.5
    else:
        colors = np.full_like(points, 0.5)
    return torch.from_numpy(points).float(), torch.from_numpy(colors).float()


def write_settings(url: str, experiment: Experiment) -> None:
    """Write `cfg_args`, the settings under the names that the published tools look for."""
    c = experiment.dynamic
    shape = [c.resolution] * 3 + [c.time_resolution]
    settings = Namespace(
        sh_degree=c.sh_degree,
        source_path=experiment.data.directory,
        model_path=url,
        white_background=True,
        eval=True,
        multires=list(c.multires),
        kplanes_config={
            "grid_dimensions": 2,
            "input_coordinate_dim": 4,
            "output_coordinate_dim": 32,
            "resolution": shape,
        },
        bounds=c.bound,
        defor_depth=c.decoder_depth,
        net_width=64,
        timebase_pe=4,
        posebase_pe=10,
        scale_rotation_pe=2,
        opacity_pe=2,
        timenet_width=64,
        timenet_output=32,
        grid_pe=0,
        no_dx=False,
        no_ds=False,
        no_dr=False,
        no_do=not c.deform_opacity,
        no_dshs=not c.deform_harmonics,
        time_range=c.time_range,
    )
    objects.write_bytes(urls.join(url, "cfg_args"), str(settings).encode())


def _save(url: str, value: Any) -> None:
    data = io.BytesIO()
    torch.save(_on_cpu(value), data)
    objects.write_bytes(url, data.getvalue())


def _on_cpu(value: Any) -> Any:
    """The value on the CPU, without gradients, and with copies of parts, whose tensors would be written as a whole."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_on_cpu(item) for item in value)
    return value


def _load(url: str) -> Any:
    try:
        return torch.load(io.BytesIO(objects.read_bytes(url)), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{url}: no such file; run stage train again with --force") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{url}: damaged, or more than tensors and numbers ({first})") from None
