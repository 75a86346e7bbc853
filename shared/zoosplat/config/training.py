"""The sections of the configuration that say how a model is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from zoosplat.config.effect import NO_EFFECT, Condition, Effect, Section
from zoosplat.config.sections import is_given
from zoosplat.config.values import (
    DEVICE_DESCRIPTION,
    MAX_INT,
    Count,
    Device,
    Index,
    NonNegative,
    Positive,
    Text,
)

RANDOM = "random"  # The value of train.start_from for weights that are drawn at random.
ANIMALS = "animals"  # The value of train.start_from for the weights that come with the package.
# The network that the weights ANIMALS are of: keys of the section model.
ANIMALS_NETWORK = {"network": "zoosplat", "num_unets": 3, "base_filters": 16, "poolings": 3, "bottleneck": 0}
OF_NETWORK = Condition("train.method", "pose_splatter")
OF_DYNAMIC = Condition("train.method", "dynamic")


def is_own_weights(start_from: Any) -> bool:
    """Whether `train.start_from` names weights of the user's own: a file, or the project of a training."""
    return start_from not in (RANDOM, ANIMALS)


DYNAMIC_FILE = Effect(("train",), only_if=OF_DYNAMIC, names_files=is_given)


class Model(Section):
    """The network and its Gaussians."""

    effect = Effect(("train",), only_if=OF_NETWORK)

    network: Literal["zoosplat", "published"] = Field(
        default="zoosplat", description="published: that of arXiv 2505.18342, for comparison; slow"
    )
    volume_fill_color: Annotated[NonNegative, Field(le=1)] = Field(
        default=0.38, description="grey of empty voxels, 0 to 1"
    )
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


class Train(Section):
    """Training, on the first third of the frames unless `fit_to` says otherwise."""

    effect = Effect(("train",), only_if=OF_NETWORK)

    method: Annotated[Literal["pose_splatter", "dynamic"], Effect(("train",))] = Field(
        default="pose_splatter",
        description="one network for all frames, or Gaussians and their motion optimised for all frames; see dynamic",
    )
    fit_to: Literal["third", "all"] = Field(
        default="third",
        description="frames to train on: the first third, so that metrics of the others are of frames never seen; or "
        "all but those that validate, for the best reconstruction: then only held-out views are new to it",
    )
    start_from: Annotated[Text, Effect(("train",), only_if=OF_NETWORK, names_files=is_own_weights)] = Field(
        default=RANDOM,
        description="weights to begin with: random; animals, that have learned from random animals (a network of 3 "
        "U-Nets, 16 filters, 3 poolings); or a project, or a .safetensors file",
    )
    lr: Positive = Field(default=1e-4, description="learning rate of Adam")
    epochs: Count = Field(default=50, description="passes over the training frames")
    max_minutes: Positive | None = Field(default=None, description="stop earlier, after this time; null: no limit")
    batch_frames: Count = Field(default=1, description="frames in one step, each with all its observed views")
    gpus: Annotated[Count | Literal["auto"], NO_EFFECT] = Field(
        default="auto", description="that share the frames of a step; auto: all there are, a frame each at least"
    )
    img_lambda: NonNegative = Field(default=0.5, description="weight of the colour error")
    square_lambda: NonNegative = Field(
        default=0.0,
        description="weight of the squared colour error; 2, with opacity_lambda and deep_lambda doubled, favours PSNR",
    )
    ssim_lambda: NonNegative = Field(default=0.0, description="weight of 1 - SSIM")
    plate_lambda: Annotated[NonNegative, Effect(("train",), only_if=OF_NETWORK, neutral=(0,))] = Field(
        default=0.0,
        description="weight of the colour error over the cameras' plates against the raw pictures, which no mask "
        "touches; needs data.masks: auto, or data.backgrounds",
    )
    opacity_lambda: NonNegative = Field(
        default=0.0,
        description="weight of the Gaussians' mean opacity: none where no view needs one; 0.03 pays on clean masks",
    )
    deep_lambda: NonNegative = Field(
        default=0.0, description="weight of what the U-Nets leave to the last one; 0.1 pays where poses differ much"
    )
    leave_out: Annotated[NonNegative, Field(le=1)] = Field(
        default=0.7, description="share of steps that carve without one of the views, a lesson for new views; 0 to 1"
    )
    jitter_voxels: NonNegative = Field(
        default=2.0, description="how far the animal's place is off at most, in training"
    )
    jitter_radians: NonNegative = Field(default=0.3, description="how far its heading is off at most, in training")
    jitter_tilt: NonNegative = Field(
        default=0.0, description="how far it is tilted at most, in training, radians: for poses like rearing"
    )
    # A validation decides which weights are kept, so it changes the result, and a plot does not.
    valid_every: Count = Field(default=1, description="epochs between validations")
    plot_every: Annotated[Count, NO_EFFECT] = Field(default=1, description="epochs between plots")
    save_every: Annotated[Count, NO_EFFECT] = Field(default=1, description="epochs between checkpoints")
    keep_last: Annotated[Count, NO_EFFECT] = Field(default=2, description="checkpoints that are kept")
    seed: Annotated[Index, Effect(("train",))] = Field(default=0, description="of initial weights and order of frames")
    device: Annotated[Device, NO_EFFECT] = Field(default="auto", description=DEVICE_DESCRIPTION)

    @field_validator("gpus", mode="before")
    @classmethod
    def _check_gpus(cls, value: Any) -> Any:
        if value == "auto" or (type(value) is int and 1 <= value <= MAX_INT):
            return value
        raise ValueError("must be auto or a whole number, 1 at least")


class Dynamic(Section):
    """The second trainer, `train.method: dynamic`. Lengths: half the crop's longest side is 1.3."""

    effect = Effect(("train",), only_if=OF_DYNAMIC)

    coarse_iterations: Index = Field(default=3000, description="without motion; each iteration is a frame")
    fine_iterations: Index = Field(default=20000, description="with motion")
    views: Count = Field(default=2, description="cameras that an iteration renders its frame from")
    initial_points: Count = Field(default=10000, description="points sampled in the visual hulls to start from")
    initial_ply: Annotated[Text | None, DYNAMIC_FILE] = Field(
        default=None, description="PLY file of points to start from instead, in scene units"
    )
    lambda_dssim: NonNegative = Field(default=0.0, description="weight of 1 - SSIM beside the L1 error of colours")
    lambda_mask: NonNegative = Field(default=0.0, description="weight of the L1 error of opacity against the masks")
    plane_tv_weight: NonNegative = Field(default=1e-4, description="weight of the roughness of the planes over space")
    time_smoothness_weight: NonNegative = Field(
        default=1e-2, description="weight of the roughness of the planes over time"
    )
    l1_time_planes: NonNegative = Field(
        default=1e-4, description="weight of the distance of the planes over time from 1"
    )
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
    densify_grad_threshold_coarse: NonNegative = Field(
        default=2e-4, description="gradient on the screen that densifies"
    )
    densify_grad_threshold_fine_init: NonNegative = Field(
        default=2e-4, description="the same, at the start of stage fine"
    )
    densify_grad_threshold_after: NonNegative = Field(default=2e-4, description="the same, at densify_until_iter")
    opacity_threshold_coarse: NonNegative = Field(default=5e-3, description="opacity below which Gaussians are pruned")
    opacity_threshold_fine_init: NonNegative = Field(default=5e-3, description="the same, at the start of stage fine")
    opacity_threshold_fine_after: NonNegative = Field(default=5e-3, description="the same, at densify_until_iter")
    add_point: bool = Field(default=False, strict=True, description="grow points beside lonely ones, too")
    checkpoint_iterations: tuple[Count, ...] = Field(
        default=(), description="iterations of either stage whose checkpoints are kept"
    )
    start_checkpoint: Annotated[Text | None, DYNAMIC_FILE] = Field(
        default=None, description="chkpnt_*.pth file to go on from, path or URL"
    )
    render_process: bool = Field(default=False, strict=True, description="keep pictures of the training")
