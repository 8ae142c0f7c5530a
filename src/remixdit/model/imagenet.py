"""Names of ImageNet's 1,000 classes, for models that only number them, as published DiTs do.

`imagenet.txt` has a line for each class, in the order of the labels: the WordNet synset and its
names. Synsets and names are WordNet's; they were taken from timm 1.0.31 (Apache-2.0).
"""

from functools import cache
from pathlib import Path

from remixdit.model.config import RemixConfig

__all__ = ["has_imagenet_names", "imagenet_label", "imagenet_names", "shown_names"]

FILE = Path(__file__).with_name("imagenet.txt")
NUM_CLASSES = 1000


def has_imagenet_names(config: RemixConfig) -> bool:
    """Whether a model's classes may go by ImageNet's names: 1,000 numbers, or its synsets."""
    if config.network.num_classes != NUM_CLASSES:
        return False
    return not config.class_names or config.class_names == tuple(synset for synset, _ in classes())


def shown_names(config: RemixConfig) -> tuple[str, ...]:
    """Return the names of a model's classes for people: its own, or ImageNet's; none otherwise."""
    return imagenet_names() if has_imagenet_names(config) else config.class_names


@cache
def classes() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the synset and the names of each class, the usual name first."""
    lines = FILE.read_text("utf-8").splitlines()
    pairs = (line.split(" ", 1) for line in lines)
    return tuple((synset, tuple(names.split(", "))) for synset, names in pairs)


def imagenet_names() -> tuple[str, ...]:
    """Return the usual name of each class."""
    return tuple(names[0] for _, names in classes())


def imagenet_label(word: str) -> int | None:
    """Return the label of a class by its synset or one of its names, None if there is none.

    Spelling counts before case, and a class's usual name before another's further name.

    Raises:
        ValueError: Several classes have this name.
    """
    for same in (str, str.lower):
        meant = same(word)
        usual = [n for n, (_, names) in enumerate(classes()) if same(names[0]) == meant]
        found = usual or [
            n for n, (synset, names) in enumerate(classes()) if meant in (synset, *map(same, names))
        ]
        if len(found) > 1:
            raise ValueError(
                f"class_labels must name one class, got {word!r}, which labels "
                f"{' and '.join(map(str, found))} have"
            )
        if found:
            return found[0]
    return None
