# The image of one stage that uses a GPU: `build-arg STAGE` names it. Its dependencies are those of gpu-base.Dockerfile.
# build.sh adds the ENTRYPOINT, in which no argument can stand.
ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm
ARG GPU_BASE=localhost/zoosplat-gpu-base:dev

FROM ${BASE_IMAGE} AS builder
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt UV_LINK_MODE=copy
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python3 -m venv /tmp/tools && /tmp/tools/bin/pip install -q "$(grep '^uv==' constraints.txt)"
COPY shared shared
ARG STAGE
COPY services/${STAGE} services/${STAGE}
RUN /tmp/tools/bin/uv pip install -q --python python3 --target /opt/zoosplat --compile-bytecode --no-deps .

FROM ${GPU_BASE}
COPY --from=builder /opt/zoosplat /opt/zoosplat
ENV PYTHONPATH=/opt/zoosplat
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"
