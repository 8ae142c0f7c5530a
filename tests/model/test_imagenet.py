"""ImageNet's names for models that only number its classes."""

import pytest

from remixdit.cli.info import names_text
from remixdit.cli.sample import label_numbers
from remixdit.model.config import RemixConfig
from remixdit.model.imagenet import (
    classes,
    has_imagenet_names,
    imagenet_label,
    imagenet_names,
    shown_names,
)
from tests.command_line import refusal, remixdit
from tests.tiny import tiny_config

SYNSETS = tuple(synset for synset, _ in classes())


def config_of(num_classes: int = 1000, names: tuple[str, ...] = ()) -> RemixConfig:
    network = tiny_config(num_classes=num_classes)
    return RemixConfig(network=network, num_bases=1, num_experts=1, class_names=names)


def test_synsets_are_in_the_order_of_the_labels():
    assert len(set(SYNSETS)) == 1000
    assert list(SYNSETS) == sorted(SYNSETS)  # labels number the sorted synsets


@pytest.mark.parametrize(
    ("word", "label"),  # as arXiv:2212.09748 numbers the classes of its figures, and well known
    [
        ("golden retriever", 207),
        ("Golden Retriever", 207),
        ("n02099601", 207),
        ("loggerhead", 33),
        ("Arctic fox", 279),
        ("sulphur-crested cockatoo", 89),
        ("volcano", 980),
        ("cardigan", 474),  # a garment; with a capital a dog
        ("Cardigan", 264),
    ],
)
def test_known_classes_have_their_numbers(word, label):
    assert imagenet_label(word) == label
    assert label_numbers(f"3, {word}", config_of()) == (3, label)


@pytest.mark.parametrize("label", range(0, 1000, 7))
def test_a_synset_is_its_class(label):
    assert imagenet_label(SYNSETS[label]) == label


def test_every_usual_name_is_its_class_or_refused():
    for label, name in enumerate(imagenet_names()):
        if imagenet_names().count(name) == 1:
            assert imagenet_label(name) == label
        else:
            with pytest.raises(ValueError, match=f"class_labels must name one class.*{label}"):
                imagenet_label(name)


def test_images_of_numbered_classes_go_by_their_names():
    assert shown_names(config_of())[207] == "golden retriever"
    assert shown_names(config_of(2, ("cat", "dog"))) == ("cat", "dog")
    assert shown_names(config_of(3)) == ()


def test_models_with_names_of_their_own_do_not_take_them():
    assert has_imagenet_names(config_of())
    assert has_imagenet_names(config_of(names=SYNSETS))
    assert not has_imagenet_names(config_of(names=SYNSETS[::-1]))
    assert not has_imagenet_names(config_of(names=tuple(map(str, range(1000)))))
    assert not has_imagenet_names(config_of(3))
    with pytest.raises(ValueError, match="of the model's 3 classes, got 'volcano'"):
        label_numbers("volcano", config_of(3))


def test_a_typing_error_is_met_with_names_that_are_like_it():
    with pytest.raises(
        ValueError, match=r"such as .*\"golden retriever\".*, got 'goldn retriever'"
    ):
        label_numbers("goldn retriever", config_of())


def test_info_and_sample_know_the_names(tmp_path, capsys):
    from remixdit.diffusion.dit import DiT
    from remixdit.model.model import RemixDiT

    RemixDiT.from_dit(DiT(config_of().network), 1, 1).save_pretrained(tmp_path / "model")
    remixdit(f"info {tmp_path}/model")
    assert "classes      1,000, with ImageNet's names: tench to toilet tissue" in (
        capsys.readouterr().out
    )
    line = f"sample {tmp_path}/model --num-images 1 --num-inference-steps 1 --output {tmp_path}"
    remixdit(f"{line}/a.npz --class-labels volcano")
    message = refusal(f"{line}/b.npz --class-labels crane", capsys)
    assert message == "class_labels must name one class, got 'crane', which labels 134 and 517 have"


def test_info_shows_a_few_names_each_on_one_line():
    facts = {"has_imagenet_names": False, "class_names": ["cat\n", *"abcdefghijk"]}
    assert names_text(facts) == ": cat\\n, a, b, c, d, e, f, g, h, i, ..."
    assert names_text({**facts, "class_names": []}) == ""
