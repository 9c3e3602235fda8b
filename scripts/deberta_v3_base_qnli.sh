#!/usr/bin/env bash
# DeBERTa-v3-base on QNLI; deberta.sh says how to call this.
source "$(dirname "${BASH_SOURCE[0]}")/deberta.sh"
deberta qnli linear "$@"
