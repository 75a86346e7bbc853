# Read by the other scripts: where everything is.
BIN="$HOME/.cache/zoosplat/bin"
RUN="${ZOOSPLAT_CLUSTER:-$HOME/.cache/zoosplat/cluster}"
NODES="$RUN/nodes"
PORT="${ZOOSPLAT_CLUSTER_PORT:-6443}"     # of the API server; etcd has the two after it
export KUBECONFIG="$RUN/kubeconfig"

# Whether the process whose id is in a file runs: the id alone could have gone to another one.
alive() {  # PIDFILE
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -e "/proc/$pid/cmdline" ] && tr '\0' ' ' < "/proc/$pid/cmdline" | grep -qF "$RUN"
}

# A daemon that outlives its shell and knows no terminal.
start() {  # NAME FOLDER COMMAND...
  local name=$1 folder=$2
  shift 2
  alive "$folder/$name.pid" && return
  setsid "$@" > "$folder/$name.log" 2>&1 < /dev/null &
  echo $! > "$folder/$name.pid"
  # Until it has become the program; one that ends at once is found by those who wait for it.
  for _ in $(seq 50); do
    if alive "$folder/$name.pid" || [ ! -e "/proc/$!" ]; then break; fi
    sleep 0.1
  done
}

stop() {  # PIDFILE
  local pid
  if alive "$1"; then
    pid=$(cat "$1")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do alive "$1" || break; sleep 0.2; done
    if alive "$1"; then kill -9 "$pid" 2>/dev/null || true; fi
  fi
  rm -f "$1"
}
