"""Which of timm's models take attention, and where: every name is built, none is assumed."""

import json
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import timm
from torch import nn

from .errors import CommandError
from .inject import attn_sites
from .models import ENTRYPOINTS
from .outputs import is_made_by
from .sites import Site
from .timm_hooks import install

__all__ = [
    "DATA",
    "TABLE",
    "Coverage",
    "check_place",
    "coverage_of",
    "markdown",
    "survey",
    "timm_names",
    "write_tables",
]

TABLE = "coverage.md"
DATA = "coverage.json"
TITLE = "# Which of timm's models take attention"


@dataclass(frozen=True)
class Coverage:
    """What `timm.create_model(name, attn_layer='eca')` does.

    Attributes:
        name: The model.
        module: timm's module that holds it.
        sites: Number of layers placed.
        places: Where they sit: class of the block and what of it passes through the layer.
        refusal: The error's text where the model takes none.
    """

    name: str
    module: str
    sites: int = 0
    places: tuple[str, ...] = ()
    refusal: str = ""


def timm_names() -> list[str]:
    """Return the names of all models of timm's own."""
    own = {entrypoint.__name__ for entrypoint in ENTRYPOINTS}
    return [name for name in timm.list_models() if name not in own]


def coverage_of(name: str, attn_layer: str = "eca") -> Coverage:
    """Build one model without memory for its weights and say what became of the layer."""
    module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    try:
        model = timm.create_model(name, attn_layer=attn_layer, device="meta")
    except ValueError as error:
        return Coverage(name, module, refusal=str(error))
    sites = attn_sites(model)
    return Coverage(name, module, len(sites), tuple(sorted({_place(model, site) for site in sites})))


def _place(model: nn.Module, site: Site) -> str:
    parent_path, _, slot = site.path.rpartition(".")
    block = type(model.get_submodule(parent_path)).__name__.removesuffix("WithAttn")
    return f"{block} `{site.gate.expressions.partition(' | ')[0]}`" if site.gate else f"{block} `.{slot}`"


def survey(names: Sequence[str], jobs: int = 1) -> Iterator[Coverage]:
    """Yield the coverage of many models, in as many processes as asked for."""
    if jobs == 1:
        yield from map(_quiet_coverage_of, names)
        return
    with get_context("spawn").Pool(jobs, initializer=_import_package) as pool:
        yield from pool.imap(_quiet_coverage_of, names, chunksize=8)


def _import_package() -> None:
    install()  # the doors into timm, in a new process


def _quiet_coverage_of(name: str) -> Coverage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            return coverage_of(name)
        finally:
            logging.disable(logging.NOTSET)


def markdown(rows: Iterable[Coverage]) -> str:
    """Return the table of the documentation: one line a module of timm."""
    by_module: dict[str, list[Coverage]] = defaultdict(list)
    for row in rows:
        by_module[row.module].append(row)
    count, total = sum(map(len, by_module.values())), len(timm_names())
    which = f"all {count:,}" if count == total else f"{count:,} of the {total:,}"
    taking = {m: found for m, found in by_module.items() if any(row.sites for row in found)}
    lines = [
        f"`timm.create_model(name, attn_layer='eca')` for {which} models of timm {timm.__version__};"
        " braces stand around the tensor that passes through the layer, a leading dot is a slot of the block that calls"
        " it.",
        "",
        "| module | models | take it | layers in each | where |",
        "|---|---|---|---|---|",
    ]
    for module, found in sorted(taking.items()):
        counts = [row.sites for row in found if row.sites]
        places = sorted({place for row in found for place in row.places})
        spread = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        where = "<br>".join(place.replace("|", "\\|") for place in places)
        lines.append(f"| {module} | {len(found)} | {len(counts)} | {spread} | {where} |")
    lines += ["", *NOTES, "", "## Refused", "", "| module | models | why |", "|---|---|---|"]
    for module, found in sorted(by_module.items()):
        for names, why in _refusals(found):
            lines.append(f"| {module} | {names} | {why} |")
    return "\n".join(lines) + "\n"


NOTES = (
    "## One layer a stage",
    "",
    "Under `attn_where='stage'` the layer gates what timm's `features_only` gives for each stage after the stem: the"
    " output of the module that `feature_info` names. Where that is no stage's output:",
    "",
    "- features taken inside a block (Xception, NASNet, PNASNet) or before a pooling (VGG): the output of the block or"
    " pooling before, from which they are computed;",
    "- DenseNet: the dense block, also before the last norm; HRNet: each `incre_modules` branch; EfficientViM: the last"
    " block, before the next stage's downsampling;",
    "- EfficientFormer's last stage gives tokens, which the layer gets as a column of pixels;",
    "- transformers behind a convolutional stem (vitamin, vision_transformer_hybrid): the stages of the stem.",
    "",
    "HRNet's features without its head (`feature_location=''`) have no such modules and are refused.",
    "",
    "## Left alone",
    "",
    "Residual additions that no layer comes before, under `attn_where='end'` too:",
    "",
    "- self-attention, and the MLPs of linear layers that follow it in the token blocks of hybrid networks;",
    "- token mixers that pool (poolformer, efficientformer): they have no convolution to weigh the outputs of;",
    "- the sums inside a norm (global response normalization of ConvNeXt V2 and csatv2);",
    "- the sums of NASNet's and PNASNet's cells, which are graphs: each cell's output passes through one layer;",
    "- iformer's position encoding, which timm fuses with its skip from outside the block;",
    "- csatv2's position encoding of maps with one channel, which has no others to be weighed against.",
    "",
    "Branches that timm fuses with their skip into one convolution (fastvit's RepMixer, repvit's RepVggDw, the"
    " depthwise convolutions of efficientvim) have a layer under `'end'` and `'add'`, and then stay unfused; under"
    " `'auto'` they are left to be fused.",
)


def _refusals(found: list[Coverage]) -> list[tuple[str, str]]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in found:
        if row.refusal:
            reasons[row.refusal.replace(row.name, "the model").partition(" Models that take it")[0]].append(row.name)
    return [(", ".join(names) if len(names) < 4 else f"{len(names)}", why) for why, names in reasons.items()]


def check_place(folder: Path, pattern: str = "") -> None:
    """Check that in a folder no tables but those of the same models would be replaced.

    Raises:
        CommandError: If it holds a coverage.md or coverage.json of anything else.
    """
    table, data = folder / TABLE, folder / DATA
    foreign = [path for path in (table, data) if path.exists() and not is_made_by(data, _made_by(pattern))]
    if table.exists() and not table.read_text(errors="replace").startswith(TITLE):
        foreign = foreign or [table]
    if foreign:
        raise CommandError(f"{foreign[0]} was not made by {_made_by(pattern)}. Give another folder.")


def _made_by(pattern: str) -> str:
    return f"timm-eca coverage --filter {pattern}" if pattern else "timm-eca coverage"


def write_tables(rows: Sequence[Coverage], folder: Path, pattern: str = "") -> None:
    """Write coverage.md, the table, and coverage.json, the number of layers in each model that matches a pattern.

    Errors as `check_place`.
    """
    check_place(folder, pattern)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text(f"{TITLE}\n\n{markdown(rows)}")
    data = {"made_by": _made_by(pattern), "timm": timm.__version__, "models": [asdict(row) for row in rows]}
    (folder / DATA).write_text(json.dumps(data, indent=0) + "\n")
