"""What two sides state."""

import pytest

from remixdit.model.config import RemixConfig
from remixdit.model.match import Side, match, side_of
from tests.tiny import tiny_config

PETS = ("cat", "dog", "elk")
LATENTS = {"name": "a", "digest": "1234", "scaling_factor": 0.18215, "shift_factor": 0.0}


def model(names: tuple[str, ...] = PETS, **changes: object) -> Side:
    return side_of("--from", RemixConfig(network=tiny_config(), class_names=names, **changes))


def data(*names: str, **changes: object) -> Side:
    fields = {"num_classes": len(names), "class_names": names, "autoencoder": {"name": "none"}}
    return Side(**{"name": "the data", **fields, **changes})


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (PETS, PETS, (0, 1, 2)),
        (PETS, ("elk", "cat", "dog"), (2, 0, 1)),
        (PETS, ("0", "1", "2"), (0, 1, 2)),  # only numbered
        ((), ("elk", "cat", "dog"), (0, 1, 2)),  # only counted
        (("crane", "owl", "crane"), ("crane", "owl", "crane"), (0, 1, 2)),  # as ImageNet has them
        (("2", "0", "1"), ("0", "1", "2"), (1, 2, 0)),  # folders that are called by numbers
    ],
)
def test_classes_are_matched_by_name_and_where_they_are_only_counted_by_number(
    ours, theirs, expected
):
    assert match(model(ours), data(*theirs)) == expected


@pytest.mark.parametrize(
    ("ours", "theirs", "subset", "message"),
    [
        (
            PETS,
            ("apple", "cat", "dog"),
            False,
            "classes of the data must be those of --from, got a set that adds 'apple' and lacks "
            "'elk'",
        ),
        (PETS, ("cat", "dog"), False, "those of --from, got a set that lacks 'elk'"),
        (PETS, ("cat", "cow"), True, "must be among those of --from, got 'cow'"),
        (PETS, ("0", "1"), False, "classes of the data must be the 3 of --from, got 2"),
        (PETS, (), False, "classes of the data must be the 3 of --from, got 0"),
        (
            ("crane", "owl", "crane"),
            ("owl", "crane"),
            True,
            "class names of --from must differ, got 'crane' twice",
        ),
    ],
)
def test_classes_that_one_side_lacks_are_refused_by_name(ours, theirs, subset, message):
    with pytest.raises(ValueError, match=message):
        match(model(ours), data(*theirs), subset=subset)


def test_held_out_data_may_lack_classes():
    assert match(model(), data("elk", "cat"), subset=True) == (2, 0)
    assert match(model(), data(), subset=True) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prediction_type": "v_prediction"},
            "prediction_type of --against must be epsilon, as for --from, got v_prediction",
        ),
        (
            {"num_train_timesteps": 250},
            "num_train_timesteps of --against must be 1000, as for --from, got 250",
        ),
        ({"network": tiny_config(input_size=16)}, r"latent_shape .* \(1, 8, 8\), .* \(1, 16, 16\)"),
        ({"autoencoder": LATENTS}, "autoencoder of --against must be none, as for --from, got a"),
    ],
)
def test_models_of_another_meaning_are_refused(changes, message):
    other = RemixConfig(**{"network": tiny_config(), "class_names": PETS, **changes})
    with pytest.raises(ValueError, match=message):
        match(model(), side_of("--against", other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scaling_factor": 0.5},
            "scaling_factor of the autoencoder of the data must be 0.18215, ",
        ),
        ({"digest": "5678"}, "digest of the autoencoder of the data must be 1234, as for --from"),
    ],
)
def test_latents_of_another_autoencoder_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        match(model(autoencoder=LATENTS), data(*PETS, autoencoder={**LATENTS, **change}))


def test_pixels_are_refused_for_a_model_of_latents():
    with pytest.raises(ValueError, match="autoencoder of the data must be a, as for --from, got"):
        match(model(autoencoder=LATENTS), data(*PETS))


def test_the_same_weights_under_another_name_and_unknown_ones_are_accepted():
    match(model(autoencoder=LATENTS), data(*PETS, autoencoder={**LATENTS, "name": "elsewhere"}))
    match(model(autoencoder={"name": "only a name"}), data(*PETS, autoencoder=LATENTS))
    imported = RemixConfig(network=tiny_config(in_channels=4), class_names=PETS)
    match(side_of("--from", imported), data(*PETS, autoencoder=LATENTS))
