# Sourced by what runs recipes: where their parts are, and how a program is started.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" # sets root

# The pretrained model: MODEL, what scripts/download.sh brought, or the hub's OWNER/MODEL.
pretrained() {
  local name=${2//_/-}
  if [ -n "${MODEL:-}" ]; then
    echo "$MODEL"
  elif [ -d "$root/checkpoints/$name" ]; then
    echo "$root/checkpoints/$name"
  else
    echo "$1/$name"
  fi
}

# The file of a method's values; without one, says which there are.
sheet() {
  local file=$root/hparams/$1_$2.yaml
  [ -f "$file" ] || fail "no values for method '$2': there is no ${file#"$root"/}, only" \
    "$(cd "$root" && echo hparams/"$1"_*.yaml)${3:-, and lora in the script itself}"
  echo "$file"
}

# packages EXTRAS MODULE ...: installs the project with EXTRAS into $VENV, as scripts/quickstart.sh
# does it, unless python has all the modules. What is run is this copy of the project.
packages() {
  python -c 'import importlib.util as u, sys; sys.exit(None in map(u.find_spec, sys.argv[1:]))' \
    "${@:2}" 2>/dev/null || environment "$1"
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
}

# launch PROGRAM [ARGUMENT ...]: the last command, on NUM_GPUS (1) processes of each of NUM_NODES (1)
# machines. With several machines the script is started on each, with the same words and
#   MASTER_ADDR  name or address of the first machine
#   MASTER_PORT  a free port there; unset: 29500
#   NODE_RANK    which this one is: 0 is the first
# and the run's folder is on a disk that all of them see.
launch() {
  local program=$1 gpus=${NUM_GPUS:-1} nodes=${NUM_NODES:-1} run machines=(--num_machines 1)
  shift
  run=(python -m "$program")
  if [ "$nodes" != 1 ]; then
    machines=(--num_machines "$nodes" --machine_rank "$NODE_RANK"
      --main_process_ip "$MASTER_ADDR" --main_process_port "${MASTER_PORT:-29500}")
  fi
  if [ $((gpus * nodes)) != 1 ]; then
    # with fewer GPUs the launcher would quietly start one process, or several that do the same
    python -c 'import sys, torch; sys.exit(torch.accelerator.device_count() < int(sys.argv[1]))' \
      "$gpus" || fail "NUM_GPUS=$gpus: torch sees fewer GPUs than that"
    run=(accelerate launch --multi_gpu --num_processes $((gpus * nodes)) "${machines[@]}"
      --mixed_precision no --dynamo_backend no --module "$program")
  fi
  show "${run[@]}" "$@"
  exec "${run[@]}" "$@"
}

# Shows a command as it could be typed.
show() { printf '+%s\n' "$(printf ' %q' "$@")" >&2; }
note() { echo "${0##*/}: $*" >&2; }
fail() { note "$@" && exit 2; }
for name in NUM_GPUS NUM_NODES; do
  [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: a whole number from 1 on is needed"
done
if [ "${NUM_NODES:-1}" != 1 ]; then
  [ -n "${MASTER_ADDR:-}" ] || fail "NUM_NODES=$NUM_NODES: MASTER_ADDR is needed, the first machine"
  [[ ${MASTER_PORT:-29500} =~ ^[1-9][0-9]*$ ]] ||
    fail "MASTER_PORT=$MASTER_PORT: a whole number from 1 on is needed"
  [[ ${NODE_RANK:-} =~ ^(0|[1-9][0-9]*)$ ]] && [ "$NODE_RANK" -lt "$NUM_NODES" ] ||
    fail "NODE_RANK=${NODE_RANK:-}: which machine this is, a number from 0 to $((NUM_NODES - 1))"
fi
