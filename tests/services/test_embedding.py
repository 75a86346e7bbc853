"""The embedding against closed forms and known truth, its stage, and recordings embedded together."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

from zoosplat.config.experiment import Experiment
from zoosplat.stages.command import main
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runner import run_stage
from zoosplat.storage import fingerprints, groups, listing, objects, schema, urls
from zoosplat_embedding import ops
from zoosplat_embedding.stage import STAGE, _kind
from zoosplat_flows.cli.app import app

Array = npt.NDArray[Any]
FPS, JUMP = 50.0, 2


def walk(rng: np.random.Generator, n: int, k: int, smooth: int) -> Array:
    """[n, k] smooth random functions of time, of about unit variance."""
    kernel = np.hanning(smooth)
    noise = rng.normal(size=(n + smooth, k))
    moving = np.stack([np.convolve(c, kernel, "same") for c in noise.T], 1)[:n]
    return np.asarray(moving / moving.std(0))


# -- projection -----------------------------------------------------------------------------------------------------
def test_without_a_heading_to_be_told_it_is_principal_components() -> None:
    rng = np.random.default_rng(0)
    pose = walk(rng, 600, 4, 40) * [4, 3, 2, 1]
    features = pose @ rng.normal(size=(4, 30)) + 5
    train = np.arange(600) < 200
    found = ops.fit(features, rng.uniform(-3, 3, 600), train, 6)
    assert found.strength == 0
    z = (features[train] - found.mean) / found.scale
    variances = np.sort(np.linalg.eigvalsh(np.cov(z.T, bias=True)))[::-1]
    np.testing.assert_allclose(found.explained[:4], variances[:4] / z.var(0).sum(), rtol=1e-3)
    np.testing.assert_allclose(found.explained[4:], 0, atol=1e-6)  # four dimensions are all there is
    np.testing.assert_allclose(found.matrix[:, :4].T @ found.matrix[:, :4], np.eye(4), atol=1e-5)
    assert not found.matrix[:, 4:].any()
    # The pose can be had back, also that of frames not fitted on.
    back, *_ = np.linalg.lstsq(np.pad(found(features), ((0, 0), (0, 1)), constant_values=1), pose, rcond=None)
    np.testing.assert_allclose(np.pad(found(features), ((0, 0), (0, 1)), constant_values=1) @ back, pose, atol=0.02)


def test_what_tells_the_heading_is_removed_and_the_pose_stays() -> None:
    """Descriptors that show the heading in two of their directions, as a lamp at one side would."""
    rng = np.random.default_rng(1)
    n = 900
    heading = np.cumsum(rng.normal(size=n) * 0.25)
    pose = walk(rng, n, 5, 30)
    light = np.stack([np.cos(heading), np.sin(heading)], 1)
    features = 2 * pose @ rng.normal(size=(5, 60)) + light @ rng.normal(size=(2, 60)) + rng.normal(size=(n, 60)) * 0.1
    train = np.arange(n) < 300
    found = ops.fit(features, heading, train, 20)
    before, after = found.heading_r2
    assert before > 0.9
    assert found.strength > 0
    assert after <= 0.05
    kept = found(features)
    assert ops.cross_validated_r2(kept, light) <= 0.05
    assert ops.cross_validated_r2(kept, pose) > 0.9


def test_a_posture_that_coincides_with_a_heading_once_stays() -> None:
    """The animal turns once and stretches while it does: the stretch is no sign of the heading at other times."""
    rng = np.random.default_rng(2)
    n = 600
    heading = np.clip(np.linspace(0, 6, n), 0, 2)
    pose = np.stack([np.clip(np.linspace(0, 6, n), 0, 2), *walk(rng, n, 3, 60).T], 1)
    pose[200:, 0] = walk(rng, n - 200, 1, 80)[:, 0] + 2
    features = pose @ rng.normal(size=(4, 40)) + rng.normal(size=(n, 40)) * 0.02
    found = ops.fit(features, heading, np.arange(n) < 200, 10)
    assert found.strength == 0
    assert ops.cross_validated_r2(found(features), pose) > 0.8


def test_adversarial_axes_of_full_strength_are_uncorrelated_with_the_target() -> None:
    rng = np.random.default_rng(3)
    target = rng.normal(size=(200, 2))
    scores = rng.normal(size=(200, 6)) + target @ rng.normal(size=(2, 6))
    axes = ops.adversarial_axes(scores, target, 1e9)
    np.testing.assert_allclose(axes.T @ axes, np.eye(6), atol=1e-9)
    kept = scores @ axes[:, :4]
    cross = (kept - kept.mean(0)).T @ (target - target.mean(0)) / 200
    np.testing.assert_allclose(cross, 0, atol=1e-5)
    plain = ops.adversarial_axes(scores, target, 0)
    values = np.linalg.eigvalsh(np.cov(scores.T))[::-1]
    np.testing.assert_allclose((scores @ plain).var(0, ddof=1), values, rtol=1e-9)


def test_what_animals_do_in_general_has_a_direction_in_few_frames() -> None:
    """A posture that the training third does not show, as rearing, but that other animals take."""
    rng = np.random.default_rng(6)
    n = 600
    pose = rng.normal(size=(n, 6))
    pose[:200, 5] = 0
    directions = np.linalg.qr(rng.normal(size=(80, 6)))[0].T
    features = pose @ directions + rng.normal(size=(n, 80)) * 0.03
    others = rng.normal(size=(400, 6)) @ directions + rng.normal(size=(400, 80)) * 0.03
    train, later = np.arange(n) < 200, np.arange(n) >= 200
    told = []
    for variation in (None, others - others.mean(0), 1e-3 * (others - others.mean(0))):
        found = ops.fit(features, rng.uniform(-3, 3, n), train, 6, variation)
        assert found.strength == 0
        x = found(features)[later]
        x, aim = x - x.mean(0), pose[later, 5] - pose[later, 5].mean()
        told.append(1 - ((aim - x @ np.linalg.lstsq(x, aim, rcond=None)[0]) ** 2).sum() / (aim**2).sum())
    assert told[0] < 0.5
    assert told[1] > 0.9
    assert told[2] == pytest.approx(told[1], abs=1e-3)  # its own scale says nothing


def test_the_more_frames_there_are_the_less_other_animals_count() -> None:
    rng = np.random.default_rng(7)
    features = walk(rng, 20_000, 3, 40) @ rng.normal(size=(3, 12)) + rng.normal(size=(20_000, 12)) * 0.05
    everywhere = rng.normal(size=(50, 12))
    angles = []
    for n in (200, 20_000):
        headings, train = rng.uniform(-3, 3, n), np.ones(n, bool)
        plain, informed = (ops.fit(features[:n], headings, train, 3, v).matrix for v in (None, everywhere))
        cosines = np.linalg.svd(plain.T @ informed, compute_uv=False)
        angles.append(np.arccos(np.clip(cosines.min(), -1, 1)))
    assert angles[1] < 0.2 * angles[0]


# -- what is alike --------------------------------------------------------------------------------------------------
def test_neighbours_are_those_of_a_search_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "BLOCK_FRAMES", 7)
    rng = np.random.default_rng(4)
    embedding = rng.normal(size=(40, 3)).astype(np.float32)
    times, recording = np.concatenate([np.arange(25), np.arange(15)]) / 10, np.repeat([0, 1], [25, 15]).astype(np.int32)
    found = ops.neighbours(embedding, times, recording, 5, 0.35)
    for i in range(40):
        far = [
            j for j in range(40) if j != i and (recording[i] != recording[j] or abs(times[i] - times[j]) >= 0.35 - 1e-9)
        ]
        expected = sorted(far, key=lambda j: float(((embedding[i] - embedding[j]) ** 2).sum()))[:5]
        assert found[i].tolist() == expected
    few = ops.neighbours(embedding[:3], np.array([0.0, 1, 5]), recording[:3], 4, 2.0)
    assert few.tolist() == [[2, -1, -1, -1], [2, -1, -1, -1], [few[2, 0], few[2, 1], -1, -1]]
    assert sorted(few[2, :2].tolist()) == [0, 1]


def test_states_and_map_of_separate_clusters() -> None:
    rng = np.random.default_rng(5)
    which = np.repeat([0, 1, 2], [60, 30, 45])
    embedding = (rng.normal(size=(135, 8)) * 0.1 + np.eye(8)[which] * 5).astype(np.float32)
    states = ops.states(embedding, 3, 0)
    assert [np.unique(states[which == k]).tolist() for k in range(3)] == [[0], [2], [1]]
    places = ops.plane(embedding, 0)
    np.testing.assert_array_equal(places, ops.plane(embedding, 0))
    distances = np.linalg.norm(places[:, None] - places, axis=-1) + 1e9 * np.eye(135)
    assert (which[distances.argmin(1)] == which).all()
    assert ops.plane(embedding[:3], 0).shape == (3, 2)
    assert len(np.unique(ops.states(embedding[:2], 8, 0))) == 2


def test_a_map_of_some_places_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "MAX_MAPPED", 50)
    rng = np.random.default_rng(6)
    which = np.arange(120) % 2
    embedding = (rng.normal(size=(120, 4)) * 0.1 + 4 * which[:, None]).astype(np.float32)
    places = ops.plane(embedding, 0)
    assert len(np.unique(places, axis=0)) <= 50
    middle = [places[which == k].mean(0) for k in (0, 1)]
    spread = max(places[which == k].std(0).max() for k in (0, 1))
    assert np.linalg.norm(middle[0] - middle[1]) > 2 * spread


def test_speed_and_height_by_hand() -> None:
    t = np.arange(30) / 25.0
    centers = np.stack([0.3 * t, 0.4 * t, np.full(30, 0.02)], 1)
    np.testing.assert_allclose(ops.speeds(centers, 25.0), 0.5)
    np.testing.assert_allclose(ops.speeds(centers[:1], 25.0), 0)
    covariances = np.tile(np.diag([1, 1, 1e-4]), (30, 1, 1))  # 1 cm
    centers[20, 2] += 0.05
    valid = np.ones(30, bool)
    heights = ops.heights(centers, covariances, valid)
    np.testing.assert_allclose(heights[[0, 20]], [0.04, 0.09], atol=1e-9)


# -- the stage ------------------------------------------------------------------------------------------------------
@pytest.fixture
def project_of(finish: Callable[..., Any], write_group: Callable[..., None]) -> Callable[..., Project]:
    """Makes a project in a folder whose features are done: a pose in 40 numbers, two frames without a hull."""

    def made(folder: Path, seed: int = 0, n: int = 90, invalid: tuple[int, ...] = (4, 50), **changes: Any) -> Project:
        names = ["0.mp4", "1.mp4"]
        recording = str(folder.with_name(f"{folder.name} recording"))
        experiment = Experiment.model_validate(
            {
                "data": {"directory": recording, "videos": names, "masks": names, "calibration": "none.h5"},
                "center_rotation": {"ell": 0.2},
                "crop": {"ell": 0.2},
                "embedding": {"dimensions": 10, "neighbours": 3, "apart_s": 0.4, "states": 4, **changes},
            }
        )
        rng = np.random.default_rng(seed)
        features = walk(rng, n, 3, 20) @ np.random.default_rng(9).normal(size=(3, 40))
        valid = ~np.isin(np.arange(n), invalid)
        features[~valid] = np.nan
        tracking = {
            "centers": np.stack([np.arange(n) * 0.001, np.zeros(n), np.full(n, 0.02)], 1),
            "covs": np.eye(3) * 1e-4,
            "angles": rng.uniform(-3, 3, n),
            "valid": valid,
        }
        written: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "center_rotation": ({}, tracking),
            "pack": ({"fps": FPS, "frame_jump": JUMP}, {}),
            "features": ({"encoder": "gaussians", "radius_m": 0.1}, {"features": features}),
        }
        sizes = {"T": n, "D": 40, "C": 2, "h": 4, "w": 4}
        writers = {
            stage: partial(write_group, sizes=sizes, attributes=attributes, values=values)
            for stage, (attributes, values) in written.items()
        }
        project = Project.at(str(folder))
        finish(project, experiment, writers)
        return project

    return made


def arrays_of(group: Any) -> dict[str, Array]:
    return {key: schema.read(group, key) for key in schema.GROUPS["embedding.zarr"]}


def test_the_stage_writes_group_and_table(project_of: Callable[..., Project], tmp_path: Path) -> None:
    project = project_of(tmp_path / "a")
    run = open_run(project)
    assert run_stage(STAGE, run)
    group = run.open_input("embedding")
    schema.validate(group, "embedding.zarr", "embedding.zarr")
    found = arrays_of(group)
    gone = np.array([4, 50])
    assert found["embedding"].shape == (90, 10)
    assert found["neighbours"].shape == (90, 3)
    assert np.isnan(found["embedding"][gone]).all()
    assert np.isnan(found["map"][gone]).all()
    assert (found["state"][gone] == -1).all()
    assert (found["neighbours"][gone] == -1).all()
    there = np.delete(np.arange(90), gone)
    assert np.isfinite(found["embedding"][there]).all()
    assert not np.isin(found["neighbours"][there], gone).any()
    assert (np.abs(found["neighbours"][there] - there[:, None]) >= 10).all()  # 0.4 s at 25 kept frames a second
    np.testing.assert_allclose(found["time"], np.arange(90) / 25)
    np.testing.assert_array_equal(found["frame"], 2 * np.arange(90))
    np.testing.assert_allclose(found["speed"], 0.025)
    attributes: dict[str, Any] = {**group.attrs}
    assert len(attributes["explained_variance"]) == 10
    assert sum(attributes["explained_variance"]) == pytest.approx(1, abs=1e-4)
    table = (tmp_path / "a" / "latest" / "embedding.csv").read_bytes()
    rows = list(csv.DictReader(io.StringIO(table.decode())))
    assert len(rows) == 90
    assert rows[4]["valid"] == "0"
    assert rows[4]["e00"] == ""
    assert float(rows[7]["e03"]) == pytest.approx(float(found["embedding"][7, 3]), rel=1e-5, abs=1e-6)
    assert float(rows[7]["center_x"]) == pytest.approx(0.007)
    mark = open_run(project).read_mark("embedding") or {}
    assert mark["frames"] == 88
    assert mark["warnings"] == ["29 training frames fit 3 of 10 dimensions; the others are 0"]
    assert not run_stage(STAGE, open_run(project))
    again = record_run(draft_run(project, open_run(project).experiment, ["embedding"]), ["embedding"])
    assert run_stage(STAGE, again)
    assert again.id == open_run(project).id != run.id
    for name in listing.list_files(run.output_url("embedding")):
        one, other = (objects.read_bytes(urls.join(r.output_url("embedding"), name)) for r in (run, again))
        assert one == other, name
    assert (tmp_path / "a" / "latest" / "embedding.csv").read_bytes() == table


def test_fitted_to_all_frames_it_tells_what_the_first_third_does_not_show(
    project_of: Callable[..., Project], tmp_path: Path
) -> None:
    told = {}
    for fit_to in ("third", "all"):
        project = project_of(tmp_path / fit_to, fit_to=fit_to)
        features = schema.array(groups.open_group(open_run(project).output_url("features"), write=True), "features")
        later = np.where(np.arange(90) < 60, 0.0, np.sin(np.arange(90)))  # in the last third, in a direction of its own
        own = np.linalg.qr(np.random.default_rng(9).normal(size=(3, 40)).T, mode="complete")[0][:, 20]
        features[...] = np.asarray(features[...]) + 5 * later[:, None] * own
        assert run_stage(STAGE, open_run(project))
        group = open_run(project).open_input("embedding")
        found, valid = schema.read(group, "embedding").astype(float), schema.read(group, "valid").astype(bool)
        x = np.column_stack([found[valid], np.ones(valid.sum())])
        residual = later[valid] - x @ np.linalg.lstsq(x, later[valid], rcond=None)[0]
        told[fit_to] = 1 - residual.var() / later[valid].var()
        assert group.attrs["fit_to"] == fit_to
        assert group.attrs["training_frames"] == (29 if fit_to == "third" else 88)
    assert told["third"] < 0.5
    assert told["all"] > 0.99


def test_bad_input_is_one_line(
    project_of: Callable[..., Project], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = project_of(tmp_path / "a", invalid=tuple(range(29)))
    assert main(STAGE, ["--project", project.url]) == 2
    error = capsys.readouterr().err
    assert "1 of the first third of 90 frames have a visual hull, too few to fit an embedding" in error
    assert error.count("\n") == 1
    objects.delete(open_run(project).result("features").file("done.json"))
    assert main(STAGE, ["--project", project.url]) == 2
    assert "features.zarr is not complete; run stage features first" in capsys.readouterr().err


def test_weights_are_of_one_kind_wherever_their_file_lies(tmp_path: Path) -> None:
    """Groups of earlier versions name the file; those of this one its content."""
    one, other, changed = (tmp_path / name for name in ("a.pth", "b.pth", "c.pth"))
    for file in (one, other):
        file.write_bytes(b"weights")
    changed.write_bytes(b"Weights")
    content = fingerprints.content_fingerprint(str(one))
    about = {"encoder": "images", "radius_m": 0.1, "block": 64}
    expected = {"encoder": "images", "radius_m": 0.1, "weights": content}
    for weights in (str(one), str(other), content):
        assert _kind({**about, "weights": weights}) == expected
    assert _kind({**about, "weights": str(changed)}) != expected
    for weights in ("IMAGENET1K_V1", str(tmp_path / "gone.pth")):
        assert _kind({**about, "weights": weights})["weights"] == weights
    assert _kind({"encoder": "gaussians", "radius_m": 0.1}) == {"encoder": "gaussians", "radius_m": 0.1}


def test_recordings_embedded_together(project_of: Callable[..., Project], tmp_path: Path) -> None:
    first, second = project_of(tmp_path / "a"), project_of(tmp_path / "b", seed=1, n=60, invalid=(), fit_to="all")
    output = tmp_path / "both"
    run = CliRunner().invoke(app, ["embed", first.url, second.url, "--output", str(output)])
    assert run.exit_code == 0, run.output
    assert str(output / "embedding.csv") in run.output
    group = groups.open_group(str(output / "embedding.zarr"))
    found = arrays_of(group)
    assert found["recording"].tolist() == [0] * 90 + [1] * 60
    assert found["t"].tolist() == [*range(90), *range(60)]
    assert dict(group.attrs)["recordings"] == [first.url, second.url]
    assert dict(group.attrs)["training_frames"] == 29 + 20  # settings are those of the first
    # Rows of the other recording are among the neighbours, also at the same time.
    near = found["neighbours"][90:]
    assert (found["recording"][near] == 0).any()
    same = found["recording"][near] == 1
    assert (np.abs(near - np.arange(90, 150)[:, None])[same] >= 10).all()
    header = (output / "embedding.csv").read_text().splitlines()[0]
    assert header.startswith("recording,t,frame,time,valid,center_x")

    groups.open_group(open_run(second).output_url("features"), write=True).attrs["encoder"] = "images"
    run = CliRunner().invoke(app, ["embed", first.url, second.url, "--output", str(output)])
    assert run.exit_code == 2
    assert "is there already; choose an --output that holds no files" in run.output
    run = CliRunner().invoke(app, ["embed", first.url, second.url, "--output", str(tmp_path / "other")])
    assert run.exit_code == 2
    assert "encoder of the features is images, but gaussians in" in run.output
    assert not (tmp_path / "other").exists()


def test_embedded_together_into_a_folder_that_holds_something_is_refused(
    project_of: Callable[..., Project], files_of: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    """Another project, one of those that are embedded, or any file of the user's, also one called embedding.csv."""
    first, second = project_of(tmp_path / "a"), project_of(tmp_path / "b", seed=1, n=60, invalid=())
    before = files_of(tmp_path / "a")
    mine = tmp_path / "mine" / "embedding.csv"
    mine.parent.mkdir()
    mine.write_text("mine")
    for output, named in ((first.url, first.url), (str(mine.parent), str(mine))):
        run = CliRunner().invoke(app, ["embed", first.url, second.url, "--output", output])
        assert run.exit_code == 2
        assert run.output.startswith(f"zoosplat: {named}")
        assert "choose an --output that holds no files" in run.output
        assert run.output.count("\n") == 1
    assert files_of(tmp_path / "a") == before
    assert [path.name for path in mine.parent.iterdir()] == ["embedding.csv"]
    assert mine.read_text() == "mine"


def test_a_run_that_is_not_the_latest_is_embedded_by_its_id(
    project_of: Callable[..., Project], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    earlier = open_run(project_of(tmp_path / "a@2026")).id  # a name that looks as if it ended in a run
    project_of(tmp_path / "a@2026", dimensions=6)
    named = {"a@2026": 6, f"a@2026@{earlier}": 10, f"a@2026@{earlier[:19]}": 10}
    for number, (which, dimensions) in enumerate(named.items()):
        run = CliRunner().invoke(app, ["embed", which, which, "--output", f"both{number}"])
        assert run.exit_code == 0, run.output
        group = groups.open_group(str(tmp_path / f"both{number}" / "embedding.zarr"))
        assert schema.read(group, "embedding").shape == (180, dimensions)
    run = CliRunner().invoke(app, ["embed", "a@2026@1999", "--output", "none"])
    assert (run.exit_code, "there is no run 1999" in run.output) == (2, True)
