# MinIO is compiled here, because its community edition is published as source only.
ARG GO_IMAGE=docker.io/library/golang:1.25-bookworm
ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm

FROM ${GO_IMAGE} AS builder
# The version is that of deploy/minio.sh.
ARG MINIO_VERSION=v0.0.0-20260212201848-7aac2a2c5b7c
RUN CGO_ENABLED=0 GOBIN=/out GOFLAGS=-buildvcs=false go install "github.com/minio/minio@${MINIO_VERSION}"

# This base has certificate authorities, and Python for asking the server whether it is ready.
FROM ${BASE_IMAGE}
COPY --from=builder /out/minio /usr/local/bin/minio
RUN mkdir /data && chown 10001:10001 /data
USER 10001:10001
ENV HOME=/tmp
VOLUME /data
EXPOSE 9000
ENTRYPOINT ["minio", "server", "/data", "--address", ":9000"]
LABEL org.opencontainers.image.title="zoosplat-minio" \
      org.opencontainers.image.licenses="AGPL-3.0-only"
