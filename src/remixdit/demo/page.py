"""The page: controls in, results out, by Gradio.

Requests wait in a queue and are drawn one at a time. Nothing is fetched from elsewhere, and nothing
is written: the fonts are the reader's own, and images travel inside of the page.
"""

import threading
from collections.abc import Callable, Iterator
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from remixdit.demo.frames import BOUNDS
from remixdit.demo.show import Subject, empty_results, results
from remixdit.sampling.sampler import SamplingConfig

__all__ = ["build", "require_gradio", "serve"]

QUEUE = 16  # requests that may wait; the next one is told that the queue is full
STYLE = Path(__file__).with_name("page.css")


def require_gradio() -> None:
    """Refuse to begin without Gradio, before a model is loaded."""
    if find_spec("gradio") is None:
        raise ValueError("demo needs Gradio, which is not installed: pip install 'remixdit[demo]'")


def serve(subject: Subject, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Show the page until interrupted.

    Args:
        subject: What to show.
        host: Address to listen at.
        port: Port, or 0 for the first free one from 7860 on.
        ready: Called with the address of the page.
    """
    import gradio as gr

    page = build(subject)
    page.queue(max_size=QUEUE, api_open=False)
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    _, address, _ = page.launch(
        server_name=host,
        server_port=port or None,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        max_file_size="1mb",  # the page takes no files
        theme=gr.themes.Soft(primary_hue="blue", font=sans, font_mono=mono),
        css_paths=STYLE,
    )
    try:
        ready(address)
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def build(subject: Subject) -> Any:
    """Return the page of a model, as `gradio.Blocks`."""
    import gradio as gr

    def draw(*values: Any) -> Iterator[str]:
        """Draw; whatever is wrong with a request is said on the page."""
        try:
            yield from results(subject, *request_of(subject, *values))
        except ValueError as error:
            raise gr.Error(str(error), title="Not possible", print_exception=False) from error
        except (MemoryError, RuntimeError) as error:
            text = f"Drawing failed: {str(error).splitlines()[0]}. Fewer images need less memory."
            raise gr.Error(text) from error

    with gr.Blocks(title=f"remixdit: {subject.name}", analytics_enabled=False) as page:
        gr.HTML(heading(subject))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                controls = make_controls(subject)
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", min_width=90)
                    other = gr.Button("Next seed", min_width=90)
                    stop = gr.Button("Stop", variant="stop", min_width=90)
            with gr.Column(scale=5, min_width=300):
                shown = gr.HTML(empty_results(subject), elem_id="results")
        options = {"outputs": shown, "show_progress": "hidden", "concurrency_limit": 1}
        seed = controls[2]
        following = other.click(next_seed, seed, seed, queue=False)
        runs = [
            start.click(draw, controls, **options),
            following.then(draw, controls, **options),
        ]
        stop.click(None, cancels=runs, queue=False)
    return page


def next_seed(seed: float | None) -> int:
    """Return the seed after this one."""
    return 0 if seed is None or seed >= BOUNDS["seed"] else int(seed) + 1


def heading(subject: Subject) -> str:
    """Return the title of the page and one sentence on the model."""
    config = subject.model.config
    what = "A plain diffusion transformer."
    if config.num_experts > 1:
        what = (
            f"{config.num_bases} bases are mixed into {config.num_experts} experts, one for each "
            "interval of timesteps; a step of sampling costs what the plain network costs."
        )
    return f'<div class="remixdit"><h1>{escape(subject.name)}</h1><p>{what}</p></div>'


def make_controls(subject: Subject) -> list[Any]:
    """Make the controls, in the order of `request_of`."""
    import gradio as gr

    model, classes = subject.model, subject.class_names
    choices = [("nothing", "")]
    if subject.against is not None:
        choices.append((subject.against_name, "against"))
    if model.num_experts > 1:
        choices.append(("one expert alone", "expert"))
    labels = gr.Dropdown(
        [(name, index) for index, name in enumerate(classes)],
        value=[],
        multiselect=True,
        max_choices=BOUNDS["num_images"],
        label="Classes",
        info="The images take turns; leave it empty for all classes.",
        visible=bool(classes),
    )
    count = gr.Slider(1, BOUNDS["num_images"], 8, step=1, label="Images")
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=BOUNDS["seed"])
    most = BOUNDS["num_inference_steps"]
    most = most if model.config.is_flow else min(most, model.config.num_train_timesteps)
    steps = gr.Slider(1, most, min(50, most), step=1, label="Steps")
    scale = gr.Slider(
        1,
        BOUNDS["guidance_scale"],
        2.0 if classes else 1.0,
        step=0.1,
        label="Guidance",
        info="How strongly images follow their class; 1 for none.",
        visible=bool(classes),
    )
    against = gr.Radio(
        choices, value="", label="Compare with", info="At the same seed.", visible=len(choices) > 1
    )
    last = model.num_experts - 1
    expert = gr.Slider(
        0, max(1, last), 0, step=1, label="Expert that draws all steps alone", visible=False
    )
    against.change(
        lambda choice: gr.update(visible=choice == "expert"), against, expert, queue=False
    )
    return [labels, count, seed, steps, scale, against, expert, *more_controls(subject)]


def more_controls(subject: Subject) -> list[Any]:
    """Make the controls that few need: scheduler, and the interval in which guidance acts."""
    import gradio as gr

    can_guide = bool(subject.class_names)
    with gr.Accordion("More settings", open=False):
        fitting = ["euler"] if subject.model.config.is_flow else ["ddpm", "ddim", "dpm++"]
        scheduler = gr.Radio(fitting, value=fitting[0], label="Scheduler")
        low = gr.Slider(
            0, 1, 0, step=0.01, label="Guidance acts from", info="0: image", visible=can_guide
        )
        high = gr.Slider(
            0, 1, 1, step=0.01, label="Guidance acts to", info="1: noise", visible=can_guide
        )
    return [scheduler, low, high]


def request_of(
    subject: Subject, labels: list[int], count: int, seed: float | None, *others: Any
) -> tuple[SamplingConfig, str, int]:
    """Return what the controls ask for: images, what to compare with, and an expert."""
    steps, scale, against, expert, scheduler, low, high = others
    if seed is None:
        raise ValueError(f"seed must be a whole number in [0, {BOUNDS['seed']}], got none")
    config = SamplingConfig(
        num_images=int(count),
        class_labels=tuple(labels or ()),
        seed=int(seed),
        num_inference_steps=int(steps),
        guidance_scale=float(scale),
        guidance_interval=(float(low), float(high)),
        scheduler=scheduler,
    )
    return config, against or "", int(expert or 0)
