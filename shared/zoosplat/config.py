"""The configuration of an experiment: one frozen, typed model with a section a stage, and its readers.

Native configurations are YAML; the JSON files of the published tool (arXiv 2505.18342) are read as they stand, see
`zoosplat.classic`. Whatever is wrong is reported together, a line each, naming the key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from zoosplat import classic, stores
from zoosplat.config_messages import lines_of
from zoosplat.config_text import dump, parse_json, parse_yaml
from zoosplat.errors import UserError

CROP_MULTIPLE = 16
MAX_BYTES = 1 << 20


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be one line of text without control characters")
    return value


def _inside(value: str) -> str:
    """Refuse names that lead out of the folder they are in, also by way of fsspec's URL chains (`a::b`)."""
    if value.startswith(("/", "\\", "~")) or "::" in value or ":/" in value or ".." in re.split(r"[/\\]", value):
        raise ValueError("must be a file inside data.directory: a relative path without '..'")
    return value


def _location(value: str) -> str:
    if not value or "::" in value or ".." in re.split(r"[/\\]", value):
        raise ValueError("must be a path below data.directory, or a whole path or URL, without '..' and '::'")
    return _printable(value)


MAX_INT = 2**31 - 1
Text = Annotated[str, Field(strict=True, min_length=1), AfterValidator(_printable)]
Inside = Annotated[Text, AfterValidator(_inside)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_INT)]
Index = Annotated[int, Field(strict=True, ge=0, le=MAX_INT)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Range = tuple[Index, Index]
Device = Literal["auto", "cpu", "cuda"]
DEVICE = "where to compute; auto: a GPU where there is one"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Section):
    """The recording."""

    directory: Text = Field(description="folder or s3:// URL of the recording; relative to this file's folder")
    videos: tuple[Inside, ...] = Field(min_length=2, description="RGB videos, one a camera, relative to directory")
    masks: tuple[Inside, ...] = Field(min_length=2, description="mask videos, one a camera, in the same order")
    camera_names: tuple[Text, ...] | None = Field(
        default=None, description="names in tables and plots; null: 0, 1, 2, ..."
    )
    calibration: str | tuple[str, ...] = Field(
        description="calibration file, or one a camera; relative to directory, or a whole path or URL"
    )
    calibration_format: Literal["auto", "hdf5", "dannce", "anipose", "pickle"] = Field(
        default="auto", description="auto: by the file's name and content"
    )
    calibration_unit: Literal["auto", "m", "mm"] = Field(
        default="auto", description="unit of the translations; auto: what the format usually has"
    )
    up: Literal["auto"] | tuple[Real, Real, Real] | str = Field(
        default="auto",
        description="from floor to ceiling: [x, y, z] in the calibration's world, of any length; an .npz whose key up "
        "holds its negative, as the published tool writes it; or auto: the mean of the cameras' own",
    )
    fps: Positive | None = Field(default=None, description="frames per second of the videos; null: what the videos say")
    image_width: Count | None = Field(
        default=None, description="pixels; null: from the videos, otherwise they are checked"
    )
    image_height: Count | None = Field(
        default=None, description="pixels; null: from the videos, otherwise they are checked"
    )

    # Before pydantic tries the members of a union and complains about each of them.
    @field_validator("calibration", mode="before")
    @classmethod
    def _calibration_kind(cls, value: Any) -> Any:
        names = value if _is_list(value) else [value]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("must be the name of a file, or a list of names, one a camera")
        for name in names:
            _location(name)
        return value

    @field_validator("up", mode="before")
    @classmethod
    def _up_kind(cls, value: Any) -> Any:
        if _is_list(value) and len(value) == 3 and all(type(v) in (int, float) and abs(v) < 1e9 for v in value):
            if math.hypot(*value) > 0:
                return value
        elif isinstance(value, str) and (value == "auto" or value.endswith(".npz")):
            return _location(value)
        raise ValueError("must be auto, a direction [x, y, z] that is not zero, or the name of an .npz file")

    def url(self, name: str) -> str:
        """Where a video, mask, calibration or up file lies: relative names are below `directory`."""
        return classic.resolve(stores.normalize(self.directory), name)


class Scheduling(_Section):
    """How work is cut into shards; never changes results."""

    frames_per_shard: Count = Field(default=1000, description="video frames in one shard of work")


class Ingest(_Section):
    """Which frames and pixels are used."""

    frame_jump: Count = Field(default=1, description="keep every n-th video frame: 0, n, 2n, ...")
    max_frames: Count | None = Field(default=None, description="kept frames at most; null: all")
    image_downsample: Count = Field(
        default=1, description="images are averaged over n x n pixels; divides width and height"
    )
    on_short: Literal["error", "truncate"] = Field(
        default="error", description="when videos differ in length: stop, or use the shortest length"
    )


class CenterRotation(_Section):
    """Tracking of centre and heading."""

    ell: Positive = Field(description="edge of the tracking cube, which has room to spare; see unit")
    grid_size: Annotated[Count, Field(le=1024)] = Field(
        default=112, description="voxels along an edge of the tracking cube"
    )


class Crop(_Section):
    """The box round the animal that the model works in."""

    ell: Positive = Field(description="edge of the model's cube, from which the box is cut; see unit")
    grid_size: Annotated[Count, Field(ge=CROP_MULTIPLE, le=1024)] = Field(
        default=112, description="voxels along an edge of the model's cube"
    )
    volume_idx: tuple[Range, Range, Range] | None = Field(
        default=None,
        description="index ranges [start, end) along x, y, z, multiples of 16 long; null: decided by the stage",
    )
    min_voxels: Count = Field(default=1, description="hull voxels, over all frames, that keep a grid index")


class Pack(_Section):
    """Which part of each image is stored."""

    window: Literal["full", "auto"] = Field(default="auto", description="whole frames, or a window round the animal")


class Model(_Section):
    """The network and its Gaussians."""

    volume_fill_color: Annotated[Weight, Field(le=1)] = Field(default=0.38, description="grey of empty voxels, 0 to 1")
    num_unets: Count = Field(default=3, description="3D U-Nets in a row")
    base_filters: Count = Field(default=8, description="channels of the first level of a U-Net")
    poolings: Annotated[Count, Field(le=4)] = Field(
        default=4, description="halvings of the resolution in a U-Net, 1 to 4"
    )
    bottleneck: Index = Field(
        default=0, description="width of a perceptron over the whole volume at the bottom of a U-Net; 0: none"
    )
    gaussian_mode: Literal["3d", "2d"] = Field(default="3d", description="3D Gaussians, or flat ones (surfels)")
    precision: Literal["auto", "fp32"] = Field(
        default="auto", description="of the U-Nets; auto: bfloat16 on a GPU, float32 elsewhere"
    )
    min_gaussians: Count = Field(default=1024, description="Gaussians a frame, at least")
    max_gaussians: Count = Field(default=16000, description="Gaussians a frame, at most")


class Train(_Section):
    """Training, on the first third of the frames."""

    lr: Positive = Field(default=1e-4, description="learning rate of Adam")
    epochs: Count = Field(default=50, description="passes over the training frames")
    max_minutes: Positive | None = Field(default=None, description="stop earlier, after this time; null: no limit")
    batch_frames: Count = Field(default=1, description="frames in one step, each with all its observed views")
    img_lambda: Weight = Field(default=0.5, description="weight of the colour error")
    ssim_lambda: Weight = Field(default=0.0, description="weight of 1 - SSIM")
    valid_every: Count = Field(default=1, description="epochs between validations")
    plot_every: Count = Field(default=1, description="epochs between plots")
    save_every: Count = Field(default=1, description="epochs between checkpoints")
    keep_last: Count = Field(default=2, description="checkpoints that are kept")
    seed: Index = Field(default=0, description="of initial weights and order of frames")
    device: Device = Field(default="auto", description=DEVICE)


class Evaluate(_Section):
    """Metrics and gallery."""

    image_downsample: Count | None = Field(
        default=None, description="metrics are taken on images averaged so; a multiple of ingest's; null: ingest's"
    )
    split: Literal["train", "valid", "test"] = Field(
        default="test", description="first, second or last third of the frames"
    )
    gallery_frames: Index = Field(default=6, description="frames shown beside their truth")
    device: Device = Field(default="auto", description=DEVICE)


class Render(_Section):
    """Pictures and films of the model."""

    frame: Index | None = Field(
        default=None, description="index among the kept frames; null: the middle of the test split"
    )
    orbit_frames: Count = Field(default=90, description="pictures in one turn round the animal")
    sequence_frames: Count = Field(default=100, description="kept frames in the film")
    width: Count | None = Field(default=None, description="pixels; null: the working size, enlarged if small")
    height: Count | None = Field(default=None, description="pixels; null: the working size, enlarged if small")
    angle_offset: Real = Field(default=0.0, description="turn of the animal about the vertical, radians")
    delta_x: Real = Field(default=0.0, description="shift of the animal, metres")
    delta_y: Real = Field(default=0.0, description="shift of the animal, metres")
    delta_z: Real = Field(default=0.0, description="shift of the animal, metres")
    camera: Index = Field(default=0, description="index of the camera whose view is rendered")
    device: Device = Field(default="auto", description=DEVICE)


class Features(_Section):
    """A descriptor of the animal in each frame, whichever way it heads."""

    encoder: Literal["gaussians", "images"] = Field(
        default="gaussians",
        description="moments of the Gaussians themselves, or a network's view of pictures of them from all round",
    )
    radius: Positive | None = Field(
        default=None,
        description="of the cylinder that is described, see unit; null: half of crop.ell; the same for recordings that "
        "are embedded together",
    )
    weights: Text = Field(
        default="IMAGENET1K_V1",
        description="of the ResNet-18 of images: torchvision's name, or a .safetensors or .pth file",
    )
    device: Device = Field(default="auto", description=DEVICE)


class Embedding(_Section):
    """Coordinates of behaviour, and what is alike."""

    dimensions: Count = Field(default=50, description="of the embedding")
    neighbours: Count = Field(default=8, description="most alike frames that are listed for each frame")
    apart_s: Weight = Field(default=1.0, description="seconds between a frame and its neighbours, at least")
    states: Count = Field(default=8, description="clusters of frames")
    seed: Index = Field(default=0, description="of the map and the clusters")


class Experiment(_Section):
    """Everything that determines the result of an experiment.

    Building one by hand raises pydantic's ValidationError (a ValueError) on bad values; the readers raise UserError.
    """

    name: Annotated[Text, Field(max_length=100)] = Field(default="experiment", description="title of reports")
    data: Data = Field(description="the recording")
    unit: Literal["m", "normalized"] = Field(
        default="m", description="of ell: metres, or the distance of the farthest camera from the cameras' centre"
    )
    holdout_views: tuple[Index, ...] = Field(
        default=(), description="cameras that tracking and training never see, from 0"
    )
    adaptive_camera: bool = Field(
        default=False, strict=True, description="re-aim every camera at the animal in every frame; for rigs that drift"
    )
    reuse: Text | None = Field(
        default=None, description="project whose masks and images are read where they are the same"
    )
    scheduling: Scheduling = Field(default=Scheduling(), description="how work is cut up; never changes results")
    ingest: Ingest = Field(default=Ingest(), description="which frames and pixels are used")
    center_rotation: CenterRotation = Field(description="tracking of centre and heading")
    crop: Crop = Field(description="the box round the animal that the model works in")
    pack: Pack = Field(default=Pack(), description="which part of each image is stored")
    model: Model = Field(default=Model(), description="the network and its Gaussians")
    train: Train = Field(default=Train(), description="training, on the first third of the frames")
    evaluate: Evaluate = Field(default=Evaluate(), description="metrics and gallery")
    render: Render = Field(default=Render(), description="pictures and films")
    features: Features = Field(default=Features(), description="a descriptor of the animal in each frame")
    embedding: Embedding = Field(default=Embedding(), description="coordinates of behaviour, and what is alike")

    @field_validator("holdout_views")
    @classmethod
    def _ordered(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(value))

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        problems = [*_list_problems(self), *_problems(self, len(self.data.videos), None, None)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def observed_views(self, n_cameras: int) -> tuple[int, ...]:
        """Indices of the cameras that tracking, carving and training see: all but `holdout_views`."""
        return tuple(c for c in range(n_cameras) if c not in self.holdout_views)

    def check(self, n_cameras: int, width: int, height: int) -> None:
        """Check against the recording: number of cameras, and video size in pixels.

        Raises:
            UserError: a line for each impossible combination.
        """
        problems = []
        if n_cameras != len(self.data.videos):
            problems.append(f"data.videos: {len(self.data.videos)} videos, but the calibration has {n_cameras} cameras")
        for key, expected, found in (
            ("image_width", self.data.image_width, width),
            ("image_height", self.data.image_height, height),
        ):
            if expected is not None and expected != found:
                problems.append(f"data.{key} = {expected}: the videos have {found}; nearest: {found}, or null")
        problems += _problems(self, n_cameras, width, height)
        if problems:
            raise UserError("\n".join(problems))

    def to_yaml(self) -> str:
        """YAML that `from_yaml` reads back to an equal experiment."""
        return dump(self.model_dump(mode="json"), default_flow_style=False)

    @classmethod
    def from_yaml(cls, text: str) -> Experiment:
        """Read native YAML. Raises UserError, a line for each problem."""
        return _validate(parse_yaml(text))

    def describe(self) -> str:
        """YAML of the experiment with the meaning and unit of each key as a comment; `from_yaml` reads it too."""
        return "".join(_commented(self, ""))


class Loaded(NamedTuple):
    """A configuration as read: the experiment, what of a classic file has no effect, and that file's project URL."""

    experiment: Experiment
    notes: list[str]
    project: str | None


def read_config(path: str, overrides: Sequence[str] = ()) -> Experiment:
    """Read native YAML or classic JSON from a local path or s3:// URL.

    Args:
        path: the file; relative directories in it are resolved against its folder.
        overrides: `section.key=value`, the value in YAML; names of the native sections, also for classic files.

    Raises:
        UserError: a line for each problem, naming the key, the value and what is valid.
    """
    return load_config(path, overrides).experiment


def load_config(path: str, overrides: Sequence[str] = ()) -> Loaded:
    """As `read_config`, together with what a classic file says besides: see `Loaded`."""
    url = stores.normalize(path)
    folder = url.rpartition("/")[0] or "/"
    try:
        return _load(_read_text(url), folder, overrides)
    except UserError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def parse_classic(raw: dict[str, Any], config_folder: str) -> tuple[Experiment, list[str]]:
    """Map a configuration of the published tool.

    Args:
        raw: the JSON object; absent and null keys have the published defaults.
        config_folder: folder of the file, against which its two directories are resolved.

    Returns:
        The experiment, and a line for each key that has no effect or that got a notable default.

    Raises:
        UserError: a line for each problem, with the classic names of the keys.
    """
    native, notes = _native(raw, stores.normalize(config_folder))
    try:
        return _validate(native), notes
    except UserError as error:
        _raise([classic.in_classic_words(line) for line in str(error).splitlines()])


def classic_project_directory(raw: dict[str, Any], config_folder: str = ".") -> str:
    """The project URL that a classic configuration names. Raises UserError where it names none."""
    value = raw.get("project_directory")
    if not isinstance(value, str) or not value:
        raise UserError("project_directory is missing: give the folder of the project")
    return classic.resolve(stores.normalize(config_folder), value)


# -- reading ------------------------------------------------------------------------------------------------------
def _read_text(url: str) -> str:
    try:
        data = stores.read_bytes(url)
    except FileNotFoundError:
        raise UserError("no such file; give a .yaml or a classic .json configuration") from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError("is a folder; give a .yaml or a classic .json configuration") from None
    except Exception as error:
        raise stores.as_user_error(error, url) or error from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{len(data)} bytes are too many for a configuration; give a .yaml or .json file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("not text in UTF-8; give a .yaml or a classic .json configuration") from None
    return text


def _load(text: str, folder: str, overrides: Sequence[str]) -> Loaded:
    # Not by the name: a classic file may be called anything. YAML reads JSON, but words its errors worse.
    raw = parse_json(text) if text.lstrip().startswith("{") else parse_yaml(text)
    if not isinstance(raw, dict):
        raise UserError("must be a mapping of keys to values")
    if classic.is_classic(raw):
        if not overrides:
            return Loaded(*parse_classic(raw, folder), classic_project_directory(raw, folder))
        # Overrides come before the check: they may mend what it would refuse.
        native, notes = _native(raw, folder)
        project = classic_project_directory(raw, folder)
    else:
        native, notes, project = raw, [], None
    for override in overrides:
        _override(native, override)
    data = native.get("data")
    for section, key in ((data, "directory"), (native, "reuse")):
        if isinstance(section, dict) and isinstance(section.get(key), str) and section[key].strip():
            section[key] = classic.resolve(folder, section[key])
    return Loaded(_validate(native), notes, project)


def _native(raw: dict[str, Any], folder: str) -> tuple[dict[str, Any], list[str]]:
    """A classic configuration, its types checked, as a native one that is not yet checked; and notes on it."""
    given = {key: value for key, value in raw.items() if value is not None}
    try:
        return classic.to_native(classic.Classic.model_validate(given), folder)
    except ValidationError as error:
        _raise(lines_of(error, classic.Classic))


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, leaf = key.strip().split(".")
    if not equals or not leaf:
        raise UserError(f"--set {override}: write section.key=value, for example train.lr=1e-4")
    for section in sections:
        inner = raw.get(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}: {section} is not a section")
        raw[section] = dict(inner)  # a copy: YAML aliases share sections
        raw = raw[section]
    try:
        raw[leaf] = parse_yaml(text)
    except UserError as error:
        raise UserError(f"--set {override}: {error}") from None


# -- checks across keys -------------------------------------------------------------------------------------------
def _list_problems(e: Experiment) -> Iterator[str]:
    """Lists that must fit the list of videos."""
    n = len(e.data.videos)
    lists = {"masks": e.data.masks, "camera_names": e.data.camera_names}
    if not isinstance(e.data.calibration, str) and len(e.data.calibration) > 1:
        lists["calibration"] = e.data.calibration
    for key, values in lists.items():
        if values is not None and len(values) != n:
            yield f"data.{key}: {len(values)} entries for {n} videos; give one a camera, in the order of data.videos"
    for key, values in {"videos": e.data.videos, **lists}.items():
        for i, value in enumerate(values or ()):
            if value in (values or ())[:i]:
                yield f"data.{key}[{i}] = {value!r}: is listed twice; give every camera its own"


def _problems(e: Experiment, n_cameras: int, width: int | None, height: int | None) -> Iterator[str]:
    """Combinations that cannot work; sizes in pixels, None where not known yet."""
    for i, view in enumerate(e.holdout_views):
        if view >= n_cameras:
            yield f"holdout_views[{i}] = {view}: there are {n_cameras} cameras; valid: 0 to {n_cameras - 1}"
        if view in e.holdout_views[:i]:
            yield f"holdout_views[{i}] = {view}: is listed twice"
    if (observed := len(e.observed_views(n_cameras))) < 2:
        most = f"hold out at most {max(n_cameras - 2, 0)}"
        yield f"holdout_views = {list(e.holdout_views)}: leaves {observed} of {n_cameras} cameras; {most}"
    if e.render.camera >= n_cameras:
        yield f"render.camera = {e.render.camera}: there are {n_cameras} cameras; nearest: {n_cameras - 1}"

    width, height = width or e.data.image_width, height or e.data.image_height
    sizes = [size for size in (width, height) if size is not None]
    working, metrics = e.ingest.image_downsample, e.evaluate.image_downsample
    size = f"{width or '?'} x {height or '?'}"
    if any(s % working for s in sizes):
        common = _nearest(working, lambda d: math.gcd(*sizes) % d == 0)
        yield f"ingest.image_downsample = {working}: does not divide images of {size}; nearest: {common}"
    if metrics is not None and metrics % working:
        near = _nearest(metrics, lambda d: d % working == 0)
        yield (
            f"evaluate.image_downsample = {metrics}: is not a multiple of ingest.image_downsample = {working}; "
            f"nearest: {near}"
        )
    elif metrics is not None and any(s % metrics for s in sizes) and not any(s % working for s in sizes):
        near = _nearest(metrics, lambda d: d % working == 0 and math.gcd(*sizes) % d == 0)
        yield f"evaluate.image_downsample = {metrics}: does not divide images of {size}; nearest: {near}"

    n = e.crop.grid_size
    for i, (start, end) in enumerate(e.crop.volume_idx or ()):
        faults = []
        if end > n:
            faults.append(f"reaches outside the grid of {n}")
        if end <= start:
            faults.append("is empty")
        elif (end - start) % CROP_MULTIPLE:
            faults.append(f"length {end - start} is not a multiple of {CROP_MULTIPLE}")
        if faults:
            fault = " and ".join(faults)
            yield f"crop.volume_idx[{i}] = ({start}, {end}): {fault}; nearest: {_nearest_range(start, end, n)}"
    if e.model.min_gaussians > e.model.max_gaussians:
        limit = e.model.max_gaussians
        yield f"model.min_gaussians = {e.model.min_gaussians}: exceeds model.max_gaussians = {limit}; nearest: {limit}"
    voxels = math.prod(max(end - start, 0) for start, end in e.crop.volume_idx or ((0, n),) * 3)
    if 0 < voxels < e.model.min_gaussians:
        yield f"model.min_gaussians = {e.model.min_gaussians}: the crop has {voxels} voxels; nearest: {voxels}"


def _nearest(value: int, valid: Callable[[int], bool]) -> str:
    """The nearest valid positive integers on both sides of one that is not."""
    below = next((v for v in range(value - 1, 0, -1) if valid(v)), None)
    above = next((v for v in range(value + 1, 2 * value + 64) if valid(v)), None)
    return " or ".join(str(v) for v in (below, above) if v is not None)


def _nearest_range(start: int, end: int, n: int) -> tuple[int, int]:
    """The range inside a grid of n, a multiple of 16 long, that is nearest in length, then in place."""
    length = CROP_MULTIPLE * max(1, math.ceil((end - start) / CROP_MULTIPLE - 0.5))
    length = min(length, n // CROP_MULTIPLE * CROP_MULTIPLE)
    start = min(start, n - length)
    return start, start + length


# -- messages -----------------------------------------------------------------------------------------------------
def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _raise(lines: Sequence[str]) -> NoReturn:
    raise UserError("\n".join(lines)) from None


def _validate(raw: Any) -> Experiment:
    if not isinstance(raw, dict):
        raise UserError("must be a mapping of keys to values")
    try:
        return Experiment.model_validate(raw)
    except ValidationError as error:
        _raise(lines_of(error, Experiment))


def _commented(section: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"\n{indent}{name}:  # {field.description}\n"
            yield from _commented(value, indent + "  ")
        else:
            plain = dump({name: section.model_dump(mode="json")[name]}, default_flow_style=True).strip()
            # A flow mapping of one key, without its braces, is a block mapping.
            yield f"{indent}{plain[1:-1]}".ljust(32) + f"  # {field.description}\n"
