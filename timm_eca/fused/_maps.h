// Loops over some rows of one sample's map: what is summed over them, and what is written to them.
//
// Maps are (C, N), or (N, C) where `nhwc` is set, N being H * W: a row is a channel, or a pixel. Vectors are (C). What
// is computed has the vectors' type T, maps may be kept in another one, M. Only _native.cpp includes this.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Index = std::int64_t;

struct Shape {
  Index batch, channels, area;
  Index nhwc, threads;

  Index rows() const { return nhwc ? area : channels; }
};

struct Rows {
  Index from, to;
};

constexpr Index kPixels = 64;     // lines of an NHWC map that are summed before the sums are
constexpr Index kWide = 512;      // elements of such a line, at most, where it is several pixels
constexpr Index kAhead = 256;     // elements that may be on their way from memory at a time
constexpr Index kLanes = 32;      // sums that a long row of an NCHW map is added up in
constexpr Index kFewLanes = 8;    // those of a short one, and of what is left
constexpr Index kLong = 128;      // elements of a long row
constexpr Index kBlock = 8192;    // elements of a row that are added up before their sum is
constexpr Index kLine = 64;       // bytes of a cache line
constexpr Index kUnlike = 1024;   // squared deviations of a pixel that is unlike the others, 1 being the mean

// ---- elements ----

// The upper half of a float, rounded to nearest even.
struct BFloat16 {
  std::uint16_t bits;

  operator float() const {
    std::uint32_t wide = std::uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }

  BFloat16& operator=(float value) {
    std::uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    std::uint32_t up = 0x7fff + (wide >> 16 & 1);
    bits = std::uint16_t((wide + (value != value ? 0 : up)) >> 16);  // the upper half of a computed NaN is one
    return *this;
  }
};

// What a row of an NCHW map has in place of a vector: one value.
template <typename T> struct Everywhere {
  T value;
  T operator[](Index) const { return value; }
};

// Pixels of an NHWC map, several at a time where they have few channels, and at last the rest of them: inner loops of a
// few vectors cost more than what they compute.
struct Grid {
  Index channels, repeat, lines, width, rest;

  Grid(Index channels, Rows pixels) : channels(channels), repeat(1) {
    Index count = pixels.to - pixels.from;
    if (2 * channels <= kWide && count) repeat = std::min(kWide / channels, count);
    lines = count / repeat;
    width = repeat * channels;
    rest = count % repeat * channels;
  }

  Index width_of(Index line) const { return line < lines ? width : rest; }
};

// A vector of the channels, once for each pixel of a line.
template <typename T> struct Repeated {
  T copies[kWide];
  const T* data;

  Repeated(const T* vector, const Grid& grid) : data(vector) {
    if (grid.repeat == 1) return;
    for (Index r = 0; r < grid.repeat; ++r) std::copy_n(vector, grid.channels, copies + r * grid.channels);
    data = copies;
  }
};

// Has elements that are needed next, if such are given, come from memory while others are gone through. What is written
// then is in the cache: one stream from memory at a time is slower than two.
template <typename M> void fetch(const M* next, Index from, Index n) {
  if (next)
    for (Index i = 0; i < n; i += kLine / Index(sizeof(M))) __builtin_prefetch(next + from + i, 0, 2);
}

template <typename M, typename F> void write_line(const M* next, Index from, Index n, F write) {
  fetch(next, from, n);
#pragma omp simd
  for (Index c = 0; c < n; ++c) write(from + c, c);
}

template <typename M, typename F> void write_pixels(const Grid& grid, const M* next, Index from, F write) {
  for (Index i = 0; i <= grid.lines; ++i) write_line(next, from + i * grid.width, grid.width_of(i), write);
}

// Calls write(at, c) for every element of some rows. make(vectors...) returns it, given what has the vectors at c.
template <typename M, typename F, typename... T>
void for_elements(const Shape& d, const M* next, Rows rows, F make, const T*... vectors) {
  if (d.nhwc) {
    Grid grid(d.channels, rows);
    write_pixels(grid, next, rows.from * d.channels, make(Repeated<T>(vectors, grid).data...));
    return;
  }
  Index most = next ? kAhead : d.area;
  for (Index c = rows.from; c < rows.to; ++c)
    for (Index i = 0; i < d.area; i += most)
      write_line(next, c * d.area + i, std::min(most, d.area - i), make(Everywhere<T>{vectors[c]}...));
}

// Adds terms of a row, from its element i on, as many as fit, and returns where they end. One sum of a kind would wait
// for itself from term to term; here several are added in turn.
template <Index kSums, typename T, typename F>
Index sum_lanes(Index from, Index i, Index n, F add, T& first, T& second) {
  T f[kSums] = {}, s[kSums] = {};
  for (; i + kSums <= n; i += kSums)
#pragma omp simd
    for (Index l = 0; l < kSums; ++l) add(from + i + l, l, f[l], s[l]);
  for (Index half = kSums / 2; half; half /= 2)
    for (Index l = 0; l < half; ++l) f[l] += f[l + half], s[l] += s[l + half];
  first += f[0];
  second += s[0];
  return i;
}

// Two sums over a row, a block of it at a time, so that small terms are not lost in large sums.
template <typename T, typename F> void sum_row(Index from, Index n, F add, T* first, T* second) {
  T total_first = 0, total_second = 0;
  for (Index at = 0; at < n; at += kBlock) {
    Index end = std::min(n - at, kBlock);
    T f = 0, s = 0;
    Index i = end < kLong ? 0 : sum_lanes<kLanes>(from + at, 0, end, add, f, s);
    i = sum_lanes<kFewLanes>(from + at, i, end, add, f, s);
    for (; i < end; ++i) add(from + at + i, 0, f, s);
    total_first += f, total_second += s;
  }
  *first = total_first;
  if (second) *second = total_second;
}

// Adds the sums of a line's elements to their channels'.
template <typename T> void fold(const Grid& grid, const T* parts, T* sums) {
  for (Index from = 0; from < grid.width; from += grid.channels)
    for (Index c = 0; c < grid.channels; ++c) sums[c] += parts[from + c];
}

// Adds the terms of a line, from the element at on, to the sums of each column.
template <bool kTwo, typename T, typename F> void add_line(Index at, Index width, F add, T* f, T* s) {
#pragma omp simd
  for (Index c = 0; c < width; ++c) {
    T first = f[c], second = kTwo ? s[c] : T(0);
    add(at + c, c, first, second);
    f[c] = first;
    if (kTwo) s[c] = second;
  }
}

// One or two sums over pixels, for each channel. They are kept for a few lines at a time, so that small terms are not
// lost in large sums.
template <bool kTwo, typename M, typename T, typename F>
void sum_pixels(const Grid& grid, const M* next, Index from, F add, T* first, T* second) {
  std::vector<T> parts(2 * grid.width);
  T *f = parts.data(), *s = f + grid.width;
  std::fill_n(first, grid.channels, T(0));
  if (kTwo) std::fill_n(second, grid.channels, T(0));
  for (Index i = 0; i <= grid.lines;) {
    std::fill(parts.begin(), parts.end(), T(0));
    Index end = std::min(i + kPixels, grid.lines + 1);
    for (; i < end; ++i) {
      Index at = from + i * grid.width, width = grid.width_of(i);
      fetch(next, at, width);
      add_line<kTwo>(at, width, add, f, s);
    }
    fold(grid, f, first);
    if (kTwo) fold(grid, s, second);
  }
}

// One or two sums of some rows' elements, for each channel: add(at, c, first, second) adds an element's terms.
// make(vectors...) returns it. The sums of pixels begin at zero, those of channels are all that there are.
template <bool kTwo, typename M, typename T, typename F, typename... V>
void sum_elements(const Shape& d, const M* next, Rows rows, F make, T* first, T* second, const V*... vectors) {
  if (d.nhwc) {
    Grid grid(d.channels, rows);
    sum_pixels<kTwo>(grid, next, rows.from * d.channels, make(Repeated<V>(vectors, grid).data...), first, second);
    return;
  }
  for (Index c = rows.from; c < rows.to; ++c) {
    fetch(next, c * d.area, d.area);
    sum_row(c * d.area, d.area, make(Everywhere<V>{vectors[c]}...), first + c, kTwo ? second + c : nullptr);
  }
}

// ---- passes over some rows of a sample ----

template <typename M, typename T> void sum_map(const M* z, const M* next, const Shape& d, Rows rows, T* sum) {
  auto make = [=] { return [=](Index at, Index, T& sum, T&) { sum += z[at]; }; };
  sum_elements<false>(d, next, rows, make, sum, sum);
}

// Sum of a row, and of squared deviations from its mean: squares of large means would cancel.
template <typename M, typename T> void row_moments(const M* z, Index n, T* sum, T* square) {
  sum_row<T>(0, n, [=](Index at, Index, T& sum, T&) { sum += z[at]; }, sum, nullptr);
  T mean = *sum / T(n);
  auto add = [=](Index at, Index, T& squares, T&) { squares += (z[at] - mean) * (z[at] - mean); };
  sum_row<T>(0, n, add, square, nullptr);
}

// Sums of deviations of an NHWC map, and of their squares.
template <typename M, typename T>
void sum_deviations(const M* z, const T* from, const Shape& d, Rows rows, T* sum, T* square) {
  auto make = [=](auto from) {
    return [=](Index at, Index c, T& sum, T& squares) {
      T v = z[at] - from[c];
      sum += v;
      squares += v * v;
    };
  };
  sum_elements<true, M>(d, nullptr, rows, make, sum, square, from);
}

// A pixel that is like others, which the first, beside the padding, may not be.
template <typename M> const M* typical(const M* z, const Shape& d) { return z + d.area / 2 * d.channels; }

// The same of NHWC maps, which are read once: both are of deviations from one pixel, which `moments` puts right.
template <typename M, typename T> void sum_moments(const M* z, const Shape& d, Rows rows, T* sum, T* square) {
  if (!d.nhwc) {
    for (Index c = rows.from; c < rows.to; ++c) row_moments(z + c * d.area, d.area, sum + c, square + c);
    return;
  }
  const M* pixel = typical(z, d);
  sum_deviations(z, std::vector<T>(pixel, pixel + d.channels).data(), d, rows, sum, square);
}

// ---- what sums of a sample's rows become ----

template <typename T> void means(const Shape& d, T* sum) {
  for (Index c = 0; c < d.channels; ++c) sum[c] /= T(d.area);
}

// Means, and sums of squared deviations from them. Where the pixel turns out to be unlike the others, most digits have
// cancelled, and the map is read once more.
template <typename M, typename T> void moments(const M* z, const Shape& d, T* sum, T* square) {
  means(d, sum);
  if (!d.nhwc) return;
  const M* pixel = typical(z, d);
  bool lost = false;
  for (Index c = 0; c < d.channels; ++c) {
    T off = sum[c] * sum[c] * T(d.area);
    square[c] -= off;
    lost |= square[c] * T(kUnlike) < off;
    sum[c] += pixel[c];
  }
  if (!lost) return;
  std::vector<T> rest(d.channels);
  sum_deviations(z, sum, d, {0, d.area}, rest.data(), square);
}

// ---- what is written to some rows of a sample ----

enum class Add { kNothing, kOther, kScaledOther };
enum class Act : Index { kNone, kRelu, kRelu6 };

// What an activation makes of an element. NaN stays NaN.
template <Act kAct, typename T> T activated(T y) {
  if (kAct != Act::kNone) y = y < T(0) ? T(0) : y;
  return kAct == Act::kRelu6 && y > T(6) ? T(6) : y;
}

// out = (z - centre) * scale + offset, plus other (times gain), after an activation.
template <typename M, typename T, Add kAdd, Act kAct>
void affine(const M* z, const M* other, M* out, const T* centre, const T* scale, const T* offset, const T* gain,
            const M* next, const Shape& d, Rows rows) {
  auto make = [=](auto m, auto a, auto h, auto g) {
    return [=](Index at, Index c) {
      T y = (z[at] - m[c]) * a[c] + h[c];
      if (kAdd == Add::kOther) y += other[at];
      if (kAdd == Add::kScaledOther) y += other[at] * g[c];
      out[at] = activated<kAct>(y);
    };
  };
  for_elements(d, next, rows, make, centre, scale, offset, gain);
}

// The same of z alone, in its place, and the sums of what is written.
template <typename M, typename T, Act kAct>
void affine_sums(M* z, const T* centre, const T* scale, const T* offset, T* sum, const Shape& d, Rows rows) {
  auto make = [=](auto m, auto a, auto h) {
    return [=](Index at, Index c, T& sum, T&) {
      T y = activated<kAct>((z[at] - m[c]) * a[c] + h[c]);
      z[at] = y;
      sum += y;
    };
  };
  sum_elements<false, M>(d, nullptr, rows, make, sum, sum, centre, scale, offset);
}

// g = grad where an activation, if there was one, let it through; sums of g * (z - centre) and of g, or of grad.
template <typename M, typename T, Act kAct>
void dots(const M* grad, const M* out, const M* z, M* g, const T* centre, T* dots, T* total, const Shape& d,
          Rows rows) {
  auto make = [=](auto m) {
    return [=](Index at, Index c, T& dot, T& sum) {
      T d = grad[at], v = kAct != Act::kNone && out[at] <= T(0) ? T(0) : d;
      if (kAct == Act::kRelu6) v = out[at] >= T(6) ? T(0) : v;
      if (kAct != Act::kNone) g[at] = v;
      dot += v * (z[at] - m[c]);
      sum += v;
    };
  };
  sum_elements<true, M>(d, nullptr, rows, make, dots, total, centre);
}

// dz = g * scale + (z - centre) * slope + shift
template <typename M, typename T>
void map_grad(const M* g, const M* z, M* dz, const T* scale, const T* centre, const T* slope, const T* shift,
              const Shape& d, Rows rows) {
  auto make = [=](auto a, auto m, auto s, auto h) {
    return [=](Index at, Index c) { dz[at] = g[at] * a[c] + (z[at] - m[c]) * s[c] + h[c]; };
  };
  for_elements<M>(d, nullptr, rows, make, scale, centre, slope, shift);
}

}  // namespace
