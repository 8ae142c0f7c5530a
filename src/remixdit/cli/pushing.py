"""`remixdit push CHECKPOINT owner/name`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from remixdit.cli.arguments import parse
from remixdit.cli.checkpoints import newest_weights
from remixdit.cli.next_steps import say_next
from remixdit.cli.terminal import say
from remixdit.model.hub import Upload, check_name, check_token, upload
from remixdit.model.loading import find_model
from remixdit.model.publishing import files_to_upload
from remixdit.training.facts import training_facts

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class PushArguments:
    """Upload a model, with its card, to the Hugging Face hub."""

    checkpoint: Positional[Path]
    """A run, a checkpoint, a model directory, or what export wrote for diffusers."""
    name: Positional[str]
    """Name of the model on the hub, owner/name; created if it does not exist."""
    private: bool = False
    """Make the model private; by default everybody can see it."""
    ema: bool = True
    """Use the averaged (EMA) weights of a checkpoint rather than its last ones."""

    def __post_init__(self) -> None:
        """Refuse a name that the hub cannot have."""
        check_name(self.name)


def run(args: Sequence[str]) -> None:
    """Upload."""
    arguments = parse(PushArguments, args, "push")
    check_token()
    if not arguments.checkpoint.is_dir():
        raise ValueError(f"checkpoint must be a directory, got {arguments.checkpoint}")
    weights = newest_weights(str(arguments.checkpoint), arguments.ema)
    found = find_model(Path(weights), arguments.ema)
    assert found is not None  # it is a directory
    files = files_to_upload(found, arguments.name, training_facts(found))
    seen = "private" if arguments.private else "public, if it is new"
    say(f"uploading to {arguments.name} ({seen}): {', '.join(map(sized, files.items()))}")
    address = upload(arguments.name, files, arguments.private)
    say_next(f"uploaded to {address}", ("sample", arguments.name, "--output", "images.png"))


def sized(file: tuple[str, Upload]) -> str:
    """Return the name and the size of a file."""
    name, content = file
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    return f"{name} {size / 1e6:,.2f} MB" if size > 1e5 else name
