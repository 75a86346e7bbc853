#!/usr/bin/env bash
# node.sh NAME PORT [--labels K=V,...] [--gpus N] [--taint K=V:EFFECT] [IMAGE.tar...]
# Add a real node. It has a containerd and a kubelet of its own, so that several nodes fit on one machine. The script
# needs root and Debian's containerd, runc and containernetworking-plugins. PORT is the kubelet's. Pods use the host's
# network. To a node that runs already, the script only imports images.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh
name=$1 port=$2
shift 2
labels="" gpus=0 taint=""
while [[ "${1:-}" == --* ]]; do
  case $1 in
    --labels) labels=$2 ;;
    --gpus) gpus=$2 ;;
    --taint) taint=$2 ;;
    *) echo "node.sh: no option $1" >&2; exit 2 ;;
  esac
  shift 2
done
node="$NODES/$name"
mkdir -p "$node/cni" "$RUN/tmp"
# Make the image of the pause process, which every pod contains. It holds one static program.
if [ ! -s "$RUN/pause.tar" ]; then
  work=$(mktemp -d "$RUN/tmp/pause.XXXXXX")
  CGO_ENABLED=0 GO111MODULE=off go build -trimpath -ldflags '-s -w' -o "$work/pause" pause/main.go
  tar -C "$work" --owner=0 --group=0 -cf "$work/layer.tar" pause
  digest=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
  printf '{"architecture":"%s","os":"linux","config":{"Entrypoint":["/pause"],"User":"65535"},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
    "$(go env GOARCH)" "$digest" > "$work/config.json"
  echo '[{"Config":"config.json","RepoTags":["localhost/pause:1"],"Layers":["layer.tar"]}]' > "$work/manifest.json"
  tar -C "$work" -cf "$RUN/pause.part" manifest.json config.json layer.tar
  mv "$RUN/pause.part" "$RUN/pause.tar"
  rm -rf "$work"
fi
# The API server finds a kubelet by its host name when it asks for logs.
grep -q " $name # zoosplat\$" /etc/hosts || echo "127.0.0.1 $name # zoosplat" >> /etc/hosts
cat > "$node/containerd.toml" <<END
version = 2
root = "$node/data"
state = "$node/state"
[grpc]
  address = "$node/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  # Without CAP_SYS_RESOURCE runc cannot lower the score and ends with "can't get final child's PID from pipe: EOF".
  restrict_oom_score_adj = true
  sandbox_image = "localhost/pause:1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$node/cni"
END
echo '{"cniVersion":"0.4.0","name":"lo","plugins":[{"type":"loopback"}]}' > "$node/cni/10-lo.conflist"
# Unpacking gigabytes takes minutes. So the next node with these images begins with hard links to the files that the
# first one unpacked.
unpacked="$RUN/unpacked/$([ $# -eq 0 ] || stat -c '%n %s %y' "$@" | sha256sum | cut -c1-16)"
fresh=$([ -d "$node/data" ] || echo yes)
linked() {  # FROM TO: link containerd's folder; only its databases change, so they are copied
  cp -al "$1" "$2"
  find "$2" -name '*.db' -exec cp -p {} {}.own \; -exec mv -f {}.own {} \;
}
given=("$RUN/pause.tar" "$@")
if [ $# -gt 0 ] && [ -n "$fresh" ] && [ -d "$unpacked" ]; then
  linked "$unpacked" "$node/data"
  given=()
fi
start containerd "$node" containerd --config "$node/containerd.toml"
ctr() { command ctr --address "$node/containerd.sock" -n k8s.io "$@"; }
for _ in $(seq 60); do ctr version > /dev/null 2>&1 && break; sleep 0.5; done
for image in ${given[@]+"${given[@]}"}; do
  ctr images import "$image" > /dev/null
  # Pods run on the unpacked layers. The packed ones are removed, because a node with GPU images has gigabytes of them.
  ctr content ls | awk '$2 ~ /[MG]i?B$/ {print $1}' | while read -r digest; do ctr content rm "$digest" > /dev/null; done
done
if [ $# -gt 0 ] && [ -n "$fresh" ] && [ ! -d "$unpacked" ]; then
  sleep 2  # containerd is still removing the layers that the loop has deleted
  mkdir -p "$RUN/unpacked"
  linked "$node/data" "$unpacked.part"
  mv "$unpacked.part" "$unpacked"
fi
if [ -d /sys/fs/cgroup/cpuset ]; then  # cgroup v1
  for controller in /sys/fs/cgroup/*/; do mkdir -p "$controller/$name" 2>/dev/null || true; done
  for file in cpuset.cpus cpuset.mems; do cat "/sys/fs/cgroup/cpuset/$file" > "/sys/fs/cgroup/cpuset/$name/$file"; done
fi
cat > "$node/kubelet.yaml" <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /$name
containerRuntimeEndpoint: unix://$node/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $RUN/pki/ca.crt}}
authorization: {mode: Webhook}
failSwapOn: false
enforceNodeAllocatable: []
address: 127.0.0.1
port: $port
healthzPort: 0
podLogsDir: $node/podlogs
evictionHard: {memory.available: 100Mi, nodefs.available: 1%}
imageGCHighThresholdPercent: 100  # images are put here, not pulled: on a fuller disk they would be removed for good
localStorageCapacityIsolation: false
END
start kubelet "$node" "$BIN/kubelet" --config "$node/kubelet.yaml" --kubeconfig "$KUBECONFIG" --root-dir "$node/kubelet" \
  --hostname-override "$name" ${labels:+--node-labels "$labels"}
for _ in $(seq 120); do "$BIN/kubectl" get node "$name" > /dev/null 2>&1 && break; sleep 0.5; done
"$BIN/kubectl" wait --for=condition=Ready "node/$name" --timeout=90s > /dev/null
if [ "$gpus" != 0 ]; then
  # This is what a device plugin would report. The kubelet leaves resources alone that are not its own.
  "$BIN/kubectl" patch node "$name" --subresource=status --type=merge > /dev/null \
    -p "{\"status\": {\"capacity\": {\"nvidia.com/gpu\": \"$gpus\"}, \"allocatable\": {\"nvidia.com/gpu\": \"$gpus\"}}}"
fi
[ -z "$taint" ] || "$BIN/kubectl" taint node "$name" "$taint" --overwrite > /dev/null
echo "cluster: node $name is ready"
