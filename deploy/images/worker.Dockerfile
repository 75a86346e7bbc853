# The image of a worker that starts stages as containers beside its own: the flows image and a client of the container
# engine. The client uses the engine's socket, which may be docker's or podman's. The image holds no engine.
ARG FLOWS_IMAGE=localhost/zoosplat-flows:dev
ARG CLIENT_IMAGE=docker.io/library/docker:28-cli

FROM ${CLIENT_IMAGE} AS client

FROM ${FLOWS_IMAGE}
COPY --from=client /usr/local/bin/docker /usr/local/bin/docker
ENV ZOOSPLAT_CONTAINER_ENGINE=docker
ARG REVISION=unknown
LABEL org.opencontainers.image.title="zoosplat-worker" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${REVISION}"
