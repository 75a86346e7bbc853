"""`make demo-containers`: the demo with every stage in its own container.

It goes through a Prefect server on PostgreSQL and a worker, and keeps its data on MinIO. Needs the images.
"""

from __future__ import annotations

from pathlib import Path

from servers import Servers, prefect, show_results

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    with Servers() as servers:
        print("demo: starting MinIO, PostgreSQL and Prefect", flush=True)
        servers.minio()
        servers.prefect()
        config = servers.demo_recording()
        servers.run(prefect(), "work-pool", "create", "zoosplat", "--type", "process")
        file = str(ROOT / "prefect.yaml")
        servers.run(prefect(), "--no-prompt", "deploy", "--prefect-file", file, "--name", "containers")
        servers.worker("zoosplat", "process")
        project = f"s3://{servers.bucket}/project"
        given = [f"config={config}", f"project={project}"]
        parameters = [word for value in given for word in ("-p", value)]
        servers.run(prefect(), "deployment", "run", "pipeline/containers", *parameters, "--watch", quiet=False)
        show_results(project, ROOT / "demo-containers")


if __name__ == "__main__":
    main()
