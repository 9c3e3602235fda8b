"""Uploads an exported folder to the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from examples.errors import DownloadError, OptionError


def uploader(name: str) -> Callable[[Path], str]:
    """What uploads a folder into the repository `name`; a new one is private.

    Args:
        name: of a model repository, `me/adapter`.

    Returns:
        (folder) -> where it is now.

    Raises:
        OptionError: there can be no such name, or nobody is logged in: before work is done.
    """
    api = HfApi()
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OptionError(f"--push_to_hub {name}: {error}") from None
    if get_token() is None:
        raise OptionError(f"--push_to_hub {name}: log in with `hf auth login`, or set HF_TOKEN")

    def upload(folder: Path) -> str:
        try:
            repository = api.create_repo(name, private=True, exist_ok=True).repo_id
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Upload by examples.export"
            )
        except (HfHubHTTPError, OSError) as error:
            raise DownloadError(
                f"--push_to_hub {name}: the hub refused or cannot be reached ({error}); "
                f"what was to be uploaded is in {folder}"
            ) from error
        return f"{api.endpoint}/{repository}"

    return upload
