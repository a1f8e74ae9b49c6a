"""Reading the tensors of a checkpoint file, whoever wrote it, without running code that it may hold."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict

__all__ = ["StateDict", "read_tensors", "some"]

StateDict = dict[str, torch.Tensor]


def read_tensors(path: str | Path, *, ema: bool = False) -> StateDict:
    """Return the tensors of a checkpoint, without running code that the file may hold.

    Raises:
        ValueError: If the file is missing, damaged, wants to run code, or has no state dict of the kind asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    content = _read_safetensors(path) if _looks_like_safetensors(path) else _read_pickle(path)
    tensors = clean_state_dict(_state_dict(content, path, ema))
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _looks_like_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:9] == b"{" and not zipfile.is_zipfile(path)


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is a damaged safetensors file: {error}.") from None


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script saves its arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_why_unreadable(path, str(error))) from None
    except (EOFError, OSError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is truncated, or no file of torch.save or safetensors: {reason}.") from None


def _why_unreadable(path: Path, reason: str) -> str:
    wanted = re.search(r"(?:GLOBAL|global|class|instruction) ([\w.]+)", reason)
    if wanted and "Unsupported" in reason:
        return (
            f"{path} is refused: it is a pickle that wants to run code ({wanted[1]}) when it is read. Only tensors and"
            " plain values are read; save its state_dict() alone, best as safetensors."
        )
    return f"{path} is truncated, or no file of torch.save or safetensors."


def _state_dict(content: Any, path: Path, ema: bool) -> StateDict:
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, no checkpoint and no state dict.")
    names = ("state_dict_ema", "model_ema") if ema else ("state_dict", "model")
    found = next((content[name] for name in names if isinstance(content.get(name), dict)), None)
    if found is None and ema:
        raise ValueError(f"{path} has no moving average of the weights (state_dict_ema); it has {some(content)}.")
    found = content if found is None else found
    other = [key for key, value in found.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)]
    if other or not found:
        raise ValueError(f"{path} holds no state dict: {some(other) or 'nothing'} is no tensor.")
    return found


def some(items: Iterable[Any], separator: str = ", ", count: int = 4) -> str:
    """Return the first few items in words, and how many more there are."""
    names = [str(item) for item in items]
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return separator.join(names[:count]) + more
