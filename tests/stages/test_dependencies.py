"""Which keys determine which results: every key declares it, and identities follow what is declared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest

from zoosplat.config.effect import StageName
from zoosplat.config.experiment import Experiment
from zoosplat.config.load import load_config
from zoosplat.errors import UserError
from zoosplat.stages.dependencies import declared_effects, outside_files, settings_of
from zoosplat.stages.registry import PIPELINE, PREPROCESSING, pipeline_of, reads_of, upstream, wants_gpu
from zoosplat.stages.results import Request

STAGES: tuple[StageName, ...] = get_args(StageName)
DEMO = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
WITHOUT_EFFECT = {
    *("name", "reuse", "scheduling.frames_per_shard"),
    *("train.device", "train.gpus", "train.keep_last", "train.plot_every", "train.save_every"),
    *("segment.device", "evaluate.device", "render.device", "features.device"),
}
FILES = "data.masks=[masks/0.mp4, masks/1.mp4, masks/2.mp4, masks/3.mp4, masks/4.mp4, masks/5.mp4]"
DYNAMIC, IMAGES, MADE = "train.method=dynamic", "features.encoder=images", "data.masks=auto"
EMPTY_SCENE = "data.backgrounds=[u, v, w, x, y, z]"
KEYPOINTS = "data.keypoints=[u, v, w, x, y, z]"
SAM = "segment.method=sam"
# Keys that no identity has at their default, with another value.
VALUES = ["data.mask_values=nonzero"]
GIVEN = [EMPTY_SCENE, "evaluate.lpips_weights=a.pth", "train.plate_lambda=0.5"]


def experiment(*overrides: str) -> Experiment:
    return load_config(DEMO, [FILES, *overrides]).experiment


def identity(stage: StageName, e: Experiment) -> str:
    """All that a result's identity has of the configuration: settings, and the places of files."""
    return json.dumps([settings_of(stage, e), outside_files(stage, e)], sort_keys=True)


def changed(base: list[str], *overrides: str) -> set[str]:
    """Stages whose own identity the overrides change."""
    one, other = experiment(*base), experiment(*base, *overrides)
    return {stage for stage in STAGES if identity(stage, one) != identity(stage, other)}


def leaves(value: Any, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {prefix[:-1]}
    return {key for name, inner in value.items() for key in leaves(inner, f"{prefix}{name}.")}


def test_stages_are_those_of_the_pipeline() -> None:
    assert tuple(spec.name for spec in PIPELINE) == STAGES


def test_every_key_declares_what_it_determines() -> None:
    assert set(declared_effects()) == leaves(experiment().model_dump())
    assert {key for key, effect in declared_effects().items() if not effect.stages} == WITHOUT_EFFECT
    for key, effect in declared_effects().items():
        assert set(effect.stages) <= set(STAGES), key
        assert list(effect.stages) == sorted(effect.stages, key=STAGES.index), key


def test_keys_at_their_neutral_value_leave_identities_as_they_were_before_these_keys() -> None:
    e = experiment()
    for key in ("data.backgrounds", "data.keypoints", "evaluate.lpips_weights", "train.plate_lambda"):
        assert declared_effects()[key].neutral
        for stage in STAGES:
            assert key not in settings_of(stage, e)
            assert not any(file.startswith(key) for file in outside_files(stage, e))
    assert "train.square_lambda" in settings_of("train", e)


def test_every_key_with_an_effect_is_part_of_an_identity() -> None:
    """In the experiments in which it is looked at; all shown here but those of a D-NeRF scene."""
    seen: set[str] = set()
    for overrides in ([], [DYNAMIC, "dynamic.initial_ply=a.ply"], [IMAGES], [MADE, SAM, KEYPOINTS], GIVEN, VALUES):
        for stage in STAGES:
            e = experiment(*overrides)
            keys = {*settings_of(stage, e), *(key.split("[")[0] for key in outside_files(stage, e))}
            assert all(stage in declared_effects()[key].stages for key in keys)
            seen |= keys
    assert seen == set(declared_effects()) - WITHOUT_EFFECT - {"data.directory"}


@pytest.mark.parametrize(
    ("base", "override", "stages"),
    [
        ([], "name=other", set()),
        ([], "reuse=other", set()),
        ([], "scheduling.frames_per_shard=7", set()),
        ([], "train.keep_last=5", set()),
        ([], "train.plot_every=5", set()),
        ([], "train.save_every=5", set()),
        ([], "train.device=cpu", set()),
        ([], "features.device=cpu", set()),
        ([], "train.valid_every=5", {"train"}),
        ([], "holdout_views=[1]", {"center_rotation", "crop", "train"}),
        ([], "unit=normalized", {"center_rotation", "crop"}),
        ([], "adaptive_camera=true", {"center_rotation"}),
        ([], "ingest.frame_jump=2", {"ingest"}),
        ([], "data.fps=50", {"ingest"}),
        ([], "data.up=[0, 0, 1]", {"ingest"}),
        ([], "data.camera_names=[a, b, c, d, e, f]", {"ingest"}),
        ([], "data.videos=[a, b, c, d, e, f]", {"ingest", "pack"}),
        ([], "data.masks=[a, b, c, d, e, f]", {"ingest"}),
        ([], "data.mask_values=nonzero", {"ingest"}),
        ([], "data.mask_values=[1, 2]", {"ingest"}),
        (["data.mask_values=[2, 1]"], "data.mask_values=[1, 2, 1]", set()),
        # As before there was the key, so that earlier results keep their ids.
        ([], "data.mask_values=auto", set()),
        ([], "data.directory=elsewhere", {"ingest", "pack"}),
        ([], EMPTY_SCENE, {"pack"}),
        ([], "data.backgrounds=null", set()),
        ([MADE], KEYPOINTS, {"segment"}),
        ([MADE], "segment.method=sam", {"segment"}),
        ([MADE, SAM], "segment.sam_weights=facebook/sam3", {"segment"}),
        ([MADE, SAM], "segment.sam_prompt=mouse", {"segment"}),
        ([MADE], "segment.sam_weights=facebook/sam3", set()),
        ([], "evaluate.lpips_weights=a.pth", {"evaluate"}),
        ([EMPTY_SCENE], "train.plate_lambda=0.5", {"train"}),
        ([], "train.plate_lambda=0", set()),
        ([], "crop.grid_size=80", {"crop"}),
        ([], "evaluate.gallery_frames=2", {"evaluate"}),
        ([], "render.camera=2", {"render"}),
        ([], "embedding.states=5", {"embedding"}),
        ([], "features.radius=0.1", {"features"}),
        ([], "train.seed=1", {"train"}),
        ([], "model.max_gaussians=9000", {"train"}),
        ([], "train.start_from=other", {"train"}),
        ([], DYNAMIC, {"train"}),
        # Masks that are made from the videos.
        ([], MADE, set(STAGES[:2])),
        ([MADE], EMPTY_SCENE, {"segment", "pack"}),
        ([MADE], "data.videos=[a, b, c, d, e, f]", {"segment", "ingest", "pack"}),
        ([MADE], "data.up=[0, 0, 1]", {"segment", "ingest"}),
        ([MADE], "data.fps=50", {"ingest"}),
        ([MADE], "holdout_views=[1]", {"segment", "center_rotation", "crop", "train"}),
        ([MADE], "unit=normalized", {"segment", "center_rotation", "crop"}),
        ([MADE], "center_rotation.ell=0.3", {"segment", "center_rotation"}),
        ([MADE], "ingest.frame_jump=2", {"segment", "ingest"}),
        ([MADE], "ingest.max_frames=9", {"segment", "ingest"}),
        ([MADE], "ingest.on_short=truncate", {"segment", "ingest"}),
        ([MADE], "ingest.image_downsample=2", {"ingest"}),
        ([MADE], "segment.rounds=3", {"segment"}),
        ([MADE], "segment.device=cpu", set()),
        ([], "segment.rounds=3", set()),
        ([], "center_rotation.ell=0.3", {"center_rotation"}),
        # What the other trainer or encoder would be told.
        ([], "dynamic.views=3", set()),
        ([], "dynamic.initial_ply=a.ply", set()),
        ([], "features.weights=a.pth", set()),
        ([DYNAMIC], "model.max_gaussians=9000", set()),
        ([DYNAMIC], "train.lr=1e-3", set()),
        ([DYNAMIC], "train.start_from=other", set()),
        ([DYNAMIC], "train.seed=1", {"train"}),
        ([DYNAMIC], "dynamic.views=3", {"train"}),
        ([DYNAMIC], "dynamic.initial_ply=a.ply", {"train"}),
        ([DYNAMIC], "dynamic.start_checkpoint=a.pth", {"train"}),
        ([IMAGES], "features.weights=a.pth", {"features"}),
    ],
)
def test_a_key_changes_the_stages_that_it_declares_and_no_other(
    base: list[str], override: str, stages: set[str]
) -> None:
    assert changed(base, override) == stages


def test_a_key_that_came_later_is_absent_at_its_default() -> None:
    assert "data.mask_values" not in settings_of("ingest", experiment())
    assert settings_of("ingest", experiment("data.mask_values=[3]"))["data.mask_values"] == [3]


def test_the_content_of_files_counts_and_not_their_places() -> None:
    moved = ["data.directory=s3://lab/moved", "train.start_from=s3://lab/a.safetensors"]
    files = ["dynamic.initial_ply=a.ply", "dynamic.start_checkpoint=a.pth", "features.weights=a.pth"]
    for base in ([], [DYNAMIC], [IMAGES]):
        one = experiment(*base, *files, "train.start_from=b.safetensors")
        other = experiment(*base, *moved, *[text.replace("=a", "=/elsewhere/b") for text in files])
        for stage in STAGES:
            assert settings_of(stage, one) == settings_of(stage, other)
            assert outside_files(stage, one).keys() == outside_files(stage, other).keys()
    # A calibration's own name says its format, and the names of DANNCE's cameras.
    assert changed([], "data.calibration=s3://lab/calibration.mat") == {"ingest"}
    one, other = experiment(), experiment("data.calibration=s3://lab/camera_params.h5")
    assert settings_of("ingest", one) == settings_of("ingest", other)


def test_experiments_with_mask_files_keep_their_ids() -> None:
    """Ids are those of the version before masks could be made: `zoosplat run` finds what it has made with that one."""
    known = {
        (): "a8d0f8b8da3cc4c5 1c9d13e88fb023e2 d159d4dc38f3273a bb43d78b3215e6b3 378684cbe75b8baf "
        "ca72c5e289e9b0a0 1f1e7474b06ff221 06b3f2d5a6af1ba0 d5bafee44148ce96",
        (DYNAMIC, IMAGES, "data.fps=50"): "0cee30340ae54c4b e01172a83ae43d53 e8b29cd9262d20e0 4a4e7430e22f8ab2 "
        "3fd968626be2b1ab 378c9fc4de229477 0c06f0b00a1708c3 86ca979028d79331 b02e4c484be6c5c9",
    }
    for overrides, expected in known.items():
        e, ids = experiment(*overrides), dict[str, str]()
        for spec in pipeline_of(e):
            inputs = {name: ids[name] for name in spec.reads}
            version = {"train": 5, "evaluate": 2}.get(spec.name, 1)
            ids[spec.name] = Request(spec.name, version, settings_of(spec.name, e), inputs, {}).id
        assert list(ids.values()) == expected.split()


def test_the_pipeline_of_an_experiment() -> None:
    names = [spec.name for spec in pipeline_of(experiment())]
    assert names == list(STAGES[1:])
    assert [spec.name for spec in pipeline_of(experiment(MADE))] == list(STAGES)
    for e in (experiment(), experiment(MADE)):
        there = [spec.name for spec in pipeline_of(e)]
        assert all(set(spec.reads) <= set(there[: there.index(spec.name)]) for spec in pipeline_of(e))
        assert upstream(["crop"], e) == {"crop", "center_rotation", *there[: there.index("center_rotation")]}
    assert (reads_of("ingest", experiment()), reads_of("ingest", experiment(MADE))) == ((), ("segment",))
    # Those whose results have the same bytes everywhere are the same in both.
    assert [spec.name for spec in PREPROCESSING] == ["ingest", "center_rotation", "crop", "pack"]
    # On a cluster segment is one process beside a GPU, or shards without one.
    assert wants_gpu("segment", experiment(MADE))
    assert not wants_gpu("segment", experiment(MADE, "segment.device=cpu"))
    assert wants_gpu("train", experiment("train.device=cpu"))


def test_outside_files_are_whole_urls() -> None:
    here = str(Path(DEMO).parent)
    e = experiment("train.start_from=../other", "features.weights=w.pth", IMAGES, "data.up=/rig/up.npz")
    assert outside_files("ingest", e) == {
        **{f"data.{kind}[{c}]": f"{here}/demo/{kind}/{c}.mp4" for kind in ("videos", "masks") for c in range(6)},
        "data.calibration": f"{here}/demo/camera_params.h5",
        "data.up": "/rig/up.npz",
    }
    assert outside_files("pack", e) == {f"data.videos[{c}]": f"{here}/demo/videos/{c}.mp4" for c in range(6)}
    assert outside_files("train", e) == {"train.start_from": str(Path(here).parent / "other")}
    assert outside_files("features", e) == {"features.weights": f"{here}/w.pth"}
    assert outside_files("train", experiment()) == outside_files("features", experiment()) == {}
    files = [f"data.calibration=[{', '.join(f'c{i}.mat' for i in range(6))}]", "data.directory=s3://lab/rec"]
    assert outside_files("ingest", experiment(*files))["data.calibration[3]"] == "s3://lab/rec/c3.mat"
    assert settings_of("train", experiment())["train.start_from"] == "animals"
    assert settings_of("features", experiment(IMAGES))["features.weights"] == "IMAGENET1K_V1"


def test_a_scene_counts_with_its_transforms_and_all_its_pictures(tmp_path: Path) -> None:
    for split, count in (("train", 2), ("test", 1)):
        frames = []
        for i in range(count):
            (tmp_path / split).mkdir(exist_ok=True)
            assert cv2.imwrite(str(tmp_path / split / f"{i}.png"), np.full((4, 4, 4), 255, np.uint8))
            pose = np.eye(4).tolist()
            frames.append({"file_path": f"./{split}/{i}", "time": i / 2, "transform_matrix": pose})
        text = json.dumps({"camera_angle_x": 0.7, "frames": frames})
        (tmp_path / f"transforms_{split}.json").write_text(text)
    raw = {"data": {"directory": str(tmp_path)}, "ingest": {"source": "dnerf"}, "train": {"method": "dynamic"}}
    e = Experiment.model_validate(raw)
    inside = ["transforms_train.json", "transforms_test.json", "test/0.png", "train/0.png", "train/1.png"]
    assert outside_files("ingest", e) == {f"data.directory/{name}": f"{tmp_path}/{name}" for name in inside}
    assert outside_files("pack", e) == outside_files("ingest", e)
    assert not any(key.startswith("data.directory") for key in settings_of("ingest", e))
    (tmp_path / "transforms_test.json").unlink()
    with pytest.raises(UserError, match=r"transforms_test\.json: no such file"):
        outside_files("pack", e)


def test_neither_torch_nor_a_service_is_imported() -> None:
    code = (
        "import sys; from zoosplat.config.load import read_config\n"
        "from zoosplat.stages.dependencies import settings_of, outside_files\n"
        f"e = read_config({DEMO!r}); settings_of('train', e); outside_files('features', e)\n"
        f"heavy = [n for n in sys.modules if n in ('torch', 'zoosplat_model', 'zoosplat_features', 'cv2')]\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
