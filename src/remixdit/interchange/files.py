"""Foreign weights, read without running code."""

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["read_tensors"]


def read_tensors(path: Path, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a state dict from a `.safetensors` file or from any file of `torch.save`.

    Args:
        path: The file.
        ema: Take the averaged weights of a training checkpoint where it has any.

    Returns:
        The tensors on the CPU, as they were saved, and the metadata of a `.safetensors` file, or
        the arguments of the training run that a `.pt` file states.

    Raises:
        ValueError: The file is not there, holds something else, or reading it would run code.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint must be a file, got {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    content = read_pickle(path)
    return state_dict_in(content, path, ema), arguments_in(content)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a `.safetensors` file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"checkpoint must be a safetensors file, got {path}: {error}") from error


def read_pickle(path: Path) -> Any:
    """Return the content of a file of `torch.save`, if it is pure data.

    Published checkpoints keep the arguments of their training run in an `argparse.Namespace`.
    That class is inert, and the only one allowed beyond tensors and plain containers.
    """
    try:
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),
        ):
            # torch warns of pickle protocols; what it cannot read under them, it refuses.
            warnings.simplefilter("ignore")
            # Mapped, the optimizer's two thirds of a training checkpoint never enter memory. Files
            # older than torch 1.6 are no zip archives and cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except PermissionError as error:
        raise ValueError(f"checkpoint must be readable, got {path}") from error
    except Exception as error:  # a pickle that is cut or forged raises anything
        raise ValueError(
            f"checkpoint must hold tensors and nothing that runs code, got {path}: {reason(error)}"
        ) from error


def reason(error: Exception) -> str:
    """Return why torch refused a file, in a few words."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found:
        return f"it asks for {found[1]}"
    return "it cannot be read, it may be cut short or of another kind"


def arguments_in(content: Any) -> dict[str, str]:
    """Return the arguments of the training run that published code saves with its weights."""
    found = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    if not isinstance(found, Mapping):
        return {}
    return {str(name): value for name, value in found.items() if isinstance(value, str)}


def state_dict_in(content: Any, path: Path, ema: bool) -> dict[str, Tensor]:
    """Return the state dict in the content of a file: alone, or under ema, model or state_dict."""
    for name in ("ema", "model", "state_dict") if ema else ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"checkpoint must hold a state dict, got a {type(content).__name__}")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            "checkpoint must hold a state dict, alone or under ema or model, got other things "
            f"than tensors under {', '.join(others[:5])} in {path}"
        )
    found = {str(name): value for name, value in content.items()}
    for name, values in found.items():
        check_tensor(name, values, path)
    return found


def check_tensor(name: str, values: Tensor, path: Path) -> None:
    """Refuse a tensor that is no plain array, or claims more numbers than the file has."""
    place = f"{ascii(name)[:80]} of {path}"
    if values.layout != torch.strided or values.is_meta or values.is_quantized:
        kind = "meta" if values.is_meta else "quantized" if values.is_quantized else values.layout
        raise ValueError(f"{place} must be a dense tensor, got {kind}")
    claimed, held = values.numel() * values.itemsize, values.untyped_storage().nbytes()
    if claimed > held:
        raise ValueError(f"{place} must hold its {claimed:,} bytes in the file, got {held:,}")
