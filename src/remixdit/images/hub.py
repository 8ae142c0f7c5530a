"""The Hugging Face hub: its names told apart from paths, and what is downloaded from it."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["downloaded", "is_hub_name", "reason"]

# What files of images, tables and weights end in: a mistyped path must not wait for the network.
FILE_SUFFIXES = frozenset(
    {".npz", ".npy", ".parquet", ".tar", ".zip", ".json", ".png", ".jpg", ".jpeg", ".csv", ".gz"}
    | {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}
)


def is_hub_name(name: str | Path) -> bool:
    """Whether something that is not on this machine may be owner/name on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    name = str(name)
    owner, slash, _ = name.partition("/")
    # In a folder that exists here, a name is a mistyped path.
    if not (owner and slash) or Path(owner).exists() or Path(name).suffix in FILE_SUFFIXES:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def downloaded(
    name: str, patterns: Sequence[str] | None = None, *, is_cached: bool = False
) -> Path | None:
    """Return the directory of the cache that holds a repository of models of the hub.

    Args:
        name: Its name, owner/name.
        patterns: Files of it that are wanted; all by default.
        is_cached: Take what was downloaded before, and do not ask the hub.

    Returns:
        The directory; None if nothing was downloaded before, or the hub has no such repository.

    Raises:
        ConnectionError: The hub refuses, or cannot be reached and nothing was downloaded before.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # that of the client in use, e.g. of a proxy
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = None if patterns is None else list(patterns)
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=is_cached))
    except (HFValidationError, RepositoryNotFoundError):
        return None
    except (LocalEntryNotFoundError, HTTPError) as error:
        if is_cached:
            return None
        raise ConnectionError(
            f"{name} is no local directory, and {constants.ENDPOINT} could not be reached to look "
            "for it: give a local directory, or download it once where there is a network"
        ) from error
    except HfHubHTTPError as error:
        raise ConnectionError(f"{name} cannot be downloaded: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return why the hub could not be written or read, and what to do."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HfHubHTTPError

    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    answers = [e.response.status_code for e in chain if isinstance(e, HfHubHTTPError)]
    if not answers:
        return f"{ENDPOINT} cannot be reached; check the network, then give the same command again"
    if answers[0] in (401, 403):
        return (
            f"the hub refuses the token ({answers[0]}); log in with `hf auth login` and a token "
            "that may write there"
        )
    return f"the hub answers {answers[0]}; give the same command again later"
