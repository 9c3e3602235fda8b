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

# launch PROGRAM [ARGUMENT ...]: the last command, on NUM_GPUS processes (1).
launch() {
  local program=$1 gpus=${NUM_GPUS:-1} run
  shift
  run=(python -m "$program")
  if [ "$gpus" != 1 ]; then
    # with fewer GPUs the launcher would quietly start one process, or several that do the same
    python -c 'import sys, torch; sys.exit(torch.accelerator.device_count() < int(sys.argv[1]))' \
      "$gpus" || fail "NUM_GPUS=$gpus: torch sees fewer GPUs than that"
    run=(accelerate launch --multi_gpu --num_processes "$gpus" --num_machines 1
      --mixed_precision no --dynamo_backend no --module "$program")
  fi
  show "${run[@]}" "$@"
  exec "${run[@]}" "$@"
}

# Shows a command as it could be typed.
show() { printf '+%s\n' "$(printf ' %q' "$@")" >&2; }
note() { echo "${0##*/}: $*" >&2; }
fail() { note "$@" && exit 2; }
[[ ${NUM_GPUS:-1} =~ ^[1-9][0-9]*$ ]] ||
  fail "NUM_GPUS=$NUM_GPUS: a whole number from 1 on is needed"
