"""ECA-Inception-v3: future work of the paper, which released none; the kernel sizes are the adaptive ones of Eq. 12.

An Inception block has no residual addition: the layer gates what the block's branches join into, once in each of the
nine blocks without stride.
"""

from functools import partial

from timm.models import generate_default_cfgs
from torch import nn

from ._factory import create_eca, eca_cfg

__all__ = ["eca_inception_v3"]

_cfg = partial(eca_cfg, first_conv="Conv2d_1a_3x3.conv", classifier="fc", input_size=(3, 299, 299), pool_size=(8, 8))

default_cfgs = generate_default_cfgs({**_cfg("eca_inception_v3")})


def eca_inception_v3(pretrained: bool = False, **kwargs) -> nn.Module:
    """ECA-Inception-v3; its stages are numbered as in timm's names, 5 for Mixed_5b to 7 for Mixed_7c."""
    return create_eca(
        "eca_inception_v3", "inception_v3", "adaptive", stages=range(5, 8), pretrained=pretrained, **kwargs
    )
