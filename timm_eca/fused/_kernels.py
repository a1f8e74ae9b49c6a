"""The passes of a fused tail on a GPU, in Triton: `formula.py` has what they compute, `gpu.py` calls them.

Forward, `pool` reads the map for its statistics, `moments` and `gains` make vectors of them, and `write` reads the map
once more for the result. Backward, `sums` reads gradient, output and map, `gate_backward` and `norm_backward` make
vectors, and `write_grad` reads gradient and map once more. Nothing is added up by atomic operations, so a result is the
same each time.

A program of those that read maps works on tiles of block_c channels by block_s pixels of one sample, in either memory
format. Vectors and sums are float32, float64 for such maps; norms and kernels are read in the type they have. A pointer
that is None stands for what a tail lacks.
"""

import triton
import triton.language as tl

__all__ = ["gains", "gate_backward", "moments", "norm_backward", "pool", "sums", "write", "write_grad"]


@triton.jit
def pool(
    z,
    pooled,
    spread,
    area,
    channels: tl.constexpr,
    nhwc: tl.constexpr,
    block_c: tl.constexpr,
    block_s: tl.constexpr,
):
    """The mean of each sample's channels and, unless spread is None, their variance: Welford's, merged as Chan's."""
    dtype: tl.constexpr = pooled.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * block_c + tl.arange(0, block_c)
    first = tl.arange(0, block_s)
    mean = tl.zeros((block_c, block_s), dtype)
    squares = tl.zeros((block_c, block_s), dtype)
    for i in range(tl.cdiv(area, block_s)):
        at, inside = _pixels(i * block_s + first, c, area, channels, nhwc)
        x = tl.load(z + sample * channels * area + at, inside, 0).to(dtype)
        off = tl.where(inside, x - mean, 0.0)
        mean += off / tl.cast(i + 1, dtype)
        if spread is not None:
            squares += off * (x - mean)
    seen = tl.where(first < area, (area - first + block_s - 1) // block_s, 0).to(dtype)[None, :]
    count = tl.cast(area, dtype)
    whole = tl.sum(mean * seen, 1) / count
    at = sample * channels + c
    tl.store(pooled + at, whole, c < channels)
    if spread is not None:
        off = mean - whole[:, None]
        tl.store(spread + at, tl.sum(squares + seen * off * off, 1) / count, c < channels)


@triton.jit
def moments(pooled, spread, mean, var, samples, channels: tl.constexpr, block_b: tl.constexpr, block_c: tl.constexpr):
    """Mean and variance of the batch, from those of its samples."""
    dtype: tl.constexpr = pooled.dtype.element_ty
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    count = tl.cast(samples, dtype)
    total = tl.zeros((block_b, block_c), dtype)
    for i in range(tl.cdiv(samples, block_b)):
        at, inside = _samples(i, c, samples, channels, block_b)
        total += tl.load(pooled + at, inside, 0)
    whole = tl.sum(total, 0) / count
    total = tl.zeros((block_b, block_c), dtype)
    for i in range(tl.cdiv(samples, block_b)):
        at, inside = _samples(i, c, samples, channels, block_b)
        off = tl.where(inside, tl.load(pooled + at, inside, 0) - whole[None, :], 0.0)
        total += tl.load(spread + at, inside, 0) + off * off
    tl.store(mean + c, whole, c < channels)
    tl.store(var + c, tl.sum(total, 0) / count, c < channels)


@triton.jit
def gains(
    pooled,
    mean,
    var,
    weight,
    bias,
    kernel,
    drop,
    scale,
    offset,
    eps: tl.constexpr,
    channels: tl.constexpr,
    size: tl.constexpr,
    block_c: tl.constexpr,
):
    """What the map less its mean is multiplied by, w * scale, and what is added, w * q."""
    dtype: tl.constexpr = pooled.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * block_c + tl.arange(0, block_c)
    pooled += sample * channels
    w = tl.sigmoid(_logits(pooled, c, mean, var, weight, bias, kernel, eps, channels, size))
    if drop is not None:
        w *= tl.load(drop + sample).to(dtype)
    at, inside = sample * channels + c, c < channels
    tl.store(scale + at, w * _scale(c, var, weight, eps, channels, dtype), inside)
    tl.store(offset + at, w * _normed(pooled, c, mean, var, weight, bias, eps, channels), inside)


@triton.jit
def write(
    z,
    shortcut,
    out,
    pooled,
    scale,
    offset,
    shortcut_weight,
    shortcut_bias,
    shortcut_mean,
    shortcut_var,
    area,
    relu: tl.constexpr,
    shortcut_eps: tl.constexpr,
    channels: tl.constexpr,
    nhwc: tl.constexpr,
    block_c: tl.constexpr,
    block_s: tl.constexpr,
):
    """The result: map and shortcut, through its norm where that has statistics, and the ReLU. It may be z itself."""
    dtype: tl.constexpr = pooled.dtype.element_ty
    sample, c, s = _tile(area, channels, block_c, block_s)
    at, inside = _pixels(s, c, area, channels, nhwc)
    start = sample * channels * area
    row = sample * channels
    p = _vector(pooled + row, c, 0.0, channels, dtype)[:, None]
    by = _vector(scale + row, c, 0.0, channels, dtype)[:, None]
    more = _vector(offset + row, c, 0.0, channels, dtype)[:, None]
    y = (tl.load(z + start + at, inside, 0).to(dtype) - p) * by + more
    if shortcut is not None:
        x = tl.load(shortcut + start + at, inside, 0).to(dtype)
        if shortcut_var is not None:
            less = _vector(shortcut_mean, c, 0.0, channels, dtype)
            slope = _scale(c, shortcut_var, shortcut_weight, shortcut_eps, channels, dtype)
            x = (x - less[:, None]) * slope[:, None] + _vector(shortcut_bias, c, 0.0, channels, dtype)[:, None]
        y += x
    if relu:
        y = tl.where(y <= 0, 0.0, y)  # NaN stays
    tl.store(out + start + at, y, inside)


@triton.jit
def sums(
    grad,
    out,
    z,
    masked,
    pooled,
    total,
    dots,
    area,
    splits,
    channels: tl.constexpr,
    nhwc: tl.constexpr,
    block_c: tl.constexpr,
    block_s: tl.constexpr,
):
    """The sums over the map of the gradient, and of it times the map less its mean; masked is that below the ReLU.

    A split of a sample is a sample here, but for the mean.
    """
    dtype: tl.constexpr = pooled.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * block_c + tl.arange(0, block_c)
    first = tl.arange(0, block_s)
    p = _vector(pooled + sample // splits * channels, c, 0.0, channels, dtype)[:, None]
    of_grad = tl.zeros((block_c, block_s), dtype)
    of_dots = tl.zeros((block_c, block_s), dtype)
    start = sample * channels * area
    for i in range(tl.cdiv(area, block_s)):
        at, inside = _pixels(i * block_s + first, c, area, channels, nhwc)
        g = tl.load(grad + start + at, inside, 0)
        if out is not None:
            g = tl.where(tl.load(out + start + at, inside, 0) <= 0, 0.0, g)
            tl.store(masked + start + at, g, inside)
        of_grad += g.to(dtype)
        of_dots += g.to(dtype) * (tl.load(z + start + at, inside, 0).to(dtype) - p)
    at = sample * channels + c
    tl.store(total + at, tl.sum(of_grad, 1), c < channels)
    tl.store(dots + at, tl.sum(of_dots, 1), c < channels)


@triton.jit
def gate_backward(
    dots,
    total,
    pooled,
    mean,
    var,
    weight,
    bias,
    kernel,
    drop,
    opened,
    d_logits,
    d_kernel,
    eps: tl.constexpr,
    channels: tl.constexpr,
    size: tl.constexpr,
    block_c: tl.constexpr,
):
    """w, the gradient of what the sigmoid gets, and each program's share of the kernel's."""
    dtype: tl.constexpr = pooled.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * block_c + tl.arange(0, block_c)
    row = sample * channels
    w = tl.sigmoid(_logits(pooled + row, c, mean, var, weight, bias, kernel, eps, channels, size))
    slope = w * (1 - w)
    if drop is not None:
        factor = tl.load(drop + sample).to(dtype)
        w *= factor
        slope *= factor
    q = _normed(pooled + row, c, mean, var, weight, bias, eps, channels)
    by_scale = _vector(dots + row, c, 0.0, channels, dtype) * _scale(c, var, weight, eps, channels, dtype)
    d = slope * (by_scale + _vector(total + row, c, 0.0, channels, dtype) * q)
    tl.store(opened + row + c, w, c < channels)
    tl.store(d_logits + row + c, d, c < channels)
    share = d_kernel + (sample * tl.num_programs(1) + tl.program_id(1)) * size
    for tap in range(size):
        q = _normed(pooled + row, c + (tap - size // 2), mean, var, weight, bias, eps, channels)
        tl.store(share + tap, tl.sum(tl.where(c < channels, d * q, 0.0), 0))


@triton.jit
def norm_backward(
    dots,
    total,
    pooled,
    mean,
    var,
    weight,
    kernel,
    opened,
    d_logits,
    scale,
    shift,
    slope,
    d_weight,
    d_bias,
    samples,
    area,
    of_batch: tl.constexpr,
    eps: tl.constexpr,
    channels: tl.constexpr,
    size: tl.constexpr,
    block_b: tl.constexpr,
    block_c: tl.constexpr,
):
    """The gradients of the norm's weight and bias, and vectors that make the map's.

    That is scale * gradient + shift, and for the batch's own moments + slope * (z - mean).
    """
    dtype: tl.constexpr = pooled.dtype.element_ty
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    m = _vector(mean, c, 0.0, channels, dtype)[None, :]
    by = _scale(c, var, weight, eps, channels, dtype)[None, :]
    of_scale = tl.zeros((block_b, block_c), dtype)
    of_q = tl.zeros((block_b, block_c), dtype)
    for i in range(tl.cdiv(samples, block_b)):
        at, inside = _samples(i, c, samples, channels, block_b)
        w = tl.load(opened + at, inside, 0)
        d_q = _d_q(i, c, d_logits, kernel, samples, channels, size, block_b) + tl.load(total + at, inside, 0) * w
        off = tl.where(inside, tl.load(pooled + at, inside, 0) - m, 0.0)
        of_q += d_q
        of_scale += tl.load(dots + at, inside, 0) * w + d_q * off
    d_offset = tl.sum(of_q, 0)
    d_scale = tl.sum(of_scale, 0)
    root = tl.rsqrt(_vector(var, c, 1.0, channels, dtype) + eps)
    tl.store(d_bias + c, d_offset, c < channels)
    tl.store(d_weight + c, d_scale * root, c < channels)
    pixels = tl.cast(area, dtype)
    d_mean = tl.zeros((block_c,), dtype)
    if of_batch:
        count = tl.cast(samples, dtype)
        gamma = _vector(weight, c, 1.0, channels, dtype)
        tl.store(slope + c, -d_scale * gamma * root * root * root / (count * pixels), c < channels)
        d_mean = -d_offset * gamma * root / count
    for i in range(tl.cdiv(samples, block_b)):
        at, inside = _samples(i, c, samples, channels, block_b)
        w, of_map = tl.load(opened + at, inside, 0), tl.load(total + at, inside, 0)
        d_q = _d_q(i, c, d_logits, kernel, samples, channels, size, block_b) + of_map * w
        tl.store(scale + at, w * by, inside)
        tl.store(shift + at, (d_q * by + d_mean[None, :] - w * by * of_map) / pixels, inside)


@triton.jit
def write_grad(
    grad,
    z,
    dz,
    scale,
    shift,
    slope,
    mean,
    area,
    channels: tl.constexpr,
    nhwc: tl.constexpr,
    block_c: tl.constexpr,
    block_s: tl.constexpr,
):
    """The map's gradient. Where slope is None, z is not read."""
    dtype: tl.constexpr = scale.dtype.element_ty
    sample, c, s = _tile(area, channels, block_c, block_s)
    at, inside = _pixels(s, c, area, channels, nhwc)
    start = sample * channels * area
    row = sample * channels
    by = _vector(scale + row, c, 0.0, channels, dtype)[:, None]
    d = tl.load(grad + start + at, inside, 0).to(dtype) * by + _vector(shift + row, c, 0.0, channels, dtype)[:, None]
    if slope is not None:
        off = tl.load(z + start + at, inside, 0).to(dtype) - _vector(mean, c, 0.0, channels, dtype)[:, None]
        d += off * _vector(slope, c, 0.0, channels, dtype)[:, None]
    tl.store(dz + start + at, d, inside)


@triton.jit
def _tile(area, channels: tl.constexpr, block_c: tl.constexpr, block_s: tl.constexpr):
    """The sample, channels and pixels of a program, where each has one tile."""
    tiles = tl.cdiv(area, block_s)
    parts = tl.cdiv(channels, block_c)
    index = tl.program_id(0)
    rest = index // tiles
    s = index % tiles * block_s + tl.arange(0, block_s)
    c = rest % parts * block_c + tl.arange(0, block_c)
    return (rest // parts).to(tl.int64), c, s


@triton.jit
def _pixels(s, c, area, channels: tl.constexpr, nhwc: tl.constexpr):
    """Where pixels of channels are in a sample, and whether there are such."""
    inside = (c < channels)[:, None] & (s < area)[None, :]
    at = s[None, :] * channels + c[:, None] if nhwc else c[:, None] * area + s[None, :]
    return at, inside


@triton.jit
def _samples(i, c, samples, channels: tl.constexpr, block_b: tl.constexpr):
    """Where channels of the i-th samples are in a matrix, and whether there are such."""
    b = i * block_b + tl.arange(0, block_b)
    return b[:, None] * channels + c[None, :], (b < samples)[:, None] & (c < channels)[None, :]


@triton.jit
def _vector(values, c, default: tl.constexpr, channels: tl.constexpr, dtype: tl.constexpr):
    if values is None:
        found = tl.full(c.shape, default, dtype)
    else:
        found = tl.load(values + c, (c >= 0) & (c < channels), default).to(dtype)
    return found


@triton.jit
def _scale(c, var, weight, eps: tl.constexpr, channels: tl.constexpr, dtype: tl.constexpr):
    """What a norm multiplies by."""
    return tl.rsqrt(_vector(var, c, 1.0, channels, dtype) + eps) * _vector(weight, c, 1.0, channels, dtype)


@triton.jit
def _normed(pooled, c, mean, var, weight, bias, eps: tl.constexpr, channels: tl.constexpr):
    """q of a sample; zero beyond its channels."""
    dtype: tl.constexpr = pooled.dtype.element_ty
    off = _vector(pooled, c, 0.0, channels, dtype) - _vector(mean, c, 0.0, channels, dtype)
    q = off * _scale(c, var, weight, eps, channels, dtype) + _vector(bias, c, 0.0, channels, dtype)
    return tl.where((c >= 0) & (c < channels), q, 0.0)


@triton.jit
def _logits(pooled, c, mean, var, weight, bias, kernel, eps: tl.constexpr, channels: tl.constexpr, size: tl.constexpr):
    """What the sigmoid of a sample's channels gets."""
    dtype: tl.constexpr = pooled.dtype.element_ty
    found = tl.zeros(c.shape, dtype)
    for tap in range(size):
        q = _normed(pooled, c + (tap - size // 2), mean, var, weight, bias, eps, channels)
        found += tl.load(kernel + tap).to(dtype) * q
    return found


@triton.jit
def _d_q(i, c, d_logits, kernel, samples, channels: tl.constexpr, size: tl.constexpr, block_b: tl.constexpr):
    """The gradient of q by way of the convolution: that of the logits, through the kernel turned round."""
    dtype: tl.constexpr = d_logits.dtype.element_ty
    found = tl.zeros((block_b, c.shape[0]), dtype)
    for tap in range(size):
        reached = c - (tap - size // 2)
        at, inside = _samples(i, reached, samples, channels, block_b)
        d = tl.load(d_logits + at, inside & (reached >= 0)[None, :] & (c < channels)[None, :], 0)
        found += tl.load(kernel + tap).to(dtype) * d
    return found
