"""The card of a model, README.md: what it is, how it was trained, its limits and how to use it.

Names of classes, data and licences are foreign: in the text they are escaped, in the header quoted.
"""

import json
import re
from collections.abc import Mapping
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

from numpy.typing import ArrayLike

from remixdit.figures.text import one_line
from remixdit.model.config import RemixConfig

__all__ = ["PLACEHOLDER", "card_files", "license_lines", "model_card"]

PLACEHOLDER = "this directory"  # in a card, until the model has a name on the hub
HEAT_MAP = "coefficients.png"
MOST_NAMES = 20
NOTHING: Mapping[str, str] = MappingProxyType({})

# Identifiers of the Hugging Face Hub; every other licence is "other", with a name.
HUB_LICENSES = {
    *("afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigcode-openrail-m"),
    *("bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause"),
    *("bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0"),
    *("cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0"),
    *("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("cc0-1.0", "creativeml-openrail-m", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1"),
    *("lgpl-3.0", "mit", "mpl-2.0", "openrail", "openrail++", "unlicense", "wtfpl", "zlib"),
}


def license_lines(name: str) -> str:
    """Return the lines of a card's front matter that state a licence, "" for none."""
    if not name:
        return ""
    if name.lower() in HUB_LICENSES:
        return f"license: {name.lower()}\n"
    # A JSON string is a YAML string, and cannot add lines of its own.
    return f"license: other\nlicense_name: {json.dumps(name)}\n"


def card_files(
    config: RemixConfig, coefficients: ArrayLike, name: str, training: Mapping[str, str] = NOTHING
) -> dict[str, bytes]:
    """Return the card of a model that gets a name on the hub, and its picture, by file.

    Args:
        config: Configuration of the model.
        coefficients: (N, K) or (L, N, K).
        name: Name of the model, "owner/name".
        training: What is known of its training, label => value.
    """
    if config.num_bases == 1:
        return {"README.md": model_card(config, name, training).encode()}
    from remixdit.figures.plots import coefficients_heatmap  # matplotlib takes a while

    picture = BytesIO()
    figure = coefficients_heatmap(coefficients, config.intervals().boundaries)
    figure.savefig(picture, format="png")
    card = model_card(config, name, training, has_heat_map=True)
    return {"README.md": card.encode(), HEAT_MAP: picture.getvalue()}


def model_card(
    config: RemixConfig,
    name: str = PLACEHOLDER,
    training: Mapping[str, str] = NOTHING,
    has_heat_map: bool = False,
) -> str:
    """Return the README.md of a model.

    Args:
        config: Configuration of the model.
        name: Name of the model for `from_pretrained`.
        training: What is known of its training, label => value.
        has_heat_map: Whether the picture of the coefficients lies beside the card.
    """
    title = f"Remix-DiT, {config.num_bases} bases, {config.num_experts} experts"
    if name != PLACEHOLDER:
        title = f"{plain(name.partition('/')[2])}: {title}"
    shown = HEAT_MAP_TEXT if has_heat_map else ""
    trained = f"## Training\n\n{table(training)}\n" if training else ""
    return (
        f"---\nlibrary_name: remixdit\ntags: [diffusion, remix-dit]\n"
        f"{license_lines(config.license)}---\n\n# {title}\n\n"
        "A diffusion transformer for each interval of timesteps, mixed from a few bases, by "
        "[remixdit](https://github.com/remixdit/remixdit) "
        "([arXiv:2412.05628](https://arxiv.org/abs/2412.05628)).\n\n"
        f"{table(facts_of(config))}\n{shown}{trained}"
        f"## Use\n\n```python\nfrom remixdit import RemixDiT\n\n"
        f'model = RemixDiT.from_pretrained("{name}")\n'
        "output = model.denoise(latents, timesteps, class_labels)\n```\n\n"
        f"`remixdit sample {'.' if name == PLACEHOLDER else name} --output images.png` draws "
        f"images.\n\n## Limits\n\n{limits_of(config)}"
    )


HEAT_MAP_TEXT = (
    f"![Share of each basis in the expert of each interval of timesteps]({HEAT_MAP})\n\n"
    "Each column is the expert of one interval of timesteps, the least noisy on the left; each row "
    "is a basis; the colour is its share.\n\n"
)


def facts_of(config: RemixConfig) -> dict[str, str]:
    """Return what a card says of the model itself, label => value."""
    network, ends = config.network, config.intervals().boundaries
    size, names = network.input_size, config.class_names
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    named = f" ({', '.join(names[:MOST_NAMES])}{more})" if names else ""
    autoencoder = Path(str(config.autoencoder["name"]))  # a name, or a path of this machine
    widths = sorted({f"{end - begin:g}" for begin, end in pairwise(ends)}, key=float)
    wide = " to ".join(dict.fromkeys((widths[0], widths[-1])))
    return {
        "network": f"{network.depth} blocks of width {network.hidden_size}, "
        f"{network.num_heads} heads, patch {network.patch_size}",
        "latents": f"{network.in_channels} x {size} x {size}, "
        f"autoencoder {autoencoder.name if autoencoder.is_absolute() else autoencoder}",
        "classes": f"{network.num_classes:,}{named}",
        "bases, K": f"{config.num_bases}" + (f" of rank {config.rank}" if config.rank else ""),
        "experts, N": f"{config.num_experts}, for intervals {wide} wide of the "
        f"timesteps {ends[0]:g} to {ends[-1]:g}",
        "mixed parameters": str(config.mixed),
        "prediction": config.prediction_type,
        "licence": config.license or "not stated",
    }


def limits_of(config: RemixConfig) -> str:
    """Return the section on limits."""
    size, classes = config.network.input_size, config.network.num_classes
    of = f"of its {classes:,} classes" if classes else "of no class that can be chosen"
    latents = f"{config.network.in_channels} x {size} x {size}"
    return (
        f"* It draws images {of}, with latents of {latents}, and no others.\n"
        "* An expert is right at the timesteps of its own interval only.\n"
        "* Images may repeat the biases of the training images, and some of these images. Neither "
        "was measured for this card.\n"
        "* The licence of the training images is not stated here.\n"
    )


def table(rows: Mapping[str, str]) -> str:
    """Return a Markdown table of two columns."""
    lines = [f"| {label} | {plain(value)} |\n" for label, value in rows.items()]
    return "| | |\n|---|---|\n" + "".join(lines)


def plain(text: str) -> str:
    """Return a foreign text that Markdown shows as it is: no markup, links or lines of its own."""
    marked = re.sub(r"([\\`*_{}\[\]<>#|!&~:@$])", r"\\\1", one_line(text))
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", marked)
