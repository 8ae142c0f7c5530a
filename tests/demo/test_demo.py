"""The page without a browser: frames, bounds, pictures and refusals."""

import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from remixdit.cli.demo import DemoArguments, subject_of
from remixdit.data.autoencoder import Pixels
from remixdit.demo.frames import MAX_FRAMES, fixed_expert, frames
from remixdit.demo.page import request_of
from remixdit.demo.pictures import cell_pixels, heat_map
from remixdit.demo.show import Subject, results, strip_steps
from remixdit.model.model import RemixDiT
from remixdit.sampling.moments import spread
from remixdit.sampling.sampler import SamplingConfig, sample, sample_latents
from tests.command_line import refusal, save_model
from tests.tiny import tiny_dit, tiny_model

FEW = SamplingConfig(num_images=2, num_inference_steps=5, guidance_scale=1.5, seed=3)


def test_the_last_frame_is_what_sample_draws():
    model = tiny_model()
    *_, last = frames([model], Pixels(), FEW)
    assert last.step == 5
    assert np.array_equal(last.images[0], next(sample(model, Pixels(), FEW)).images)


def test_two_models_take_their_steps_from_the_same_noise():
    model = tiny_model()
    for frame in frames([model, tiny_model()], Pixels(), FEW):
        assert np.array_equal(*frame.images)


def test_a_fixed_expert_draws_as_the_model_whose_experts_are_all_that_one():
    model = tiny_model()
    network = model.expert(2)
    plain = RemixDiT.from_dit(network, 1, 1)
    drawn = sample_latents(fixed_expert(model, 2), FEW, range(2))
    assert np.allclose(drawn, sample_latents(plain, FEW, range(2)), atol=1e-5)


def test_a_fixed_expert_draws_in_the_precision_of_the_page():
    model = tiny_model()
    model.sample_with(torch.bfloat16)
    assert fixed_expert(model, 2).sampling == (torch.bfloat16, False)


@pytest.mark.parametrize("total", [1, 2, 7, 31, 32, 33, 50, 250])
def test_frames_are_bounded_and_hold_those_of_the_strip(total):
    made = spread(total, MAX_FRAMES)
    assert len(made) == len(set(made)) == min(total, MAX_FRAMES)
    assert made[-1] == strip_steps(total)[-1] == total
    assert total == 1 or made[0] == strip_steps(total)[0] == 1
    assert set(strip_steps(total)) <= set(made)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_images": 17}, "num_images must be at most 16, got 17"),
        ({"num_inference_steps": 251}, "num_inference_steps must be at most 250, got 251"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**32}, "seed must be at most 4294967295"),
        ({"guidance_scale": 21}, "guidance_scale must be at most 20, got 21"),
    ],
)
def test_a_request_beyond_the_bounds_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        next(frames([tiny_model()], Pixels(), replace(FEW, **fields)))


def test_the_heat_map_begins_at_the_noise_and_frames_the_active_expert():
    coefficients = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])  # (N, K)
    pixels = cell_pixels(coefficients)  # (K, N, 3)
    assert pixels.shape == (2, 3, 3)
    assert pixels[0, 0].tolist() == [0, 34, 78]  # expert 2 has nothing of basis 0
    assert pixels[0, 2].tolist() == [254, 232, 56]  # expert 0 is basis 0
    assert 'style="left: 0.000%; width: 33.333%"' in heat_map(coefficients, active=2)
    assert "active" not in heat_map(coefficients)


def test_results_show_both_models_and_end_with_downloads():
    subject = Subject("run", tiny_model(), Pixels())
    pages = list(results(subject, FEW, "expert", 1))
    assert len(pages) == 5
    assert "Step 1 of 5" in pages[0]
    assert "download=" not in pages[0]
    assert "Finished after 5 steps" in pages[-1]
    assert re.findall('download="([^"]*)"', pages[-1]) == [
        "all-5-experts-seed-3.png",
        "expert-1-alone-seed-3.png",
    ]
    assert "<b>Expert 0</b> owns the timesteps 0 to 200" in pages[-1]


def test_names_of_classes_and_models_are_text_not_markup():
    model = tiny_model()
    model.config = replace(model.config, class_names=("<b>cat</b>", "dog", "elk"))
    page = next(results(Subject("run", model, Pixels()), FEW))
    assert "<b>cat</b>" not in page
    assert "&lt;b&gt;cat&lt;/b&gt;" in page


def test_an_emptied_seed_is_refused():
    subject = Subject("run", tiny_model(), Pixels())
    with pytest.raises(ValueError, match="seed must be a whole number"):
        request_of(subject, [], 2, None, 5, 1.0, "", 0, "ddpm", 0, 1)


def test_another_model_must_draw_from_the_same_noise(tmp_path):
    save_model(tmp_path / "remixed", 0)
    RemixDiT.from_dit(tiny_dit(), 1, 1).save_pretrained(tmp_path / "other")
    arguments = DemoArguments(checkpoint=str(tmp_path / "remixed"), against=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="latent_shape of --against"):
        subject_of(arguments)


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("remixdit.demo.page.find_spec", lambda name: None)
    assert "pip install 'remixdit[demo]'" in refusal("demo anything", capsys)


BUILD = """
from remixdit.data.autoencoder import Pixels
from remixdit.demo.page import build
from remixdit.demo.show import Subject
from tests.tiny import tiny_model
page = build(Subject("run", tiny_model(), Pixels(), tiny_model(), "plain"))
print(*{part.label for part in page.blocks.values() if getattr(part, "label", None)}, sep="\\n")
"""


@pytest.mark.skipif(find_spec("gradio") is None, reason="needs: pip install 'remixdit[demo]'")
def test_the_page_can_be_built():
    # A process of its own: Gradio leaves event loops open.
    command = [sys.executable, "-c", BUILD]
    built = subprocess.run(command, capture_output=True, text=True, check=True)
    wanted = {"Classes", "Seed", "Steps", "Guidance", "Scheduler", "Compare with"}
    assert wanted <= set(built.stdout.splitlines())
