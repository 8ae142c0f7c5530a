"""Nothing comes from the network unless it was asked for, and all of it is checked."""

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from remixdit.evaluation.features import load_extractor
from remixdit.evaluation.features.inception import INCEPTION_URL
from tests.command_line import refusal


def test_weights_of_fid_that_are_already_there_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / INCEPTION_URL.rpartition("/")[2]).write_bytes(b"other weights")
    with pytest.raises(ValueError, match="must be the published file, got another in"):
        load_extractor("inception", weights="download")


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "{}/nothing"])
def test_what_is_no_name_of_the_hub_is_not_looked_up(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("looked up")
    )
    line = f"sample {name.format(tmp_path)} --output {tmp_path}/a.png"
    assert refusal(line, capsys).startswith("model must be a directory or a model of the hub")


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_machine(tmp_path, monkeypatch, capsys):
    def unreachable(name, **_):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal(f"sample owner/name --output {tmp_path}/a.png", capsys, code=1)
    assert message == (
        "owner/name is no directory, and the Hugging Face Hub cannot be reached to look for it"
    )
