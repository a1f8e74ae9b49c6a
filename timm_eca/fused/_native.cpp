// The passes of a fused tail for CPUs: one read of a map for its statistics, one for the result, vectors in between.
//
// formula.py has the formula and the names. Maps are (B, C, N), or (B, N, C) where `nhwc` is set, N being H * W; vectors
// are (B, C) or (C). No Python and no PyTorch header is needed: pointers and sizes come by ctypes from native.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

using Index = std::int64_t;

struct Shape {
  Index batch, channels, area;
  Index nhwc, threads;
};

constexpr Index kChannelBlock = 64;    // channels of an NHWC map that one thread sums at a time
constexpr Index kPixels = 64;          // rows of such a map that are summed before the sums are
constexpr Index kWide = 256;           // elements of such a row, at most, where it is several pixels
constexpr Index kRowsAtOnce = 4;       // rows of such a map that are added at once where they are several pixels
constexpr Index kLanes = 32;           // sums that one row of an NCHW map is added up in
constexpr Index kLong = 256;           // elements of a row for which that pays
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

// ---- maps ----

// What a row of an NCHW map has in place of a vector: one value.
template <typename T> struct Everywhere {
  T value;
  T operator[](Index) const { return value; }
};

// A range of channels of an NHWC map as rows. Where a pixel has few channels a row is several pixels, and the last one
// may be shorter: inner loops of a few vectors cost more than what they compute.
struct Grid {
  Index channels, repeat, rows, stride, width, rest;

  Grid(const Shape& d, Index c0, Index c1) : channels(c1 - c0), repeat(1) {
    if (channels == d.channels && 2 * channels <= kWide) repeat = std::min(kWide / channels, d.area);
    rows = d.area / repeat;
    stride = repeat * d.channels;
    width = repeat * channels;
    rest = d.area % repeat * channels;
  }

  Index width_of(Index row) const { return row < rows ? width : rest; }
};

// A vector of the channels, once for each pixel of a row.
template <typename T> struct Repeated {
  T copies[kWide];
  const T* data;

  Repeated(const T* vector, const Grid& grid) : data(vector) {
    if (grid.repeat == 1) return;
    for (Index r = 0; r < grid.repeat; ++r) std::copy_n(vector, grid.channels, copies + r * grid.channels);
    data = copies;
  }
};

template <typename F> void write_row(Index from, Index n, F write) {
#pragma omp simd
  for (Index c = 0; c < n; ++c) write(from + c, c);
}

template <typename F> void write_rows(const Grid& grid, Index from, F write) {
  for (Index i = 0; i <= grid.rows; ++i) write_row(from + i * grid.stride, grid.width_of(i), write);
}

// Calls write(at, c) for every element of some channels. make(vectors...) returns it, given what has the vectors at c.
template <typename T, typename F, typename... V>
void for_elements(const Shape& d, Index c0, Index c1, F make, const V*... vectors) {
  if (d.nhwc) {
    Grid grid(d, c0, c1);
    write_rows(grid, c0, make(Repeated<T>(vectors + c0, grid).data...));
  } else {
    for (Index c = c0; c < c1; ++c) write_row(c * d.area, d.area, make(Everywhere<T>{vectors[c]}...));
  }
}

// Adds terms of a long row, as many as fit, and returns how many. One sum of a kind would wait for itself from term to
// term; here several are added in turn.
template <typename T, typename F> Index sum_lanes(Index from, Index n, F add, T* first, T* second) {
  T f[kLanes] = {}, s[kLanes] = {};
  Index i = 0;
  for (; i + kLanes <= n; i += kLanes)
#pragma omp simd
    for (Index l = 0; l < kLanes; ++l) add(from + i + l, l, f[l], s[l]);
  for (Index half = kLanes / 2; half; half /= 2)
    for (Index l = 0; l < half; ++l) f[l] += f[l + half], s[l] += s[l + half];
  *first = f[0];
  *second = s[0];
  return i;
}

// Two sums over a row.
template <typename T, typename F> void sum_row(Index from, Index n, F add, T* first, T* second) {
  T f = 0, s = 0;
  Index done = n < kLong ? 0 : sum_lanes(from, n, add, &f, &s);
#pragma omp simd reduction(+ : f, s)
  for (Index i = done; i < n; ++i) add(from + i, 0, f, s);
  *first = f;
  if (second) *second = s;
}

// Adds the sums of a row's elements to their channels'.
template <typename T> void fold(const Grid& grid, const T* parts, T* sums) {
  for (Index from = 0; from < grid.width; from += grid.channels)
    for (Index c = 0; c < grid.channels; ++c) sums[c] += parts[from + c];
}

// Adds terms of some rows, from the element at on, to the sums of each column: these are read and written once.
template <Index kRows, bool kTwo, typename T, typename F>
void add_rows(Index at, Index stride, Index width, F add, T* f, T* s) {
#pragma omp simd
  for (Index c = 0; c < width; ++c) {
    T first = f[c], second = kTwo ? s[c] : T(0);
    for (Index r = 0; r < kRows; ++r) add(at + r * stride + c, c, first, second);
    f[c] = first;
    if (kTwo) s[c] = second;
  }
}

// One or two sums over the pixels, for each channel. They are kept for a few rows at a time, so that small terms are
// not lost in large sums.
template <Index kRows, bool kTwo, typename T, typename F>
void sum_pixels(const Grid& grid, Index from, F add, T* first, T* second) {
  std::vector<T> parts(2 * grid.width);
  T *f = parts.data(), *s = f + grid.width;
  std::fill_n(first, grid.channels, T(0));
  if (kTwo) std::fill_n(second, grid.channels, T(0));
  Index many = grid.repeat > 1 ? grid.rows : 0;  // rows of wide maps are read faster one after the other
  for (Index i = 0; i <= grid.rows;) {
    std::fill(parts.begin(), parts.end(), T(0));
    Index end = i + kPixels;
    for (; i + kRows <= std::min(end, many); i += kRows)
      add_rows<kRows, kTwo>(from + i * grid.stride, grid.stride, grid.width, add, f, s);
    for (; i < end && i <= grid.rows; ++i) add_rows<1, kTwo>(from + i * grid.stride, 0, grid.width_of(i), add, f, s);
    fold(grid, f, first);
    if (kTwo) fold(grid, s, second);
  }
}

// One or two sums of some channels' elements: add(at, c, first, second) adds an element's terms. make(vector) returns
// it. kRows is how many rows of a narrow NHWC map are added at once.
template <Index kRows, bool kTwo, typename T, typename F>
void sum_elements(const Shape& d, Index c0, Index c1, F make, const T* vector, T* first, T* second) {
  if (d.nhwc) {
    Grid grid(d, c0, c1);
    Repeated<T> repeated(vector + c0, grid);
    sum_pixels<kRows, kTwo>(grid, c0, make(repeated.data), first + c0, second + c0);
  } else {
    for (Index c = c0; c < c1; ++c)
      sum_row(c * d.area, d.area, make(Everywhere<T>{vector[c]}), first + c, kTwo ? second + c : nullptr);
  }
}

// ---- passes over some channels of a sample ----

template <typename T> void pool(const T* z, const Shape& d, Index c0, Index c1, T* mean) {
  auto make = [=](auto) { return [=](Index at, Index, T& sum, T&) { sum += z[at]; }; };
  sum_elements<kRowsAtOnce, false>(d, c0, c1, make, z, mean, mean);  // no vector is needed, and one sum
  for (Index c = c0; c < c1; ++c) mean[c] /= T(d.area);
}

// Mean of a row, and sum of squared deviations from it: squares of large means would cancel.
template <typename T> void row_moments(const T* z, Index n, T* mean, T* square) {
  sum_row<T>(0, n, [=](Index at, Index, T& sum, T&) { sum += z[at]; }, mean, nullptr);
  T m = *mean /= T(n);
  auto add = [=](Index at, Index, T& squares, T&) { squares += (z[at] - m) * (z[at] - m); };
  sum_row<T>(0, n, add, square, nullptr);
}

// The same of NHWC maps, which are read once: deviations are from the first pixel, and that is put right.
template <typename T> void pixel_moments(const T* z, const Shape& d, Index c0, Index c1, T* mean, T* square) {
  auto make = [=](auto first) {
    return [=](Index at, Index c, T& sum, T& squares) {
      T v = z[at] - first[c];
      sum += v;
      squares += v * v;
    };
  };
  sum_elements<kRowsAtOnce, true>(d, c0, c1, make, z, mean, square);
  for (Index c = c0; c < c1; ++c) {
    T off = mean[c] / T(d.area);
    square[c] -= off * mean[c];
    mean[c] = z[c] + off;
  }
}

template <typename T> void moments(const T* z, const Shape& d, Index c0, Index c1, T* mean, T* square) {
  if (d.nhwc) return pixel_moments(z, d, c0, c1, mean, square);
  for (Index c = c0; c < c1; ++c) row_moments(z + c * d.area, d.area, mean + c, square + c);
}

enum class Add { kNothing, kOther, kScaledOther };

// out = (z - centre) * scale + offset, plus other (times gain), after ReLU. NaN stays NaN.
template <typename T, Add kAdd, bool kRelu>
void affine(const T* z, const T* other, T* out, const T* centre, const T* scale, const T* offset, const T* gain,
            const Shape& d, Index c0, Index c1) {
  auto make = [=](auto m, auto a, auto h, auto g) {
    return [=](Index at, Index c) {
      T y = (z[at] - m[c]) * a[c] + h[c];
      if (kAdd == Add::kOther) y += other[at];
      if (kAdd == Add::kScaledOther) y += other[at] * g[c];
      out[at] = kRelu && y < T(0) ? T(0) : y;
    };
  };
  for_elements<T>(d, c0, c1, make, centre, scale, offset, gain);
}

// g = grad where out is above zero, if there was a ReLU; sums of g * (z - centre) and of g, or of grad.
template <typename T, bool kRelu>
void dots(const T* grad, const T* out, const T* z, T* g, const T* centre, T* dots, T* total, const Shape& d, Index c0,
          Index c1) {
  auto make = [=](auto m) {
    return [=](Index at, Index c, T& dot, T& sum) {
      T v = kRelu && !(out[at] > T(0)) ? T(0) : grad[at];
      if (kRelu) g[at] = v;
      dot += v * (z[at] - m[c]);
      sum += v;
    };
  };
  sum_elements<1, true>(d, c0, c1, make, centre, dots, total);  // four maps are streams enough
}

// dz = g * scale + (z - centre) * slope + shift
template <typename T>
void map_grad(const T* g, const T* z, T* dz, const T* scale, const T* centre, const T* slope, const T* shift,
              const Shape& d, Index c0, Index c1) {
  auto make = [=](auto a, auto m, auto s, auto h) {
    return [=](Index at, Index c) { dz[at] = g[at] * a[c] + (z[at] - m[c]) * s[c] + h[c]; };
  };
  for_elements<T>(d, c0, c1, make, scale, centre, slope, shift);
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

// gate = sigmoid(conv(q)) * drop, of one sample.
template <typename T> void gate_of(const Weights<T>& w, const T* q, Index channels, Index b, T* gate) {
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

// ---- loops over samples and channels ----

// Calls body(i) for each i below count.
template <typename F> void in_parallel(const Shape& d, Index count, F body) {
  Index threads = threads_for(d);
  if (threads == 1) {  // entering a parallel region costs as much as a small map
    for (Index i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index i = 0; i < count; ++i) body(i);
}

template <typename F> void for_samples(const Shape& d, F body) { in_parallel(d, d.batch, body); }

// Calls body(b, c0, c1) for every sample and range of channels, in parallel.
template <typename F> void for_channels(const Shape& d, F body) {
  Index width = d.batch >= d.threads ? d.channels : kChannelBlock;
  Index blocks = (d.channels + width - 1) / width;
  in_parallel(d, d.batch * blocks, [=](Index i) {
    Index c0 = i % blocks * width;
    body(i / blocks, c0, std::min(c0 + width, d.channels));
  });
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

// What is added to a map: nothing where the map is null, and through its norm unless it has no moments.
template <typename T> struct Other {
  const T *map, *gamma, *beta, *mean, *var;
  T eps;

  // The norm's factor, and what it adds on top of that of each sample.
  T gain(Index c) const { return (gamma ? gamma[c] : T(1)) / std::sqrt(var[c] + eps); }
  T shift(Index c, T gain) const { return (beta ? beta[c] : T(0)) - mean[c] * gain; }
};

template <typename T>
void apply(const T* z, const Other<T>& other, T* out, const T* centre, const T* scale, const T* offset, const T* gain,
           const Shape& d, Index b, Index c0, Index c1, bool relu) {
  Index at = b * d.channels * d.area, v = b * d.channels;
  auto run = !other.map ? (relu ? affine<T, Add::kNothing, true> : affine<T, Add::kNothing, false>)
             : other.mean ? (relu ? affine<T, Add::kScaledOther, true> : affine<T, Add::kScaledOther, false>)
                          : (relu ? affine<T, Add::kOther, true> : affine<T, Add::kOther, false>);
  run(z + at, other.map ? other.map + at : nullptr, out + at, centre + v, scale + v, offset + v, gain, d, c0, c1);
}

enum class Read : Index { kNothing, kPool, kMoments };

// What is read of z is not given. Without out the result is what would make it: scale and offset, else null.
template <typename T>
void forward(const Shape& d, const T* z, const Other<T>& other, T* out, const Weights<T>& w, T* mean, T* var,
             T* pooled, T* scale, T* offset, Read reading, bool relu) {
  Index channels = d.channels, vectors = d.batch * channels;
  std::unique_ptr<T[]> space(new T[3 * channels + (out ? 2 * vectors : 0)]);
  T *inverse = space.get(), *norm = inverse + channels, *gain = norm + channels;
  if (out) scale = gain + channels, offset = scale + vectors;
  T* square = offset;
  for (Index c = 0; c < channels; ++c) gain[c] = other.mean ? other.gain(c) : T(1);
  auto read = [=](Index b, Index c0, Index c1) {
    Index v = b * channels;
    if (reading == Read::kMoments)
      moments(z + v * d.area, d, c0, c1, pooled + v, square + v);
    else if (reading == Read::kPool)
      pool(z + v * d.area, d, c0, c1, pooled + v);
  };
  auto gains = [=](Index b) {
    Index v = b * channels;
    gains_of(w, norm, pooled + v, channels, b, scale + v, offset + v);
    if (other.mean)
      for (Index c = 0; c < channels; ++c) offset[v + c] += other.shift(c, gain[c]);
  };
  auto write = [=](Index b, Index c0, Index c1) {
    if (out) apply(z, other, out, pooled, scale, offset, gain, d, b, c0, c1, relu);
  };
  if (reading != Read::kMoments && d.batch >= d.threads) {  // a sample at a time: its second read is from the cache
    norm_of(w, channels, inverse, norm);
    for_samples(d, [=](Index b) { read(b, 0, channels), gains(b), write(b, 0, channels); });
    return;
  }
  for_channels(d, read);
  if (reading == Read::kMoments) batch_moments(d, pooled, square, mean, var);
  norm_of(w, channels, inverse, norm);
  for_samples(d, gains);
  for_channels(d, write);
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
template <typename T>
void backward(const Shape& d, const T* grad, const T* out, const T* z, T* g, T* dz, const Weights<T>& w,
              const T* pooled, T* dgamma, T* dbeta, T* dkernel, T* dot, T* total, T* scale, T* slope, bool of_batch) {
  Index channels = d.channels, vectors = d.batch * channels;
  std::unique_ptr<T[]> space(new T[vectors + 3 * channels + d.batch * w.size + (grad ? 3 * vectors + channels : 0)]);
  T *dq = space.get(), *inverse = dq + vectors, *norm = inverse + channels, *common = norm + channels;
  T* dkernels = common + channels;
  if (grad) dot = dkernels + d.batch * w.size, total = dot + vectors, scale = total + vectors, slope = scale + vectors;
  std::fill_n(slope, channels, T(0));
  std::fill_n(common, channels, T(0));
  norm_of(w, channels, inverse, norm);
  auto sum = [=](Index b, Index c0, Index c1) {
    Index v = b * channels, at = v * d.area;
    auto run = out ? dots<T, true> : dots<T, false>;
    run(grad + at, out ? out + at : nullptr, z + at, out ? g + at : nullptr, pooled + v, dot + v, total + v, d, c0, c1);
  };
  auto grads = [=](Index b) {
    Index v = b * channels;
    gate_grads(w, norm, pooled + v, channels, b, dot + v, total + v, scale + v, dq + v, dkernels + b * w.size);
  };
  // z reaches the result by itself, times scale; by its mean, which is also subtracted; and by the batch's moments.
  T* shift = total;
  auto shift_of = [=](Index b) {
    for (Index c = 0, v = b * channels; c < channels; ++c, ++v)
      shift[v] = (dq[v] * norm[c] - scale[v] * total[v]) / T(d.area) + common[c];
  };
  const T* masked = out ? g : grad;
  auto write = [=](Index b, Index c0, Index c1) {
    Index v = b * channels, at = v * d.area;
    map_grad(masked + at, z + at, dz + at, scale + v, w.mean, slope, shift + v, d, c0, c1);
  };
  bool at_once = grad && !of_batch && d.batch >= d.threads;
  if (at_once) {  // a sample at a time: its second read comes from the cache
    for_samples(d, [=](Index b) {
      sum(b, 0, channels), grads(b);
      if (dz) shift_of(b), write(b, 0, channels);
    });
  } else {
    if (grad) for_channels(d, sum);
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
  if (dz) for_channels(d, write);
}

// ---- calls: what native.py packs, field by field ----

template <typename T> struct Forward {
  Shape shape;
  Index size;
  Read reading;
  Index relu;
  double eps, factor, other_eps;
  const T *z, *other;
  T* out;
  const T *gamma, *beta, *kernel;
  T *mean, *var;
  const T* drop;
  T *pooled, *running_mean, *running_var;
  const T *other_gamma, *other_beta, *other_mean, *other_var;
  T *scale, *offset;

  void run() const {
    Weights<T> weights{gamma, beta, kernel, mean, var, drop, size, T(eps)};
    Other<T> added{other, other_gamma, other_beta, other_mean, other_var, T(other_eps)};
    std::vector<T> unkept(pooled ? 0 : shape.batch * shape.channels);
    T* pool = pooled ? pooled : unkept.data();
    forward<T>(shape, z, added, out, weights, mean, var, pool, scale, offset, reading, relu);
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
  T *dgamma, *dbeta, *dkernel, *dot, *total, *scale, *slope;

  void run() const {
    Weights<T> weights{gamma, beta, kernel, mean, var, drop, size, T(eps)};
    backward<T>(shape, grad, out, z, masked, dz, weights, pooled, dgamma, dbeta, dkernel, dot, total, scale, slope,
                of_batch);
  }
};

}  // namespace

extern "C" {
void tail_forward_f32(const Forward<float>* call) { call->run(); }
void tail_forward_f64(const Forward<double>* call) { call->run(); }
void tail_backward_f32(const Backward<float>* call) { call->run(); }
void tail_backward_f64(const Backward<double>* call) { call->run(); }
}
