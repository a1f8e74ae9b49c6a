"""From checkpoints of the official repository and of timm's training script to folders in Hub format.

Official code: https://github.com/BangguWu/ECANet (MIT). What a file holds is read from its keys and shapes; its name
and its `arch` field are no help: the released ECA-ResNet-50 calls itself se_resnet50.
"""

import collections
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from . import hub
from .checkpoint_files import StateDict, read_tensors
from .errors import some
from .layouts import in_timm_layout
from .making import shapes_of
from .models import ENTRYPOINTS
from .models.released import RELEASED, TAG
from .weights import sha256_of

__all__ = ["Checkpoint", "convert", "infer"]


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, as inferred from keys and shapes.

    Attributes:
        model: Name of this package's entrypoint.
        kernel_sizes: ECA kernel size per stage.
        num_classes: Outputs of the classifier.
        in_chans: Channels of the input images.
        official: Whether the keys are the official repository's.
        tensors: The weights under the entrypoint's keys.
    """

    model: str
    kernel_sizes: tuple[int, ...]
    num_classes: int
    in_chans: int
    official: bool
    tensors: StateDict


def convert(path: str | Path, out: str | Path, model: str | None = None, *, ema: bool = False) -> Checkpoint:
    """Convert a checkpoint to a folder in Hub format, which appears whole or not at all.

    Args:
        path: A file of `torch.save` or safetensors: the official repository's or timm's training checkpoint, or a
            state dict; with or without `module.` before its keys.
        out: Folder to write, new or empty.
        model: The entrypoint that the file is expected to hold. None: whichever it holds. With the tag of the released
            weights, 'eca_resnet50.ecanet_in1k', the file is the one that the paper's authors released, and the card
            gives what they reported of it. Nothing in a file tells theirs from another training by their code.
        ema: Take the moving average of the weights from a training checkpoint.

    Raises:
        ValueError: If the file cannot be read without running code, holds no model of this package, holds another
            than expected, cannot be the released one, lacks tensors or has too many, or holds values that are not
            finite; or `out` is in use.
    """
    path, out = Path(path).expanduser(), Path(out).expanduser()
    _check_new(out)
    found = infer(read_tensors(path, ema=ema), path.name)
    if model is not None:
        _check_expected(found, model, path)
    network = timm.create_model(
        found.model, kernel_sizes=found.kernel_sizes, num_classes=found.num_classes, in_chans=found.in_chans
    )
    network.load_state_dict(found.tensors)
    default = timm.create_model(found.model, device="meta")
    same_shapes = shapes_of(default) == shapes_of(network)
    if same_shapes:
        network._model_args = {}  # type: ignore[assignment]  # the entrypoint's own preset needs no arguments
    released = found.model if model and "." in model else None
    if released:
        _check_released(found, same_shapes, path)
    else:
        for key in ("tag", "license", "origin_url"):  # these are the released weights'
            network.pretrained_cfg.pop(key, None)  # type: ignore[operator,union-attr]
    origin = f"converted by timm-eca from `{path.name}`, sha256 `{sha256_of(path)}`"
    hub.save(network, out, portable=False if released else None, released=released, origin=origin)
    return found


def _check_new(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder. Give a new one.")
    if any("\ud800" <= c <= "\udfff" for c in str(out.absolute())):  # as Python holds bytes that are not UTF-8
        raise ValueError(f"{out.absolute()} is not UTF-8, and safetensors takes no other paths. Give another folder.")


def _check_expected(found: Checkpoint, model: str, path: Path) -> None:
    names = [entrypoint.__name__ for entrypoint in ENTRYPOINTS]
    names += [f"{name}.{TAG}" for name in RELEASED]
    if model not in names:
        raise ValueError(f"Unknown model {model!r}. Models that checkpoints are converted to: {', '.join(names)}.")
    expected = model.partition(".")[0]
    if expected != found.model:
        raise ValueError(
            f"{path} holds {found.model} with kernel sizes {found.kernel_sizes} per stage, not {expected} as expected."
        )


def _check_released(found: Checkpoint, same_shapes: bool, path: Path) -> None:
    if not (found.official and same_shapes):
        layout = "the official code's" if found.official else "timm's"
        raise ValueError(
            f"{path} is not the {found.model} that the paper's authors released: it has {layout} keys, kernel sizes"
            f" {found.kernel_sizes} per stage, {found.num_classes} classes, {found.in_chans} channels. Give the model"
            " without the tag."
        )


def infer(tensors: StateDict, name: str = "The checkpoint") -> Checkpoint:
    """Return which model a state dict is, under which keys, from its keys and shapes alone.

    Args:
        tensors: The state dict, in the official repository's layout or in timm's.
        name: What to call it in messages.

    Raises:
        ValueError: If it is none, not whole, or not finite.
    """
    official, renamed = in_timm_layout(tensors, name)
    _check_values(renamed, name)
    skeletons = {e.__name__: timm.create_model(e.__name__, device="meta") for e in ENTRYPOINTS}
    model, differences = _nearest(renamed, skeletons)
    if differences:
        raise ValueError(f"{name} holds no whole model of this package; nearest is {model}: {some(differences, '; ')}.")
    head, stem = (skeletons[model].pretrained_cfg[k] for k in ("classifier", "first_conv"))  # type: ignore[index]
    return Checkpoint(
        model=model,
        kernel_sizes=_kernel_sizes(renamed, skeletons[model], name),
        num_classes=renamed[f"{head}.weight"].shape[0],
        in_chans=renamed[f"{stem}.weight"].shape[1],
        official=official,
        tensors=_with_counters(renamed, skeletons[model]),
    )


def _check_values(tensors: StateDict, name: str) -> None:
    odd = [key for key, t in tensors.items() if t.layout != torch.strided or t.is_quantized or t.is_meta]
    if odd:
        raise ValueError(f"{name} holds tensors that are sparse, quantized or without values: {some(odd)}.")
    dtype = torch.get_default_dtype()  # the model's, whose range a file of higher precision may exceed
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t.to(dtype)).all()]
    if bad:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity) as {kind} in {some(bad)}.")


def _nearest(tensors: StateDict, skeletons: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the model that differs least, and its differences in order: missing, wrong shape, too many."""
    differences = {name: _differences(tensors, skeleton) for name, skeleton in skeletons.items()}
    name = min(differences, key=lambda name: len(differences[name]))
    if len(differences[name]) > len(tensors) or not tensors:
        return "none", [f"keys such as {some(tensors)}"]
    return name, differences[name]


def _differences(tensors: StateDict, skeleton: Any) -> list[str]:
    expected = skeleton.state_dict()
    head, stem = (skeleton.pretrained_cfg[k] for k in ("classifier", "first_conv"))
    free = {f"{site.path}.conv.weight": 2 for site in skeleton.attn_sites}  # the kernel size is whatever it is
    free |= {f"{stem}.weight": 1, f"{head}.weight": 0}
    counters = any(key.endswith(".num_batches_tracked") for key in tensors)  # files of PyTorch 0.3 have none
    wanted = {k: t for k, t in expected.items() if counters or not k.endswith(".num_batches_tracked")}
    if f"{head}.weight" in tensors and tensors[f"{head}.weight"].ndim:
        wanted[f"{head}.bias"] = wanted[f"{head}.bias"].new_empty(tensors[f"{head}.weight"].shape[0])
    missing = [f"{key} is missing" for key in wanted if key not in tensors]
    foreign = [f"{key} has no place" for key in tensors if key not in wanted]
    reshaped = [
        f"{key} is {_kind(tensors[key])}{tuple(tensors[key].shape)}, expected {_kind(tensor)}{tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in tensors and not _fits(tensors[key], tensor, free.get(key))
    ]
    return missing + reshaped + foreign


def _kind(tensor: torch.Tensor) -> str:
    return "" if tensor.is_floating_point() else f"{str(tensor.dtype).removeprefix('torch.')} "


def _fits(tensor: torch.Tensor, expected: torch.Tensor, free: int | None) -> bool:
    """Whether a tensor has the shape, but for one free dimension, and is floating point, of any precision, if asked."""
    sizes = enumerate(zip(tensor.shape, expected.shape))
    same_shape = tensor.ndim == expected.ndim and all(a == b or (i == free and a > 0) for i, (a, b) in sizes)
    return same_shape and (tensor.is_floating_point() or not expected.is_floating_point())


def _kernel_sizes(tensors: StateDict, skeleton: Any, name: str) -> tuple[int, ...]:
    sizes: dict[int, set[int]] = collections.defaultdict(set)
    for site in skeleton.attn_sites:
        sizes[site.stage].add(tensors[f"{site.path}.conv.weight"].shape[-1])
    odd = all(len(found) == 1 and min(found) % 2 for found in sizes.values())
    if not odd:
        raise ValueError(f"{name} has ECA kernel sizes {dict(sizes)} by stage; accepted: one odd size in each stage.")
    return tuple(min(found) for found in sizes.values())


def _with_counters(tensors: StateDict, skeleton: Any) -> StateDict:
    zeros = {k: torch.zeros((), dtype=torch.long) for k in skeleton.state_dict() if k.endswith(".num_batches_tracked")}
    return {**zeros, **tensors}
