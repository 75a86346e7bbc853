#!/usr/bin/env bash
# requirements.sh TARGET: check that this machine has all that a make target needs, before the target works for minutes.
# Where something is missing, it prints a line for each such thing and then the one command that installs Debian's
# packages, and the exit status is 2.
# TARGET is images, cluster-tools, demo-containers, demo-kubernetes or test-cluster.
set -euo pipefail
target=$1
. "${BASH_SOURCE[0]%/*}/engine.sh"
BIN="$HOME/.cache/zoosplat/bin"
IMAGES=(segment ingest center-rotation crop pack train evaluate render features embedding flows)
# Commands and the packages of Debian that have them.
PACKAGES="
  containerd containerd
  containerd-shim-runc-v2 containerd
  ctr containerd
  debootstrap debootstrap
  initdb postgresql
  loopback containernetworking-plugins
  newuidmap uidmap
  openssl openssl
  podman podman
  runc runc
"
lines=() install=()

missing() { lines+=("$1"); }

found() {  # COMMAND: it looks also in the folders of Debian's packages that are not on every user's PATH
  local folder
  command -v "$1" >/dev/null && return
  for folder in /usr/sbin /usr/lib/cni /usr/lib/postgresql/*/bin; do
    [ ! -x "$folder/$1" ] || return 0
  done
  return 1
}

need() {  # COMMAND...
  local command name package
  for command in "$@"; do
    found "$command" && continue
    while read -r name package; do [ "$name" != "$command" ] || break; done <<<"$PACKAGES"
    missing "there is no $command; it is in Debian's package $package"
    case " ${install[*]-} " in *" $package "*) ;; *) install+=("$package") ;; esac
  done
}

need_root() {  # WHY
  [ "$EUID" = 0 ] || missing "only root can do it: $1"
}

need_linux() {
  case $OSTYPE in linux*) ;; *) missing "Kubernetes nodes need Linux, and this is $OSTYPE" ;; esac
}

need_disk() {  # GIGABYTES FOLDER WHAT
  local folder=$2 free=""
  while [ ! -d "$folder" ]; do folder=${folder%/*}; done
  if command -v df >/dev/null; then
    free=$(df -Pk "$folder/" | { read -r _; read -r _ _ _ free _; echo $((free * 1024 / 1000000000)); })
  fi
  [ -z "$free" ] || [ "$free" -ge "$1" ] || missing "$3 takes $1 GB of disk, and ${folder:-/} has $free GB free"
}

need_go() {
  local version
  if ! command -v go >/dev/null; then
    missing "there is no go; install Go 1.21 or newer, from its own site or as Debian 13's package golang-go"
    return
  fi
  version=$(go env GOVERSION)
  version=${version#go1.}
  # From 1.21 on, Go fetches the version that a program wants.
  if [ "${version%%[!0-9]*}" -lt 21 ]; then
    missing "go is version 1.$version; install Go 1.21 or newer, from its own site or as Debian 13's package golang-go"
  fi
}

need_minio() {
  command -v minio >/dev/null || [ -x "$BIN/minio" ] || need_go
}

need_engine() {
  if [ ${#engine[@]} -eq 0 ]; then
    need podman runc  # docker does too
  elif ! command -v "${engine[0]}" >/dev/null; then
    missing "there is no ${engine[0]}, which ZOOSPLAT_CONTAINER_ENGINE names"
    engine=()
  elif [[ ${engine[0]} == *podman ]]; then
    need runc
    [ "$EUID" = 0 ] || need newuidmap
  fi
}

need_images() {
  [ ${#engine[@]} -gt 0 ] || return 0  # the missing engine is reported elsewhere
  local there image lacking=""
  there=$("${engine[@]}" images --format '{{.Repository}}:{{.Tag}}') || there=""
  for image in "${IMAGES[@]}"; do
    case $there in *"localhost/zoosplat-$image:dev"*) ;; *) lacking+="${lacking:+, }$image" ;; esac
  done
  [ -z "$lacking" ] || missing "there are no images of $lacking; run make images"
}

# Where the registry of images cannot be reached, base.sh makes the image that the others stand on.
need_base_image() {
  [ -z "${BASE_IMAGE:-}" ] || return 0
  if [ ${#engine[@]} -gt 0 ]; then
    if has_image "$PYTHON_IMAGE" || has_image "$OWN_BASE"; then return; fi
    if found debootstrap && [ "$EUID" = 0 ]; then return; fi
    if "${engine[@]}" pull -q "$PYTHON_IMAGE" >/dev/null 2>&1; then return; fi
    need_root "$PYTHON_IMAGE cannot be pulled, so a base image is made from Debian"
  fi
  need debootstrap
}

case $target in
  images)
    need_engine
    need_base_image
    [ ${#engine[@]} -gt 0 ] && has_image localhost/zoosplat-gpu-base:dev || need_disk 40 "$HOME/.cache/zoosplat" "building the images"
    ;;
  cluster-tools)
    need_linux
    need_go
    need_disk 7 "$HOME" "building the tools"
    ;;
  demo-containers)
    need_engine
    [ -n "${ZOOSPLAT_IMAGE_REGISTRY:-}" ] || need_images
    need initdb
    need_minio
    ;;
  demo-kubernetes | test-cluster)
    need_linux
    need_root "nodes are containerds and kubelets of this machine"
    need_engine
    need_images
    need runc containerd ctr containerd-shim-runc-v2 loopback openssl initdb
    need_go
    need_disk 20 "$HOME/.cache/zoosplat" "the nodes' copy of the images"
    ;;
  *) echo "requirements.sh: there is no target $target" >&2; exit 2 ;;
esac
[ ${#lines[@]} -gt 0 ] || exit 0
printf "$target: %s\n" "${lines[@]}" >&2
[ ${#install[@]} -eq 0 ] || echo "$target: apt-get install ${install[*]}" >&2
exit 2
