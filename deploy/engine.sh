# Read by other scripts: `engine` is the words that start the container engine, none where there is no engine. The same words as in
# zoosplat_flows/runners/containers.py, which runs what they build.
engine=()
if [ -n "${ZOOSPLAT_CONTAINER_ENGINE:-}" ]; then
  read -ra engine <<<"$ZOOSPLAT_CONTAINER_ENGINE"
elif docker info >/dev/null 2>&1; then
  engine=(docker)
elif command -v podman >/dev/null; then
  # In a folder of its own, apart from the user's other images.
  store=$HOME/.cache/zoosplat/containers
  engine=(podman --root "$store/root" --runroot "$store/run" --storage-driver=overlay --runtime runc --cgroup-manager=cgroupfs)
fi
PYTHON_IMAGE=docker.io/library/python:3.12-slim-bookworm  # what the images stand on
OWN_BASE=localhost/zoosplat-base:dev                      # made by images/base.sh where that one cannot be pulled

has_image() { "${engine[@]}" image inspect "$1" >/dev/null 2>&1; }
