"""Reading the tensors of a checkpoint file, whoever wrote it, without running code that it may hold."""

import argparse
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from timm.models import clean_state_dict

from .errors import some

__all__ = ["StateDict", "read_tensors"]

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
    found = _state_dict(content, path, ema)
    tensors = clean_state_dict(found)
    if len(tensors) != len(found):
        raise ValueError(f"{path} holds the same tensors more than once, with prefixes such as 'module.' and without.")
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _looks_like_safetensors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(9)[8:9] == b"{" and not zipfile.is_zipfile(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None


def _read_safetensors(path: Path) -> Any:
    try:
        return load(path.read_bytes())  # load_file refuses paths that are not UTF-8
    except SafetensorError as error:
        raise ValueError(f"{path} is a damaged safetensors file: {error}.") from None


def _read_pickle(path: Path) -> Any:
    try:
        # timm's training script saves its arguments. Warnings say before an error what the error says again.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_why_unreadable(path, str(error))) from None
    except Exception as error:  # a damaged file raises what it likes: struct.error, AssertionError, ...
        if "weights_only" in str(error):
            raise ValueError(_refusal(path, "TorchScript, or a tar file as torch.save wrote them first")) from None
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is truncated, or no file of torch.save or safetensors: {reason}.") from None


def _why_unreadable(path: Path, reason: str) -> str:
    named = re.search(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]+)", reason)
    wanted = named[1] if named else _first_import(path)
    return _refusal(path, wanted) if wanted else f"{path} is truncated, or no file of torch.save or safetensors."


def _refusal(path: Path, code: str) -> str:
    return (
        f"{path} is refused: it is a pickle that wants to run code ({code}) when it is read. Only tensors and plain"
        " values are read; save its state_dict() alone, best as safetensors."
    )


def _first_import(path: Path) -> str | None:
    """Return what a plain pickle, which torch.save does not write, would import first; the pickle is not run."""
    texts: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    return str(argument).replace(" ", ".")
                if opcode.name == "STACK_GLOBAL":
                    return ".".join(texts[-2:])
                texts += [argument] if isinstance(argument, str) else []
    except Exception:  # no pickle, or a damaged one
        return None
    return None


def _state_dict(content: Any, path: Path, ema: bool) -> StateDict:
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, no checkpoint and no state dict.")
    names = ("state_dict_ema", "model_ema") if ema else ("state_dict", "model")
    found = next((content[name] for name in names if isinstance(content.get(name), dict)), None)
    if found is None and ema:
        raise ValueError(f"{path} has no moving average of the weights (state_dict_ema); it has {some(content)}.")
    found = content if found is None else found
    if not found:
        raise ValueError(f"{path} holds no state dict: it is empty.")
    other = [key for key, value in found.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)]
    if other:
        raise ValueError(f"{path} holds no state dict: {some(other)} is no tensor.")
    return found
