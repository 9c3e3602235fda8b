#!/usr/bin/env bash
# DeBERTa-v3-base on MRPC; deberta.sh says how to call this.
source "$(dirname "${BASH_SOURCE[0]}")/deberta.sh"
deberta mrpc clr "$@"
