# Sourced by squad.sh and bert.sh: METHOD and DENSITY, which scripts of BERT-base take.

# method_and_density [ARGUMENT ...]: sets method (lora unless given), density, and used, the number
# of arguments that they are. DENSITY is the share of the encoder's weights to keep, such as 0.3.
method_and_density() {
  method=lora density='' used=0
  if [[ ${1:---} != -* ]]; then method=$1 used=1 && shift; fi
  if [[ ${1:---} != -* ]]; then density=$1 used=2 && shift; fi
  [ -n "$density" ] || return 0
  [[ $method =~ ^(block_prune|splopa|splora)$ ]] ||
    fail "$method has no density: block_prune, splopa and splora have"
  [[ $density =~ ^(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)$ ]] ||
    fail "density $density: a share of the weights is needed, such as 0.3 for 30 %"
}
