"""The loop of one's own that the README points to."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import environment

SCRIPT = Path(__file__).parents[2] / "examples" / "own_loop.py"


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ("unet", "UNet2DModel"),
        pytest.param("dit --compile", "DiTTransformer2DModel", marks=pytest.mark.slow),
    ],
)
def test_a_diffusers_model_learns_in_a_loop_of_ones_own(options, kind):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options.split(), "--steps", "8"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment(),
        timeout=280,
    )
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]
    assert f"expert 4 is a {kind}" in done.stdout
