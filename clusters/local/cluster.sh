#!/usr/bin/env bash
# A Ray cluster on this machine, a head and N workers, for whoever has its token.
#
#   cluster.sh start FOLDER [N]   start a head and N workers (1), wait for them, say how to use them
#   cluster.sh stop FOLDER        end them
#
# FOLDER keeps the token, the processes' numbers and Ray's logs. PORT (6379) and DASHBOARD_PORT (8265)
# move the two ports that others connect to, AGENT_PORT (52365) that of the head's agent, CPUS the
# cores that each node says it has.
set -euo pipefail

readonly HOST=127.0.0.1
readonly PORT=${PORT:-6379} DASHBOARD_PORT=${DASHBOARD_PORT:-8265} AGENT_PORT=${AGENT_PORT:-52365}
readonly CPUS=${CPUS:-$(nproc)}
# the longest that a loaded machine needed for a node, doubled
readonly PATIENCE_S=${PATIENCE_S:-180}

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

make_token() {
  [[ -s $folder/token ]] || head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' >"$folder/token"
}

# Starts a node that outlives this script and notes its number. It is tried again where it ends by
# itself: Ray gives a node 30 s to start, which a busy machine may need more of.
launch() {
  local name=$1
  shift
  setsid bash -c 'for _ in 1 2 3; do "$@" && exit; done' node "$@" >"$folder/$name.log" 2>&1 </dev/null &
  echo $! >>"$folder/pids"
}

start_head() {
  launch head ray start --head --block --node-ip-address="$HOST" --port="$PORT" \
    --dashboard-host="$HOST" --dashboard-port="$DASHBOARD_PORT" \
    --dashboard-agent-listen-port="$AGENT_PORT" \
    --num-cpus="$CPUS" --temp-dir="$folder/ray" --disable-usage-stats
}

start_worker() {
  # the agents of all nodes of one machine cannot have the head's port; 0: any
  launch "worker-$1" ray start --block --node-ip-address="$HOST" --address="$HOST:$PORT" \
    --dashboard-agent-listen-port=0 --num-cpus="$CPUS" --disable-usage-stats
}

# The token goes through a pipe: a command line is there for everyone to read.
num_alive() {
  curl --silent --max-time 10 --header @<(printf 'Authorization: Bearer %s' "$(<"$folder/token")") \
    "http://$HOST:$DASHBOARD_PORT/api/v0/nodes" | grep -o '"state": *"ALIVE"' | wc -l
}

all_run() {
  while read -r pid; do kill -0 "$pid" 2>/dev/null || return 1; done <"$folder/pids"
}

await_nodes() {
  local deadline=$((SECONDS + PATIENCE_S))
  until (($(num_alive || true) >= $1)); do
    if ((SECONDS > deadline)) || ! all_run; then
      echo "$1 nodes did not start, or not in $PATIENCE_S s: see $folder/*.log" >&2
      end_nodes
      exit 1
    fi
    sleep 1
  done
}

start() {
  local -r num_workers=${1:-1}
  [[ ! -e $folder/pids ]] || { echo "$folder has a cluster already: stop it first" >&2; exit 1; }
  make_token
  start_head
  await_nodes 1
  for ((worker = 1; worker <= num_workers; worker++)); do start_worker "$worker"; done
  await_nodes $((num_workers + 1))
  cat <<HOW
export RAY_ADDRESS=$HOST:$PORT
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$folder/token
# jobs: kd submit RUN.yaml --address http://$HOST:$DASHBOARD_PORT
HOW
}

end_nodes() {
  [[ -e $folder/pids ]] || { echo "$folder has no cluster" >&2; return 0; }
  # each is the leader of a session: its raylet, agents and workers have its number as their group
  tac "$folder/pids" | while read -r pid; do kill -TERM -- "-$pid" 2>/dev/null || true; done
  local deadline=$((SECONDS + 30))
  while read -r pid; do
    while kill -0 -- "-$pid" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.2; done
    kill -KILL -- "-$pid" 2>/dev/null || true
  done <"$folder/pids"
  rm "$folder/pids"
}

(($# >= 2)) || usage
umask 077
mkdir -p "$2"
folder=$(realpath "$2")
# else somebody may know the token, or have us end what is not ours
[[ -O $folder ]] && ! (($(stat -c 0%a "$folder") & 022)) || {
  echo "$folder is another's, or others may write in it: choose one that is yours alone" >&2
  exit 1
}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
unset RAY_ADDRESS
case $1 in
  start) start "${3:-1}" ;;
  stop) end_nodes ;;
  *) usage ;;
esac
