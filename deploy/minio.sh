#!/bin/sh
# Build MinIO, the S3 server of the tests, from source into ~/.cache/zoosplat/bin. Do nothing where it is there already.
set -eu

version=v0.0.0-20260212201848-7aac2a2c5b7c
bin="$HOME/.cache/zoosplat/bin"

if [ -x "$bin/minio" ]; then
    echo "minio: $bin/minio is there"
    exit 0
fi
if command -v minio >/dev/null; then
    echo "minio: $(command -v minio) is there"
    exit 0
fi
if ! command -v go >/dev/null; then
    echo "minio: needs Go, which is not here; install Go or put minio on the PATH. The S3 tests run on moto's server instead."
    exit 0
fi
mkdir -p "$bin"
echo "minio: building $version, about 3 minutes"
# The build goes beside its place and is then renamed, so that an interrupted build leaves nothing that looks finished.
building=$(mktemp -d "$bin/building.XXXXXX")
trap 'rm -rf "$building"' EXIT
GOBIN="$building" GOFLAGS=-buildvcs=false go install "github.com/minio/minio@$version"
mv "$building/minio" "$bin/minio"
echo "minio: $bin/minio"
