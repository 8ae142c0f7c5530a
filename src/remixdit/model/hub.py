"""The Hugging Face hub: models come from it and go to it, as data without code."""

from collections.abc import Mapping
from json import JSONDecodeError
from pathlib import Path

from remixdit.images.hub import downloaded, is_hub_name, reason

__all__ = ["Upload", "check_name", "check_token", "download", "upload"]

Upload = Path | bytes  # a file as it is on the disk, or its content

# A model is its configuration and weights, and the licence that its card states.
WANTED = ("*.json", "*.safetensors", "README.md")
# What diffusers wrote before it had safetensors. It is read as tensors, never as code.
EARLIER = "*diffusion_pytorch_model*.bin"


def check_name(repo_id: str) -> None:
    """Refuse what cannot be the name of a model of the hub, without asking it.

    Args:
        repo_id: Name, "owner/name".
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    rule = "" if repo_id.count("/") == 1 else "it must have one slash"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        rule = rule or str(error).replace(f": '{repo_id}'", "").rstrip(".")
    if rule:
        raise ValueError(f"name must be owner/name on the hub, got {repo_id!r}: {rule}")


def check_token() -> None:
    """Refuse to write to the hub without a token."""
    from huggingface_hub import get_token

    if not get_token():
        raise ValueError(
            "a token of the Hugging Face Hub must be known to upload, got none: log in with "
            "`hf auth login`, or set HF_TOKEN"
        )


def download(repo_id: str) -> Path:
    """Download a model of the hub into the cache."""
    found = downloaded(repo_id, WANTED) if is_hub_name(repo_id) else None
    if found and lacks_weights(found):
        found = downloaded(repo_id, [*WANTED, EARLIER])
    if found is None:
        raise ValueError(f"model must be a directory or a model of the hub, got {repo_id!r}")
    return found


def lacks_weights(directory: Path) -> bool:
    """Whether a network of a downloaded model has its configuration alone."""
    networks = [path.parent for path in directory.rglob("config.json")]
    return any(not any(path.glob("*.safetensors")) for path in networks)


def upload(repo_id: str, files: Mapping[str, Upload], private: bool = False) -> str:
    """Write files to the hub as one commit; return the address of the model.

    Args:
        repo_id: Name, "owner/name"; it is made if it is not there.
        files: Files by their path in the repository.
        private: Whether a new repository is private. A public one is refused then.

    Raises:
        OSError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    check_name(repo_id)
    check_token()
    api = HfApi()
    # The hub's client raises errors of its own for answers, of httpx for a lost connection,
    # RuntimeError around either for a large file, and of JSON for the page of a proxy.
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    failures = (OSError, RuntimeError, JSONDecodeError, http_error)
    try:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} must be private with --private, but it is there as public")
        operations = [
            CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
            for name, content in files.items()
        ]
        api.create_commit(repo_id, operations, commit_message="Upload a model with remixdit")
    except failures as error:
        if isinstance(error, FileNotFoundError) and error.filename:
            raise  # a file of the model
        raise ConnectionError(f"{repo_id} cannot be uploaded: {reason(error)}") from error
    return str(address)
