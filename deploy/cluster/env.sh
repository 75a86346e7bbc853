# The other scripts read this file. It says where everything lies, and how daemons are started and stopped.
BIN="$HOME/.cache/zoosplat/bin"
RUN="${ZOOSPLAT_CLUSTER:-$HOME/.cache/zoosplat/cluster}"
NODES="$RUN/nodes"
PORT="${ZOOSPLAT_CLUSTER_PORT:-6443}"     # port of the API server; etcd uses the next two
export KUBECONFIG="$RUN/kubeconfig"

# Whether the process whose id is in a file runs. Its command line is compared too, because another process may have the
# id by now.
alive() {  # PIDFILE
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -e "/proc/$pid/cmdline" ] && tr '\0' ' ' < "/proc/$pid/cmdline" | grep -qF "$RUN"
}

# Start a daemon that outlives its shell and has no terminal.
start() {  # NAME FOLDER COMMAND...
  local name=$1 folder=$2
  shift 2
  alive "$folder/$name.pid" && return
  setsid "$@" > "$folder/$name.log" 2>&1 < /dev/null &
  echo $! > "$folder/$name.pid"
  # Wait until the child process has become the program. Callers that wait for a daemon notice one that ends at once.
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
