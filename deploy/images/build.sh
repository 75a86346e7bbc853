#!/usr/bin/env bash
# build.sh [IMAGE...]: build the images (stages, gpu-base, flows, worker, minio; default: stages and flows) with podman or docker.
#   REGISTRY, TAG             names of the images: REGISTRY/zoosplat-STAGE:TAG (localhost, dev)
#   BASE_IMAGE                default python:3.12-slim-bookworm; without a registry, base.sh makes it
#   GSPLAT_ARCHS              CUDA architectures to compile gsplat for ("8.0 8.6 8.9 9.0 12.0"); "" for CPU only
#   MAX_JOBS                  number of compiler processes (2)
#   ZOOSPLAT_CONTAINER_ENGINE the engine's command, as for the runner
set -euo pipefail
cd "$(dirname "$0")/../.."
REGISTRY=${REGISTRY:-localhost} TAG=${TAG:-dev}
CPU_STAGES=(ingest center_rotation crop pack embedding)
GPU_STAGES=(segment train evaluate render features)
deploy/requirements.sh images
. deploy/engine.sh
options=(--network host)
if [[ ${engine[0]} == *podman ]]; then
  cache=$HOME/.cache/zoosplat/containers/cache
  mkdir -p "$cache"
  home=~root  # home of the builder's user, which is the same in the image
  options+=(--isolation chroot --format docker --volume "$cache:$home/.cache")
  # Where a proxy signs the connections, the builder must trust this machine's authorities; the images never hold them.
  ca=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
  [ ! -f "$ca" ] || options+=(--volume "$ca:/etc/ssl/certs/ca-certificates.crt:ro")
fi

if [ -z "${BASE_IMAGE:-}" ]; then
  BASE_IMAGE=$PYTHON_IMAGE
  if ! has_image "$BASE_IMAGE" && ! "${engine[@]}" pull -q "$BASE_IMAGE" >/dev/null 2>&1; then
    BASE_IMAGE=$OWN_BASE
    if ! has_image "$BASE_IMAGE"; then
      echo "images: $PYTHON_IMAGE cannot be had; making $BASE_IMAGE from Debian"
      tar=$(mktemp)
      trap 'rm -f "$tar"' EXIT
      deploy/images/base.sh "$tar"
      "${engine[@]}" import "$tar" "$BASE_IMAGE" >/dev/null
    fi
  fi
fi

build() {  # NAME DOCKERFILE [OPTION...]: DOCKERFILE may be -, the standard input
  local image=$REGISTRY/zoosplat-${1//_/-}:$TAG file=$2 log
  shift 2
  log=$(mktemp)
  echo "images: building $image"
  if ! "${engine[@]}" build "${options[@]}" -t "$image" -f "$file" --build-arg "BASE_IMAGE=$BASE_IMAGE" \
    --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" "$@" . >"$log" 2>&1; then
    tail -40 "$log" >&2
    rm -f "$log"
    exit 1
  fi
  rm -f "$log"
}

build_stage() {  # NAME DOCKERFILE [OPTION...]
  local stage=$1 file=$2
  shift 2
  build "$stage" - --build-arg "STAGE=$stage" --label "org.opencontainers.image.title=zoosplat-${stage//_/-}" "$@" \
    < <(cat "$file" && echo "ENTRYPOINT [\"python\", \"-m\", \"zoosplat_$stage\"]")
}

gpu_base() {
  local archs=${GSPLAT_ARCHS-8.0 8.6 8.9 9.0 12.0}
  build gpu-base deploy/images/gpu-base.Dockerfile --build-arg "GSPLAT_ARCHS=$archs" --build-arg "MAX_JOBS=${MAX_JOBS:-2}"
}

# Ingest uses scipy only to read calibrations of MATLAB and for rotations.
INGEST_UNUSED=$(printf 'scipy/%s ' cluster datasets differentiate fft fftpack integrate interpolate ndimage odr optimize \
  signal stats)
INGEST_LATE_MODULES="h5py, scipy.io, scipy.spatial.transform"

is_one_of() {  # WORD WORDS...
  local word=$1
  shift
  [[ " $* " == *" $word "* ]]
}

wanted=("$@")
[ $# -gt 0 ] || wanted=("${CPU_STAGES[@]}" "${GPU_STAGES[@]}" flows)
made_gpu_base=""
for name in "${wanted[@]}"; do
  if is_one_of "$name" "${GPU_STAGES[@]}"; then
    [ -n "$made_gpu_base" ] || gpu_base
    made_gpu_base=1
    build_stage "$name" deploy/images/gpu-stage.Dockerfile --build-arg "GPU_BASE=$REGISTRY/zoosplat-gpu-base:$TAG"
  elif [ "$name" = ingest ]; then
    build_stage "$name" deploy/images/cpu-stage.Dockerfile --build-arg "UNUSED=$INGEST_UNUSED" \
      --build-arg "LATE_MODULES=$INGEST_LATE_MODULES"
  elif is_one_of "$name" "${CPU_STAGES[@]}"; then
    build_stage "$name" deploy/images/cpu-stage.Dockerfile
  else
    case $name in
      gpu-base) gpu_base; made_gpu_base=1 ;;
      worker) build worker deploy/images/worker.Dockerfile --build-arg "FLOWS_IMAGE=$REGISTRY/zoosplat-flows:$TAG" ;;
      flows | minio) build "$name" "deploy/images/$name.Dockerfile" ;;
      *) echo "images: there is no image $name; there are ${CPU_STAGES[*]} ${GPU_STAGES[*]} gpu-base flows worker minio" >&2; exit 2 ;;
    esac
  fi
done
"${engine[@]}" images --format '{{.Repository}}:{{.Tag}} {{.Size}}' | grep "^$REGISTRY/zoosplat-.*:$TAG " | sort -u
