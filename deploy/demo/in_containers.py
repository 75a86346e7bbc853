"""`make demo-containers`: the demo with every stage in its own container.

It goes through a Prefect server on PostgreSQL and a worker, and keeps its data on MinIO. Needs the images.
"""

from __future__ import annotations

from pathlib import Path

from servers import Servers, show_results

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    with Servers() as servers:
        print("demo: starting MinIO, PostgreSQL and Prefect", flush=True)
        servers.minio()
        servers.prefect()
        config = servers.demo_recording()
        servers.deploy("containers")
        servers.worker("zoosplat", "process")
        project = f"s3://{servers.bucket}/project"
        servers.pipeline("containers", f"config={config}", f"project={project}")
        show_results(project, ROOT / "demo-containers")


if __name__ == "__main__":
    main()
