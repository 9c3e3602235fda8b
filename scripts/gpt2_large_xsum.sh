#!/usr/bin/env bash
# GPT-2 large on XSum; lib/nlg.sh says how to call this.
source "$(dirname "${BASH_SOURCE[0]}")/lib/nlg.sh"
nlg gpt2_large xsum "$@"
