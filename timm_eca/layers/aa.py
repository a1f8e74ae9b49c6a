"""Attention-augmented convolution.

Paper: Attention Augmented Convolutional Networks, ICCV 2019, https://arxiv.org/abs/1904.09925.
"""

import torch
from torch import nn

from .checks import odd_kernel_size, positive_int, size_of_map
from .registry import register_attn

__all__ = ["AttnAugmentedConv2d"]


@register_attn("aa")
class AttnAugmentedConv2d(nn.Module):
    """Convolution whose last channels come from self-attention: concat(conv(x), attention(x)), Eq. 4.

    The attention has N_h heads over all positions (Eq. 1 to 3), followed by a 1x1 convolution of the concatenated
    heads, and, where feat_size is given, the relative position logits of Eq. 5.

    Args:
        channels: Number of channels of the input.
        out_channels: Number of channels of the output. None: as many as the input has.
        kernel_size: Odd kernel size of the convolution.
        stride: Stride of the convolution. Above 1 the attention sees the input after average pooling with the same
            kernel size and stride.
        key_ratio: kappa, the keys' total width over out_channels.
        value_ratio: upsilon, the attention's share of out_channels.
        num_heads: N_h. Both widths are rounded down to multiples of it, and are at least N_h.
        min_key_dim: Least width of a head's keys, 20 in the paper.
        feat_size: Height and width of the attention's input for relative positions. None: none are encoded.
        device: Device of the weights.
        dtype: Data type of the weights.

    Shape:
        input (B, channels, H, W), output (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: If an argument is out of range or leaves the convolution or the attention no channel; in
            forward, if feat_size is given and the attention's input is of another size.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        key_ratio: float = 0.2,
        value_ratio: float = 0.1,
        num_heads: int = 8,
        min_key_dim: int = 20,
        feat_size: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        channels, heads = positive_int("channels", channels), positive_int("num_heads", num_heads)
        out_channels = channels if out_channels is None else positive_int("out_channels", out_channels)
        k, stride = odd_kernel_size(kernel_size), positive_int("stride", stride)
        value_dim = max(int(value_ratio * out_channels) // heads, 1) * heads
        if not 0 < value_ratio <= 1 or key_ratio < 0 or value_dim >= out_channels:
            raise ValueError(
                f"value_ratio must leave channels to convolution and {heads} heads, and key_ratio be at least 0, got"
                f" value_ratio={value_ratio!r}, key_ratio={key_ratio!r} for {out_channels} output channels."
            )
        placed = {"device": device, "dtype": dtype}
        self.num_heads = heads
        self.key_dim = max(int(key_ratio * out_channels) // heads, positive_int("min_key_dim", min_key_dim))
        self.widths = (heads * self.key_dim, heads * self.key_dim, value_dim)
        self.feat_size = None if feat_size is None else size_of_map("feat_size", feat_size)
        self.conv = nn.Conv2d(channels, out_channels - value_dim, k, stride, k // 2, bias=False, **placed)
        self.pool = nn.AvgPool2d(k, stride, k // 2) if stride > 1 else nn.Identity()
        self.qkv = nn.Conv2d(channels, sum(self.widths), 1, bias=False, **placed)
        self.proj = nn.Conv2d(value_dim, value_dim, 1, bias=False, **placed)
        if self.feat_size is not None:
            height, width = self.feat_size
            std = self.key_dim**-0.5
            self.rel_height = nn.Parameter(torch.randn(2 * height - 1, self.key_dim, **placed) * std)
            self.rel_width = nn.Parameter(torch.randn(2 * width - 1, self.key_dim, **placed) * std)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Return the heads' outputs, concatenated: (B, channels, H, W) -> (B, value width, H, W)."""
        batch, _, height, width = x.shape
        q, k, v = self.qkv(x).flatten(2).split(self.widths, 1)
        q = q.unflatten(1, (self.num_heads, self.key_dim)).transpose(2, 3)
        k = k.unflatten(1, (self.num_heads, self.key_dim))
        v = v.unflatten(1, (self.num_heads, self.widths[2] // self.num_heads)).transpose(2, 3)
        logits = torch.matmul(q, k)
        if self.feat_size is not None:
            logits = logits + self._relative_logits(q, height, width)
        heads = torch.matmul((logits * self.key_dim**-0.5).softmax(-1), v)  # (B, heads, H W, value width / heads)
        return heads.transpose(2, 3).reshape(batch, self.widths[2], height, width)

    def _relative_logits(self, q: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return q_i . (r^W_{jx - ix} + r^H_{jy - iy}) for pairs i, j: (B, heads, N, key dim) -> (B, heads, N, N)."""
        if (height, width) != self.feat_size:
            raise ValueError(f"The attention's input must be of feat_size {self.feat_size}, got {(height, width)}.")
        q = q.unflatten(2, (height, width))
        rows, columns = torch.arange(height, device=q.device), torch.arange(width, device=q.device)
        r_height = self.rel_height[rows[None, :] - rows[:, None] + height - 1]  # (H, H, key dim): from, to
        r_width = self.rel_width[columns[None, :] - columns[:, None] + width - 1]
        by_row = torch.einsum("bnyxd,yzd->bnyxz", q, r_height).unsqueeze(-1)
        by_column = torch.einsum("bnyxd,xzd->bnyxz", q, r_width).unsqueeze(-2)
        return (by_row + by_column).flatten(4).flatten(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x), self.proj(self.attention(self.pool(x)))], 1)
