"""Zarr groups of results as xarray Datasets with units and coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing

from zoosplat.storage import schema

# The dimensions of `schema.GROUPS` and what a Dataset calls them.
DIMENSIONS = {
    "T": "time",
    "C": "camera",
    "Ch": "held_out_camera",
    "h": "y",
    "w": "x",
    "H": "frame_y",
    "W": "frame_x",
    "D": "descriptor",
    "E": "dimension",
    "k": "neighbour",
}
AXIS = ("axis", ("x", "y", "z"))
SECOND_AXIS = ("second_axis", ("x", "y", "z"))
PIXEL_AXIS = ("pixel_axis", ("x", "y"))
# The dimensions of an array that `schema.GROUPS` gives as a number: a name, and the label of each index if it has one.
UNNAMED: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "box": (("edge", ("x0", "y0", "x1", "y1")),),
    "hull_mean": (AXIS,),
    "hull_cov": (AXIS, SECOND_AXIS),
    "principal_shift": (PIXEL_AXIS,),
    "centers": (AXIS,),
    "covs": (AXIS, SECOND_AXIS),
    "rgb": (("channel", ("R", "G", "B")),),
    "origin": (PIXEL_AXIS,),
    "map": (("map_axis", ("x", "y")),),
    "center": (AXIS,),
    "pose": (("row", ()), ("column", ())),
    "plate": (("channel", ("R", "G", "B")),),
    "light": (("channel", ("R", "G", "B")), ("term", ("gain", "slope_x", "slope_y", "offset"))),
}
# A Dataset has these arrays as coordinates, or `ProjectReader.cameras` gives them.
LEFT_OUT = ("time", "t", "frame", "intrinsics", "world_to_camera")


@dataclass(frozen=True, eq=False)
class Axes:
    """The coordinates that the results of a run share.

    Attributes:
        frames: [T] int64, number of each kept frame in the recording, from 0.
        times_s: [T] float64, seconds from the recording's first frame.
        camera_names: of the C cameras, in their order.
    """

    frames: npt.NDArray[np.int64]
    times_s: npt.NDArray[np.float64]
    camera_names: tuple[str, ...]

    @classmethod
    def of(cls, masks: zarr.Group) -> Axes:
        """The coordinates of a run, from its masks.zarr."""
        attributes: Any = masks.attrs
        frames = schema.read(masks, "frame")
        return cls(frames, frames / float(attributes["fps"]), tuple(str(name) for name in attributes["camera_names"]))

    def coordinates(self) -> dict[str, Any]:
        """For a Dataset: `time` is the index, `t` and `frame` go with it."""
        return {
            "time": ("time", self.times_s, {"units": "s", "long_name": "time from the first frame of the recording"}),
            "t": ("time", np.arange(len(self.frames)), {"long_name": "index among the kept frames"}),
            "frame": ("time", self.frames, {"long_name": "number of the frame in the recording, from 0"}),
            "camera": ("camera", list(self.camera_names)),
        }


class _LazyArray(BackendArray):
    """A zarr array of which xarray reads the blocks that hold the values asked for, when it is asked for them."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        return self._array.oindex[key]


def read_dataset(group: zarr.Group, name: str, where: str, axes: Axes, *, lazy: bool) -> xr.Dataset:
    """A group as a Dataset; each variable has the attributes `units` (unless it has none) and `long_name`.

    Args:
        group: open for reading.
        name: its kind, a key of `schema.GROUPS`.
        where: its URL, for errors.
        axes: coordinates of the run.
        lazy: read arrays when their values are asked for, each time anew; else all of them now, once.

    Raises:
        UserError: the group lacks an array, or has one of another type; lazy values raise it when they are read.
    """
    schema.validate(group, name, where)
    optional = {**schema.MOVING, **schema.BACKGROUND, "all_views": schema.ALL_VIEWS}
    specs = {**{key: spec for key, spec in optional.items() if key in group}, **schema.GROUPS[name]}
    if schema.has_seen(group):
        specs.setdefault("seen", schema.SEEN)
    coordinates = axes.coordinates()
    if "all_views" in specs:
        held_out: Any = group.attrs["holdout_views"]
        coordinates["held_out_camera"] = ("held_out_camera", [axes.camera_names[c] for c in held_out])
    variables: dict[str, Any] = {}
    for key, spec in specs.items():
        if key in LEFT_OUT:
            continue
        dims, unnamed = [], iter(UNNAMED.get(key, ()))
        for dim in spec.dims:
            if isinstance(dim, str):
                dims.append(DIMENSIONS[dim])
                continue
            label, labels = next(unnamed)
            dims.append(label)
            if labels:
                coordinates[label] = (label, list(labels))
        attributes = {"units": spec.unit} if spec.unit else {}
        values: Any
        if lazy and spec.layout != "whole":
            values = indexing.LazilyIndexedArray(_LazyArray(schema.array(group, key)))
        else:
            values = schema.read_seen(group) if key == "seen" else schema.read(group, key)
            values.setflags(write=False)
        variables[key] = xr.Variable(dims, values, {**attributes, "long_name": spec.meaning})
    used = {dim for variable in variables.values() for dim in variable.dims}
    shown = {key: value for key, value in coordinates.items() if value[0] in used}
    return xr.Dataset(variables, shown, dict(group.attrs))
