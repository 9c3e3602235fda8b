# Sourced by scripts that run programs. `environment EXTRAS` makes $VENV (default: .venv beside
# scripts/), installs torch (${TORCH:-torch}: name a CPU build there) and the project with EXTRAS
# into it, and puts it first on PATH. What is installed already is left alone.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=${VENV:-$root/.venv}

environment() {
  local extras=$1 torch=${TORCH:-torch} stamp
  stamp="$VENV/.rankwise-$extras-$(printf %s "$torch $root" | cat - "$root/pyproject.toml" | cksum | tr -d ' ')"
  if [ ! -e "$stamp" ]; then
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
      echo "Python 3.10 or newer is needed, $python is $("$python" --version 2>&1): set PYTHON=/path/to/python3" >&2
      return 1
    }
    echo "== installing into $VENV ($torch, then this project with [$extras])"
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$torch"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root[$extras]"
    touch "$stamp"
  fi
  export PATH="$VENV/bin:$PATH"
}
