"""`zoosplat cluster`: looks at the Kubernetes cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from zoosplat_flows.cli.errors import CommandGroup

cluster_app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Look at the Kubernetes cluster.")


@cluster_app.command()
def status(
    settings: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Settings of the runner. [dim]default: $ZOOSPLAT_SETTINGS[/]"),
    ] = None,
) -> None:
    """Nodes of each profile, Jobs that have not ended, and why pods wait, in words.

    The cluster is that of $KUBECONFIG; inside a pod, its own.
    """
    from zoosplat_flows.commands.cluster import show_cluster
    from zoosplat_flows.runners.kubernetes.api import KubernetesApi
    from zoosplat_flows.runners.kubernetes.settings import ClusterSettings

    loaded = ClusterSettings.read(settings)
    show_cluster(loaded, KubernetesApi(loaded.namespace))
