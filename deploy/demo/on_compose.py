"""Runs the demo on the services of deploy/compose.yaml: its recording goes to MinIO, its stages run in containers.

AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are those of deploy/.env; their user must be allowed to make buckets.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from servers import Servers, show_results

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    os.environ |= {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9000",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
    }
    import boto3

    client = boto3.Session().client("s3")
    with Servers() as files:  # compose has started the servers, so this object starts none
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=files.bucket)
        config = files.demo_recording()
        project = f"s3://{files.bucket}/project"
        files.pipeline("containers", f"config={config}", f"project={project}")
        show_results(project, ROOT / "demo-containers")


if __name__ == "__main__":
    main()
