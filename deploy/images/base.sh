#!/usr/bin/env bash
# base.sh ROOT_TAR: make a tar file of Debian bookworm with Python, for machines that reach no registry. It needs root.
# `podman import ROOT_TAR IMAGE` turns the file into an image; build.sh does so by itself.
set -euo pipefail
command -v debootstrap >/dev/null || { echo "base: needs debootstrap; apt-get install debootstrap" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
root=$folder/root
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" \
  ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$folder/log" 2>&1 || { tail -20 "$folder/log" >&2; exit 1; }
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info}/* "$root"/var/log/*
tar -C "$root" -cf "$1" .
