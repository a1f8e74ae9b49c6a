// A norm that sums what it makes, and what the convolution after it makes on average: it commutes with the mean.
//
// pooled.py tells where that is done. Only _native.cpp includes this.

#pragma once

#include <algorithm>
#include <vector>

#include "_passes.h"

namespace {

// A convolution (made, D, size, size) of stride 1 that keeps a map's sizes, size being 1 or 3; last its D where nhwc.
template <typename T> struct Conv {
  const T *weight, *bias;
  Index made, size, width, nhwc;
};

// What each tap of a convolution of 3x3 meets of a sample's map, of which the sums over all are given: all but the
// pixels of one border or two, as padding has zeros there. Tap t of channel c is at t * D + c or c * 9 + t.
template <typename M, typename T>
void sum_taps(const M* z, const Shape& d, const Conv<T>& conv, const T* total, T* taps) {
  Index channels = d.channels, width = conv.width, last = d.area - width;
  Index pixel = d.nhwc ? channels : 1, channel = d.nhwc ? 1 : d.area;
  std::vector<T> sums(4 * channels);
  auto line = [&](Index from, Index step, Index count, Index which) {
    for (Index i = 0; i < count; ++i)
      for (Index c = 0; c < channels; ++c) sums[which * channels + c] += z[(from + i * step) * pixel + c * channel];
  };
  line(last, 1, width, 0), line(0, 1, width, 1);
  line(width - 1, width, d.area / width, 2), line(0, width, d.area / width, 3);
  for (Index t = 0; t < 9; ++t) {
    Index y = t / 3, x = t % 3;  // the first tap of a column does not meet the last row, the last not the first
    const T *row = &sums[(y ? 1 : 0) * channels], *column = &sums[(x ? 3 : 2) * channels];
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

constexpr Index kTogether = 4;  // sums that do not wait for one another

// Some of the means that a convolution makes, from the sums that its taps meet.
template <typename T>
void convolve(const Conv<T>& conv, Index terms, const T* met, Index area, Index first, Index end, T* made) {
  const T* rows[kTogether];
  for (Index r = 0; r < kTogether; ++r) rows[r] = conv.weight + std::min(first + r, end - 1) * terms;
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (Index i = 0; i < terms; ++i) {
    s0 += rows[0][i] * met[i], s1 += rows[1][i] * met[i];
    s2 += rows[2][i] * met[i], s3 += rows[3][i] * met[i];
  }
  const T sums[kTogether] = {s0, s1, s2, s3};
  for (Index o = first; o < end; ++o) made[o] = sums[o - first] / T(area) + (conv.bias ? conv.bias[o] : T(0));
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
  sum_parts(d, total, unused, [=](Index b, Rows rows, T* sum, T*) {
    run(z + b * channels * d.area, w.mean, norm, offset, sum, d, rows);
  });
  if (taps > 1)
    for_samples(d, [=](Index b) {
      Index v = b * channels;
      sum_taps(z + v * d.area, d, conv, total + v, met + taps * v);
    });
  Index terms = taps * channels;
  in_parallel(d, (conv.made + kTogether - 1) / kTogether, [=](Index tile) {
    Index first = tile * kTogether, end = std::min(first + kTogether, conv.made);
    for (Index b = 0; b < d.batch; ++b)
      convolve(conv, terms, met + b * terms, d.area, first, end, pooled + b * conv.made);
  });
}

}  // namespace
