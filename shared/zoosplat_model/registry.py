"""Builds networks and predictors as the configuration names them."""

from __future__ import annotations

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.runs import Run
from zoosplat_model import checkpoints
from zoosplat_model.devices import pick_device
from zoosplat_model.dynamic.predictor import DynamicPredictor
from zoosplat_model.frames import FrameReader, open_reader
from zoosplat_model.network.predictor import SplatterPredictor
from zoosplat_model.network.splatter import PoseSplatter
from zoosplat_model.predictor import Predictor
from zoosplat_model.published import PublishedSplatter


def build_splatter(reader: FrameReader, experiment: Experiment, own: type[PoseSplatter] = PoseSplatter) -> PoseSplatter:
    """The untrained network that `model.network` names, for a recording, on the CPU.

    Args:
        reader: the recording.
        experiment: the settings.
        own: class of our own network.
    """
    network = PublishedSplatter if experiment.model.network == PublishedSplatter.network else own
    return network.from_reader(reader, experiment)


def open_predictor(run: Run, device: str = "auto", *, finished: bool = True) -> Predictor:
    """Load the best checkpoint of a run whose stages pack, center_rotation, crop and train are done.

    Args:
        run: whose results are read.
        device: see `pick_device`.
        finished: False takes the best checkpoint so far of a training that has not ended (dynamic: the newest).

    Raises:
        UserError: a stage is missing, the checkpoint is damaged, or the device does not exist.
    """
    chosen = pick_device(device)
    if finished:
        run.input_url("train")
    reader = open_reader(run, chosen)
    if run.experiment.train.method == "dynamic":
        return DynamicPredictor(reader, run, finished=finished)
    model = build_splatter(reader, run.experiment).move_to(chosen)
    checkpoint = checkpoints.load(run.output_url("train"), "best")
    if checkpoint is None:
        raise UserError(f"{run.output_url('train')}: no checkpoint; run stage train again with --force")
    try:
        model.load_state_dict(checkpoint.average)
    except RuntimeError:  # names or shapes differ
        url = run.output_url("train")
        why = "does not fit the configuration, or is another version's; run stage train again with --force"
        raise UserError(f"{url}: the checkpoint {why}") from None
    return SplatterPredictor(reader, model.freeze_for_inference(), checkpoint.step)
