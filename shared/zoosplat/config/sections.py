"""The sections of the configuration, but for those of the training."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from zoosplat.config.effect import NO_EFFECT, Condition, Effect, Section
from zoosplat.config.paths import resolve_path
from zoosplat.config.values import (
    DEVICE_DESCRIPTION,
    Count,
    Device,
    Index,
    IndexRange,
    NonNegative,
    Positive,
    Real,
    RecordingFile,
    Text,
    check_location,
)
from zoosplat.storage import urls

CROP_MULTIPLE = 16  # Voxels. The published U-Net halves a crop four times, so each edge is a multiple of 2**4.
WEIGHTS_FILES = (".safetensors", ".pth", ".pt")  # The endings by which features.weights is a file.
MASK_VALUES = ("auto", "white", "inverted", "alpha", "nonzero")  # data.mask_values, if it is no list of labels.
MAX_LABEL = 65535  # The largest value of a pixel in a PNG picture of 16 bits.
MAX_UP_COMPONENT = 1e9  # Larger components of data.up would overflow when they are squared.
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # Of a model at the Hugging Face hub.
OF_VIDEOS = Condition("ingest.source", "videos")
OF_DNERF_SCENE = Condition("ingest.source", "dnerf")
OF_IMAGES = Condition("features.encoder", "images")
OF_SAM = Condition("segment.method", "sam")
INGEST = Effect(("ingest",))
READING = Effect(("segment", "ingest"))  # Of keys by which both the raw videos and the masks are read.
AUTO = "auto"  # The value of data.masks for masks that stage segment makes.


def is_weights_file(weights: str) -> bool:
    """Whether `features.weights` is a file rather than a name that torchvision knows."""
    return weights.endswith(WEIGHTS_FILES)


def is_weights_folder(weights: str) -> bool:
    """Whether `segment.sam_weights` is a folder rather than a name at the hub, such as facebook/sam2.1-hiera-large."""
    return weights.startswith(("/", "./", "../", "~")) or "://" in weights


def _always(value: Any) -> bool:
    return True


def _is_up_file(up: Any) -> bool:
    return isinstance(up, str) and up != "auto"


def is_given(value: Any) -> bool:
    """Whether a key that may be null names a file, or files."""
    return value is not None


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _kind_of_masks(value: Any) -> str:
    return "made" if value == AUTO else "files"


Masks = Annotated[
    Annotated[Literal["auto"], Tag("made")] | Annotated[tuple[RecordingFile, ...], Field(min_length=2), Tag("files")],
    Discriminator(_kind_of_masks),
]


class Data(Section):
    """The recording."""

    # The pictures of a D-NeRF scene have no keys of their own, so the folder stands for them.
    directory: Annotated[Text, Effect(("ingest", "pack"), only_if=OF_DNERF_SCENE, names_files=_always)] = Field(
        description="folder or s3:// URL of the recording; relative to this file's folder"
    )
    # Stage ingest reads them too: the recording's length and frame rate come from the videos.
    videos: Annotated[
        tuple[RecordingFile, ...], Effect(("segment", "ingest", "pack"), only_if=OF_VIDEOS, names_files=_always)
    ] = Field(min_length=2, description="RGB videos, one a camera, relative to directory")
    masks: Annotated[Masks, Effect(("ingest",), only_if=OF_VIDEOS, names_files=_is_list)] = Field(
        description="masks, one entry a camera, in the same order: a video, a folder of pictures that are numbered by "
        "frame, or their pattern, such as masks/0/%05d.png; or auto: stage segment makes them from the videos"
    )
    mask_values: Annotated[
        Literal["auto", "white", "inverted", "alpha", "nonzero"] | tuple[Index, ...],
        Effect(("ingest",), only_if=OF_VIDEOS, neutral=("auto",)),
    ] = Field(
        default="auto",
        description="which pixels of a mask are the animal: auto: white, 1 or opaque, if nothing else can be meant; "
        "white: half of white or more; inverted: black; alpha: opaque; nonzero: all but 0; or a list of labels",
    )
    backgrounds: Annotated[
        tuple[RecordingFile, ...] | None,
        Effect(("segment", "pack"), only_if=OF_VIDEOS, names_files=is_given, neutral=(None,)),
    ] = Field(
        default=None,
        description="pictures or videos of the empty scene, one a camera, in the same order; null: there are none",
    )
    keypoints: Annotated[
        tuple[RecordingFile, ...] | None,
        Effect(("segment",), only_if=OF_VIDEOS, names_files=is_given, neutral=(None,)),
    ] = Field(
        default=None,
        description="keypoints in the raw videos, one file a camera, in the same order, of SLEAP (.slp, analysis .h5), "
        "DeepLabCut (.h5, .csv) or Lightning Pose (.csv): they help masks: auto; null: there are none",
    )
    camera_names: Annotated[tuple[Text, ...] | None, READING] = Field(
        default=None, description="names in tables and plots; null: 0, 1, 2, ..."
    )
    # The file names matter: a suffix tells the format, and DANNCE names the file of a camera after the camera.
    calibration: Annotated[
        str | tuple[str, ...],
        Effect(READING.stages, only_if=OF_VIDEOS, names_files=_always, file_names_matter=True),
    ] = Field(description="calibration file, or one a camera; relative to directory, or a whole path or URL")
    calibration_format: Annotated[Literal["auto", "hdf5", "dannce", "anipose", "pickle"], READING] = Field(
        default="auto", description="auto: by the file's name and content"
    )
    calibration_unit: Annotated[Literal["auto", "m", "mm"], READING] = Field(
        default="auto", description="unit of the translations; auto: what the format usually has"
    )
    up: Annotated[
        Literal["auto"] | tuple[Real, Real, Real] | str,
        Effect(READING.stages, only_if=OF_VIDEOS, names_files=_is_up_file),
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

    @field_validator("masks", mode="before")
    @classmethod
    def _check_masks(cls, value: Any) -> Any:
        if not _is_list(value) and value != AUTO:
            raise ValueError("must be auto, or a list of files, one a camera")
        return value

    # These run before pydantic, which would try every member of the union and complain about each.
    @field_validator("mask_values", mode="before")
    @classmethod
    def _check_mask_values(cls, value: Any) -> Any:
        if _is_list(value) and value and all(type(v) is int and 0 <= v <= MAX_LABEL for v in value):
            return tuple(sorted(set(value)))
        if isinstance(value, str) and value in MASK_VALUES:
            return value
        raise ValueError(
            f"must be one of {', '.join(MASK_VALUES)}, or a list of values from 0 to {MAX_LABEL}, such as [1, 2]"
        )

    @field_validator("calibration", mode="before")
    @classmethod
    def _check_calibration(cls, value: Any) -> Any:
        names = value if _is_list(value) else [value]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("must be the name of a file, or a list of names, one a camera")
        for name in names:
            check_location(name)
        return value

    @field_validator("up", mode="before")
    @classmethod
    def _check_up(cls, value: Any) -> Any:
        if (
            _is_list(value)
            and len(value) == 3
            and all(type(v) in (int, float) and abs(v) < MAX_UP_COMPONENT for v in value)
        ):
            if math.hypot(*value) > 0:
                return value
        elif isinstance(value, str) and (value == "auto" or value.endswith(".npz")):
            return check_location(value)
        raise ValueError("must be auto, a direction [x, y, z] that is not zero, or the name of an .npz file")

    @property
    def masks_are_made(self) -> bool:
        """Whether stage segment makes the masks from the videos, so that they are no files."""
        return self.masks == AUTO

    def url(self, name: str) -> str:
        """Where a video, mask, background, calibration or up file lies: relative names are below `directory`."""
        return resolve_path(urls.normalize(self.directory), name)


class Scheduling(Section):
    """How work is cut into shards; never changes results."""

    effect = NO_EFFECT

    frames_per_shard: Count = Field(default=1000, description="video frames in one shard of work")


class Segment(Section):
    """How masks are made from the raw videos, where data.masks is auto."""

    effect = Effect(("segment",))

    method: Literal["network", "sam"] = Field(
        default="network",
        description="what tells the animal from its background: the network that comes along; or sam: SAM 2 or SAM 3, "
        "which zoosplat[sam] installs, at the places that the network and all views together find",
    )
    sam_weights: Annotated[Text, Effect(("segment",), only_if=OF_SAM, names_files=is_weights_folder)] = Field(
        default="facebook/sam2.1-hiera-large",
        description="weights of SAM 2 or SAM 3: a name at the Hugging Face hub, or a folder (a whole path, or ./folder "
        "relative to this file's) with config.json, .safetensors and the processor's files",
    )
    sam_prompt: Annotated[Text | None, Effect(("segment",), only_if=OF_SAM)] = Field(
        default=None, description="what SAM 3 looks for, such as: mouse; null: boxes and points are the only prompt"
    )
    background_frames: Count = Field(
        default=60, description="frames, spread over the recording, in which the background is looked for"
    )
    adapt_minutes: NonNegative = Field(
        default=0.0,
        description="time for which the network learns from what all views agree on; 0: it does not, because masks of "
        "synthetic recordings did not become better",
    )
    rounds: Count = Field(
        default=2, description="how often what all views tell of a frame together is told to each of them"
    )
    min_agreement: Annotated[NonNegative, Field(le=1)] = Field(
        default=0.3,
        description="a view whose mask agrees less (IoU) with what the other views tell counts as absent from that "
        "frame; 0: none does",
    )
    device: Annotated[Device, NO_EFFECT] = Field(default="auto", description=DEVICE_DESCRIPTION)

    @field_validator("sam_weights")
    @classmethod
    def _check_weights(cls, value: str) -> str:
        if not is_weights_folder(value) and not HUB_NAME.fullmatch(value):
            raise ValueError("must be a name at the hub, OWNER/MODEL, or a folder: a whole path, or ./FOLDER")
        return value


class Ingest(Section):
    """Which frames and pixels are used."""

    effect = INGEST

    source: Literal["videos", "dnerf"] = Field(
        default="videos",
        description="videos of fixed cameras, or a scene of transforms_train.json and transforms_test.json",
    )
    frame_jump: Annotated[Count, READING] = Field(default=1, description="keep every n-th video frame: 0, n, 2n, ...")
    max_frames: Annotated[Count | None, READING] = Field(default=None, description="kept frames at most; null: all")
    image_downsample: Count = Field(
        default=1, description="images are averaged over n x n pixels; divides width and height"
    )
    on_short: Annotated[Literal["error", "truncate"], READING] = Field(
        default="error", description="when videos differ in length: stop, or use the shortest length"
    )


class CenterRotation(Section):
    """Tracking of centre and heading."""

    effect = Effect(("center_rotation",))

    # Stage segment carves the animal in this cube too.
    ell: Annotated[Positive, Effect(("segment", "center_rotation"))] = Field(
        description="edge of the tracking cube, which has room to spare; see unit"
    )
    grid_size: Annotated[Count, Field(le=1024)] = Field(
        default=112, description="voxels along an edge of the tracking cube"
    )


class Crop(Section):
    """The box round the animal that the model works in."""

    effect = Effect(("crop",))

    ell: Positive = Field(description="edge of the model's cube, from which the box is cut; see unit")
    grid_size: Annotated[Count, Field(ge=CROP_MULTIPLE, le=1024)] = Field(
        default=112, description="voxels along an edge of the model's cube"
    )
    volume_idx: tuple[IndexRange, IndexRange, IndexRange] | None = Field(
        default=None,
        description="index ranges [start, end) along x, y, z, multiples of 16 long; null: decided by the stage",
    )
    min_voxels: Count = Field(default=1, description="hull voxels, over all frames, that keep a grid index")


class Pack(Section):
    """Which part of each image is stored."""

    effect = Effect(("pack",))

    window: Literal["full", "auto"] = Field(default="auto", description="whole frames, or a window round the animal")


class Evaluate(Section):
    """Metrics and gallery."""

    effect = Effect(("evaluate",))

    image_downsample: Count | None = Field(
        default=None, description="metrics are taken on images averaged so; a multiple of ingest's; null: ingest's"
    )
    split: Literal["train", "valid", "test"] = Field(
        default="test", description="first, second or last third of the frames"
    )
    gallery_frames: Index = Field(default=6, description="frames shown beside their truth")
    lpips_weights: Annotated[Text | None, Effect(("evaluate",), names_files=is_given, neutral=(None,))] = Field(
        default=None, description="file of AlexNet's or VGG's weights for the metric LPIPS, path or URL; null: without"
    )
    device: Annotated[Device, NO_EFFECT] = Field(default="auto", description=DEVICE_DESCRIPTION)


class Render(Section):
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
    device: Annotated[Device, NO_EFFECT] = Field(default="auto", description=DEVICE_DESCRIPTION)


class Features(Section):
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
    weights: Annotated[Text, Effect(("features",), only_if=OF_IMAGES, names_files=is_weights_file)] = Field(
        default="IMAGENET1K_V1",
        description="of the ResNet-18 of images: torchvision's name, or a .safetensors or .pth file",
    )
    device: Annotated[Device, NO_EFFECT] = Field(default="auto", description=DEVICE_DESCRIPTION)


class Embedding(Section):
    """Coordinates of behaviour, and what is alike."""

    effect = Effect(("embedding",))

    dimensions: Count = Field(default=50, description="of the embedding")
    fit_to: Literal["third", "all"] = Field(
        default="third",
        description="frames whose descriptors decide what the dimensions tell: the first third, as for training; or "
        "all, for behaviour that comes later too",
    )
    neighbours: Count = Field(default=8, description="most alike frames that are listed for each frame")
    apart_s: NonNegative = Field(default=1.0, description="seconds between a frame and its neighbours, at least")
    states: Count = Field(default=8, description="clusters of frames")
    seed: Index = Field(default=0, description="of the map and the clusters")
