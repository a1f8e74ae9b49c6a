"""Model cards: front matter that the Hub validates, and what a reader needs to know before using the weights."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .models.released import RELEASED, Released

__all__ = ["HUB_LICENSES", "model_card"]

IN1K = "ILSVRC/imagenet-1k"
PAPER = "https://arxiv.org/abs/1910.03151"
AUTHORS_CODE = "https://github.com/BangguWu/ECANet"
TAGS = ["image-classification", "timm", "timm-eca", "channel-attention", "eca"]
_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community
h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other
pddl postgresql unknown unlicense wtfpl zlib
"""
HUB_LICENSES = frozenset(_LICENSES.split())
"""What the Hub takes as a license: https://huggingface.co/docs/hub/repositories-licenses."""
CITATION = """```bibtex
@InProceedings{Wang_2020_CVPR,
  title = {ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks},
  author = {Wang, Qilong and Wu, Banggu and Zhu, Pengfei and Li, Peihua and Zuo, Wangmeng and Hu, Qinghua},
  booktitle = {The IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2020}
}
```"""


def model_card(
    name: str, config: dict[str, Any], parameters: int, *, released: str | None = None, origin: str | None = None
) -> str:
    """Return the text of a `README.md`.

    Args:
        name: The repository's name without its owner.
        config: The model's `config.json`.
        parameters: Number of parameters.
        released: Name of the released model that the weights are, for the authors' figures.
        origin: One sentence on where the weights come from.
    """
    name, origin = _printable(name), origin and _printable(origin)
    facts = RELEASED[released] if released else None
    body = [f"# Model card for {name}", _intended_use(config), _details(config, parameters, facts, origin)]
    body += [_recipe(facts), _accuracy(facts)] if facts else []
    body += [_usage(f"{'timm-eca' if facts else 'ORG'}/{name}", config), f"## Citation\n\n{CITATION}"]
    return f"---\n{_front_matter(name, config, facts)}\n---\n\n" + "\n\n".join(body) + "\n"


def _printable(text: str) -> str:
    """Escape what no line of text can hold: line breaks, and the bytes of a file's name that are not UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _front_matter(name: str, config: dict[str, Any], facts: Released | None) -> str:
    data: dict[str, Any] = {
        **_license(config["pretrained_cfg"].get("license") or "unknown"),
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": TAGS,
    }
    if facts:
        data["datasets"] = [IN1K]
        data["metrics"] = ["accuracy"]
        data["model_name"] = name
        data["eval_results"] = [_result("Top-1", facts.top1), _result("Top-5", facts.top5)]
    return ModelCardData(**data).to_yaml()


def _license(name: str) -> dict[str, str]:
    """Return a license as the Hub takes it: one of its list, or an identifier of its own under `other`."""
    identifier = re.sub(r"[^a-z0-9.+-]+", "-", name.lower())
    return {"license": identifier} if identifier in HUB_LICENSES else {"license": "other", "license_name": identifier}


def _result(name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        task_name="Image classification",
        dataset_type=IN1K,
        dataset_name="ImageNet-1k",
        dataset_split="validation",
        metric_type="accuracy",
        metric_name=f"{name} (%)",
        metric_value=value,
        source_name="README of BangguWu/ECANet",
        source_url=AUTHORS_CODE,
    )


def _intended_use(config: dict[str, Any]) -> str:
    classes = config["num_classes"]
    return (
        f"`{config['architecture']}` with {_attention(config)}, for image classification ({classes} classes) and as a"
        " backbone whose features are fine-tuned for other tasks. Expect unreliable predictions on images unlike its"
        " training data, and do not let it alone decide where a wrong answer does harm."
    )


def _attention(config: dict[str, Any]) -> str:
    attn = config.get("attn")
    if attn is None:
        return "no attention of timm-eca"
    layer = attn["attn_layer"]
    return f"efficient channel attention ([ECA-Net]({PAPER}))" if layer == "eca" else f"the attention layer `{layer}`"


def _details(config: dict[str, Any], parameters: int, facts: Released | None, origin: str | None) -> str:
    cfg = config["pretrained_cfg"]
    size = " x ".join(map(str, cfg["input_size"][1:]))
    lines = [
        "## Model details\n",
        f"- **Parameters:** {parameters:,} ({parameters / 2**20:.2f} x 2^20)",
        f"- **Input:** {size}, {cfg['interpolation']}, crop {cfg['crop_pct']}, mean {tuple(cfg['mean'])},"
        f" std {tuple(cfg['std'])}",
    ]
    if config.get("kernel_sizes"):
        lines.insert(2, f"- **ECA kernel size per stage:** {', '.join(map(str, config['kernel_sizes']))}")
    if facts:
        lines.insert(2, f"- **Multiply-adds:** {facts.multiply_adds} (G: 2^30, M: 2^20; {AUTHORS_CODE})")
        lines.append(f"- **Original:** the authors' file, {AUTHORS_CODE}")
    if origin:
        lines.append(f"- **Origin:** {origin}")
    lines.append(f"- **Paper:** {PAPER}")
    return "\n".join(lines)


def _recipe(facts: Released) -> str:
    recipe = facts.recipe
    return "\n".join(
        [
            "## Recipe\n",
            f"ImageNet-1k, {recipe.epochs} epochs, batch size {recipe.batch_size}.\n",
            f"- Optimizer: {recipe.optimizer}",
            f"- Schedule: {recipe.schedule}",
            "- Loss: cross entropy without label smoothing; no EMA, no mixed precision",
            "- Training: random resized crop to 224 x 224, horizontal flip",
            "- Test: short side to 256, bilinear, centre crop of 224 x 224",
        ]
    )


def _accuracy(facts: Released) -> str:
    return "\n".join(
        [
            "## Accuracy\n",
            "ImageNet-1k validation, one centre crop of 224 x 224, as the authors report it.\n",
            "| Source | Top-1 (%) | Top-5 (%) |",
            "|---|---|---|",
            f"| Released file ([README]({AUTHORS_CODE})) | {facts.top1:.2f} | {facts.top5:.2f} |",
            f"| [Paper]({PAPER}), {facts.paper_table} | {facts.paper_top1:.2f} | {facts.paper_top5:.2f} |",
        ]
    )


def _usage(repo: str, config: dict[str, Any]) -> str:
    if "attn" in config and not config.get("portable"):
        load = f'import timm_eca.hub\n\nmodel = timm_eca.hub.load("{repo}")'
        note = "The package `timm-eca` checks the sha256 of the weights; its import also lets timm load them."
    else:
        load = f'import timm\n\nmodel = timm.create_model("hf-hub:{repo}", pretrained=True)'
        note = "Plain timm loads it. `timm_eca.hub.load` checks the sha256 of the weights too."
    if repo.startswith("ORG/"):
        note += " `ORG` stands for the owner of the repository."
    return f"## Usage\n\n{note}\n\n```python\n{load}\n```"
