"""An exported pipeline draws our images where remixdit is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from remixdit.data.autoencoder import load_autoencoder
from remixdit.interchange import ExportConfig, export_pipeline, run_export
from remixdit.model.model import RemixDiT
from remixdit.sampling.sampler import SamplingConfig, sample, sample_latents
from tests.tiny import perturb, save_tiny, tiny_dit

# Nothing of ours can be imported in that process.
RUN = """
import json, sys
from pathlib import Path

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("remixdit", "tests"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
import numpy as np, torch, diffusers
for job in json.loads(sys.argv[1]):
    pipe = diffusers.DiffusionPipeline.from_pretrained(job["directory"], trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    if job["scheduler"]:
        scheduler = getattr(diffusers, job["scheduler"])
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
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


def drawn_without_us(jobs: list[dict], tmp_path: Path) -> list[dict]:
    """Run the jobs in a process that has no remixdit; return what each drew."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(script), json.dumps(jobs)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
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


def test_a_pipeline_without_remixdit_draws_our_images(tmp_path):
    save_tiny(tmp_path / "vae")
    latent = {"in_channels": 4, "num_classes": 3}
    vae = load_autoencoder(tmp_path / "vae").spec
    names = {"class_names": ("cat", "dog, big", "owl")}
    flow = {"prediction_type": "flow_prediction"}
    guided = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.8)}
    cases = [
        (remixed(options=names), "ddim", "", guided),
        (remixed(options={"autoencoder": vae}, **latent), "ddim", "", {}),
        (remixed(options={"mixed": "all", "per_block": True}, num_classes=0), "ddim", "", {}),
        (remixed(4, flow, learn_sigma=False), "euler", "", guided),
        (remixed(options={"rank": 2, "coefficients": "raw"}), "ddim", "", {}),
        (
            remixed(options={"prediction_type": "v_prediction", "num_train_timesteps": 250}),
            "dpm++",
            "DPMSolverMultistepScheduler",
            {},
        ),
    ]
    jobs, expected = [], []
    for number, (model, scheduler, name, guidance) in enumerate(cases):
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
            labels = {"class_labels": list(names["class_names"])}
        call = {**labels, **guidance, "num_inference_steps": 12}
        files = {"noise": str(noise), "output": str(tmp_path / f"out-{number}.npz")}
        jobs.append({"directory": str(directory), "scheduler": name, "call": call, **files})
    for found, (latents, images) in zip(drawn_without_us(jobs, tmp_path), expected, strict=True):
        np.testing.assert_allclose(found["latent"], latents, rtol=1e-3, atol=1e-4)
        pixels = found["pil"].reshape(images.shape).astype(int)
        assert np.abs(pixels - images.astype(int)).max() <= 1  # at the edge between two values
        assert (pixels == images).mean() > 0.99
        assert len(found["seen"]) == 24


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
    from diffusers import FlowMatchEulerDiscreteScheduler

    from remixdit.interchange.pipelines import model_arguments, model_state, scheduler_for
    from remixdit.interchange.remix_dit_pipeline import RemixDiTModel, RemixDiTPipeline

    model = remixed()
    transformer = RemixDiTModel(**model_arguments(model))
    transformer.load_state_dict(model_state(model))
    pipe = RemixDiTPipeline(transformer, scheduler_for(model.config))
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
