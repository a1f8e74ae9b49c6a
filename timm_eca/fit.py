"""Whether weights and config.json of a folder in Hub format belong together, told from shapes alone."""

from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open

from .errors import IntegrityError
from .spec import ATTN_ARGS
from .weights import CONFIG, WEIGHTS

__all__ = ["attn_args", "check_fit"]


def attn_args(config: dict[str, Any], named: str | Path) -> dict[str, Any]:
    """Return the arguments that make a portable config's model one with attention of this package; else none.

    Args:
        config: The config.json.
        named: What to call the folder in messages.

    Raises:
        IntegrityError: If the config says that it is portable and lacks them, or has others: those reach timm.
    """
    if not config.get("portable"):
        return {}
    args, attn = config.get("model_args"), config.get("attn")
    block_args = args.get("block_args") if isinstance(args, dict) else None
    if not isinstance(block_args, dict) or not isinstance(attn, dict) or not attn.keys() <= set(ATTN_ARGS):
        raise IntegrityError(
            f"{named}: {CONFIG} says that it is portable, and needs model_args with block_args for that, and attn with"
            f" nothing but {', '.join(ATTN_ARGS)}."
        )
    return {**attn, "block_args": {k: v for k, v in block_args.items() if k != "attn_layer"}}


def check_fit(folder: Path, config: dict[str, Any], named: str | Path) -> int:
    """Return the number of tensors in a folder, which are those of the model that its config describes.

    Args:
        folder: The folder.
        config: Its config.json.
        named: What to call it in messages.

    Raises:
        IntegrityError: If config.json describes no model, or names or shapes of the tensors are others.
    """
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    args = attn_args(config, named)
    try:
        model = timm.create_model(f"local-dir:{folder}", device="meta", **args)
    except Exception as error:  # timm calls the model with whatever arguments the config holds
        raise IntegrityError(f"{named}: no {config['architecture']} can be made as its config says: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        raise IntegrityError(
            f"{named}: {len(wrong)} of {len(expected)} tensors do not fit {config['architecture']}: "
            + "; ".join(f"{n} is {found.get(n, 'absent')}, not {expected.get(n, 'there')}" for n in wrong[:4])
        )
    return len(found)
