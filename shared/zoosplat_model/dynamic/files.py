"""The files of a dynamic model, as the published 4D Gaussian Splatting tools read and write them.

    chkpnt_{coarse|fine}_{iteration}.pth           everything that goes on: see `Checkpoint`
    point_cloud/coarse_iteration_{n}/, point_cloud/iteration_{n}/
        point_cloud.ply  deformation.pth  deformation_table.pth  deformation_accum.pth
    cfg_args                                       the settings, as Python's Namespace(...) in text

Tensors, numbers, strings, dicts, lists and tuples alone; read with `weights_only=True`, so nothing is ever executed.
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
from zoosplat_model.dynamic.gaussians import GaussianSet
from zoosplat_model.dynamic.hexplane import DeformationField, HexPlane
from zoosplat_model.dynamic.schedule import Stage

NAME = re.compile(r"chkpnt_(coarse|fine)_(\d+)\.pth")


class Checkpoint(NamedTuple):
    """What a `chkpnt_*.pth` holds, in its order; the file is the pair of this, as a plain tuple, and the iteration."""

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


def build_field(experiment: Experiment) -> DeformationField:
    """The deformation field of a configuration, untrained, on the CPU."""
    c = experiment.dynamic
    grid = HexPlane(c.multires, c.resolution, c.time_resolution, c.bound, c.time_range)
    return DeformationField(grid, c.decoder_depth, c.deform_opacity, c.deform_harmonics)


# -- checkpoints --------------------------------------------------------------------------------------------------
def checkpoint_name(stage: Stage, iteration: int) -> str:
    return f"chkpnt_{stage}_{iteration}.pth"


def checkpoints_in(url: str) -> list[tuple[Stage, int]]:
    """Stage and iteration of the checkpoints directly below a URL, oldest first."""
    found = [NAME.fullmatch(name) for name in listing.list_files(url)]
    keys: list[tuple[Stage, int]] = [("coarse" if m[1] == "coarse" else "fine", int(m[2])) for m in found if m]
    return sorted(keys)


def write_checkpoint(
    url: str,
    stage: Stage,
    iteration: int,
    gaussians: GaussianSet,
    field: DeformationField,
    optimizer: torch.optim.Optimizer,
    active_sh_degree: int,
    spatial_lr_scale: float,
) -> None:
    """Write a checkpoint below `url`, whole or not at all."""
    g = gaussians.values()
    held = Checkpoint(
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
        optimizer=_settled(optimizer.state_dict()),
        spatial_lr_scale=spatial_lr_scale,
    )
    _save(urls.join(url, checkpoint_name(stage, iteration)), (tuple(held), iteration))


def _settled(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state with learning rates as numbers, which a GPU has as tensors."""
    groups = [{**group, "lr": float(group["lr"]), "capturable": False} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def read_checkpoint(url: str) -> tuple[Checkpoint, Stage, int]:
    """A checkpoint, its stage and its iteration, on the CPU.

    Raises:
        UserError: there is none, it is damaged, or its name does not tell the stage.
    """
    name = NAME.fullmatch(url.rpartition("/")[2])
    if name is None:
        raise UserError(f"{url}: a checkpoint is called chkpnt_coarse_N.pth or chkpnt_fine_N.pth")
    loaded = _load(url)
    try:
        values, iteration = loaded
        return Checkpoint(*values), "coarse" if name[1] == "coarse" else "fine", int(iteration)
    except (TypeError, ValueError) as error:
        raise UserError(f"{url}: not a checkpoint of dynamic Gaussians ({error})") from None


def read_newest(url: str, field: DeformationField) -> tuple[dict[str, Tensor], int, Stage, int]:
    """Gaussians, degree of their harmonics, stage and iteration of the newest checkpoint; it fills `field`. On the CPU.

    Raises:
        UserError: there is none, or it is damaged or of another configuration.
    """
    own = checkpoints_in(url)
    if not own:
        raise UserError(f"{url}: no checkpoint yet; training writes one a minute")
    where = urls.join(url, checkpoint_name(*own[-1]))
    checkpoint, stage, iteration = read_checkpoint(where)
    _fill(field, checkpoint.deformation, where)
    return checkpoint.values(), checkpoint.active_sh_degree, stage, iteration


def _fill(field: DeformationField, state: Any, where: str) -> None:
    try:
        field.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = str(error).splitlines()[-1].strip()
        raise UserError(f"{where}: of another configuration ({first}); run stage train again with --force") from None


# -- results ------------------------------------------------------------------------------------------------------
def folder_of(url: str, stage: Stage, iteration: int) -> str:
    """The folder of a result below a model's URL."""
    return urls.join(url, "point_cloud", ("coarse_iteration_" if stage == "coarse" else "iteration_") + str(iteration))


def write_result(url: str, stage: Stage, iteration: int, gaussians: GaussianSet, field: DeformationField) -> None:
    """Write Gaussians and deformation; the Gaussians last, so that where they are, all is."""
    folder = folder_of(url, stage, iteration)
    _save(urls.join(folder, "deformation.pth"), dict(field.state_dict()))
    _save(urls.join(folder, "deformation_table.pth"), gaussians.deformation_table)
    _save(urls.join(folder, "deformation_accum.pth"), gaussians.deformation_accum)
    objects.write_bytes(urls.join(folder, "point_cloud.ply"), to_ply(gaussians.values()))


def read_result(url: str, stage: Stage, iteration: int, field: DeformationField) -> dict[str, Tensor]:
    """The parameters of the Gaussians, on the CPU; the deformation goes into `field`.

    Raises:
        UserError: files are missing, damaged, or of another configuration.
    """
    folder = folder_of(url, stage, iteration)
    where = urls.join(folder, "deformation.pth")
    _fill(field, _load(where), where)
    where = urls.join(folder, "point_cloud.ply")
    try:
        return from_ply(objects.read_bytes(where))
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise UserError(f"{where}: damaged or missing ({error}); run stage train again with --force") from None


def to_ply(values: dict[str, Tensor]) -> bytes:
    """Parameters of Gaussians as the PLY of 3DGS: logits, logarithms of scales, harmonics channel by channel."""
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
    """What `to_ply` wrote. Raises ValueError, or KeyError for an attribute that is not there."""
    columns = ply.decode(data)

    def of(*names: str) -> Tensor:
        return torch.from_numpy(np.stack([columns[name] for name in names], 1)).float()

    return {
        "xyz": of("x", "y", "z"),
        "f_dc": of(*(f"f_dc_{i}" for i in range(3)))[:, None],
        "f_rest": of(*(f"f_rest_{i}" for i in range(45))).view(-1, 3, 15).mT.contiguous(),
        "opacity": of("opacity"),
        "scaling": of(*(f"scale_{i}" for i in range(3))),
        "rotation": of(*(f"rot_{i}" for i in range(4))),
    }


def read_points(url: str) -> tuple[Tensor, Tensor]:
    """Points [N, 3] and colours [N, 3], 0 to 1, of a PLY file: red, green, blue or the constant harmonic; else grey.

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
    """`cfg_args`: the settings under the names that the published tools look for."""
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
    """The same without the GPU, gradients and parts of larger tensors, whose whole memory would be written."""
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
