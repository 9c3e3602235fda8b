#!/usr/bin/env bash
# Measures everything worth measuring on one GPU, in ten minutes at most, without a network.
#
#     bash benchmarks/gpu.sh [--device cuda|cpu] [--quick] [--dry_run]
#
# Needs Python >= 3.10 with torch >= 2.11, numpy and safetensors. Transformers with PEFT take part if
# they can be imported. Shapes are published ones, weights random; tokens are random too, unless
# RANKWISE_DATA names a folder with e2e, squad and tokenizers. Writes what every command prints to
# $OUT (a new folder in runs/), beside header.txt with the machine, the versions and the commit.
#     --quick    the tiniest setting of every command, a couple of minutes on a CPU
#     --dry_run  prints the commands and stops
# Ends with 1 where a command failed or ran out of time, and lists those; the others still run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

device=cuda quick='' dry=''
fail() { echo "gpu.sh: $*" >&2 && exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --device)
      [[ ${2:-} =~ ^(cuda|cpu)$ ]] || fail "--device: cuda or cpu is needed"
      device=$2 && shift
      ;;
    --quick) quick=1 ;;
    --dry_run) dry=1 ;;
    *) fail "unknown option $1; there are --device, --quick, --dry_run" ;;
  esac
  shift
done
TOTAL=600 LIMIT=90 # seconds: of everything, of one command
[ "$device" = cuda ] || TOTAL=3600 LIMIT=600 # a busy CPU may take its time
failures=()

header() {
  echo "commit: $(git describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)"
  python - "$device" <<'PYTHON'
import importlib.metadata as metadata, platform, sys
import torch

cuda = sys.argv[1] == "cuda"
if cuda and not torch.cuda.is_available():
    sys.exit("gpu.sh: torch sees no GPU; --device cpu --quick tries the script without one")
print("device:", torch.cuda.get_device_name() if cuda else platform.processor() or "cpu")
print("memory of the device, GiB:", torch.cuda.mem_get_info()[1] / 2**30) if cuda else None
print("python:", platform.python_version())
print("torch:", torch.__version__, " CUDA:", torch.version.cuda)
for name in ("transformers", "peft"):
    try:
        print(f"{name}:", metadata.version(name))
    except metadata.PackageNotFoundError:
        print(f"{name}: not there, left out")
PYTHON
}

# Shows a command as it could be typed.
show() { printf '+%s\n' "$(printf ' %q' "$@")"; }

# bench NAME MODULE OPTIONS -- QUICK: one command, its output to NAME.txt. With --quick the options
# after `--` take the place of those before it.
bench() {
  local name=$1 module=$2 full=() small=() chosen left limit status
  shift 2
  while [ "$1" != -- ]; do full+=("$1") && shift; done
  small=("${@:2}")
  chosen=("${full[@]}")
  [ -z "$quick" ] || chosen=("${small[@]}")
  local command=(python -m "benchmarks.$module" "${chosen[@]}" --device "$device")
  [ -z "$dry" ] || { show "${command[@]}" && return; }
  left=$((TOTAL - SECONDS)) # bash counts SECONDS from the script's start
  limit=$((left < LIMIT ? left : LIMIT))
  if [ "$limit" -le 0 ]; then
    failures+=("$name: no time left") && return
  fi
  echo "$name ..."
  show "${command[@]}" >"$OUT/$name.txt"
  timeout --kill-after 5 "$limit" "${command[@]}" >>"$OUT/$name.txt" 2>&1 </dev/null
  status=$?
  case $status in
    0) ;;
    124 | 137) failures+=("$name: more than $limit s") ;;
    *) failures+=("$name: exit status $status, $(tail -n 1 "$OUT/$name.txt")") ;;
  esac
}

if [ -z "$dry" ]; then
  OUT=${OUT:-runs/gpu-$(date -u +%Y%m%dT%H%M%SZ)}
  mkdir -p "$OUT" || fail "OUT=$OUT: no such folder can be made"
  header >"$OUT/header.txt" || exit 2
  cat "$OUT/header.txt"
fi

e2e=(--random) squad=(--random)
if [ -n "${RANKWISE_DATA:-}" ]; then
  e2e=(--data_dir "$RANKWISE_DATA" --tokenizer "$RANKWISE_DATA/tokenizers/gpt2")
  squad=(--data_dir "$RANKWISE_DATA" --vocabulary "$RANKWISE_DATA/tokenizers/bert-base-uncased")
fi
one=(--rounds 1 --batch 2) # the tiniest setting, where a benchmark has no more
tiny=("${one[@]}" --layers 1 --length 16)

# Steps: tokens per second and peak memory beside the peer's, each side in its own process.
for dtype in bfloat16 float32; do
  bench "roberta_base_$dtype" lora_step --dtype "$dtype" \
    --size roberta-base --batch 32 --rounds 5 --steps 20 \
    -- --dtype "$dtype" --size minilm "${one[@]}" --steps 1
  bench "deberta_v3_base_$dtype" deberta_step --dtype "$dtype" --layers 12 --batch 32 --rounds 10 \
    -- --dtype "$dtype" --layers 1 "${one[@]}" --longest 16
done
bench gpt2_step gpt2_step "${e2e[@]}" --batch 32 --rounds 5 --steps 10 \
  -- "${e2e[@]}" "${one[@]}" --layers 1 --steps 1
bench squad_step squad_step "${squad[@]}" --size bert-base --batch 32 --rounds 5 --steps 10 \
  -- "${squad[@]}" "${one[@]}" --size minilm --steps 1
bench beam_search beam_search "${e2e[@]}" --once --sides ours:0 transformers:8 --contexts 32 \
  -- "${e2e[@]}" --once --sides ours:0 transformers:2 --contexts 2 --layers 1 --new 4 --rounds 1

# What methods cost beside LoRA.
bench adalora_step adalora_cost --part step --batch 32 -- --part step "${tiny[@]}"
bench ivon_step ivon_step -- --modules 6 --rounds 1 --repeats 1
bench dylora_step dylora_step --batch 32 -- --size minilm "${one[@]}" --steps 1
for dtype in bfloat16 float32; do
  bench "bim_step_$dtype" bim_step --dtype "$dtype" --rounds 10 \
    -- --dtype "$dtype" "${one[@]}" --layers 1
done
bench dora_step dora_step --batch 32 --rounds 10 -- "${tiny[@]}"
bench pruning_step pruning_step --layers 12 --batch 32 --rounds 10 -- "${tiny[@]}"
bench adapter_step adapter_step --batch 32 --rounds 10 -- "${tiny[@]}"

# Compacted models.
bench compact_speed compact_speed --size bert-base --batch 1 32 --rounds 10 \
  -- --size minilm --batch 1 --length 16 --rounds 1

[ -z "$dry" ] || exit 0
echo "outputs: $OUT"
if [ ${#failures[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failures[@]}" | tee "$OUT/failures.txt"
  exit 1
fi
