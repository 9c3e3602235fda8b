#!/usr/bin/env bash
# DeBERTa-v3-base on SST-2; deberta.sh says how to call this.
source "$(dirname "${BASH_SOURCE[0]}")/deberta.sh"
deberta sst2 linear "$@"
