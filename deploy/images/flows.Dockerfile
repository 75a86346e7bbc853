# The image of the flow and of the `zoosplat` command, which start stages in other containers. It holds no stage.
ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS builder
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt UV_LINK_MODE=copy
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv /tmp/tools && /tmp/tools/bin/pip install -q "$(grep '^uv==' constraints.txt)" \
    && /tmp/tools/bin/uv venv -q --python "$(command -v python3)" /opt/venv
# Dependencies come first, because they change less often than the code. What no stage uses is removed: tests, symbols
# for debuggers, other services of AWS.
RUN /tmp/tools/bin/uv pip install -q --python /opt/venv -c constraints.txt -r pyproject.toml --extra flows \
    && find /opt/venv -type d \( -name tests -o -name test \) -prune -exec rm -rf {} + \
    && find /opt/venv/lib/python3*/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d \
        ! -name s3 ! -name 'sso*' ! -name sts ! -name signin -exec rm -rf {} + \
    && apt-get update -qq && apt-get install -y -qq --no-install-recommends binutils \
    && find /opt/venv/lib \( -path '*/numcodecs/*' -o -path '*/av/*' \) -name '*.so' -exec strip --strip-debug {} +
COPY README.md LICENSE ./
COPY shared/zoosplat shared/zoosplat
COPY flows flows
RUN /tmp/tools/bin/uv pip install -q --python /opt/venv --no-deps . \
    # This import writes the byte code, which cannot be written later: the file system of a container is read-only.
    && /opt/venv/bin/python -c 'import boto3, s3fs, prefect.server.api.server, zoosplat_flows.pipeline, zoosplat_flows.cli.app'

FROM ${BASE_IMAGE}
COPY --from=builder /opt/venv /opt/venv
RUN echo 'zoosplat:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd && echo 'zoosplat:x:10001:' >> /etc/group
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /app
COPY prefect.yaml /app/
CMD ["prefect", "worker", "start", "--pool", "zoosplat", "--type", "process"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="zoosplat-flows" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${REVISION}"
