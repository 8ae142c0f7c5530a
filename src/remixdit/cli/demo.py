"""`remixdit demo CHECKPOINT`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from remixdit.cli.arguments import parse
from remixdit.cli.checkpoints import check_precision, open_autoencoder, open_model
from remixdit.cli.terminal import say
from remixdit.demo.frames import check_against
from remixdit.demo.page import require_gradio, serve
from remixdit.demo.show import Subject
from remixdit.distributed import pick_device
from remixdit.model.model import RemixDiT

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Show a model at work on a page in the browser: images, experts and coefficients."""

    checkpoint: Positional[str]
    """A model directory, a run, a checkpoint of a run, or a model on the Hugging Face Hub."""
    against: str | None = None
    """A second model to draw beside it from the same seed, e.g. the plain DiT it started from."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 shows the page to the network, without a password."""
    port: int = 0
    """Port of the page; 0 for the first free one from 7860 on."""
    ema: bool = True
    """Use the averaged (EMA) weights of a checkpoint rather than its last ones."""
    device: str = "auto"
    """Device: auto, cpu or cuda. auto is the GPU if there is one."""
    precision: str = "fp32"
    """Precision of the network: fp32 or bf16."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_precision(self.precision)
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")


def run(args: Sequence[str]) -> None:
    """Load the models and show the page."""
    arguments = parse(DemoArguments, args, "demo")
    require_gradio()
    subject = subject_of(arguments)
    try:
        serve(
            subject,
            arguments.host,
            arguments.port,
            lambda address: say(f"open {address} in a browser; Ctrl+C ends"),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the page is closed") from None


def subject_of(arguments: DemoArguments) -> Subject:
    """Load what the page shows."""
    device = pick_device(arguments.device)

    def opened(path: str) -> RemixDiT:
        return open_model(path, ema=arguments.ema, precision=arguments.precision, device=device)

    model = opened(arguments.checkpoint)
    autoencoder = open_autoencoder(model, device)
    name = shown_name(arguments.checkpoint)
    if arguments.against is None:
        return Subject(name, model, autoencoder)
    against = opened(arguments.against)
    check_against(model, against, arguments.against)
    return Subject(name, model, autoencoder, against, shown_name(arguments.against))


def shown_name(path: str) -> str:
    """Return the last two parts of a path, or the name of a model of the hub."""
    return "/".join(Path(path).parts[-2:]).lstrip("/")
