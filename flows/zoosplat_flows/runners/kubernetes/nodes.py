"""Which nodes offer which profile, and which profile an experiment needs."""

from __future__ import annotations

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.memory import GIB, USABLE_SHARE, peak_gpu_bytes, profile_gib, smallest_profile
from zoosplat.stages.memory_advice import suggest_smaller
from zoosplat_flows.runners.kubernetes.api import JsonObject, label_selector
from zoosplat_flows.runners.kubernetes.manifests import GPU_RESOURCE
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings, Profile, Toleration, overlay, parse_quantity


def _allocatable(node: JsonObject, resource: str) -> float:
    return parse_quantity(node["status"].get("allocatable", {}).get(resource, "0"))


def _is_tolerated(taint: JsonObject, tolerations: tuple[Toleration, ...]) -> bool:
    return any(
        (t.key is None or t.key == taint["key"])
        and (t.operator == "Exists" or (t.value or "") == taint.get("value", ""))
        and (t.effect is None or t.effect == taint["effect"])
        for t in tolerations
    )


def offers_profile(node: JsonObject, profile: Profile) -> bool:
    """Whether a node has a profile's labels, admits its pods and, when nothing runs on it, has room for one.

    A node counts even while it is drained or not ready, since it will come back.
    """
    labels = node["metadata"].get("labels", {})
    needs = {GPU_RESOURCE: float(profile.gpus)}
    needs |= {"cpu": parse_quantity(profile.cpu), "memory": parse_quantity(profile.memory)}
    # Kubernetes itself sets the taints node.kubernetes.io/..., for as long as the node is drained or not ready.
    taints = [
        t
        for t in node["spec"].get("taints", [])
        if t["effect"] != "PreferNoSchedule" and not t["key"].startswith("node.kubernetes.io/")
    ]
    return (
        all(labels.get(key) == value for key, value in profile.nodeSelector.items())
        and all(_allocatable(node, resource) >= amount for resource, amount in needs.items())
        and all(_is_tolerated(taint, profile.tolerations) for taint in taints)
    )


def count_offering_nodes(settings: ClusterSettings, nodes: list[JsonObject]) -> dict[str, int]:
    """For each profile the number of nodes that offer it, the smallest GPU first."""
    return {name: sum(offers_profile(node, settings.profiles[name]) for node in nodes) for name in settings.ordered()}


def choose_profile(
    settings: ClusterSettings, nodes: list[JsonObject] | None, wanted: str | None, experiment: Experiment
) -> str:
    """Choose the profile that an experiment is trained with.

    Args:
        settings: the settings of the runner.
        nodes: all nodes of the cluster; None where they are not known: then every profile counts as offered.
        wanted: name of a profile; None or `auto`: the smallest offered one whose GPU holds `memory.peak_gpu_bytes`.
        experiment: what is to be trained.

    Returns:
        Name of the profile.

    Raises:
        UserError: no node offers the profile, or none is large enough. The message lists what the nodes offer.
    """
    counts = dict.fromkeys(settings.ordered(), 1) if nodes is None else count_offering_nodes(settings, nodes)
    present = [name for name, count in counts.items() if count]
    have = ", ".join(f"{name} ({counts[name]} node{'s' * (counts[name] != 1)})" for name in present) or "no profile"
    if wanted not in (None, "auto"):
        assert wanted is not None
        profile = settings.profile(wanted)
        if not counts[wanted]:
            labels = label_selector(profile.nodeSelector)
            needs = f"{labels}, {profile.gpus} GPU, cpu {profile.cpu}, memory {profile.memory}"
            raise UserError(f"profile {wanted}: no node offers it ({needs}); the nodes of this cluster offer {have}")
        return wanted
    fitting = smallest_profile(experiment, present)
    if fitting is None:
        needs = f"{peak_gpu_bytes(experiment) / GIB:.0f} GiB"
        largest = USABLE_SHARE * GIB * max(map(profile_gib, present), default=0)
        raise UserError(
            f"profile auto: training needs about {needs} of GPU memory; the nodes of this cluster offer {have}; "
            f"{suggest_smaller(experiment, largest)}, or name a profile"
        )
    return fitting


def apply_profile(settings: ClusterSettings, name: str, experiment: Experiment) -> Experiment:
    """The experiment as a profile of the settings changes it. Raises UserError as `overlay`."""
    return overlay(experiment, name, settings.profile(name).config)
