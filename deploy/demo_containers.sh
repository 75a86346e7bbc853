#!/usr/bin/env bash
# The demo with every stage in its own container, on a MinIO of its own. Needs `make images` and `make minio`.
set -euo pipefail
cd "$(dirname "$0")/.."
minio=$HOME/.cache/zoosplat/bin/minio
[ -x "$minio" ] || minio=$(command -v minio) || { echo "demo: no MinIO; run make minio" >&2; exit 2; }
folder=$(mktemp -d)
port=$(.venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MINIO_ROOT_USER=demo MINIO_ROOT_PASSWORD
MINIO_ROOT_PASSWORD=$(.venv/bin/python -c 'import secrets; print(secrets.token_hex(16))')
"$minio" server "$folder/data" --address "127.0.0.1:$port" --quiet >"$folder/log" 2>&1 &
server=$!
trap 'kill $server; wait $server 2>/dev/null || true; rm -rf "$folder"' EXIT
export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=$MINIO_ROOT_USER AWS_SECRET_ACCESS_KEY=$MINIO_ROOT_PASSWORD
export AWS_DEFAULT_REGION=us-east-1 AWS_EC2_METADATA_DISABLED=true
.venv/bin/python - "$folder" <<'PYTHON'
import importlib.resources
import os
import sys
import time
from pathlib import Path

os.environ |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_LOGGING_LEVEL": "CRITICAL"}
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"

import boto3

from zoosplat import stores
from zoosplat.synthetic import make_recording
from zoosplat_flows.pipeline import listening, pipeline

folder = Path(sys.argv[1]) / "recording"
make_recording(folder)
for _ in range(100):
    try:
        boto3.client("s3").create_bucket(Bucket="demo")
        break
    except Exception:
        time.sleep(0.2)
for path in folder.rglob("*"):
    if path.is_file():
        stores.write_bytes(f"s3://demo/recording/{path.relative_to(folder)}", path.read_bytes())
config = (importlib.resources.files("zoosplat_flows") / "demo.yaml").read_text()
stores.write_bytes("s3://demo/demo.yaml", config.replace("directory: demo", "directory: s3://demo/recording").encode())
began = time.monotonic()


def show(event):
    if event.state != "running":
        print(f"{time.monotonic() - began:6.1f} s  {event.stage}: {event.state} {event.message}", flush=True)


with listening(show):
    results = pipeline(project="s3://demo/project", config="s3://demo/demo.yaml", runner="containers")
target = Path("demo-containers")
for name in ("report/index.html", "evaluation/metrics_test.csv"):
    stores.write_bytes(str(target.resolve() / Path(name).name), stores.read_bytes(f"s3://demo/project/{name}"))
print(f"report: {target / 'index.html'}")
PYTHON
