"""Commands read a run that writes and removes checkpoints meanwhile."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from remixdit.cli.main import main
from remixdit.model.loading import checkpoints
from tests.command_line import remixdit
from tests.processes import start_processes, wait_for_checkpoint

DRAWING = "--num-images 2 --num-inference-steps 1"


def drawn(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, np.ndarray]:
    """Draw images; return the step that the command says last, and the images."""
    output = line.split()[3]
    assert main(line.split()) == 0, capsys.readouterr().err
    steps = re.findall(r"weights of step ([\d,]+)", capsys.readouterr().err)
    with np.load(output) as arrays:
        return int(steps[-1].replace(",", "")), arrays["arr_0"]


def test_images_are_those_of_the_step_that_is_said(data, tmp_path, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    train = f"train tiny --data {data} --save-every 2 --log-every 1 --output-dir"
    process = start_processes(f"{train} {run} --keep-checkpoints 1 --steps 100000", 1)
    wait_for_checkpoint(run)
    found, drawings = {}, 0
    try:
        while len(found) < 3 or drawings < 20:
            step, images = drawn(
                f"sample {run} --output {tmp_path}/{drawings}.npz {DRAWING}", capsys
            )
            found[step] = images
            drawings += 1
            assert main(f"info {run} --json".split()) == 0
            assert json.loads(capsys.readouterr().out)["step"] >= step
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    steps = sorted(found)[:3]
    remixdit(f"{train} {whole} --keep-checkpoints 1000 --steps {steps[-1] + 1}")
    for step in steps:
        place = whole / "checkpoints" / f"step-{step:08}"
        line = f"sample {place} --output {tmp_path}/{step}-again.npz {DRAWING}"
        assert np.array_equal(drawn(line, capsys)[1], found[step])


def test_a_checkpoint_that_is_removed_while_torch_opens_it_is_left_for_the_next(
    data, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    remixdit(f"train tiny --data {data} --steps 4 --save-every 2 --output-dir {run}")
    kept, newest = checkpoints(run)
    from_file = torch.UntypedStorage.from_file

    def removed_first(*args: object, **options: object) -> torch.UntypedStorage:
        shutil.rmtree(newest, ignore_errors=True)
        return from_file(*args, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", removed_first)
    assert main(f"info {run} --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert checkpoints(run) == [kept]
