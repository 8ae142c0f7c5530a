"""One request => the page's results, again and again while the images denoise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape

import numpy as np
from numpy.typing import NDArray

from remixdit.data.autoencoder import Autoencoder
from remixdit.demo.frames import MAX_FRAMES, Frame, fixed_expert, frames
from remixdit.demo.pictures import columns_for, data_uri, heat_map, image_panel, strip
from remixdit.figures.grids import image_grid
from remixdit.model.imagenet import shown_names
from remixdit.model.model import RemixDiT
from remixdit.sampling.moments import spread
from remixdit.sampling.sampler import SamplingConfig, labels_of

__all__ = ["Subject", "empty_results", "results"]

STRIP_IMAGES = 8

MAP_TEXT = (
    "Each column is an expert: an interval of timesteps, from noise to image. Each row is a basis: "
    "one set of weights. The lighter a cell, the more of that basis is in that expert. "
    "The frame moves to the expert that is drawing."
)


@dataclass(frozen=True)
class Subject:
    """The model that the page is about, and what it may be compared with."""

    name: str
    """Name of the model, as the user wrote it."""
    model: RemixDiT
    """Model on its device, in its precision."""
    autoencoder: Autoencoder
    """Autoencoder of its latents."""
    against: RemixDiT | None = None
    """Another model of the same latents and classes."""
    against_name: str = ""
    """Name of the other model."""

    @property
    def class_names(self) -> list[str]:
        """Name of every class; empty for an unconditional model."""
        config = self.model.config
        names = shown_names(config) or (f"class {n}" for n in range(config.network.num_classes))
        return list(names)

    def coefficients(self) -> NDArray[np.float64]:
        """Return (N, K) coefficients; of a table for each block, their mean."""
        tables = self.model.experts.coefficients().detach()  # (L, N, K)
        return tables.mean(0).double().cpu().numpy()


@lru_cache(maxsize=1)  # the memory of one network
def remembered_expert(model: RemixDiT, expert: int) -> RemixDiT:
    """Return a model of one expert, kept until another is asked for."""
    return fixed_expert(model, expert)


def results(
    subject: Subject, config: SamplingConfig, compare: str = "", expert: int = 0
) -> Iterator[str]:
    """Draw what was asked for; yield the results as HTML, the last with finished images.

    Args:
        subject: Model of the page.
        config: Images to draw.
        compare: "against" for the other model, "expert" for one expert alone, "" for nothing.
        expert: Expert in [0, N) that draws alone.
    """
    models, titles = [subject.model], [title_of(subject.model)]
    if compare == "against" and subject.against is not None:
        models.append(subject.against)
        titles.append(subject.against_name)
    elif compare == "expert":
        models.append(remembered_expert(subject.model, expert))
        titles.append(f"expert {expert} alone")
    labels = labels_of(subject.model, config).tolist()
    names = [subject.class_names[label] if subject.class_names else "" for label in labels]
    seen: list[Frame] = []
    for frame in frames(models, subject.autoencoder, config):
        seen.append(frame)
        yield page_of(subject, config, titles, names, seen)


def title_of(model: RemixDiT) -> str:
    """Return what draws the images."""
    return f"all {model.num_experts} experts" if model.num_experts > 1 else "the model"


def page_of(
    subject: Subject,
    config: SamplingConfig,
    titles: Sequence[str],
    names: Sequence[str],
    seen: Sequence[Frame],
) -> str:
    """Return the results after some frames."""
    frame, total = seen[-1], config.num_inference_steps
    finished = frame.step == total
    panels = "".join(
        image_panel(title, images, names, finished)
        for title, images in zip(titles, frame.images, strict=True)
    )
    end = download_links(titles, names, frame, config.seed) if finished else ""
    return (
        f'<div class="remixdit"><p class="status" aria-live="polite">{status(frame, total)}'
        f'<progress max="{total}" value="{frame.step}"></progress></p>'
        f'<div class="panels">{panels}</div>{end}'
        f"{mixture(subject, frame)}{strips(titles, seen, total)}</div>"
    )


def empty_results(subject: Subject) -> str:
    """Return what stands there before the first request."""
    return (
        '<div class="remixdit"><p class="hint">Press <b>Draw</b>: the images appear here while '
        f"they denoise.</p>{mixture(subject, None)}</div>"
    )


def status(frame: Frame, total: int) -> str:
    """Return how far the images are."""
    if frame.step == total:
        return f"Finished after {total} steps"
    return f"Step {frame.step} of {total}"


def mixture(subject: Subject, frame: Frame | None) -> str:
    """Return the heat map and what it says of the active expert; "" for a plain network."""
    model = subject.model
    if model.num_experts == 1:
        return ""
    coefficients = subject.coefficients()
    active = None if frame is None else frame.expert
    mean = " Cells are means over the blocks." if model.config.per_block else ""
    about = "" if frame is None else f'<p class="active-text">{about_expert(subject, frame)}</p>'
    return (
        f"<section><h3>What the experts are mixed from</h3>{heat_map(coefficients, active)}"
        f'{about}<p class="note">{MAP_TEXT}{mean}</p></section>'
    )


def about_expert(subject: Subject, frame: Frame) -> str:
    """Return the interval and the largest coefficients of the active expert."""
    expert, ends = frame.expert, subject.model.intervals.boundaries
    row = subject.coefficients()[expert]
    largest = [basis for basis in np.argsort(-abs(row))[:3] if abs(row[basis]) >= 0.005]
    shares = ", ".join(f"{row[basis]:.2f} of basis {basis}" for basis in largest)
    return (
        f"<b>Expert {expert}</b> owns the timesteps {ends[expert]:.4g} to {ends[expert + 1]:.4g}: "
        f"{shares}."
    )


def strips(titles: Sequence[str], seen: Sequence[Frame], total: int) -> str:
    """Return the first image of each model as it came about, at most 8 times."""
    by_step = {frame.step: frame for frame in seen}
    # Frames are spread over the steps, and the strip's over the frames: each has its frame.
    steps = strip_steps(total)
    shown = [by_step.get(step) for step in steps]
    rows = []
    for index, title in enumerate(titles):
        captions = [caption(frame, with_expert=index == 0) for frame in shown]
        pictures = [None if frame is None else frame.images[index][0] for frame in shown]
        rows.append(strip(pictures, captions, title if len(titles) > 1 else ""))
    return (
        f"<section><h3>The first image, from noise to data</h3>{''.join(rows)}"
        '<p class="note">Below each: its timestep, and the expert that took the step.</p></section>'
    )


def strip_steps(total: int) -> list[int]:
    """Return the steps of the strip, a part of those that have a frame."""
    made = spread(total, MAX_FRAMES)
    return [made[number - 1] for number in spread(len(made), STRIP_IMAGES)]


def caption(frame: Frame | None, with_expert: bool) -> tuple[str, str]:
    """Return timestep and expert of a picture of the strip."""
    if frame is None:
        return "", ""
    return f"t = {frame.timestep:.3g}", f"expert {frame.expert}" if with_expert else ""


def download_links(titles: Sequence[str], names: Sequence[str], frame: Frame, seed: int) -> str:
    """Return a link to each model's images, as a grid with the class names."""
    links = []
    for title, images in zip(titles, frame.images, strict=True):
        grid = np.asarray(image_grid(images, columns_for(len(names)), names if any(names) else ()))
        file = f"{title.strip('/').replace('/', '-').replace(' ', '-')}-seed-{seed}.png"
        what = "Download the images" if len(titles) == 1 else f"Download: {title}"
        links.append(
            f'<a class="download" download="{escape(file)}" href="{data_uri(grid)}">'
            f"{escape(what)}</a>"
        )
    return f'<p class="downloads">{"".join(links)}</p>'
