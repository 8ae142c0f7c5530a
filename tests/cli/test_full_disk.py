"""Every file is whole or not there: a limit on the size of files stands in for a full disk."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from remixdit.cli.main import main
from tests.command_line import files_below, refusal, remixdit, save_model, write_npz
from tests.tiny import save_tiny

LIMIT = 300  # bytes: less than any picture, figure or weights here

COMMANDS = {
    "grid": "sample {given}/model --num-images 4 --num-inference-steps 2 --output {out}/a.png",
    "arrays": "sample {given}/model --num-images 4 --num-inference-steps 2 --output {out}/a.npz",
    "pictures": "sample {given}/model --num-images 4 --num-inference-steps 2 --output {out}/a",
    "dit": "export {given}/model --expert 0 --output {out}/a",
    "experts": "export {given}/model --format experts --output {out}/a",
    "diffusers": "export {given}/model --format diffusers --expert 0 --output {out}/a",
    "pixels": "encode {given}/a.npz --image-size 16 --output {out}/a",
    "latents": "encode {given}/a.npz --image-size 16 --autoencoder {given}/vae --output {out}/a",
    "sheet": "data check {given}/shards --output {out}/a.png",
    "matrix": "losses {given}/model --data {given}/shards --num-images 4 --output {out}/a.png",
    "result": "losses {given}/model --data {given}/shards --num-images 4 --output {out}/a.json",
    "figures": "plot {given}/run --output {out}/a",
}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Return a directory with a model, a run, pictures, shards and an autoencoder."""
    directory = tmp_path_factory.mktemp("given")
    save_model(directory / "model", 0)
    save_tiny(directory / "vae")
    write_npz(directory / "a.npz")
    remixdit(f"encode {directory}/a.npz --image-size 16 --output {directory}/shards")
    remixdit(
        f"train tiny --data {directory}/shards --num-bases 1 --num-experts 1 --steps 2 "
        f"--output-dir {directory}/run"
    )
    return directory


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow beyond a few bytes, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # it would be cut off
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = writes_bytecode


@pytest.mark.skipif(sys.platform != "linux", reason="other systems kill the process")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_an_error_of_the_machine_and_leaves_nothing_half_written(
    name, given, tmp_path, capsys
):
    (tmp_path / "kept").write_text("earlier")
    with full_disk():
        assert main(COMMANDS[name].format(given=given, out=tmp_path).split()) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("remixdit: error: ")
    assert "File too large" in message
    assert str(tmp_path / "a") in message
    left = {path for path in files_below(tmp_path) if (tmp_path / path).is_file()} - {"kept"}
    # Whole pictures may be there, but not the samples.json that says that all are.
    whole = tuple(f"a/{number:06}.png" for number in range(4))
    assert not [path for path in left if not path.startswith(("a/.encoding/settings", *whole))]
    assert (tmp_path / "kept").read_text() == "earlier"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems kill the process")
@pytest.mark.parametrize("name", ["grid", "arrays", "matrix"])
def test_a_result_that_cannot_be_replaced_stays(name, given, tmp_path, capsys):
    line = COMMANDS[name].format(given=given, out=tmp_path)
    path = Path(line.split()[-1])
    path.write_bytes(b"earlier")
    with full_disk():
        refusal(f"{line} --overwrite", capsys, code=1)
    assert path.read_bytes() == b"earlier"
    assert files_below(tmp_path) == {path.name}
