// The passes of a fused tail for CPUs: one read of a map for its statistics, one for the result, vectors in between.
//
// formula.py has the formula and the names, _maps.h the loops over one sample, _parts.h those over all. Maps are
// (B, C, N), or (B, N, C) where `nhwc` is set, N being H * W; vectors are (B, C) or (C). Maps are of type M, vectors
// and what is computed of type T. Without a kernel there is no gate, and what is left is a norm and what follows it.
// Only _native.cpp and _pooled.h include this.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "_maps.h"
#include "_parts.h"

namespace {

constexpr Index kCached = 1 << 20;  // elements of a sample that the caches still hold when they are read again

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

// ---- vectors ----

template <typename T> struct Weights {
  const T *gamma, *beta, *kernel, *mean, *var, *drop;  // gamma, beta, kernel and drop may be null
  Index size;
  T eps;
};

// The norm's: 1 / sqrt(var + eps), and that times gamma.
template <typename T> void norm_of(const Weights<T>& w, Index channels, T* inverse, T* norm) {
  for (Index c = 0; c < channels; ++c) inverse[c] = T(1) / std::sqrt(w.var[c] + w.eps);
  for (Index c = 0; c < channels; ++c) norm[c] = w.gamma ? w.gamma[c] * inverse[c] : inverse[c];
}

// q = (pooled - mean) * norm + beta
template <typename T>
void normed(const Weights<T>& w, const T* norm, const T* pooled, Index channels, T* q) {
  for (Index c = 0; c < channels; ++c) q[c] = (pooled[c] - w.mean[c]) * norm[c];
  if (w.beta)
    for (Index c = 0; c < channels; ++c) q[c] += w.beta[c];
}

// Calls body(j, offset, from, to) for each weight of a kernel: it meets channel c + offset for c of [from, to).
template <typename F> void for_kernel(Index size, Index channels, F body) {
  for (Index j = 0; j < size; ++j) {
    Index offset = j - size / 2;
    body(j, offset, std::max<Index>(0, -offset), std::min(channels, channels - offset));
  }
}

// What a sample's map is centred at: its mean, which the gate takes, or without a gate the norm's.
template <typename T> const T* centre_of(const Weights<T>& w, const T* pooled, Index at) {
  return w.kernel ? pooled + at : w.mean;
}

// gate = sigmoid(conv(q)) * drop, of one sample; without a kernel there is none.
template <typename T> void gate_of(const Weights<T>& w, const T* q, Index channels, Index b, T* gate) {
  if (!w.kernel) {
    std::fill_n(gate, channels, T(1));
    return;
  }
  std::fill_n(gate, channels, T(0));
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
  normed(w, norm, pooled, channels, q);
  gate_of(w, q, channels, b, gate);
  for (Index c = 0; c < channels; ++c) {
    offset[c] = gate[c] * q[c];
    scale[c] = gate[c] * norm[c];
  }
}

// ---- passes ----

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

// What is added to a map: nothing where the map is null, and through its norm unless it has no moments.
template <typename M, typename T> struct Other {
  const M* map = nullptr;
  const T *gamma = nullptr, *beta = nullptr, *mean = nullptr, *var = nullptr;
  T eps = 0;

  // The norm's factor, and what it adds on top of that of each sample.
  T gain(Index c) const { return (gamma ? gamma[c] : T(1)) / std::sqrt(var[c] + eps); }
  T shift(Index c, T gain) const { return (beta ? beta[c] : T(0)) - mean[c] * gain; }
};

template <typename M, typename T, Add kAdd> auto affine_of(Act act) {
  return act == Act::kNone   ? affine<M, T, kAdd, Act::kNone>
         : act == Act::kRelu ? affine<M, T, kAdd, Act::kRelu> : affine<M, T, kAdd, Act::kRelu6>;
}

template <typename M, typename T>
void apply(const M* z, const Other<M, T>& other, M* out, const T* centre, const T* scale, const T* offset,
           const T* gain, const M* next, const Shape& d, Index b, Rows rows, Act act) {
  Index at = b * d.channels * d.area, v = b * d.channels;
  const M* added = other.map ? other.map + at : nullptr;
  auto run = !other.map ? affine_of<M, T, Add::kNothing>(act)
             : other.mean ? affine_of<M, T, Add::kScaledOther>(act) : affine_of<M, T, Add::kOther>(act);
  run(z + at, added, out + at, centre, scale + v, offset + v, gain, next, d, rows);
}

enum class Read : Index { kNothing, kPool, kMoments };

// What is read of z is not given. Without out the result is what would make it: scale and offset, else null.
template <typename M, typename T>
void forward(const Shape& d, const M* z, const Other<M, T>& other, M* out, const Weights<T>& w, T* mean, T* var,
             T* pooled, T* scale, T* offset, Read reading, Act act) {
  Index channels = d.channels, vectors = d.batch * channels, sample = channels * d.area;
  if (reading == Read::kPool && !w.kernel) reading = Read::kNothing;
  std::unique_ptr<T[]> space(new T[3 * channels + (out ? 2 * vectors : 0)]);
  T *inverse = space.get(), *norm = inverse + channels, *gain = norm + channels;
  if (out) scale = gain + channels, offset = scale + vectors;
  T* square = offset;
  for (Index c = 0; c < channels; ++c) gain[c] = other.mean ? other.gain(c) : T(1);
  bool in_turn = reading != Read::kMoments && parts_of(d) == 1;  // a sample's second read is from the cache
  bool fetches = in_turn && reading == Read::kPool && sample <= kCached;
  auto sum = [=](Index b, Rows rows, T* first, T* second) {
    const M *map = z + b * sample, *next = fetches && other.map ? other.map + b * sample : nullptr;
    reading == Read::kMoments ? sum_moments(map, d, rows, first, second) : sum_map(map, next, d, rows, first);
  };
  auto finish = [=](Index b) {
    Index v = b * channels;
    reading == Read::kMoments ? moments(z + b * sample, d, pooled + v, square + v) : means(d, pooled + v);
  };
  auto gains = [=](Index b) {
    Index v = b * channels;
    gains_of(w, norm, centre_of(w, pooled, v), channels, b, scale + v, offset + v);
    if (other.mean)
      for (Index c = 0; c < channels; ++c) offset[v + c] += other.shift(c, gain[c]);
  };
  auto write = [=](const M* next, Index b, Rows rows) {
    const T* centre = centre_of(w, pooled, b * channels);
    if (out) apply(z, other, out, centre, scale, offset, gain, next, d, b, rows, act);
  };
  if (in_turn) {
    norm_of(w, channels, inverse, norm);
    for_samples(d, [=](Index b) {
      Rows all{0, d.rows()};
      if (reading == Read::kPool) sum(b, all, pooled + b * channels, nullptr), finish(b);
      gains(b);
      write(fetches && b + 1 < d.batch ? z + (b + 1) * sample : nullptr, b, all);
    });
    return;
  }
  if (reading != Read::kNothing) {
    sum_parts(d, pooled, square, sum);
    for_samples(d, finish);
  }
  if (reading == Read::kMoments) batch_moments(d, pooled, square, mean, var);
  norm_of(w, channels, inverse, norm);
  for_samples(d, gains);
  for_parts(d, [=](Index b, Index, Rows rows) { write(nullptr, b, rows); });
}

// From a sample's dots and total: the gradients of q and of the kernel; scale becomes what multiplies grad in that of
// z, and dots the gradient of the norm's scale.
template <typename T>
void gate_grads(const Weights<T>& w, const T* norm, const T* pooled, Index channels, Index b, T* dots, const T* total,
                T* scale, T* dq, T* dkernel) {
  std::unique_ptr<T[]> space(new T[3 * channels]);
  T *q = space.get(), *gate = q + channels, *dy = gate + channels;
  normed(w, norm, pooled, channels, q);
  gate_of(w, q, channels, b, gate);
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

// Without grad its dots and total are given, and the result is what would make dz: scale, slope, and shift in place of
// total. With it these are null.
template <typename M, typename T>
void backward(const Shape& d, const M* grad, const M* out, const M* z, M* g, M* dz, const Weights<T>& w,
              const T* pooled, T* dgamma, T* dbeta, T* dkernel, T* dot, T* total, T* scale, T* slope, bool of_batch,
              Act act) {
  Index channels = d.channels, vectors = d.batch * channels;
  std::unique_ptr<T[]> space(new T[vectors + 3 * channels + d.batch * w.size + (grad ? 3 * vectors + channels : 0)]);
  T *dq = space.get(), *inverse = dq + vectors, *norm = inverse + channels, *common = norm + channels;
  T* dkernels = common + channels;
  if (grad) dot = dkernels + d.batch * w.size, total = dot + vectors, scale = total + vectors, slope = scale + vectors;
  std::fill_n(slope, channels, T(0));
  std::fill_n(common, channels, T(0));
  norm_of(w, channels, inverse, norm);
  auto sum = [=](Index b, Rows rows, T* first, T* second) {
    Index at = b * channels * d.area;
    auto run = act == Act::kNone   ? dots<M, T, Act::kNone>
               : act == Act::kRelu ? dots<M, T, Act::kRelu> : dots<M, T, Act::kRelu6>;
    const T* centre = centre_of(w, pooled, b * channels);
    run(grad + at, out ? out + at : nullptr, z + at, out ? g + at : nullptr, centre, first, second, d, rows);
  };
  auto grads = [=](Index b) {
    Index v = b * channels;
    const T* centre = centre_of(w, pooled, v);
    gate_grads(w, norm, centre, channels, b, dot + v, total + v, scale + v, dq + v, dkernels + b * w.size);
  };
  // z reaches the result by itself, times scale; by its mean, which is also subtracted; and by the batch's moments.
  T* shift = total;
  auto shift_of = [=](Index b) {
    for (Index c = 0, v = b * channels; c < channels; ++c, ++v)
      shift[v] = (dq[v] * norm[c] - scale[v] * total[v]) / T(d.area) + common[c];
  };
  const M* masked = out ? g : grad;
  auto write = [=](Index b, Rows rows) {
    Index v = b * channels, at = v * d.area;
    map_grad(masked + at, z + at, dz + at, scale + v, w.mean, slope, shift + v, d, rows);
  };
  bool at_once = grad && !of_batch && parts_of(d) == 1;
  if (at_once) {  // a sample at a time: its second read comes from the cache
    for_samples(d, [=](Index b) {
      Rows all{0, d.rows()};
      sum(b, all, dot + b * channels, total + b * channels), grads(b);
      if (dz) shift_of(b), write(b, all);
    });
  } else {
    if (grad) sum_parts(d, dot, total, sum);
    for_samples(d, grads);
  }

  std::vector<double> sums(2 * channels + w.size);
  double *dnorm = sums.data(), *dmean = dnorm + channels, *dk = dmean + channels;
  for (Index b = 0; b < d.batch; ++b) {
    for (Index c = 0; c < channels; ++c) dnorm[c] += dot[b * channels + c], dmean[c] += dq[b * channels + c];
    for (Index j = 0; j < w.size; ++j) dk[j] += dkernels[b * w.size + j];
  }
  for (Index c = 0; c < channels; ++c) dgamma[c] = T(dnorm[c] * inverse[c]), dbeta[c] = T(dmean[c]);
  for (Index j = 0; j < w.size; ++j) dkernel[j] = T(dk[j]);
  if (at_once || (grad && !dz)) return;

  double count = double(d.batch) * d.area;
  if (of_batch)
    for (Index c = 0; c < channels; ++c) {
      slope[c] = T(-dnorm[c] * norm[c] * inverse[c] * inverse[c] / count);
      common[c] = T(-dmean[c] * norm[c] / count);
    }
  for_samples(d, shift_of);
  if (dz) for_parts(d, [=](Index b, Index, Rows rows) { write(b, rows); });
}

}  // namespace
