#!/usr/bin/env bash
# compose.sh up: builds the images and starts the fleet of compose.yaml.
# compose.sh down: removes it with its volumes and files.
# Needs Docker with Compose, Go and openssl.
set -euo pipefail
cd "$(dirname "$0")"
compose() { if docker compose version >/dev/null 2>&1; then docker compose -p reseal "$@"; else docker-compose -p reseal "$@"; fi; }
files=.compose

certificate() { # NAME DNS-NAME…: a certificate of the local authority
  local name=$1 sans=DNS:localhost,IP:127.0.0.1 dns
  shift
  for dns in "$@"; do sans+=",DNS:$dns"; done
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj "/CN=$name" \
    -CA "$files/tls/ca.pem" -CAkey "$files/ca.key" -addext "subjectAltName=$sans" -addext basicConstraints=CA:FALSE \
    -keyout "$files/tls/$name.key" -out "$files/tls/$name.pem" 2>/dev/null
  # The containers' user must read it; the folder above is closed to others.
  chmod 0644 "$files/tls/$name.key"
}

up() {
  ./images.sh
  mkdir -p "$files/tls" "$files/tokens"
  if [ ! -e "$files/tls/ca.pem" ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj "/CN=Reseal compose" \
      -keyout "$files/ca.key" -out "$files/tls/ca.pem" 2>/dev/null
    certificate etcd etcd
    certificate controlplane controlplane
    certificate backend backend.internal
    certificate site
  fi
  compose up -d etcd controlplane backend
  until docker cp "$(compose ps -q controlplane):/data/admin.yaml" "$files/admin.yaml" >/dev/null 2>&1; do sleep 0.5; done
  CGO_ENABLED=0 go build -o "$files/resealctl" ../cmd/resealctl
  ctl() { "$files/resealctl" --config "$files/admin.yaml" "$@"; }
  until ctl get edges >/dev/null 2>&1; do sleep 0.5; done
  for edge in edge-a edge-b; do
    [ -e "$files/tokens/$edge" ] || { ctl token create --id "$edge" -o name >"$files/tokens/$edge"; chmod 0644 "$files/tokens/$edge"; }
  done
  ctl apply -f compose-manifests.yaml
  compose up -d edge-a edge-b
  until ctl get edges -o json | tr -d ' \n' | grep -q '"id":"edge-a","state":"synced".*"id":"edge-b","state":"synced"'; do sleep 0.5; done
  ctl get edges
  cat <<MESSAGE

Try:
  curl --cacert deploy/$files/tls/ca.pem https://localhost:8443/
  curl --cacert deploy/$files/tls/ca.pem https://localhost:8444/
  deploy/$files/resealctl --config deploy/$files/admin.yaml stats
  deploy/compose.sh down
MESSAGE
}

case ${1:-} in
up) up ;;
down) compose down --volumes && rm -rf "$files" ;;
*) echo "usage: $0 up|down" >&2; exit 2 ;;
esac
