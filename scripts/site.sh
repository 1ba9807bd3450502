# What scripts/bench and scripts/soak share beyond lib.sh: a gateway with its registry, agents, a target and stock
# ssh, all on 127.0.0.1, in a directory that goes when the script ends. Sourced, never run; after lib.sh.
# shellcheck shell=bash
# shellcheck disable=SC2154 # $top is lib.sh's
# shellcheck disable=SC2034 # what the functions set is for those who source this

# site_begin NAME : a working directory, $work, which becomes the current one.
site_begin() {
  work=$(mktemp -d "/tmp/caponier-$1.XXXXXX")
  on_exit rm -rf "$work"
  chmod 0755 "$work"
  cd "$work" || exit 1
  mkdir keys log sockets
  ulimit -n "$(ulimit -Hn)"
}

# site_build [fleet] [proxied] [trail] : $CAPONIER_BIN, and with "fleet" $CAPONIER_FLEET too, with "proxied" $CAPONIER_PROXIED, with
# "trail" $CAPONIER_TRAIL, all built unless they are given; and the load, which needs nothing of the package, and so is not worth a build of all that the package needs.
site_build() {
  local wanted=()
  need_cargo
  [ -n "${CAPONIER_BIN:-}" ] || wanted+=(--bin caponier)
  [[ " $* " != *" fleet "* ]] || [ -n "${CAPONIER_FLEET:-}" ] || wanted+=(--example fleet)
  [[ " $* " != *" proxied "* ]] || [ -n "${CAPONIER_PROXIED:-}" ] || wanted+=(--example proxied)
  [[ " $* " != *" trail "* ]] || [ -n "${CAPONIER_TRAIL:-}" ] || wanted+=(--example trail)
  if [ "${#wanted[@]}" -gt 0 ]; then
    say "Building: cargo build --profile dist ${wanted[*]}"
    while read -r built; do
      case $built in
        */fleet) CAPONIER_FLEET=$built ;;
        */proxied) CAPONIER_PROXIED=$built ;;
        */trail) CAPONIER_TRAIL=$built ;;
        *) CAPONIER_BIN=$built ;;
      esac
    done < <(built_executables --profile dist "${wanted[@]}")
  fi
  CAPONIER_BIN=$(realpath "${CAPONIER_BIN:-}")
  CAPONIER_FLEET=${CAPONIER_FLEET:+$(realpath "$CAPONIER_FLEET")}
  CAPONIER_PROXIED=${CAPONIER_PROXIED:+$(realpath "$CAPONIER_PROXIED")}
  CAPONIER_TRAIL=${CAPONIER_TRAIL:+$(realpath "$CAPONIER_TRAIL")}
  rustc --edition 2024 -O -o "$work/load" "$top/benches/load.rs"
  rustc --edition 2024 -O -o "$work/delay" "$top/benches/delay.rs"
}

# launch NAME COMMAND… : starts a process whose output goes to log/NAME.log; its id is then in $pid.
launch() {
  local name=$1
  shift
  "$@" >"log/$name.log" 2>&1 </dev/null &
  pid=$!
  on_exit stop "$pid"
}

# free_port : one that nobody listens on, outside the range from which the kernel hands out ports to clients.
free_port() {
  local port
  while port=$((20000 + RANDOM % 10000)); [ -n "$(ss -Hltn "sport = :$port")" ]; do :; done
  printf '%s\n' "$port"
}
listening() { [ -n "$(ss -Hltn "sport = :$1")" ]; }

# says NAME TEXT : whether the output of the process NAME has this.
says() { grep -q -- "$2" "log/$1.log"; }

# first_line NAME : what a program that prints its address first has printed, once it has.
first_line() {
  wait_for 5 "$1" test -s "log/$1.log"
  head -n 1 "log/$1.log"
}

# site_target : starts the target; its address is then in $target, its port in $target_port.
site_target() {
  launch target ./load serve
  target=$(first_line target)
  target_port=${target##*:}
}

# --- our side ---------------------------------------------------------------------------------------------

declare -A ssh_door=() gateway_pid=()
extra_gateway='' extra_agent=''

# new_gateway NAME AGENT… : the files of a gateway: keys, a registry in which the principal "user" may use these agents
# of the organisation acme, and a configuration. $extra_gateway goes into its table [gateway].
new_gateway() {
  local name=$1
  shift
  [ -f keys/user ] || ssh-keygen -q -t ed25519 -N '' -C '' -f keys/user
  mkdir -p "$name/registry/organisations/acme/principals/user" "$name/registry/organisations/acme/agents"
  "$CAPONIER_BIN" keys generate --output "$name/host" >/dev/null
  "$CAPONIER_BIN" keys generate --output "$name/login" >/dev/null
  cp keys/user.pub "$name/registry/organisations/acme/principals/user/user.pub"
  printf 'agents = ["*"]\n' >"$name/registry/organisations/acme/principals/user.toml"
  local agent
  for agent in "$@"; do
    "$CAPONIER_BIN" keys generate --output "$name/$agent" >/dev/null
    mkdir -p "$name/registry/organisations/acme/agents/$agent"
    cp "$name/$agent.pub" "$name/registry/organisations/acme/agents/$agent/key.pub"
  done
  ssh_door[$name]=$(free_port)
  cat >"$name/gateway.toml" <<END
[gateway]
listen = ["127.0.0.1:${ssh_door[$name]}"]
host_key = "$work/$name/host"
registry = "$work/$name/registry"
admin_socket = "$work/$name/admin.sock"
$extra_gateway

[[organisation]]
id = "acme"
login_key = "$work/$name/login"

[audit]
file = "$work/$name/trail.jsonl"
END
  printf '[127.0.0.1]:%s %s\n' "${ssh_door[$name]}" "$(cut -d' ' -f1,2 "$name/host.pub")" >>known_hosts
}

# token_key NAME : a key that signs tokens for the principal "user" of a gateway.
token_key() {
  "$CAPONIER_BIN" keys generate --output "$1/tokens" >/dev/null
  mkdir -p "$1/registry/organisations/acme/token-keys"
  cp "$1/tokens.pub" "$1/registry/organisations/acme/token-keys/tokens.pub"
  printf 'principals = ["user"]\n' >"$1/registry/organisations/acme/token-keys/tokens.toml"
}

# connect_client NAME GATEWAY AGENT TARGET : a client at the CONNECT door; $port is then where it listens, $pid its process.
connect_client() {
  local token
  port=$(free_port)
  token=$("$CAPONIER_BIN" url "acme/$3" --gateway localhost --principal user --key "$2/tokens" 2>/dev/null)
  token=${token#*caponier:}
  TOKEN=${token%@*} launch "$1" "$CAPONIER_PROXIED" "$port" "127.0.0.1:${ssh_door[$2]}" "$4" tls/ca.pem
  wait_for 10 "the client of the CONNECT door ($1)" listening "$port"
}

# loopback_door NAME AGENT TARGET : one more door of a gateway that has not started; its port is then in $door.
loopback_door() {
  door=$(free_port)
  printf '\n[[local]]\nlisten = "127.0.0.1:%s"\nagent = "acme/%s"\ntarget = "%s"\nprincipal = "user"\n' "$door" "$2" "$3" \
    >>"$1/gateway.toml"
}

# start_gateway NAME : starts it; its process is then in ${gateway_pid[NAME]}.
start_gateway() {
  launch "$1" "$CAPONIER_BIN" gateway --config "$1/gateway.toml"
  gateway_pid[$1]=$pid
  wait_for 10 "the gateway $1" listening "${ssh_door[$1]}"
}

# site_certificates : an authority and a certificate of its for 127.0.0.1: tls/ca.pem, tls/server.pem and tls/server.key.
site_certificates() {
  mkdir tls
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj '/CN=an authority' \
    -keyout tls/ca.key -out tls/ca.pem 2>/dev/null
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj '/CN=localhost' \
    -keyout tls/server.key -out tls/server.csr 2>/dev/null
  openssl x509 -req -in tls/server.csr -CA tls/ca.pem -CAkey tls/ca.key -CAcreateserial -days 1 -out tls/server.pem \
    -extfile <(printf 'subjectAltName = DNS:localhost, IP:127.0.0.1\n') 2>/dev/null
  chmod 0600 tls/server.key
}

# new_agent NAME AGENT [REPLICA] [ADDRESS] : the configuration of an agent of the gateway NAME, which it dials at ADDRESS, or by
# the URL that stands there.
# $extra_agent goes into its table [agent].
new_agent() {
  local replica=${3:-one} address=${4:-127.0.0.1:${ssh_door[$1]}} ports=$target_port
  [ -z "${more_ports:-}" ] || ports+=", $more_ports"
  [[ $address == *://* ]] || address=ssh://$address
  cat >"$1/$2-$replica.toml" <<END
[agent]
id = "$2"
replica = "$replica"
host_key = "$work/$1/$2"
$extra_agent

[[organisation]]
id = "acme"
gateways = ["$address"]

[[organisation.orchestrator]]
key = "$(cut -d' ' -f1,2 "$1/login.pub")"
asserts = ["user"]

[[organisation.allow]]
name = "target"
addresses = ["127.0.0.1/32"]
ports = [$ports]

[audit]
file = "$work/$1/$2-$replica.jsonl"
END
}

# start_agent NAME AGENT [REPLICA] : starts it; its process is then in $pid.
start_agent() { launch "$1-$2-${3:-one}" "$CAPONIER_BIN" agent --config "$1/$2-${3:-one}.toml"; }

# links NAME [FILTER] : the links of a gateway that jq's FILTER selects, one object a line; agents without one are listed,
# too, and passed over.
links() {
  "$CAPONIER_BIN" agents --socket "$1/admin.sock" --json |
    jq -c ".[] | select(.address != null and .state != \"absent\") | select(${2:-true})"
}

# linked NAME AGENT [REPLICA] : whether it has an active link.
linked() {
  [ -n "$(links "$1" ".agent == \"$2\" and .state == \"active\"${3:+ and .replica == \"$3\"}")" ]
}

# --- stock ssh --------------------------------------------------------------------------------------------

# ssh_options : fills $ssh, the client with all that both parties need.
ssh_options() {
  ssh=(ssh -N -F none -i keys/user -c aes128-gcm@openssh.com -o IdentitiesOnly=yes -o IdentityAgent=none -o BatchMode=yes
    -o "UserKnownHostsFile=$work/known_hosts" -o StrictHostKeyChecking=yes -o ExitOnForwardFailure=yes
    -o ServerAliveInterval=20)
}

# ssh_client NAME GATEWAY AGENT TARGET : a client at the SSH door; $port is then where it listens, $pid its process.
ssh_client() {
  port=$(free_port)
  launch "$1" "${ssh[@]}" -p "${ssh_door[$2]}" "acme/$3@127.0.0.1" -L "127.0.0.1:$port:$4"
  wait_for 10 "ssh -L ($1)" listening "$port"
}

# forward_client NAME GATEWAY AGENT TARGET : the same with `caponier forward`.
forward_client() {
  port=$(free_port)
  launch "$1" "$CAPONIER_BIN" forward --gateway "ssh://127.0.0.1:${ssh_door[$2]}" --agent "acme/$3" --identity keys/user \
    --known-hosts known_hosts -L "127.0.0.1:$port:$4"
  wait_for 10 "caponier forward ($1)" listening "$port"
}

# --- looking at processes ---------------------------------------------------------------------------------

# tree PID… : these processes and all that descend from them.
tree() {
  local each
  for each in "$@"; do
    printf '%s\n' "$each"
    mapfile -t children < <(pgrep -P "$each")
    [ "${#children[@]}" -eq 0 ] || tree "${children[@]}"
  done
}

# cpu PID… : seconds of processor time, user and system, that these processes have used.
cpu() {
  local each
  for each in "$@"; do
    sed 's/^.*) //' "/proc/$each/stat"
  done | awk -v tick="$(getconf CLK_TCK)" '{ sum += $12 + $13 } END { printf "%.2f\n", sum / tick }'
}

# resident PID : VmRSS in KiB.
resident() { awk '$1 == "VmRSS:" { print $2 }' "/proc/$1/status"; }

# descriptors PID : how many it has.
descriptors() { find "/proc/$1/fd" -mindepth 1 -maxdepth 1 | wc -l; }

# calc EXPRESSION : with decimals.
calc() { awk "BEGIN { printf \"%.3f\\n\", $1 }"; }

# big_trail FILE MIB HOURS : makes one, and leaves what `trail make` says of it in FILE.json.
big_trail() { "$CAPONIER_TRAIL" make "$1" "$2" "$3" >"$1.json"; }

# said_of FILE KEY : what that was.
said_of() { jq -r ".$2" "$1.json"; }

# timed NAME COMMAND… : runs it with its output to log/NAME.log; its seconds and its peak of memory in KiB are then in $took and
# $peak.
timed() {
  local name=$1
  shift
  python3 - "$@" >"log/$name.log" 2>"log/$name.time" <<'END' || { cat "log/$name.time" >&2; die "${*:1:3} failed"; }
import os, resource, subprocess, sys, time
began = time.monotonic()
code = subprocess.run(sys.argv[1:]).returncode
took = time.monotonic() - began
print(f"{took:.3f} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}", file=sys.stderr)
sys.exit(code)
END
  read -r took peak < <(tail -n 1 "log/$name.time")
}
