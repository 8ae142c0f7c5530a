"""Fixtures that tests of several folders use."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.command_line import write_npz

PARITY = Path(__file__).parent / "parity"


@pytest.fixture(scope="session")
def given() -> dict[str, Tensor]:
    """Inputs, weights and outputs of the published implementations."""
    return load_file(PARITY / "given.safetensors")


@pytest.fixture(scope="session")
def settings() -> dict:
    """The configuration that belongs to `given`."""
    return json.loads((PARITY / "given.json").read_text())


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Noisy pictures of three classes, an .npz."""
    return write_npz(tmp_path_factory.mktemp("data") / "pictures.npz")
