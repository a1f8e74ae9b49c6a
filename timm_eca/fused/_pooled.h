// A norm that sums what it makes, and what the convolution after it makes on average: it commutes with the mean.
//
// pooled.py tells where that is done. Only _native.cpp includes this.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "_passes.h"

namespace {

// A convolution (made, D, size, size) of stride 1 that keeps a map's sizes, size being 1 or 3; last its D where nhwc.
template <typename T> struct Conv {
  const T *weight, *bias;
  Index made, size, width, nhwc;
};

// How many sums are added up at a time, as a sum waits for its last term.
constexpr Index kTogether = 4;

// Sums of each channel over some pixels of a sample's map, `step` apart.
template <typename M, typename T>
void sum_line(const M* z, const Shape& d, Index from, Index step, Index count, T* sums) {
  if (d.nhwc) {
    std::fill_n(sums, d.channels, T(0));
    for (Index i = 0; i < count; ++i) {
      const M* pixel = z + (from + i * step) * d.channels;
#pragma omp simd
      for (Index c = 0; c < d.channels; ++c) sums[c] += pixel[c];
    }
    return;
  }
  for (Index c = 0; c < d.channels; c += kTogether) {
    const M* rows[kTogether];
    for (Index r = 0; r < kTogether; ++r) rows[r] = z + std::min(c + r, d.channels - 1) * d.area + from;
    T of_rows[kTogether] = {};
    for (Index i = 0; i < count; ++i)
      for (Index r = 0; r < kTogether; ++r) of_rows[r] += rows[r][i * step];
    std::copy_n(of_rows, std::min(kTogether, d.channels - c), sums + c);
  }
}

// What each tap of a convolution of 3x3 meets of a sample's map, of which the sums over all are given: all but the
// pixels of one border or two, as padding has zeros there. Tap t of channel c is at t * D + c or c * 9 + t.
template <typename M, typename T>
void sum_taps(const M* z, const Shape& d, const Conv<T>& conv, const T* total, T* taps) {
  Index channels = d.channels, width = conv.width, height = d.area / width, last = d.area - width;
  Index pixel = d.nhwc ? channels : 1, channel = d.nhwc ? 1 : d.area;
  std::vector<T> sums(4 * channels);
  T *top = sums.data(), *bottom = top + channels, *left = bottom + channels, *right = left + channels;
  sum_line(z, d, 0, 1, width, top), sum_line(z, d, last, 1, width, bottom);
  sum_line(z, d, 0, width, height, left), sum_line(z, d, width - 1, width, height, right);
  for (Index t = 0; t < 9; ++t) {
    Index y = t / 3, x = t % 3;  // the first tap of a column does not meet the last row, the last not the first
    const T *row = y ? top : bottom, *column = x ? left : right;
    Index corner = ((y ? 0 : last) + (x ? 0 : width - 1)) * pixel;
    for (Index c = 0; c < channels; ++c) {
      T sum = total[c];
      if (y != 1) sum -= row[c];
      if (x != 1) sum -= column[c];
      if (y != 1 && x != 1) sum += z[corner + c * channel];
      taps[conv.nhwc ? t * channels + c : c * 9 + t] = sum;
    }
  }
}

// What a register holds. A row of weights is multiplied with several samples at a time, as many as leave their sums,
// kTogether rows by kSamples, in registers: it is loaded once for them.
#ifdef __AVX512F__
constexpr Index kRegister = 64, kSamples = 4;
#else
constexpr Index kRegister = 32, kSamples = 2;
#endif

template <typename T, Index kBytes> struct Lanes {
  static constexpr Index kCount = kBytes / Index(sizeof(T));
  typedef T Type __attribute__((vector_size(kBytes)));

  static Type load(const T* from) {
    Type lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
  }

  // Compilers add up lanes one after the other, unless they are halved.
  static T sum(const T* from) {
    using Half = Lanes<T, kBytes / 2>;
    using Quarter = Lanes<T, kBytes / 4>;
    T halves[Half::kCount];
    typename Half::Type half = Half::load(from) + Half::load(from + Half::kCount);
    std::memcpy(halves, &half, sizeof half);
    typename Quarter::Type quarter = Quarter::load(halves) + Quarter::load(halves + Quarter::kCount);
    T sum = 0;
    for (Index l = 0; l < Quarter::kCount; ++l) sum += quarter[l];
    return sum;
  }
};

// Products of rows of weights with what the taps of kCount samples meet. The weights' next rows come from memory
// meanwhile.
template <Index kCount, typename T>
void multiply(const T* const* rows, const T* met, Index terms, T (*products)[kCount]) {
  using L = Lanes<T, kRegister>;
  typename L::Type sums[kTogether][kCount] = {};
  Index i = 0;
  for (; i + L::kCount <= terms; i += L::kCount) {
    typename L::Type of_samples[kCount];
    for (Index b = 0; b < kCount; ++b) of_samples[b] = L::load(met + b * terms + i);
    for (Index r = 0; r < kTogether; ++r) {
      typename L::Type weights = L::load(rows[r] + i);
      __builtin_prefetch(rows[r] + kTogether * terms + i, 0, 2);
      for (Index b = 0; b < kCount; ++b) sums[r][b] += weights * of_samples[b];
    }
  }
  T lanes[L::kCount];
  for (Index r = 0; r < kTogether; ++r)
    for (Index b = 0; b < kCount; ++b) {
      std::memcpy(lanes, &sums[r][b], sizeof lanes);
      products[r][b] = L::sum(lanes);
    }
  for (; i < terms; ++i)
    for (Index r = 0; r < kTogether; ++r)
      for (Index b = 0; b < kCount; ++b) products[r][b] += rows[r][i] * met[b * terms + i];
}

// Some of the means that a convolution makes of kCount samples, from the sums that its taps meet.
template <Index kCount, typename T>
void convolve(const Conv<T>& conv, Index terms, const T* met, Index area, Index first, Index end, T* made) {
  const T* rows[kTogether];
  for (Index r = 0; r < kTogether; ++r) rows[r] = conv.weight + std::min(first + r, end - 1) * terms;
  T products[kTogether][kCount];
  multiply<kCount>(rows, met, terms, products);
  for (Index o = first; o < end; ++o)
    for (Index b = 0; b < kCount; ++b)
      made[b * conv.made + o] = products[o - first][b] / T(area) + (conv.bias ? conv.bias[o] : T(0));
}

// Puts a norm and its activation in the place of z, and has the mean of what a convolution then makes of that: it is
// the convolution of the means that its taps meet.
template <typename M, typename T>
void norm_pool(const Shape& d, M* z, const Weights<T>& w, const Conv<T>& conv, T* pooled, Act act) {
  Index channels = d.channels, vectors = d.batch * channels, taps = conv.size * conv.size;
  std::vector<T> space(2 * vectors + 3 * channels + (taps > 1 ? taps * vectors : 0));
  T *total = space.data(), *unused = total + vectors, *inverse = unused + vectors, *norm = inverse + channels;
  T *offset = norm + channels, *met = taps > 1 ? offset + channels : total;
  norm_of(w, channels, inverse, norm);
  if (w.beta) std::copy_n(w.beta, channels, offset);
  auto run = act == Act::kNone   ? affine_sums<M, T, Act::kNone>
             : act == Act::kRelu ? affine_sums<M, T, Act::kRelu> : affine_sums<M, T, Act::kRelu6>;
  bool in_turn = parts_of(d) == 1;  // a sample's borders are still in the cache then
  auto meet = [=](Index b) {
    Index v = b * channels;
    sum_taps(z + v * d.area, d, conv, total + v, met + taps * v);
  };
  sum_parts(d, total, unused, [=](Index b, Rows rows, T* sum, T*) {
    run(z + b * channels * d.area, w.mean, norm, offset, sum, d, rows);
    if (taps > 1 && in_turn) meet(b);
  });
  if (taps > 1 && !in_turn) for_samples(d, meet);
  Index terms = taps * channels;
  in_parallel(d, (conv.made + kTogether - 1) / kTogether, [=](Index tile) {
    Index first = tile * kTogether, end = std::min(first + kTogether, conv.made), b = 0;
    for (; b + kSamples <= d.batch; b += kSamples)
      convolve<kSamples>(conv, terms, met + b * terms, d.area, first, end, pooled + b * conv.made);
    for (; b < d.batch; ++b) convolve<1>(conv, terms, met + b * terms, d.area, first, end, pooled + b * conv.made);
  });
}

}  // namespace
