#!/usr/bin/env bash
# Build Kubernetes, etcd, kwok and helm from source into ~/.cache/zoosplat/bin. This needs Go and takes about 8 minutes
# on two cores. Do nothing where they are there already.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh
kubernetes=v1.36.3
version=k8s.io/component-base/version
# The build must be told its version, because clients cannot parse the default one.
told="-s -w -X $version.gitVersion=$kubernetes -X $version.gitMajor=1 -X $version.gitMinor=36"
missing=()
for name in kube-apiserver kube-controller-manager kube-scheduler kubectl kubelet etcd kwok kwok-stages.yaml helm; do
  [ -s "$BIN/$name" ] || missing+=("$name")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "cluster tools: $BIN has them all"
  exit 0
fi
../requirements.sh cluster-tools
mkdir -p "$BIN"
# The build goes beside its place and is then renamed, so that an interrupted build leaves nothing that looks finished.
building=$(mktemp -d "$BIN/building.XXXXXX")
trap 'rm -rf "$building"' EXIT
cp go.mod tools.go "$building"
export GOFLAGS=-buildvcs=false
for name in "${missing[@]}"; do
  echo "cluster tools: building $name"
  case $name in
    helm) GOBIN="$building" go install helm.sh/helm/v3/cmd/helm@v3.22.0 ;;
    kwok) GOBIN="$building" go install sigs.k8s.io/kwok/cmd/kwok@v0.8.0 ;;
    kwok-stages.yaml)  # what simulated nodes and pods do; without it kwok ends at once
      stages=$(go mod download -json sigs.k8s.io/kwok@v0.8.0 | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')/kustomize/stage
      for file in "$stages"/node/fast/node-initialize.yaml "$stages"/node/heartbeat-with-lease/node-*.yaml "$stages"/pod/general/pod-*.yaml
      do
        echo ---
        cat "$file"
      done > "$building/$name"
      ;;
    etcd) (cd "$building" && go mod tidy && go build -ldflags "-s -w" -o etcd go.etcd.io/etcd/server/v3) ;;
    *) (cd "$building" && go mod tidy && go build -ldflags "$told" -o "$name" "k8s.io/kubernetes/cmd/$name") ;;
  esac
  mv "$building/$name" "$BIN/$name"
done
