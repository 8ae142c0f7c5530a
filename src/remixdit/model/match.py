"""What two sides state, a model and data or two models, is compared, and classes are matched.

Only what both sides state is compared. A difference is refused, as its result would be silently
wrong: labels of other classes, latents of another autoencoder, losses of another prediction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remixdit.model.config import RemixConfig

__all__ = [
    "ClassesDifferError",
    "Side",
    "are_numbers",
    "match",
    "match_autoencoders",
    "refuse_other",
    "side_of",
]


class ClassesDifferError(ValueError):
    """Two sides have different classes."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """What a model, or a data set, states about itself."""

    name: str
    """Name in errors, as the user gave it."""
    num_classes: int
    """Number of classes; 0 for none."""
    class_names: tuple[str, ...]
    """(num_classes,) names; empty if they are only counted."""
    autoencoder: Mapping[str, Any]
    """Autoencoder between latents and pixels."""
    latent_shape: tuple[int, int, int] | None = None
    """(C, H, W) of a latent; None if it is fitted to the other side."""
    prediction_type: str | None = None
    """Prediction of a network; None for data."""
    num_train_timesteps: int | None = None
    """Number of timesteps, T; None for data and for continuous time."""


def side_of(name: str, config: RemixConfig) -> Side:
    """Return what a model states.

    Args:
        name: Name of the model in errors.
        config: Configuration of the model.
    """
    network = config.network
    return Side(
        name=name,
        num_classes=network.num_classes,
        class_names=config.class_names,
        autoencoder=config.autoencoder,
        latent_shape=(network.in_channels, network.input_size, network.input_size),
        prediction_type=config.prediction_type,
        num_train_timesteps=None if config.is_flow else config.num_train_timesteps,
    )


def match(model: Side, other: Side, *, subset: bool = False) -> tuple[int, ...]:
    """Refuse what differs, and match the classes.

    Args:
        model: The model that decides how classes are numbered.
        other: Data or another model.
        subset: Whether the other side may lack some of the model's classes.

    Returns:
        The model's label of each class of the other side; none for an unconditional model that
        may see a subset.
    """
    for field in ("prediction_type", "num_train_timesteps", "latent_shape"):
        wanted, found = getattr(model, field), getattr(other, field)
        if None not in (wanted, found):
            refuse_other(field, wanted, found, model.name, other.name)
    match_autoencoders(model, other)
    if subset and not model.num_classes:
        return ()
    return match_classes(model, other, subset)


def refuse_other(field: str, wanted: Any, found: Any, name: str, other_name: str) -> None:
    """Refuse a field that differs.

    Args:
        field: Name of the field.
        wanted: Its value on the one side.
        found: Its value on the other side.
        name: Name of the one side in errors.
        other_name: Name of the other side.
    """
    if wanted != found:
        raise ValueError(f"{field} of {other_name} must be {wanted}, as for {name}, got {found}")


def match_autoencoders(model: Side, other: Side) -> None:
    """Refuse latents of another autoencoder.

    Only fields that both sides give are compared: an imported model may know no more than a name,
    and the same weights may have another name.
    """
    own, found, names = model.autoencoder, other.autoencoder, (model.name, other.name)
    for field in sorted((own.keys() & found.keys()) - {"name"}):
        refuse_other(f"{field} of the autoencoder", own[field], found[field], *names)
    for one, another in ((model, other), (other, model)):
        if "digest" in one.autoencoder and are_pixels(another):
            refuse_other("autoencoder", own["name"], found["name"], *names)
    is_known = "none" not in (own["name"], found["name"])
    if is_known and "digest" not in own.keys() | found.keys():  # nothing but names
        refuse_other("autoencoder", own["name"], found["name"], *names)


def are_pixels(side: Side) -> bool:
    """Whether latents are pixels; more channels have an autoencoder, even if it is not stated."""
    channels = None if side.latent_shape is None else side.latent_shape[0]
    return side.autoencoder["name"] == "none" and channels in (None, 1, 3)


def match_classes(model: Side, other: Side, subset: bool) -> tuple[int, ...]:
    """Match classes by name, or by number where one side only counts them."""
    ours, theirs = model.class_names, other.class_names
    if ours == theirs and model.num_classes == other.num_classes:
        return tuple(range(model.num_classes))  # even if two classes have one name
    unknown, missing = named_only_in(theirs, ours), named_only_in(ours, theirs)
    if not unknown and (subset or (theirs and not missing)):
        refuse_twins(model, other)
        return tuple(ours.index(name) for name in theirs)
    if are_numbers(ours) or are_numbers(theirs):
        if model.num_classes != other.num_classes:
            raise ClassesDifferError(
                f"classes of {other.name} must be the {model.num_classes} of {model.name}, "
                f"got {other.num_classes}"
            )
        return tuple(range(model.num_classes))
    if subset:
        raise ClassesDifferError(
            f"classes of {other.name} must be among those of {model.name}, got {some(unknown)}"
        )
    differences = {"adds": unknown, "lacks": missing}
    told = " and ".join(f"{verb} {some(names)}" for verb, names in differences.items() if names)
    raise ClassesDifferError(
        f"classes of {other.name} must be those of {model.name}, got a set that {told}"
    )


def named_only_in(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return the names that others lack, in their order."""
    known = set(others)
    return [name for name in names if name not in known]


def refuse_twins(*sides: Side) -> None:
    """Refuse names that do not tell classes apart."""
    for side in sides:
        if len(set(side.class_names)) < len(side.class_names):
            twin = next(name for name in side.class_names if side.class_names.count(name) > 1)
            raise ClassesDifferError(f"class names of {side.name} must differ, got {twin!r} twice")


def are_numbers(class_names: Sequence[str]) -> bool:
    """Whether classes are only numbered."""
    return all(name == str(number) for number, name in enumerate(class_names))


def some(names: Sequence[str], limit: int = 4) -> str:
    """List the first few names."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
