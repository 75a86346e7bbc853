#!/usr/bin/env bash
# Stop all that up.sh and node.sh started: pods, kubelets, containerds and the control plane. Then unmount their file
# systems and remove their cgroups and data.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh
[ -d "$RUN" ] || exit 0
# Kubelets are stopped first, because they would start stopped pods again.
for pid in "$NODES"/*/kubelet.pid; do [ -e "$pid" ] && stop "$pid"; done
for node in "$NODES"/*/; do
  [ -S "$node/containerd.sock" ] && alive "$node/containerd.pid" || continue
  ctr() { command ctr --address "${node%/}/containerd.sock" -n k8s.io "$@" 2>/dev/null; }
  for task in $(ctr tasks list -q); do ctr tasks kill -s SIGKILL -a "$task" || true; done
  for container in $(ctr containers list -q); do ctr tasks delete -f "$container" > /dev/null || true; done
done
# containerd's shims go on after containerd has ended, so they are stopped too.
for cmdline in /proc/[0-9]*/cmdline; do
  if tr '\0' ' ' < "$cmdline" 2>/dev/null | grep -q "containerd-shim.* -address $NODES/"; then
    kill -9 "$(basename "$(dirname "$cmdline")")" 2>/dev/null || true
  fi
done
for pid in "$NODES"/*/containerd.pid; do [ -e "$pid" ] && stop "$pid"; done
for name in kwok scheduler controllers apiserver etcd; do [ -e "$RUN/$name.pid" ] && stop "$RUN/$name.pid"; done
# The innermost mounts come first, because a mount that holds others cannot be unmounted.
awk -v under="$NODES/" 'index($2, under) == 1 {print $2}' /proc/mounts | sort -r | while read -r mount; do umount -l "$mount" || true; done
for node in "$NODES"/*/; do
  [ -d "$node" ] || continue
  name=$(basename "$node")
  for group in /sys/fs/cgroup/*/"$name" /sys/fs/cgroup/"$name"; do
    if [ -d "$group" ]; then find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true; fi
  done
  sed "/ $name # zoosplat\$/d" /etc/hosts > "$RUN/hosts" && cat "$RUN/hosts" > /etc/hosts  # in place: it may be a mount
done
rm -rf "$RUN"
