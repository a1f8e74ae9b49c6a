"""timm's own attention layers that keep the shape of their input, under timm's names."""

from timm.layers import get_attn

from .registry import register_attn

__all__ = ["TIMM_ATTNS"]

# Not here: sk, splat, lambda, bottleneck and halo, which stand in for convolutions. timm's create_attn knows them
# as before; as a layer that gates what a block computed they make no sense. Nor ge: see gather_excite.py.
TIMM_ATTNS = (
    "bat",
    "cbam",
    "ceca",
    "coord",
    "ecam",
    "ela",
    "ese",
    "gc",
    "gca",
    "lcbam",
    "nl",
    "scoord",
    "se",
    "strip",
)

for _name in TIMM_ATTNS:
    register_attn(_name, get_attn(_name))
