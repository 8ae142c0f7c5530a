"""An exported pipeline draws our images where remixdit is not installed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from remixdit.data.autoencoder import load_autoencoder
from remixdit.interchange import ExportConfig, export_pipeline, run_export
from remixdit.interchange.pipelines import model_arguments, model_state, scheduler_for
from remixdit.interchange.remix_dit_pipeline import RemixDiTModel, RemixDiTPipeline
from remixdit.model.model import RemixDiT
from remixdit.sampling.sampler import SamplingConfig, sample, sample_latents
from tests.tiny import perturb, save_tiny, tiny_dit

NAMES = ("cat", "dog, big", "owl")

# Nothing of ours can be imported in that process.
BLOCK = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("remixdit", "tests"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
"""
RUN = """
import importlib.util, json, sys
import numpy as np, torch, diffusers
assert not sys.argv[2] or importlib.util.find_spec(sys.argv[2]) is None
for job in json.loads(sys.argv[1]):
    pipe = diffusers.DiffusionPipeline.from_pretrained(job["directory"], trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    if job["scheduler"]:
        scheduler = getattr(diffusers, job["scheduler"])
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    if job.get("compile"):
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    found = {"seen": []}
    def seen(pipe, step, timestep, given):
        found["seen"].append(timestep)
        return given
    noise = torch.from_numpy(np.load(job["noise"]))
    for kind in ("latent", "pil"):
        images = pipe(**job["call"], latents=noise, output_type=kind,
                      callback_on_step_end=seen).images
        found[kind] = np.stack([np.asarray(image) for image in images])
    np.savez(job["output"], **found)
assert "remixdit" not in sys.modules
"""


def remixed(num_experts: int = 5, options: dict | None = None, **shape) -> RemixDiT:
    network = tiny_dit(**shape)
    model = RemixDiT.from_dit(network, min(2, num_experts), num_experts, **(options or {}))
    perturb(model.experts, 0.5)
    if model.config.rank:
        for name, bases in model.experts.bases().items():
            if name.endswith(".up"):
                torch.nn.init.normal_(bases, std=0.2)
    return model.eval()


def drawn_without_us(jobs: list[dict], tmp_path: Path, python: str = "") -> list[dict]:
    """Run the jobs in a process that has no remixdit; return what each drew.

    It is of another environment, or of this one, where the package is then hidden.
    """
    script = tmp_path / "run.py"
    script.write_text(RUN if python else BLOCK + RUN)
    words = [python or sys.executable, "-P", str(script), json.dumps(jobs)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "remixdit" if python else ""],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr
    return [dict(np.load(job["output"])) for job in jobs]


def noise_of(model: RemixDiT, config: SamplingConfig) -> np.ndarray:
    from remixdit.seeds import generator_for

    network = model.config.network
    shape = (network.in_channels, network.input_size, network.input_size)
    generators = [generator_for(config.seed, "sample", i) for i in range(config.num_images)]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).numpy()


def cases_of(tmp_path: Path) -> Iterator[tuple[RemixDiT, str, str, dict]]:
    """Yield models, our sampler of each, diffusers' where the pipeline has another, and options."""
    save_tiny(tmp_path / "vae")
    latent = {"in_channels": 4, "num_classes": 3}
    vae = load_autoencoder(tmp_path / "vae").spec
    flow = {"prediction_type": "flow_prediction"}
    short = {"prediction_type": "v_prediction", "num_train_timesteps": 250}
    guided = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.8)}
    yield remixed(options={"class_names": NAMES}), "ddim", "", guided
    yield remixed(options={"autoencoder": vae}, **latent), "ddim", "", {}
    yield remixed(options={"mixed": "all", "per_block": True}, num_classes=0), "ddim", "", {}
    yield remixed(4, flow, learn_sigma=False), "euler", "", guided
    yield remixed(options={"rank": 2, "coefficients": "raw"}), "ddim", "", {}
    yield remixed(options=short), "dpm++", "DPMSolverMultistepScheduler", {}


def jobs_of(tmp_path: Path) -> tuple[list[dict], list[tuple[np.ndarray, np.ndarray]]]:
    """Return jobs for a process without us, and the latents and images that we draw."""
    jobs, expected = [], []
    for number, (model, scheduler, name, guidance) in enumerate(cases_of(tmp_path)):
        options = {"num_images": 3, "num_inference_steps": 12, "scheduler": scheduler, **guidance}
        config = SamplingConfig(**options)
        autoencoder = load_autoencoder(model.config.autoencoder)
        (images,) = sample(model, autoencoder, config)
        expected.append((sample_latents(model, config, range(3)).numpy(), images.images))
        directory, noise = tmp_path / f"pipeline-{number}", tmp_path / f"noise-{number}.npy"
        export_pipeline(model, directory)
        np.save(noise, noise_of(model, config))
        labels: dict = {"class_labels": [0, 1, 2]}
        if not model.config.network.num_classes:
            labels = {"batch_size": 3}
        elif model.config.class_names:
            labels = {"class_labels": list(NAMES)}
        call = {**labels, **guidance, "num_inference_steps": 12}
        files = {"noise": str(noise), "output": str(tmp_path / f"out-{number}.npz")}
        jobs.append({"directory": str(directory), "scheduler": name, "call": call, **files})
    return jobs, expected


def assert_ours(drawn: list[dict], expected: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Compare what pipelines drew, in 12 steps twice, with our latents and images."""
    for found, (latents, images) in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(found["latent"], latents, rtol=1e-3, atol=1e-4)
        pixels = found["pil"].reshape(images.shape).astype(int)
        assert np.abs(pixels - images.astype(int)).max() <= 1  # at the edge between two values
        assert (pixels == images).mean() > 0.99
        assert len(found["seen"]) == 24


def test_a_pipeline_without_remixdit_draws_our_images(tmp_path):
    jobs, expected = jobs_of(tmp_path)
    assert_ours(drawn_without_us(jobs, tmp_path), expected)


@pytest.mark.long
def test_a_pipeline_draws_our_images_in_an_environment_of_its_own(tmp_path):
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    packages = [f"torch=={torch.__version__.split('+')[0]}", "diffusers", "safetensors", "pillow"]
    constraints = Path(__file__).parents[2] / "constraints.txt"
    words = [python, "-m", "pip", "install", "-q", "-c", str(constraints), *packages]
    installed = subprocess.run(words, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"no packages: {installed.stderr.strip().splitlines()[-1]}")
    jobs, expected = jobs_of(tmp_path)
    compiled = {**jobs[0], "compile": True, "output": str(tmp_path / "compiled.npz")}
    drawn = drawn_without_us([*jobs, compiled], tmp_path, python)
    assert_ours(drawn, [*expected, expected[0]])


def tiny_pipeline(model: RemixDiT) -> Any:
    """Return the pipeline of a model of pixels, without files."""
    transformer = RemixDiTModel(**model_arguments(model)).eval()
    transformer.load_state_dict(model_state(model))
    pipe = RemixDiTPipeline(transformer, scheduler_for(model.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: Any, **options: Any) -> torch.Tensor:
    call = {"class_labels": [0, 1], "num_inference_steps": 8, "output_type": "latent"}
    return pipe(**{**call, **options}).images


def test_noise_and_random_steps_come_from_the_generator():
    pipe = tiny_pipeline(remixed())
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    def draw(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return latents_of(pipe, generator=generators if len(seeds) > 1 else generators[0])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    both, other = draw(1, 2), draw(1, 3)
    torch.testing.assert_close(both[0], other[0])
    assert not torch.allclose(both[1], other[1])


def test_a_callback_replaces_the_latents():
    pipe = tiny_pipeline(remixed())
    given = []

    def forget(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        given.append((step, timestep))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = latents_of(pipe, callback_on_step_end=forget)
    assert torch.equal(latents, torch.zeros_like(latents))
    assert [step for step, _ in given] == list(range(8))
    assert [time for _, time in given] == sorted((time for _, time in given), reverse=True)


def test_schedulers_of_the_same_process_end_in_the_same_image():
    pipe = tiny_pipeline(remixed(options={"prediction_type": "v_prediction"}))
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    config = pipe.scheduler.config
    expected = latents_of(pipe, latents=noise, num_inference_steps=100)
    for name in (
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ):
        pipe.scheduler = getattr(diffusers, name).from_config(config)
        found = latents_of(pipe, latents=noise, num_inference_steps=100)
        error = float((found - expected).abs().mean() / expected.abs().mean())
        # Euler's steps are those of DDIM; higher orders meet them as steps get short.
        assert error < (1e-3 if name == "EulerDiscreteScheduler" else 0.05), name


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("ddim", "static", {"clip_sample": True}),
        ("ddim", "dynamic", {"thresholding": True, "sample_max_value": 1e6}),
        ("dpm++", "static", {"thresholding": True, "sample_max_value": 1.0}),
        ("dpm++", "dynamic", {"thresholding": True, "sample_max_value": 1e6}),
    ],
)
def test_a_scheduler_that_clips_draws_our_thresholded_images(name, kind, changes):
    model = remixed()
    pipe = tiny_pipeline(model)
    scheduler = {"ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler"}[name]
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **changes)
    fields = {"num_images": 2, "num_inference_steps": 8, "scheduler": name}
    config = SamplingConfig(**fields, thresholding=kind)
    ours = sample_latents(model, config, range(2))
    free = sample_latents(model, replace(config, thresholding="none"), range(2))
    assert not torch.allclose(ours, free, atol=0.01)
    found = latents_of(pipe, latents=torch.from_numpy(noise_of(model, config)))
    torch.testing.assert_close(found, ours, rtol=1e-3, atol=1e-4)


def test_blocks_are_captured_whole_by_the_compiler():
    pipe = tiny_pipeline(remixed())
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = latents_of(pipe, latents=noise)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(latents_of(pipe, latents=noise), expected)


def test_a_pipeline_is_safetensors_and_code_that_no_other_version_replaces(tmp_path):
    model = remixed()
    model.save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    run_export(ExportConfig(checkpoint=str(tmp_path / "model"), output=output, format="pipeline"))
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    (code,) = output.glob("*.py")
    assert code.stem.startswith("remix_dit_pipeline_")  # and the digest of its content
    assert files == {
        "model_index.json",
        "README.md",
        code.name,
        f"transformer/{code.name}",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    }
    assert "remixdit import" not in code.read_text()


def test_a_pipeline_refuses_what_it_cannot_draw(tmp_path):
    pipe = tiny_pipeline(remixed())
    for call, message in (
        ({"class_labels": [3]}, r"class_labels must be in \[0, 3\).*got 3"),
        ({"class_labels": "cat"}, "names of pipe.labels, got 'cat'"),
        ({}, "class_labels must be given for 3 classes"),
        ({"class_labels": 0, "guidance_scale": 0.5}, "guidance_scale must be at least 1"),
        ({"class_labels": 0, "num_inference_steps": 1001}, r"num_inference_steps must be in 1\.\."),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**call)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="scheduler must be of epsilon, got FlowMatchEuler"):
        pipe(class_labels=0)
    with pytest.raises(ValueError, match="autoencoder must be known for a model of 4 channels"):
        export_pipeline(remixed(in_channels=4), tmp_path / "out")
    assert not (tmp_path / "out").exists()
