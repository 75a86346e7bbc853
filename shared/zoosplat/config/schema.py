"""The configuration of an experiment: one frozen, typed model with a section a stage, and its readers.

Native configurations are YAML; the JSON files of the published tool (arXiv 2505.18342) are read as they stand, see
`zoosplat.config.classic`. Whatever is wrong is reported together, a line each, naming the key.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from zoosplat.config import classic
from zoosplat.config.messages import lines_of
from zoosplat.config.text import dump, nested, parse_json, parse_yaml
from zoosplat.errors import UserError
from zoosplat.recording import dnerf
from zoosplat.storage import objects, urls
from zoosplat.storage.errors import as_user_error

CROP_MULTIPLE = 16
MAX_BYTES = 1 << 20
RANDOM, ANIMALS = "random", "animals"  # of train.start_from; the latter are weights that come with the package
WEIGHTS_FILES = (".safetensors", ".pth", ".pt")  # endings of features.weights that is a file
OF_ANIMALS = {"network": "zoosplat", "num_unets": 3, "base_filters": 16, "poolings": 3, "bottleneck": 0}


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


StageName = Literal["ingest", "center_rotation", "crop", "pack", "train", "evaluate", "render", "features", "embedding"]


@dataclass(frozen=True)
class Effect:
    """What a key determines. A section declares it for all its keys, and a key of another effect for itself.

    `zoosplat.config.effects` reads the declarations: the identity of a result comes from them.

    Attributes:
        stages: stages whose results the key determines; later stages follow through what they read.
        applies: whether the key is looked at in an experiment; None: it always is.
        names_files: whether a value names files outside the project; None: no value does. The content of such files
            determines the result, and the folder that they lie in does not.
        by_name: whether the files' own names, without folders, determine the result as well.
    """

    stages: tuple[StageName, ...]
    applies: Callable[[Experiment], bool] | None = None
    names_files: Callable[[Any], bool] | None = None
    by_name: bool = False


def _any(value: Any) -> bool:
    return True


def _is_up_file(up: Any) -> bool:
    return isinstance(up, str) and up != "auto"


def _are_own_weights(start_from: Any) -> bool:
    return start_from not in (RANDOM, ANIMALS)


def _if_given(value: Any) -> bool:
    return value is not None


def _if_videos(experiment: Experiment) -> bool:
    return experiment.ingest.source == "videos"


def _if_scene(experiment: Experiment) -> bool:
    return experiment.ingest.source == "dnerf"


def _if_network(experiment: Experiment) -> bool:
    return experiment.train.method == "pose_splatter"


def _if_dynamic(experiment: Experiment) -> bool:
    return experiment.train.method == "dynamic"


def _if_images(experiment: Experiment) -> bool:
    return experiment.features.encoder == "images"


def is_weights_file(weights: str) -> bool:
    """Whether `features.weights` is a file rather than a name that torchvision knows."""
    return weights.endswith(WEIGHTS_FILES)


NOTHING = Effect(())
INGEST = Effect(("ingest",))
DYNAMIC_FILE = Effect(("train",), applies=_if_dynamic, names_files=_if_given)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    effect: ClassVar[Effect | None] = None  # of the section's keys; None: each key declares its own


class Data(_Section):
    """The recording."""

    # A scene's pictures lie in it, wherever it is; videos and masks count by themselves.
    directory: Annotated[Text, Effect(("ingest", "pack"), applies=_if_scene, names_files=_any)] = Field(
        description="folder or s3:// URL of the recording; relative to this file's folder"
    )
    # Stage ingest takes the recording's length and rate from them.
    videos: Annotated[tuple[Inside, ...], Effect(("ingest", "pack"), applies=_if_videos, names_files=_any)] = Field(
        min_length=2, description="RGB videos, one a camera, relative to directory"
    )
    masks: Annotated[tuple[Inside, ...], Effect(("ingest",), applies=_if_videos, names_files=_any)] = Field(
        min_length=2, description="mask videos, one a camera, in the same order"
    )
    camera_names: Annotated[tuple[Text, ...] | None, INGEST] = Field(
        default=None, description="names in tables and plots; null: 0, 1, 2, ..."
    )
    # A suffix says the format, and a DANNCE file of one camera is called after it.
    calibration: Annotated[
        str | tuple[str, ...], Effect(("ingest",), applies=_if_videos, names_files=_any, by_name=True)
    ] = Field(description="calibration file, or one a camera; relative to directory, or a whole path or URL")
    calibration_format: Annotated[Literal["auto", "hdf5", "dannce", "anipose", "pickle"], INGEST] = Field(
        default="auto", description="auto: by the file's name and content"
    )
    calibration_unit: Annotated[Literal["auto", "m", "mm"], INGEST] = Field(
        default="auto", description="unit of the translations; auto: what the format usually has"
    )
    up: Annotated[
        Literal["auto"] | tuple[Real, Real, Real] | str,
        Effect(("ingest",), applies=_if_videos, names_files=_is_up_file),
    ] = Field(
        default="auto",
        description="from floor to ceiling: [x, y, z] in the calibration's world, of any length; an .npz whose key up "
        "holds its negative, as the published tool writes it; or auto: the mean of the cameras' own",
    )
    fps: Annotated[Positive | None, INGEST] = Field(
        default=None, description="frames per second of the videos; null: what the videos say"
    )
    image_width: Annotated[Count | None, INGEST] = Field(
        default=None, description="pixels; null: from the videos, otherwise they are checked"
    )
    image_height: Annotated[Count | None, INGEST] = Field(
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
        return classic.resolve(urls.normalize(self.directory), name)


class Scheduling(_Section):
    """How work is cut into shards; never changes results."""

    effect = NOTHING

    frames_per_shard: Count = Field(default=1000, description="video frames in one shard of work")


class Ingest(_Section):
    """Which frames and pixels are used."""

    effect = INGEST

    source: Literal["videos", "dnerf"] = Field(
        default="videos",
        description="videos of fixed cameras, or a scene of transforms_train.json and transforms_test.json",
    )
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

    effect = Effect(("center_rotation",))

    ell: Positive = Field(description="edge of the tracking cube, which has room to spare; see unit")
    grid_size: Annotated[Count, Field(le=1024)] = Field(
        default=112, description="voxels along an edge of the tracking cube"
    )


class Crop(_Section):
    """The box round the animal that the model works in."""

    effect = Effect(("crop",))

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

    effect = Effect(("pack",))

    window: Literal["full", "auto"] = Field(default="auto", description="whole frames, or a window round the animal")


class Model(_Section):
    """The network and its Gaussians."""

    effect = Effect(("train",), applies=_if_network)

    network: Literal["zoosplat", "published"] = Field(
        default="zoosplat", description="published: that of arXiv 2505.18342, for comparison; slow"
    )
    volume_fill_color: Annotated[Weight, Field(le=1)] = Field(default=0.38, description="grey of empty voxels, 0 to 1")
    num_unets: Count = Field(default=3, description="3D U-Nets in a row")
    base_filters: Count = Field(default=8, description="channels of the first level of a U-Net")
    poolings: Annotated[Count, Field(le=4)] = Field(
        default=4, description="halvings of the resolution in a U-Net, 1 to 4"
    )
    bottleneck: Index = Field(
        default=0,
        description="width of a perceptron over the whole volume at the bottom of a U-Net; 0: none, or the "
        "published network's 512",
    )
    gaussian_mode: Literal["3d", "2d"] = Field(default="3d", description="3D Gaussians, or flat ones (surfels)")
    precision: Literal["auto", "fp32"] = Field(
        default="auto", description="of the U-Nets; auto: bfloat16 on a GPU, float32 elsewhere"
    )
    min_gaussians: Count = Field(default=1024, description="Gaussians a frame, at least")
    max_gaussians: Count = Field(default=16000, description="Gaussians a frame, at most")


class Train(_Section):
    """Training, on the first third of the frames unless `fit_to` says otherwise."""

    effect = Effect(("train",), applies=_if_network)

    method: Annotated[Literal["pose_splatter", "dynamic"], Effect(("train",))] = Field(
        default="pose_splatter",
        description="one network for all frames, or Gaussians and their motion optimised for all frames; see dynamic",
    )
    fit_to: Literal["third", "all"] = Field(
        default="third",
        description="frames to train on: the first third, so that metrics of the others are of frames never seen; or "
        "all but those that validate, for the best reconstruction: then only held-out views are new to it",
    )
    start_from: Annotated[Text, Effect(("train",), applies=_if_network, names_files=_are_own_weights)] = Field(
        default=RANDOM,
        description="weights to begin with: random; animals, that have learned from random animals (a network of 3 "
        "U-Nets, 16 filters, 3 poolings); or a project, or a .safetensors file",
    )
    lr: Positive = Field(default=1e-4, description="learning rate of Adam")
    epochs: Count = Field(default=50, description="passes over the training frames")
    max_minutes: Positive | None = Field(default=None, description="stop earlier, after this time; null: no limit")
    batch_frames: Count = Field(default=1, description="frames in one step, each with all its observed views")
    gpus: Annotated[Count | Literal["auto"], NOTHING] = Field(
        default="auto", description="that share the frames of a step; auto: all there are, a frame each at least"
    )
    img_lambda: Weight = Field(default=0.5, description="weight of the colour error")
    square_lambda: Weight = Field(
        default=0.0,
        description="weight of the squared colour error; 2, with opacity_lambda and deep_lambda doubled, favours PSNR",
    )
    ssim_lambda: Weight = Field(default=0.0, description="weight of 1 - SSIM")
    opacity_lambda: Weight = Field(
        default=0.0,
        description="weight of the Gaussians' mean opacity: none where no view needs one; 0.03 pays on clean masks",
    )
    deep_lambda: Weight = Field(
        default=0.0, description="weight of what the U-Nets leave to the last one; 0.1 pays where poses differ much"
    )
    leave_out: Annotated[Weight, Field(le=1)] = Field(
        default=0.7, description="share of steps that carve without one of the views, a lesson for new views; 0 to 1"
    )
    jitter_voxels: Weight = Field(default=2.0, description="how far the animal's place is off at most, in training")
    jitter_radians: Weight = Field(default=0.3, description="how far its heading is off at most, in training")
    jitter_tilt: Weight = Field(
        default=0.0, description="how far it is tilted at most, in training, radians: for poses like rearing"
    )
    # A validation decides which weights are kept, so it is no mere display as plots are.
    valid_every: Count = Field(default=1, description="epochs between validations")
    plot_every: Annotated[Count, NOTHING] = Field(default=1, description="epochs between plots")
    save_every: Annotated[Count, NOTHING] = Field(default=1, description="epochs between checkpoints")
    keep_last: Annotated[Count, NOTHING] = Field(default=2, description="checkpoints that are kept")
    seed: Annotated[Index, Effect(("train",))] = Field(default=0, description="of initial weights and order of frames")
    device: Annotated[Device, NOTHING] = Field(default="auto", description=DEVICE)

    @field_validator("gpus", mode="before")
    @classmethod
    def _gpus_kind(cls, value: Any) -> Any:
        if value == "auto" or (type(value) is int and 1 <= value <= MAX_INT):
            return value
        raise ValueError("must be auto or a whole number, 1 at least")


class Dynamic(_Section):
    """The second trainer, `train.method: dynamic`. Lengths: half the crop's longest side is 1.3."""

    effect = Effect(("train",), applies=_if_dynamic)

    coarse_iterations: Index = Field(default=3000, description="without motion; each iteration is a frame")
    fine_iterations: Index = Field(default=20000, description="with motion")
    views: Count = Field(default=2, description="cameras that an iteration renders its frame from")
    initial_points: Count = Field(default=10000, description="points sampled in the visual hulls to start from")
    initial_ply: Annotated[Text | None, DYNAMIC_FILE] = Field(
        default=None, description="PLY file of points to start from instead, in scene units"
    )
    lambda_dssim: Weight = Field(default=0.0, description="weight of 1 - SSIM beside the L1 error of colours")
    lambda_mask: Weight = Field(default=0.0, description="weight of the L1 error of opacity against the masks")
    plane_tv_weight: Weight = Field(default=1e-4, description="weight of the roughness of the planes over space")
    time_smoothness_weight: Weight = Field(default=1e-2, description="weight of the roughness of the planes over time")
    l1_time_planes: Weight = Field(default=1e-4, description="weight of the distance of the planes over time from 1")
    position_lr_init: Positive = Field(default=1.6e-4, description="learning rate, times the extent of the cameras")
    position_lr_final: Positive = Field(default=1.6e-6, description="the same after lr_steps iterations of a stage")
    deformation_lr_init: Positive = Field(default=1.6e-4, description="learning rate of the decoder of the motion")
    deformation_lr_final: Positive = Field(default=1.6e-5, description="the same after lr_steps iterations")
    grid_lr_init: Positive = Field(default=1.6e-3, description="learning rate of the planes")
    grid_lr_final: Positive = Field(default=1.6e-4, description="the same after lr_steps iterations")
    lr_steps: Count | None = Field(default=None, description="iterations of the decay; null: fine_iterations")
    feature_lr: Positive = Field(default=2.5e-3, description="learning rate of colours; of their harmonics a 20th")
    opacity_lr: Positive = Field(default=0.05, description="learning rate of opacities, as logits")
    scaling_lr: Positive = Field(default=5e-3, description="learning rate of scales, as logarithms")
    rotation_lr: Positive = Field(default=1e-3, description="learning rate of orientations")
    sh_degree: Annotated[Index, Field(le=3)] = Field(
        default=3, description="degree of the harmonics of colour, at most; one more each 1,000 iterations"
    )
    multires: tuple[Count, ...] = Field(
        default=(1, 2, 4, 8), min_length=1, description="levels of the planes, multiples of resolution"
    )
    resolution: Annotated[Count, Field(ge=2)] = Field(default=64, description="cells along an axis of space")
    time_resolution: Annotated[Count, Field(ge=2)] = Field(default=25, description="cells along time, on all levels")
    time_range: Literal["half", "full"] = Field(
        default="half", description="half: time from 0 to 1, as published, uses half of those cells; full: all of them"
    )
    bound: Positive = Field(default=1.6, description="half the side of the planes' box, scene units")
    decoder_depth: Count = Field(default=1, description="layers before the heads of the decoder")
    deform_opacity: bool = Field(default=False, strict=True, description="let opacities change over time")
    deform_harmonics: bool = Field(default=False, strict=True, description="let colours change over time")
    densify_until_iter: Count = Field(default=15000, description="iterations of a stage in which Gaussians are added")
    densify_from_iter: Index = Field(default=500, description="iterations before the first densification")
    densification_interval: Count = Field(default=100, description="iterations between densifications")
    pruning_from_iter: Index = Field(default=500, description="iterations before the first pruning")
    pruning_interval: Count = Field(default=100, description="iterations between prunings")
    opacity_reset_interval: Count = Field(default=3000, description="iterations between resets of opacity to 0.01")
    max_gaussians: Count = Field(default=360000, description="no densification from this number of Gaussians on")
    min_gaussians_to_prune: Index = Field(default=200000, description="no pruning up to this number of Gaussians")
    percent_dense: Positive = Field(
        default=0.01, description="share of the extent of the cameras above which a Gaussian is split, not cloned"
    )
    densify_grad_threshold_coarse: Weight = Field(default=2e-4, description="gradient on the screen that densifies")
    densify_grad_threshold_fine_init: Weight = Field(default=2e-4, description="the same, at the start of stage fine")
    densify_grad_threshold_after: Weight = Field(default=2e-4, description="the same, at densify_until_iter")
    opacity_threshold_coarse: Weight = Field(default=5e-3, description="opacity below which Gaussians are pruned")
    opacity_threshold_fine_init: Weight = Field(default=5e-3, description="the same, at the start of stage fine")
    opacity_threshold_fine_after: Weight = Field(default=5e-3, description="the same, at densify_until_iter")
    add_point: bool = Field(default=False, strict=True, description="grow points beside lonely ones, too")
    checkpoint_iterations: tuple[Count, ...] = Field(
        default=(), description="iterations of either stage whose checkpoints are kept"
    )
    start_checkpoint: Annotated[Text | None, DYNAMIC_FILE] = Field(
        default=None, description="chkpnt_*.pth file to go on from, path or URL"
    )
    render_process: bool = Field(default=False, strict=True, description="keep pictures of the training")


class Evaluate(_Section):
    """Metrics and gallery."""

    effect = Effect(("evaluate",))

    image_downsample: Count | None = Field(
        default=None, description="metrics are taken on images averaged so; a multiple of ingest's; null: ingest's"
    )
    split: Literal["train", "valid", "test"] = Field(
        default="test", description="first, second or last third of the frames"
    )
    gallery_frames: Index = Field(default=6, description="frames shown beside their truth")
    device: Annotated[Device, NOTHING] = Field(default="auto", description=DEVICE)


class Render(_Section):
    """Pictures and films of the model."""

    effect = Effect(("render",))

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
    device: Annotated[Device, NOTHING] = Field(default="auto", description=DEVICE)


class Features(_Section):
    """A descriptor of the animal in each frame, whichever way it heads."""

    effect = Effect(("features",))

    encoder: Literal["gaussians", "images"] = Field(
        default="gaussians",
        description="moments of the Gaussians themselves, or a network's view of pictures of them from all round",
    )
    radius: Positive | None = Field(
        default=None,
        description="of the cylinder that is described, see unit; null: half of crop.ell; the same for recordings that "
        "are embedded together",
    )
    weights: Annotated[Text, Effect(("features",), applies=_if_images, names_files=is_weights_file)] = Field(
        default="IMAGENET1K_V1",
        description="of the ResNet-18 of images: torchvision's name, or a .safetensors or .pth file",
    )
    device: Annotated[Device, NOTHING] = Field(default="auto", description=DEVICE)


class Embedding(_Section):
    """Coordinates of behaviour, and what is alike."""

    effect = Effect(("embedding",))

    dimensions: Count = Field(default=50, description="of the embedding")
    fit_to: Literal["third", "all"] = Field(
        default="third",
        description="frames whose descriptors decide what the dimensions tell: the first third, as for training; or "
        "all, for behaviour that comes later too",
    )
    neighbours: Count = Field(default=8, description="most alike frames that are listed for each frame")
    apart_s: Weight = Field(default=1.0, description="seconds between a frame and its neighbours, at least")
    states: Count = Field(default=8, description="clusters of frames")
    seed: Index = Field(default=0, description="of the map and the clusters")


class Experiment(_Section):
    """Everything that determines the result of an experiment.

    Building one by hand raises pydantic's ValidationError (a ValueError) on bad values; the readers raise UserError.
    """

    name: Annotated[Text, Field(max_length=100), NOTHING] = Field(default="experiment", description="title of reports")
    data: Data = Field(description="the recording")
    unit: Annotated[Literal["m", "normalized"], Effect(("center_rotation", "crop"))] = Field(
        default="m", description="of ell: metres, or the distance of the farthest camera from the cameras' centre"
    )
    holdout_views: Annotated[tuple[Index, ...], Effect(("center_rotation", "crop", "train"))] = Field(
        default=(), description="cameras that tracking and training never see, from 0"
    )
    adaptive_camera: Annotated[bool, Effect(("center_rotation",))] = Field(
        default=False, strict=True, description="re-aim every camera at the animal in every frame; for rigs that drift"
    )
    reuse: Annotated[Text | None, NOTHING] = Field(
        default=None, description="project whose masks and images are read where they are the same"
    )
    scheduling: Scheduling = Field(default=Scheduling(), description="how work is cut up; never changes results")
    ingest: Ingest = Field(default=Ingest(), description="which frames and pixels are used")
    center_rotation: CenterRotation = Field(description="tracking of centre and heading")
    crop: Crop = Field(description="the box round the animal that the model works in")
    pack: Pack = Field(default=Pack(), description="which part of each image is stored")
    model: Model = Field(default=Model(), description="the network and its Gaussians")
    train: Train = Field(default=Train(), description="training")
    dynamic: Dynamic = Field(default=Dynamic(), description="the second trainer, optimised for one recording")
    evaluate: Evaluate = Field(default=Evaluate(), description="metrics and gallery")
    render: Render = Field(default=Render(), description="pictures and films")
    features: Features = Field(default=Features(), description="a descriptor of the animal in each frame")
    embedding: Embedding = Field(default=Embedding(), description="coordinates of behaviour, and what is alike")

    @model_validator(mode="before")
    @classmethod
    def _scene_of_dnerf(cls, raw: Any) -> Any:
        return with_dnerf_defaults(raw)

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

    @property
    def flat_gaussians(self) -> bool:
        """Whether Gaussians are discs, whose third scale means nothing. Only a network's can be, not dynamic ones."""
        return self.train.method == "pose_splatter" and self.model.gaussian_mode == "2d"

    def observed_views(self, n_cameras: int) -> tuple[int, ...]:
        """Indices of the cameras that tracking, carving and training see: all but `holdout_views`."""
        held_out = set(self.holdout_views)
        return tuple(c for c in range(n_cameras) if c not in held_out)

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
        """Read native YAML; dotted keys count as keys of their sections. Raises UserError, a line for each problem."""
        raw = parse_yaml(text)
        return _validate(nested(raw) if isinstance(raw, dict) else raw)

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
    url = urls.normalize(path)
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
    native, notes = _native(raw, urls.normalize(config_folder))
    try:
        return _validate(native), notes
    except UserError as error:
        _raise([classic.in_classic_words(line) for line in str(error).splitlines()])


def classic_project_directory(raw: dict[str, Any], config_folder: str = ".") -> str:
    """The project URL that a classic configuration names. Raises UserError where it names none."""
    value = raw.get("project_directory")
    if not isinstance(value, str) or not value:
        raise UserError("project_directory is missing: give the folder of the project")
    return classic.resolve(urls.normalize(config_folder), value)


def with_dnerf_defaults(raw: Any) -> Any:
    """A raw configuration whose `ingest.source` is dnerf, with what such a scene has; any other as it is.

    Its two cameras are `train` and `test`, which is held out; the box is that of the published tools, 2.6 long.
    """
    if not isinstance(raw, dict) or not isinstance(ingest := raw.get("ingest"), dict):
        return raw
    if ingest.get("source") != "dnerf":
        return raw
    sections: dict[str, dict[str, Any]] = {
        "data": {
            "videos": dnerf.FILES,
            "masks": dnerf.FILES,
            "camera_names": dnerf.SPLITS,
            "calibration": dnerf.FILES[0],
            "up": (0.0, 0.0, 1.0),
        },
        "center_rotation": {"ell": 2.6},
        "crop": {"ell": 2.6, "grid_size": 112, "volume_idx": ((0, 112),) * 3},
        "render": {"camera": 1},
    }
    filled = {"holdout_views": (1,), **raw}
    for name, values in sections.items():
        given = raw.get(name, {})
        filled[name] = {**values, **given} if isinstance(given, dict) else given
    return filled


# -- reading ------------------------------------------------------------------------------------------------------
def _read_text(url: str) -> str:
    try:
        data = objects.read_bytes(url)
    except FileNotFoundError:
        raise UserError("no such file; give a .yaml or a classic .json configuration") from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError("is a folder; give a .yaml or a classic .json configuration") from None
    except Exception as error:
        raise as_user_error(error, url) or error from None
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
        native, notes, project = nested(raw), [], None
    for override in overrides:
        _override(native, override)
    paths = (
        (native.get("data"), "directory", _any),
        (native, "reuse", _any),
        (native.get("train"), "start_from", _are_own_weights),
        (native.get("dynamic"), "initial_ply", _any),
        (native.get("dynamic"), "start_checkpoint", _any),
        (native.get("features"), "weights", is_weights_file),
    )
    for section, key, is_path in paths:
        written = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(written, str) and written.strip() and is_path(written):
            section[key] = classic.resolve(folder, written)
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
        seen = set()
        for i, value in enumerate(values or ()):
            if value in seen:
                yield f"data.{key}[{i}] = {value!r}: is listed twice; give every camera its own"
            seen.add(value)


def _problems(e: Experiment, n_cameras: int, width: int | None, height: int | None) -> Iterator[str]:
    """Combinations that cannot work; sizes in pixels, None where not known yet."""
    for i, view in enumerate(e.holdout_views):
        if view >= n_cameras:
            yield f"holdout_views[{i}] = {view}: there are {n_cameras} cameras; valid: 0 to {n_cameras - 1}"
        if i and view == e.holdout_views[i - 1]:  # they are sorted
            yield f"holdout_views[{i}] = {view}: is listed twice"
    moving = e.ingest.source == "dnerf"
    if moving and e.train.method != "dynamic":
        yield "ingest.source = 'dnerf': has one picture at a time; only train.method = dynamic can use it"
    if (observed := len(e.observed_views(n_cameras))) < 2 and not (moving and observed):
        most = f"hold out at most {max(n_cameras - 2, 0)}"
        yield f"holdout_views = {list(e.holdout_views)}: leaves {observed} of {n_cameras} cameras; {most}"
    if e.render.camera >= n_cameras:
        yield f"render.camera = {e.render.camera}: there are {n_cameras} cameras; nearest: {n_cameras - 1}"

    width, height = width or e.data.image_width, height or e.data.image_height
    common = math.gcd(width or 0, height or 0)  # 0, which everything divides: no size is known
    working, metrics = e.ingest.image_downsample, e.evaluate.image_downsample
    size = f"{width or '?'} x {height or '?'}"
    if common % working:
        near = _nearest(working, _divisors(common))
        yield f"ingest.image_downsample = {working}: does not divide images of {size}; nearest: {near}"
    if metrics is not None and (metrics % working or (common % metrics and not common % working)):
        if common and not common % working:
            near = _nearest(metrics, [d for d in _divisors(common) if d % working == 0])
        else:
            below = metrics // working * working
            near = _nearest(metrics, [d for d in (below, below + working) if 0 < d <= MAX_INT])
        fault = (
            f"is not a multiple of ingest.image_downsample = {working}"
            if metrics % working
            else f"does not divide images of {size}"
        )
        yield f"evaluate.image_downsample = {metrics}: {fault}; nearest: {near}"

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
    if e.train.gpus != "auto" and e.train.gpus > e.train.batch_frames:
        yield (
            f"train.gpus = {e.train.gpus}: they share the frames of a step, which has train.batch_frames = "
            f"{e.train.batch_frames}; nearest: {e.train.batch_frames}, or more frames"
        )
    if e.train.start_from == ANIMALS:
        for key, needed in OF_ANIMALS.items():
            if (given := getattr(e.model, key)) != needed:
                yield (
                    f"model.{key} = {given}: train.start_from = {ANIMALS} are weights of a network with {needed}; set "
                    f"it so, or train.start_from to {RANDOM}"
                )
    if e.model.min_gaussians > e.model.max_gaussians:
        limit = e.model.max_gaussians
        yield f"model.min_gaussians = {e.model.min_gaussians}: exceeds model.max_gaussians = {limit}; nearest: {limit}"
    voxels = math.prod(max(end - start, 0) for start, end in e.crop.volume_idx or ((0, n),) * 3)
    if 0 < voxels < e.model.min_gaussians:
        yield f"model.min_gaussians = {e.model.min_gaussians}: the crop has {voxels} voxels; nearest: {voxels}"


def _divisors(n: int) -> list[int]:
    """Divisors of a positive n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def _nearest(value: int, valid: Sequence[int]) -> str:
    """Those next to a value on both sides, of ascending numbers that it is not one of."""
    at = bisect.bisect(valid, value)
    return " or ".join(str(v) for v in valid[max(at - 1, 0) : at + 1])


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
