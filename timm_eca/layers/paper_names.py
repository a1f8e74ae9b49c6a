"""Names for layers that are a class with its arguments fixed, as the ECA-Net paper compares them."""

from functools import partial

from timm.layers import get_attn

from .eca import EcaLayer
from .eca_stacked import EcaStacked
from .registry import AttnLayer, register_attn
from .se_variants import SeGroups

__all__ = ["PAPER_ATTNS"]

PAPER_ATTNS: dict[str, AttnLayer] = {
    # Table 2: 16 groups, C / 16 groups, C / 8 groups; ECA with k = 3 in every block.
    "se_gc1": partial(SeGroups, groups=16),
    "se_gc2": partial(SeGroups, group_size=16),
    "se_gc3": partial(SeGroups, group_size=8),
    "eca_k3": partial(EcaLayer, kernel_size=3),
    # Supplement B.
    "eca2": partial(EcaStacked, depth=2),
    "eca3": partial(EcaStacked, depth=3),
    # Non-local Neural Networks, CVPR 2018, https://arxiv.org/abs/1711.07971: half the channels inside (Section 3.3)
    # and no scale before the softmax (Eq. 3), where timm's 'nl' has an eighth of the channels and scales by C^-0.5.
    "nl_paper": partial(get_attn("nl"), rd_ratio=0.5, rd_divisor=1, use_scale=False),
}

for _name, _layer in PAPER_ATTNS.items():
    register_attn(_name, _layer)
