# What scripts/test, scripts/demo, scripts/bench and scripts/soak share. Sourced, never run.
#
# It promises three things: a script says what it installs before it installs it; every wait has a
# deadline; and whatever a script made is taken away on every way out, in the reverse order of its making.
# shellcheck shell=bash

set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Programs such as sshd and ip live here, and the PATH of an ordinary user does not always say so.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '%s\n' "$*"; }

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

as_root() {
  if [ "$EUID" -eq 0 ]; then
    "$@"
  elif have sudo; then
    sudo "$@"
  else
    die "'$*' needs root: run this as root, or install sudo"
  fi
}

# --- leaving nothing behind -------------------------------------------------------------------------------

undo=()

# on_exit COMMAND ARGUMENT… : runs when the script ends, however it ends; the last registered runs first.
on_exit() {
  local words
  printf -v words '%q ' "$@"
  undo+=("$words")
}

# undo_all : takes away all that is registered so far, and lets nothing interrupt that. A script may call it early,
# to look at what is left.
undo_all() {
  local step
  trap '' INT TERM HUP
  while [ "${#undo[@]}" -gt 0 ]; do
    step=${undo[-1]}
    unset 'undo[-1]'
    eval "$step" || true
  done
}

unwind() {
  local status=$?
  set +e
  undo_all
  trap - EXIT
  exit "$status"
}

trap unwind EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# stop PID… : ends processes that this script started, politely at first, and returns once they are gone. One that
# ended long ago is left alone: its number may be another's by now.
stop() {
  local pid deadline
  for pid in "$@"; do
    is_child "$pid" || continue
    kill -TERM "$pid" 2>/dev/null || continue
    deadline=$((SECONDS + 5))
    while running "$pid"; do
      if [ "$SECONDS" -ge "$deadline" ]; then
        kill -KILL "$pid" 2>/dev/null
        break
      fi
      sleep 0.02
    done
    wait "$pid" 2>/dev/null || true
  done
}

# running PID : whether it lives; a zombie that nobody has waited for does not.
running() {
  local stat
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  stat=${stat##*) }
  [ "${stat%% *}" != Z ]
}

# is_child PID : whether it is a child of this script.
is_child() {
  local stat
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  stat=${stat##*) }
  stat=${stat#* }
  [ "${stat%% *}" = "$$" ]
}

# --- waiting ----------------------------------------------------------------------------------------------

# wait_for SECONDS WHAT COMMAND… : until COMMAND succeeds; when the time is over, the script fails and says WHAT.
wait_for() {
  local seconds=$1 what=$2 deadline
  shift 2
  deadline=$((${EPOCHREALTIME/[.,]/} + seconds * 1000000))
  until "$@" >/dev/null 2>&1; do
    [ "${EPOCHREALTIME/[.,]/}" -lt "$deadline" ] || die "waited $seconds s for $what, in vain"
    sleep 0.05
  done
}

# --- packages ---------------------------------------------------------------------------------------------

# The directory of initdb and postgres: PG_BINDIR, else the newest that Debian has installed, else the PATH.
postgres_bindir() {
  local found
  found=$(printf '%s\n' /usr/lib/postgresql/*/bin/postgres | sort -V | tail -n 1)
  [ -x "$found" ] || found=$(command -v postgres) || true
  [ -z "${PG_BINDIR:-}" ] || found=$PG_BINDIR/postgres
  [ -x "$found" ] || return 1
  dirname "$found"
}

# present WHAT : a command, an absolute path, or "postgresql" for a server of any version.
present() {
  case $1 in
    postgresql) postgres_bindir >/dev/null ;;
    /*) [ -e "$1" ] ;;
    *) have "$1" ;;
  esac
}

# need_packages WHAT:PACKAGE… : installs, from Debian or Ubuntu, the package of whatever is not present.
# Services that come with a package are not started: the scripts start their own, with their own settings.
need_packages() {
  local pair missing=() why=()
  for pair in "$@"; do
    present "${pair%%:*}" && continue
    missing+=("${pair##*:}")
    why+=("${pair%%:*}")
  done
  [ "${#missing[@]}" -gt 0 ] || return 0
  have apt-get || die "absent: ${why[*]}. Install what Debian calls ${missing[*]}, then run this again"
  say "Installing ${missing[*]} (absent: ${why[*]}); their services are not started."
  (
    # invoke-rc.d and deb-systemd-invoke ask this file; one that is there already is the owner's and stays.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
      printf '#!/bin/sh\nexit 101\n' | as_root install -m 0755 /dev/stdin /usr/sbin/policy-rc.d
      trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    as_root apt-get -qq update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "${missing[@]}" >/dev/null
  )
  hash -r
  for pair in "$@"; do
    present "${pair%%:*}" || die "${pair##*:} is installed, and yet ${pair%%:*} is absent"
  done
}

# need_cargo : Rust, which comes from elsewhere, and the C compiler and linker that it wants.
need_cargo() {
  need_packages cc:gcc /usr/include/stdio.h:libc6-dev
  if ! have cargo && [ -x "$HOME/.cargo/bin/cargo" ]; then
    PATH=$PATH:$HOME/.cargo/bin
  fi
  have cargo || die "cargo is absent: install Rust 1.90 or later, see https://rustup.rs"
}

# built_executable ARGUMENT… : builds with cargo, saying so, and prints the path of the binary caponier.
built_executable() {
  built_executables --bin caponier "$@" | grep -x '.*/caponier' || die "cargo built no executable"
}

# built_executables ARGUMENT… : builds with cargo, and prints the paths of all executables that come of it.
built_executables() {
  (cd "$top" && cargo build --locked "$@" --message-format=json-render-diagnostics) |
    jq -r 'select(.reason == "compiler-artifact" and .executable) | .executable'
}

# sshd run by root wants an empty directory of its own, which a service manager would have made.
sshd_directory() {
  [ -d /run/sshd ] || [ "$EUID" -ne 0 ] || {
    mkdir -m 0755 /run/sshd
    on_exit rmdir --ignore-fail-on-non-empty /run/sshd
  }
}

# --- Kubernetes -------------------------------------------------------------------------------------------

# need_kubectl : one that is there already ($KUBECTL, or on the PATH) is taken as it is, of whatever age; else Debian's
# package kubernetes-client is installed. Where no such package is to be had, as on Ubuntu, kubectl is built from the Go
# modules of Kubernetes. The path is then in $KUBECTL.
need_kubectl() {
  KUBECTL=${KUBECTL:-$(command -v kubectl)} || {
    if ! apt_has kubernetes-client; then
      as_root apt-get -qq update || true
    fi
    if apt_has kubernetes-client; then
      need_packages kubectl:kubernetes-client
      KUBECTL=$(command -v kubectl)
    else
      say "There is no package kubernetes-client here: kubectl is built from its Go modules."
      kubernetes_program kubectl
      KUBECTL=$kubernetes/kubectl
    fi
  }
  export KUBECTL
}

apt_has() { have apt-cache && [ -n "$(apt-cache show "$1" 2>/dev/null)" ]; }

# The release that kubernetes_program builds, without its first number; and where, unless it is there already.
kubernetes_release=33.13
kubernetes=${CAPONIER_KUBERNETES:-${CARGO_TARGET_DIR:-$top/target}/kubernetes-1.$kubernetes_release}

# kubernetes_program NAME… : builds commands of Kubernetes, such as kube-apiserver, into $kubernetes. Each takes minutes, once.
# Kubernetes cannot be installed by `go install`, since its go.mod says where in its own tree its libraries are; so a module of
# ours requires it, with those libraries of the same release in their place.
kubernetes_program() {
  local name mod wanted=()
  for name in "$@"; do [ -x "$kubernetes/$name" ] || wanted+=("$name"); done
  [ "${#wanted[@]}" -gt 0 ] || return 0
  have go || PATH=$PATH:/usr/local/go/bin
  need_packages go:golang-go jq:jq /etc/ssl/certs/ca-certificates.crt:ca-certificates
  # An older one does not know how to fetch the newer one that the modules ask for.
  [ "$(go env GOVERSION | sed -E 's/^go1\.([0-9]+).*/\1/')" -ge 21 ] ||
    die "$(go version) is too old to build ${wanted[*]}: install Go 1.21 or later, or set KUBECTL to a kubectl"
  say "Building ${wanted[*]} of Kubernetes 1.$kubernetes_release from Go modules, into $kubernetes (some minutes each)."
  mkdir -p "$kubernetes"
  (
    cd "$kubernetes"
    export GOFLAGS='-mod=mod -buildvcs=false' GOTOOLCHAIN=auto CGO_ENABLED=0
    printf 'module example.invalid/kubernetes\n' >go.mod
    mod=$(go mod download -json "k8s.io/kubernetes@v1.$kubernetes_release" | jq -r .GoMod)
    {
      printf 'module example.invalid/kubernetes\n'
      grep '^go ' "$mod"
      printf 'require k8s.io/kubernetes v1.%s\n' "$kubernetes_release"
      sed -nE "s#^\s*(k8s.io/[a-z-]+) => ./staging/.*#replace \1 => \1 v0.$kubernetes_release#p" "$mod"
    } >go.mod
    # Its own build says which release it is; without that, kubectl cannot compare the two ends.
    version=k8s.io/component-base/version
    said="-X $version.gitVersion=v1.$kubernetes_release -X $version.gitMajor=1 -X $version.gitMinor=${kubernetes_release%.*}"
    for name in "${wanted[@]}"; do
      nice go build -ldflags "-s -w $said" -o "./$name" "k8s.io/kubernetes/cmd/$name"
    done
  )
}

# --- Helm -------------------------------------------------------------------------------------------------

helm_version=3.22.0

# need_helm : one that is there already ($HELM, or on the PATH), else the release above, from its Go module; and what reads
# what it renders. `helm` is then a function that calls it.
need_helm() {
  need_packages openssl:openssl /usr/bin/python3:python3 /usr/lib/python3/dist-packages/yaml/__init__.py:python3-yaml
  have go || PATH=$PATH:/usr/local/go/bin
  HELM=${HELM:-$(type -P helm)} || HELM=${GOPATH:-$HOME/go}/bin/helm
  [ ! -x "$HELM" ] || return 0
  need_packages go:golang-go /etc/ssl/certs/ca-certificates.crt:ca-certificates
  [ "$(go env GOVERSION | sed -E 's/^go1\.([0-9]+).*/\1/')" -ge 21 ] ||
    die "$(go version) is too old to build helm: install Go 1.21 or later, or set HELM to a helm"
  say "Building helm $helm_version from its Go module."
  GOTOOLCHAIN=auto CGO_ENABLED=0 go install "helm.sh/helm/v3/cmd/helm@v$helm_version"
}

# It says at each step where links lead.
helm() { "$HELM" "$@" 2> >(grep -v 'found symbolic link' >&2); }
