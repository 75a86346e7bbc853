# Other scripts read this file. The array `engine` holds the words that start the container engine, and is empty where
# there is none. The words are those of zoosplat_flows/runners/containers.py, which runs the images that the scripts
# build.
engine=()
if [ -n "${ZOOSPLAT_CONTAINER_ENGINE:-}" ]; then
  read -ra engine <<<"$ZOOSPLAT_CONTAINER_ENGINE"
elif docker info >/dev/null 2>&1; then
  engine=(docker)
elif command -v podman >/dev/null; then
  # The images lie in a folder of their own, apart from the user's other images.
  store=$HOME/.cache/zoosplat/containers
  engine=(podman --root "$store/root" --runroot "$store/run" --storage-driver=overlay --runtime runc --cgroup-manager=cgroupfs)
fi
PYTHON_IMAGE=docker.io/library/python:3.12-slim-bookworm  # base of all images
OWN_BASE=localhost/zoosplat-base:dev                      # base made by images/base.sh where that one cannot be pulled

has_image() { "${engine[@]}" image inspect "$1" >/dev/null 2>&1; }
