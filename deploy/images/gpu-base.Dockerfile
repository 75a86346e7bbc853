# The image that segment, train, evaluate, render and features share: torch, gsplat and their other dependencies.
# gsplat's kernels are compiled here with NVIDIA's compiler from PyPI, so that no pod compiles at first use and none holds
# a compiler.
ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm

# The dependencies are listed in a file that changes with nothing else. So a new linter or a changed README does not
# make the kernels compile again.
FROM ${BASE_IMAGE} AS requirements
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt UV_LINK_MODE=copy
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv /tmp/tools && /tmp/tools/bin/pip install -q "$(grep '^uv==' constraints.txt)" \
    && mkdir /wanted && grep '^uv==' constraints.txt > /wanted/uv.txt \
    && /tmp/tools/bin/uv pip compile -q --no-header --no-annotate -c constraints.txt pyproject.toml \
        --extra segment --extra train --extra evaluate --extra render --extra features -o /wanted/requirements.txt \
    && touch -d @0 /wanted /wanted/*

FROM ${BASE_IMAGE} AS builder
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt UV_LINK_MODE=copy
COPY --from=requirements /wanted /wanted
# Only dependencies are installed here. Each stage adds its own code, so that all share the gigabytes of this image.
RUN python3 -m venv /tmp/tools && /tmp/tools/bin/pip install -q -r /wanted/uv.txt \
    && /tmp/tools/bin/uv venv -q --python "$(command -v python3)" /opt/venv \
    && /tmp/tools/bin/uv pip install -q --python /opt/venv --no-deps -r /wanted/requirements.txt

# CUDA architectures, such as "9.0" or "8.0 8.6 8.9 9.0 12.0". Without any, no kernels are compiled, and the images
# rasterise on the CPU only.
ARG GSPLAT_ARCHS="8.0 8.6 8.9 9.0 12.0"
ARG MAX_JOBS=2
COPY shared/zoosplat/errors.py shared/zoosplat/machine.py /build/zoosplat/
COPY flows/zoosplat_flows/commands/gsplat_kernels.py /build/kernels.py
RUN if [ -n "$GSPLAT_ARCHS" ]; then \
        if ! command -v g++ || ! [ -f "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; then \
            apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ $([ -d /usr/local/include/python3* ] || echo python3-dev); \
        fi \
        && PATH="/tmp/tools/bin:$PATH" PYTHONPATH=/build /opt/venv/bin/python /build/kernels.py $GSPLAT_ARCHS; \
    fi
# Some packages hold templates that are not valid Python, so a file that cannot be compiled is no failure.
RUN /tmp/tools/bin/uv pip uninstall -q --python /opt/venv ninja \
    && find /opt/venv -type d \( -name tests -o -name test \) -prune -exec rm -rf {} + \
    && find /opt/venv -name '*.a' -delete \
    && { /opt/venv/bin/python -m compileall -q -j 2 /opt/venv/lib > /dev/null || true; }

FROM ${BASE_IMAGE}
COPY --from=builder /opt/venv /opt/venv
RUN echo 'zoosplat:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd && echo 'zoosplat:x:10001:' >> /etc/group
# The NVIDIA container runtime reads from these variables which GPUs and driver libraries a container gets.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /app
ARG REVISION=unknown
LABEL org.opencontainers.image.title="zoosplat-gpu-base" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${REVISION}"
