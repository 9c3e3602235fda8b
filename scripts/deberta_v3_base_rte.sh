#!/usr/bin/env bash
# DeBERTa-v3-base on RTE; lib/deberta.sh says how to call this.
source "$(dirname "${BASH_SOURCE[0]}")/lib/deberta.sh"
deberta rte clr "$@"
