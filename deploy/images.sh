#!/usr/bin/env bash
# Builds the container images from static binaries: images.sh [VERSION]
# The images are reseal/controlplane, reseal/edge, reseal/resealctl, and for the
# compose file and the tests reseal/etcd and reseal/backend. None is pulled.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-devel}
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
mkdir -p "$context/bin/empty"
build() { # DIRECTORY NAME
  CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$version" -o "$context/bin/$2" "$1"
}
build ./cmd/reseal-controlplane reseal-controlplane
build ./cmd/reseal-edge reseal-edge
build ./cmd/resealctl resealctl
build ./integration/containers/etcd etcd
build ./integration/containers/backend backend
for target in controlplane edge resealctl etcd backend; do
  docker build --quiet --file deploy/Dockerfile --target "$target" --tag "reseal/$target:$version" --tag "reseal/$target:latest" "$context"
done
