"""The configuration of an experiment: one frozen, typed model with a section for each stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from zoosplat.config import checks
from zoosplat.config.dnerf_defaults import with_dnerf_defaults
from zoosplat.config.effect import NO_EFFECT, Effect, Section
from zoosplat.config.messages import describe_errors
from zoosplat.config.sections import (
    CenterRotation,
    Crop,
    Data,
    Embedding,
    Evaluate,
    Features,
    Ingest,
    Pack,
    Render,
    Scheduling,
    Segment,
)
from zoosplat.config.serialization import dump, nest_dotted_keys, parse_yaml
from zoosplat.config.training import Dynamic, Model, Train
from zoosplat.config.values import Index, Text
from zoosplat.errors import UserError


class Experiment(Section):
    """Everything that determines the result of an experiment.

    Building one by hand raises pydantic's ValidationError (a ValueError) on bad values; the readers raise UserError.
    """

    name: Annotated[Text, Field(max_length=100), NO_EFFECT] = Field(
        default="experiment", description="title of reports"
    )
    data: Data = Field(description="the recording")
    unit: Annotated[Literal["m", "normalized"], Effect(("segment", "center_rotation", "crop"))] = Field(
        default="m", description="of ell: metres, or the distance of the farthest camera from the cameras' centre"
    )
    holdout_views: Annotated[tuple[Index, ...], Effect(("segment", "center_rotation", "crop", "train"))] = Field(
        default=(), description="cameras that tracking and training never see, from 0"
    )
    adaptive_camera: Annotated[bool, Effect(("center_rotation",))] = Field(
        default=False, strict=True, description="re-aim every camera at the animal in every frame; for rigs that drift"
    )
    reuse: Annotated[Text | None, NO_EFFECT] = Field(
        default=None, description="project whose masks and images are read where they are the same"
    )
    scheduling: Scheduling = Field(default=Scheduling(), description="how work is cut up; never changes results")
    segment: Segment = Field(default=Segment(), description="masks from the raw videos, where data.masks is auto")
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
    def _fill_in_dnerf_scene(cls, raw: Any) -> Any:
        return with_dnerf_defaults(raw)

    @field_validator("holdout_views")
    @classmethod
    def _sort(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(value))

    @model_validator(mode="after")
    def _check_combinations(self) -> Experiment:
        problems = [
            *checks.mask_problems(self.data, self.ingest),
            *checks.plate_problems(self.data, self.ingest, self.train),
            *checks.list_problems(self.data),
            *self._problems(len(self.data.videos), None, None),
        ]
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
        problems += self._problems(n_cameras, width, height)
        if problems:
            raise UserError("\n".join(problems))

    def _problems(self, n_cameras: int, width: int | None, height: int | None) -> Iterator[str]:
        """Combinations of keys that cannot work; sizes in pixels, None where they are not known yet."""
        yield from checks.camera_problems(self.holdout_views, n_cameras, self.ingest, self.train, self.render)
        yield from checks.image_size_problems(self.data, self.ingest, self.evaluate, width, height)
        yield from checks.crop_problems(self.crop)
        yield from checks.training_problems(self.train, self.model, self.crop)

    def to_yaml(self) -> str:
        """YAML that `from_yaml` reads back to an equal experiment."""
        return dump(self.model_dump(mode="json"), default_flow_style=False)

    @classmethod
    def from_yaml(cls, text: str) -> Experiment:
        """Read native YAML; dotted keys count as keys of their sections. Raises UserError, a line for each problem."""
        raw = parse_yaml(text)
        return cls.from_raw(nest_dotted_keys(raw) if isinstance(raw, dict) else raw)

    @classmethod
    def from_raw(cls, raw: Any) -> Experiment:
        """The experiment of nested keys and their plain values. Raises UserError, a line for each problem."""
        if not isinstance(raw, dict):
            raise UserError("must be a mapping of keys to values")
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise UserError("\n".join(describe_errors(error, cls))) from None

    def describe(self) -> str:
        """YAML of the experiment with the meaning and unit of each key as a comment; `from_yaml` reads it too."""
        return "".join(_commented_yaml(self, ""))


def _commented_yaml(section: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"\n{indent}{name}:  # {field.description}\n"
            yield from _commented_yaml(value, indent + "  ")
        else:
            plain = dump({name: section.model_dump(mode="json")[name]}, default_flow_style=True).strip()
            # A flow mapping of one key, without its braces, is a block mapping.
            yield f"{indent}{plain[1:-1]}".ljust(32) + f"  # {field.description}\n"
