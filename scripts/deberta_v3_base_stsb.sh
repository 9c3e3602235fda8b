#!/usr/bin/env bash
# DeBERTa-v3-base on STS-B; lib/deberta.sh says how to call this.
source "$(dirname "${BASH_SOURCE[0]}")/lib/deberta.sh"
deberta stsb clr "$@"
