// The passes of a fused tail for CPUs: one read of a map for its statistics, one for the result, vectors in between.
//
// formula.py has the formula and the names. Maps are (B, C, N), or (B, N, C) where `nhwc` is set, N being H * W; vectors
// are (B, C) or (C). No Python and no PyTorch header is needed: pointers and sizes come by ctypes from native.py.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Index = std::int64_t;

struct Shape {
  Index batch, channels, area;
  Index nhwc, threads;
};

constexpr Index kChannelBlock = 64;    // channels of an NHWC map that one thread sums at a time
constexpr Index kPixels = 64;          // of such a map that are summed before the sums are
constexpr Index kWorthAThread = 32768; // elements, PyTorch's own grain

Index threads_for(const Shape& d) {
  Index most = d.batch * d.channels * d.area / kWorthAThread + 1;
  return most < d.threads ? most : d.threads;
}

// exp for sums of a few terms, written so that compilers vectorise it: 2^n times a Taylor series on [-ln2/2, ln2/2].
template <typename T> struct Exp;

template <> struct Exp<float> {
  static float of(float x) {
    x = x > 88.f ? 88.f : (x < -87.f ? -87.f : x);
    float n = std::nearbyint(x * 1.44269504f);
    float r = std::fma(n, -1.42860677e-6f, std::fma(n, -0.693145752f, x));
    float p = 1.f / 5040;
    p = std::fma(p, r, 1.f / 720);
    p = std::fma(p, r, 1.f / 120);
    p = std::fma(p, r, 1.f / 24);
    p = std::fma(p, r, 1.f / 6);
    p = std::fma(p, r, 0.5f);
    p = std::fma(p, r, 1.f);
    p = std::fma(p, r, 1.f);
    std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
  }
};

template <> struct Exp<double> {
  static double of(double x) { return std::exp(x); }
};

template <typename T> T sigmoid(T x) { return T(1) / (T(1) + Exp<T>::of(-x)); }

// ---- one sample's pass over one channel (NCHW) or a block of channels (NHWC) ----

// Mean, and sum of squared deviations from it unless null.
template <typename T> void row_moments(const T* z, Index n, T* mean, T* square) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Index i = 0; i < n; ++i) sum += z[i];
  T m = sum / T(n);
  *mean = m;
  if (!square) return;
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (Index i = 0; i < n; ++i) squares += (z[i] - m) * (z[i] - m);
  *square = squares;
}

// Sums over pixels are kept for a few pixels at a time, so that small terms are not lost in large sums.
template <typename T, typename F> void sum_pixels(Index n, Index width, T* first, T* second, F add) {
  std::vector<T> parts(2 * width);
  T *f = parts.data(), *s = f + width;
  for (Index c = 0; c < width; ++c) first[c] = second[c] = 0;
  for (Index from = 0; from < n; from += kPixels) {
    for (Index c = 0; c < 2 * width; ++c) f[c] = 0;
    for (Index i = from; i < n && i < from + kPixels; ++i) add(i, f, s);
    for (Index c = 0; c < width; ++c) first[c] += f[c], second[c] += s[c];
  }
}

template <typename T>
void block_moments(const T* z, Index n, Index stride, Index width, T* mean, T* square) {
  if (!square) {
    std::vector<T> unused(width);
    sum_pixels(n, width, mean, unused.data(), [=](Index i, T* sum, T*) {
#pragma omp simd
      for (Index c = 0; c < width; ++c) sum[c] += z[i * stride + c];
    });
    for (Index c = 0; c < width; ++c) mean[c] /= T(n);
    return;
  }
  sum_pixels(n, width, mean, square, [=](Index i, T* sum, T* squares) {
#pragma omp simd
    for (Index c = 0; c < width; ++c) {
      T v = z[i * stride + c] - z[c];  // from the first pixel: squares of large means would cancel
      sum[c] += v;
      squares[c] += v * v;
    }
  });
  for (Index c = 0; c < width; ++c) {
    square[c] -= mean[c] * mean[c] / T(n);
    mean[c] = z[c] + mean[c] / T(n);
  }
}

template <typename T> void moments(const T* z, const Shape& d, Index b, Index c0, Index c1, T* mean, T* square) {
  const T* sample = z + b * d.channels * d.area;
  T *m = mean + b * d.channels, *s = square ? square + b * d.channels : nullptr;
  if (d.nhwc) {
    block_moments(sample + c0, d.area, d.channels, c1 - c0, m + c0, s ? s + c0 : nullptr);
  } else {
    for (Index c = c0; c < c1; ++c) row_moments(sample + c * d.area, d.area, m + c, s ? s + c : nullptr);
  }
}

// out = (z - centre) * scale + offset, plus other, after ReLU. NaN stays NaN.
template <typename T, bool kAdd, bool kRelu> struct Affine {
  static T of(T z, T centre, T scale, T offset, T other) {
    T y = (z - centre) * scale + offset;
    if (kAdd) y += other;
    return kRelu && y < T(0) ? T(0) : y;
  }
};

template <typename T, bool kAdd, bool kRelu>
void affine(const T* z, const T* other, T* out, const T* centre, const T* scale, const T* offset, const Shape& d,
            Index c0, Index c1) {
  if (d.nhwc) {
    for (Index i = 0; i < d.area; ++i)
#pragma omp simd
      for (Index c = c0; c < c1; ++c) {
        Index at = i * d.channels + c;
        out[at] = Affine<T, kAdd, kRelu>::of(z[at], centre[c], scale[c], offset[c], kAdd ? other[at] : T(0));
      }
  } else {
    for (Index c = c0; c < c1; ++c) {
      T m = centre[c], a = scale[c], h = offset[c];
#pragma omp simd
      for (Index at = c * d.area; at < (c + 1) * d.area; ++at)
        out[at] = Affine<T, kAdd, kRelu>::of(z[at], m, a, h, kAdd ? other[at] : T(0));
    }
  }
}

// g = grad where out is above zero (all of it without out); sums of g * (z - centre) and of g.
template <typename T>
void row_dots(const T* grad, const T* out, const T* z, T* g, Index n, T centre, T* dots, T* total) {
  T d = 0, t = 0;
  if (out) {
#pragma omp simd reduction(+ : d, t)
    for (Index i = 0; i < n; ++i) {
      T v = out[i] > T(0) ? grad[i] : T(0);
      g[i] = v;
      d += v * (z[i] - centre);
      t += v;
    }
  } else {
#pragma omp simd reduction(+ : d, t)
    for (Index i = 0; i < n; ++i) {
      d += grad[i] * (z[i] - centre);
      t += grad[i];
    }
  }
  *dots = d;
  *total = t;
}

template <typename T>
void block_dots(const T* grad, const T* out, const T* z, T* g, Index n, Index stride, Index width, const T* centre,
                T* dots, T* total) {
  if (out) {
    sum_pixels(n, width, dots, total, [=](Index i, T* d, T* t) {
#pragma omp simd
      for (Index c = 0; c < width; ++c) {
        T v = out[i * stride + c] > T(0) ? grad[i * stride + c] : T(0);
        g[i * stride + c] = v;
        d[c] += v * (z[i * stride + c] - centre[c]);
        t[c] += v;
      }
    });
  } else {
    sum_pixels(n, width, dots, total, [=](Index i, T* d, T* t) {
#pragma omp simd
      for (Index c = 0; c < width; ++c) {
        d[c] += grad[i * stride + c] * (z[i * stride + c] - centre[c]);
        t[c] += grad[i * stride + c];
      }
    });
  }
}

// dz = g * scale + (z - centre) * slope + shift
template <typename T>
void map_grad(const T* g, const T* z, T* dz, const T* scale, const T* centre, const T* slope, const T* shift,
              const Shape& d, Index c0, Index c1) {
  if (d.nhwc) {
    for (Index i = 0; i < d.area; ++i)
#pragma omp simd
      for (Index c = c0; c < c1; ++c) {
        Index at = i * d.channels + c;
        dz[at] = g[at] * scale[c] + (z[at] - centre[c]) * slope[c] + shift[c];
      }
  } else {
    for (Index c = c0; c < c1; ++c) {
      T a = scale[c], m = centre[c], s = slope[c], h = shift[c];
#pragma omp simd
      for (Index at = c * d.area; at < (c + 1) * d.area; ++at) dz[at] = g[at] * a + (z[at] - m) * s + h;
    }
  }
}

// ---- vectors ----

template <typename T> struct Weights {
  const T *gamma, *beta, *kernel, *mean, *var, *drop;  // gamma, beta and drop may be null
  Index size;
  T eps;
};

// The norm's: 1 / sqrt(var + eps), and that times gamma.
template <typename T> void norm_of(const Weights<T>& w, Index channels, T* inverse, T* norm) {
  for (Index c = 0; c < channels; ++c) inverse[c] = T(1) / std::sqrt(w.var[c] + w.eps);
  for (Index c = 0; c < channels; ++c) norm[c] = w.gamma ? w.gamma[c] * inverse[c] : inverse[c];
}

// Calls body(j, offset, from, to) for each weight of a kernel: it meets channel c + offset for c of [from, to).
template <typename F> void for_kernel(Index size, Index channels, F body) {
  for (Index j = 0; j < size; ++j) {
    Index offset = j - size / 2;
    body(j, offset, offset < 0 ? -offset : 0, channels - (offset > 0 ? offset : 0));
  }
}

// q = (pooled - mean) * norm + beta, and gate = sigmoid(conv(q)) * drop, of one sample.
template <typename T>
void gate_of(const Weights<T>& w, const T* norm, const T* pooled, Index channels, Index b, T* q, T* gate) {
  for (Index c = 0; c < channels; ++c) q[c] = (pooled[c] - w.mean[c]) * norm[c];
  if (w.beta)
    for (Index c = 0; c < channels; ++c) q[c] += w.beta[c];
  for (Index c = 0; c < channels; ++c) gate[c] = 0;
  for_kernel(w.size, channels, [=](Index j, Index offset, Index from, Index to) {
    T k = w.kernel[j];
    for (Index c = from; c < to; ++c) gate[c] += k * q[c + offset];
  });
  T drop = w.drop ? w.drop[b] : T(1);
  for (Index c = 0; c < channels; ++c) gate[c] = sigmoid(gate[c]) * drop;
}

template <typename T>
void gains_of(const Weights<T>& w, const T* norm, const T* pooled, Index channels, Index b, T* scale, T* offset) {
  T *q = offset, *gate = scale;  // each is read before its place is written
  gate_of(w, norm, pooled, channels, b, q, gate);
  for (Index c = 0; c < channels; ++c) {
    offset[c] = gate[c] * q[c];
    scale[c] = gate[c] * norm[c];
  }
}

// Calls body(b, c0, c1) for every sample and range of channels, in parallel.
template <typename F> void for_channels(const Shape& d, F body) {
  Index width = d.batch >= d.threads ? d.channels : kChannelBlock;
  Index blocks = (d.channels + width - 1) / width;
#pragma omp parallel for collapse(2) num_threads(threads_for(d)) schedule(static)
  for (Index b = 0; b < d.batch; ++b)
    for (Index block = 0; block < blocks; ++block) {
      Index c0 = block * width, c1 = c0 + width;
      body(b, c0, c1 < d.channels ? c1 : d.channels);
    }
}

template <typename F> void for_samples(const Shape& d, F body) {
#pragma omp parallel for num_threads(threads_for(d)) schedule(static)
  for (Index b = 0; b < d.batch; ++b) body(b);
}

template <typename T>
void batch_moments(const Shape& d, const T* pooled, const T* square, T* mean, T* var) {
  std::vector<double> sum(d.channels), squares(d.channels);
  for (Index b = 0; b < d.batch; ++b)
    for (Index c = 0; c < d.channels; ++c) sum[c] += pooled[b * d.channels + c];
  for (Index c = 0; c < d.channels; ++c) sum[c] /= d.batch;
  for (Index b = 0; b < d.batch; ++b)
    for (Index c = 0; c < d.channels; ++c) {
      double off = pooled[b * d.channels + c] - sum[c];
      squares[c] += square[b * d.channels + c] + off * off * d.area;
    }
  for (Index c = 0; c < d.channels; ++c) {
    mean[c] = T(sum[c]);
    var[c] = T(squares[c] / (double(d.batch) * d.area));
  }
}

template <typename T>
void update_running(const Shape& d, const T* mean, const T* var, T* running_mean, T* running_var, double factor) {
  double count = double(d.batch) * d.area, unbias = count / (count - 1);
  for (Index c = 0; c < d.channels; ++c) {
    running_mean[c] += T(factor * (mean[c] - running_mean[c]));
    running_var[c] += T(factor * (var[c] * unbias - running_var[c]));
  }
}

template <typename T>
void apply(const T* z, const T* other, T* out, const T* centre, const T* scale, const T* offset, const Shape& d,
           Index b, Index c0, Index c1, bool relu) {
  Index at = b * d.channels * d.area, v = b * d.channels;
  auto run = other ? (relu ? affine<T, true, true> : affine<T, true, false>)
                   : (relu ? affine<T, false, true> : affine<T, false, false>);
  run(z + at, other ? other + at : nullptr, out + at, centre + v, scale + v, offset + v, d, c0, c1);
}

template <typename T>
void forward(const Shape& d, const T* z, const T* other, T* out, Weights<T> w, T* mean, T* var, T* pooled,
             bool of_batch, bool relu) {
  Index channels = d.channels, vectors = d.batch * channels;
  std::vector<T> space(2 * vectors + 2 * channels);
  T *scale = space.data(), *offset = scale + vectors, *inverse = offset + vectors, *norm = inverse + channels;
  T* square = of_batch ? offset : nullptr;
  auto pool = [=](Index b, Index c0, Index c1) { moments<T>(z, d, b, c0, c1, pooled, square); };
  auto gains = [=](Index b) {
    Index v = b * channels;
    gains_of(w, norm, pooled + v, channels, b, scale + v, offset + v);
  };
  auto write = [=](Index b, Index c0, Index c1) {
    apply(z, other, out, pooled, scale, offset, d, b, c0, c1, relu);
  };
  if (!of_batch && d.batch >= d.threads) {  // a sample at a time: its second read comes from the cache
    norm_of(w, channels, inverse, norm);
    for_samples(d, [=](Index b) { pool(b, 0, channels), gains(b), write(b, 0, channels); });
    return;
  }
  for_channels(d, pool);
  if (of_batch) batch_moments(d, pooled, square, mean, var);
  norm_of(w, channels, inverse, norm);
  for_samples(d, gains);
  for_channels(d, write);
}

// The sums of grad over a sample's map, grad masked by the ReLU on the way.
template <typename T>
void dots_of(const Shape& d, const T* grad, const T* out, const T* z, T* g, const T* pooled, T* dots, T* total,
             Index b, Index c0, Index c1) {
  Index step = d.nhwc ? c1 - c0 : 1;
  for (Index c = c0; c < c1; c += step) {
    Index at = b * d.channels * d.area + (d.nhwc ? c : c * d.area), v = b * d.channels + c;
    const T* o = out ? out + at : nullptr;
    T* gi = out ? g + at : nullptr;
    if (d.nhwc)
      block_dots(grad + at, o, z + at, gi, d.area, d.channels, step, pooled + v, dots + v, total + v);
    else
      row_dots(grad + at, o, z + at, gi, d.area, pooled[v], dots + v, total + v);
  }
}

// From a sample's dots and total: the gradients of q and of the kernel; scale becomes what multiplies grad in that of
// z, and dots the gradient of the norm's scale.
template <typename T>
void gate_grads(const Weights<T>& w, const T* norm, const T* pooled, Index channels, Index b, T* dots, const T* total,
                T* scale, T* dq, T* dkernel) {
  std::vector<T> space(3 * channels);
  T *q = space.data(), *gate = q + channels, *dy = gate + channels;
  gate_of(w, norm, pooled, channels, b, q, gate);
  T drop = w.drop ? w.drop[b] : T(1), undo = drop == T(0) ? T(0) : T(1) / drop;
  for (Index c = 0; c < channels; ++c) {
    dy[c] = (dots[c] * norm[c] + total[c] * q[c]) * gate[c] * (T(1) - gate[c] * undo);
    dq[c] = total[c] * gate[c];
  }
  for_kernel(w.size, channels, [=](Index j, Index offset, Index from, Index to) {
    T k = w.kernel[j], dk = 0;
#pragma omp simd reduction(+ : dk)
    for (Index c = from; c < to; ++c) {
      dq[c + offset] += k * dy[c];
      dk += dy[c] * q[c + offset];
    }
    dkernel[j] = dk;
  });
  for (Index c = 0; c < channels; ++c) {
    dots[c] = dots[c] * gate[c] + dq[c] * (pooled[c] - w.mean[c]);
    scale[c] = gate[c] * norm[c];
  }
}

template <typename T>
void backward(const Shape& d, const T* grad, const T* out, const T* z, T* g, T* dz, const Weights<T>& w,
              const T* pooled, T* dgamma, T* dbeta, T* dkernel, bool of_batch) {
  Index channels = d.channels, vectors = d.batch * channels;
  std::vector<T> space(4 * vectors + 3 * channels + d.batch * w.size);
  T *dots = space.data(), *total = dots + vectors, *scale = total + vectors, *dq = scale + vectors;
  T *inverse = dq + vectors, *norm = inverse + channels, *slope = norm + channels, *dkernels = slope + channels;
  for_channels(d, [=](Index b, Index c0, Index c1) { dots_of(d, grad, out, z, g, pooled, dots, total, b, c0, c1); });
  norm_of(w, channels, inverse, norm);
  for_samples(d, [=](Index b) {
    Index v = b * channels;
    gate_grads(w, norm, pooled + v, channels, b, dots + v, total + v, scale + v, dq + v, dkernels + b * w.size);
  });

  std::vector<double> sums(2 * channels + w.size);
  double *dnorm = sums.data(), *dmean = dnorm + channels, *dk = dmean + channels;
  for (Index b = 0; b < d.batch; ++b) {
    for (Index c = 0; c < channels; ++c) dnorm[c] += dots[b * channels + c], dmean[c] += dq[b * channels + c];
    for (Index j = 0; j < w.size; ++j) dk[j] += dkernels[b * w.size + j];
  }
  for (Index c = 0; c < channels; ++c) dgamma[c] = T(dnorm[c] * inverse[c]), dbeta[c] = T(dmean[c]);
  for (Index j = 0; j < w.size; ++j) dkernel[j] = T(dk[j]);
  if (!dz) return;

  // z reaches the result by itself, times scale; by its mean, which is also subtracted; and by the batch's moments.
  double count = double(d.batch) * d.area;
  std::vector<T> common(channels);
  if (of_batch)
    for (Index c = 0; c < channels; ++c) {
      slope[c] = T(-dnorm[c] * norm[c] * inverse[c] * inverse[c] / count);
      common[c] = T(-dmean[c] * norm[c] / count);
    }
  T* shift = dq;
  for (Index b = 0; b < d.batch; ++b)
    for (Index c = 0; c < channels; ++c) {
      Index v = b * channels + c;
      shift[v] = (dq[v] * norm[c] - scale[v] * total[v]) / T(d.area) + common[c];
    }
  const T* masked = out ? g : grad;
  for_channels(d, [=](Index b, Index c0, Index c1) {
    Index at = b * channels * d.area, v = b * channels;
    map_grad(masked + at, z + at, dz + at, scale + v, w.mean, slope, shift + v, d, c0, c1);
  });
}

// ---- calls: what native.py packs, field by field ----

template <typename T> struct Forward {
  Shape shape;
  Index size, of_batch, relu;
  double eps, factor;
  const T *z, *other;
  T* out;
  const T *gamma, *beta, *kernel;
  T *mean, *var;
  const T* drop;
  T *pooled, *running_mean, *running_var;

  void run() const {
    Weights<T> weights{gamma, beta, kernel, mean, var, drop, size, T(eps)};
    std::vector<T> unkept(pooled ? 0 : shape.batch * shape.channels);
    forward<T>(shape, z, other, out, weights, mean, var, pooled ? pooled : unkept.data(), of_batch, relu);
    if (running_mean) update_running(shape, mean, var, running_mean, running_var, factor);
  }
};

template <typename T> struct Backward {
  Shape shape;
  Index size, of_batch, unused;
  double eps;
  const T *grad, *out, *z;
  T *masked, *dz;
  const T *gamma, *beta, *kernel, *mean, *var, *drop, *pooled;
  T *dgamma, *dbeta, *dkernel;

  void run() const {
    Weights<T> weights{gamma, beta, kernel, mean, var, drop, size, T(eps)};
    backward<T>(shape, grad, out, z, masked, dz, weights, pooled, dgamma, dbeta, dkernel, of_batch);
  }
};

}  // namespace

extern "C" {
void tail_forward_f32(const Forward<float>* call) { call->run(); }
void tail_forward_f64(const Forward<double>* call) { call->run(); }
void tail_backward_f32(const Backward<float>* call) { call->run(); }
void tail_backward_f64(const Backward<double>* call) { call->run(); }
}
