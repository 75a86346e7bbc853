"""The calls of the Kubernetes API that zoosplat makes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from zoosplat.errors import UserError

JsonObject = dict[str, Any]  # an object of Kubernetes, as JSON

MANAGED_BY = "zoosplat"  # value of the label app.kubernetes.io/managed-by of all our Jobs and pods
REQUEST_TIMEOUT_S = 20  # seconds that one request may take


class KubernetesApi:
    """The calls that the runner and `zoosplat cluster status` make, with objects as plain JSON.

    Inside a pod they use the pod's service account, elsewhere $KUBECONFIG or ~/.kube/config.
    """

    def __init__(self, namespace: str) -> None:
        """Raises UserError where no cluster is configured."""
        from kubernetes import client, config

        self.namespace = namespace
        configuration = client.Configuration()
        try:
            try:
                config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            except config.ConfigException:
                config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise UserError(f"no Kubernetes cluster: {error}; set KUBECONFIG, or run in a pod") from None
        connection = client.ApiClient(configuration)
        self.batch, self.core = client.BatchV1Api(connection), client.CoreV1Api(connection)

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> bytes:
        data: bytes = function(*args, **options, _preload_content=False, _request_timeout=REQUEST_TIMEOUT_S).data
        return data

    def create_job(self, job: JsonObject) -> JsonObject:
        """Create a Job from its manifest. Returns it as the server completes it."""
        return dict(json.loads(self._call(self.batch.create_namespaced_job, self.namespace, job)))

    def read_job(self, name: str) -> JsonObject | None:
        """A Job with its status; None where it does not exist."""
        try:
            return dict(json.loads(self._call(self.batch.read_namespaced_job, name, self.namespace)))
        except Exception as error:
            if http_status(error) == 404:
                return None
            raise

    def delete_job(self, name: str) -> None:
        """Delete a Job, if it exists; the cluster's garbage collector then deletes its pods."""
        try:
            self._call(self.batch.delete_namespaced_job, name, self.namespace, propagation_policy="Background")
        except Exception as error:
            if http_status(error) != 404:
                raise

    def list_jobs(self, **labels: str) -> list[JsonObject]:
        """All Jobs of zoosplat that have these labels."""
        labels = {"app.kubernetes.io/managed-by": MANAGED_BY, **labels}
        text = self._call(self.batch.list_namespaced_job, self.namespace, label_selector=label_selector(labels))
        return list(json.loads(text)["items"])

    def list_pods(self, **labels: str) -> list[JsonObject]:
        """All pods of zoosplat that have these labels."""
        labels = {"app.kubernetes.io/managed-by": MANAGED_BY, **labels}
        text = self._call(self.core.list_namespaced_pod, self.namespace, label_selector=label_selector(labels))
        return list(json.loads(text)["items"])

    def list_nodes(self) -> list[JsonObject] | None:
        """All nodes of the cluster; None where the account may not list them, which takes a ClusterRole."""
        try:
            return list(json.loads(self._call(self.core.list_node))["items"])
        except Exception as error:
            if http_status(error) == 403:
                return None
            raise

    def read_log(self, pod: str, since_s: int | None = None) -> str:
        """What a pod has printed, each line after its time; with `since_s` only that of the last so many seconds."""
        since = {} if since_s is None else {"since_seconds": since_s}
        function = self.core.read_namespaced_pod_log
        return self._call(function, pod, self.namespace, timestamps=True, **since).decode(errors="replace")


def label_selector(labels: dict[str, str]) -> str:
    """Labels as a selector: `key=value,key=value`."""
    return ",".join(f"{key}={value}" for key, value in labels.items())


def http_status(error: BaseException) -> int | None:
    """HTTP status of an API error; 0 where the server did not answer, None for any other error."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    if isinstance(error, ApiException):
        return int(error.status or 0)
    return 0 if isinstance(error, HTTPError) else None


def explain_refusal(error: Exception) -> Exception:
    """The error of a Job that could not be created: a UserError where the settings can mend it, else unchanged."""
    if http_status(error) in (400, 403, 404, 422):
        try:
            text = json.loads(getattr(error, "body", "") or "")["message"]
        except (ValueError, KeyError, TypeError):
            text = str(error)
        return UserError(f"Kubernetes refuses the Job: {text}; check the runner's settings and its Role")
    return error
