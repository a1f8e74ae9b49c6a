// Loops over samples, or parts of them where there are more threads, shared out to PyTorch's threads.
//
// Only _passes.h includes this.

#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "_maps.h"

namespace {

constexpr Index kWorthAThread = 32768;  // elements, PyTorch's own grain

Index threads_for(const Shape& d) {
  Index most = d.batch * d.channels * d.area / kWorthAThread + 1;
  return most < d.threads ? most : d.threads;
}

// Calls body(i) for each i below count. A team smaller than PyTorch's would end the other threads: they get nothing.
template <typename F> void in_parallel(const Shape& d, Index count, F body) {
  Index threads = std::min(threads_for(d), count);
  if (threads <= 1) {  // entering a parallel region costs as much as a small map
    for (Index i = 0; i < count; ++i) body(i);
    return;
  }
  Index share = (count + threads - 1) / threads;
#pragma omp parallel for schedule(static, share)
  for (Index i = 0; i < count; ++i) body(i);
}

template <typename F> void for_samples(const Shape& d, F body) { in_parallel(d, d.batch, body); }

// Into how many parts a sample's rows go, so that all threads get as many.
Index parts_of(const Shape& d) {
  Index threads = threads_for(d);
  return d.batch >= threads ? 1 : threads / std::gcd(threads, d.batch);
}

// Calls body(b, part, rows) for all parts of all samples, in parallel.
template <typename F> void for_parts(const Shape& d, F body) {
  Index parts = parts_of(d), rows = d.rows();
  in_parallel(d, d.batch * parts, [=](Index i) {
    Index part = i % parts;
    body(i / parts, part, Rows{rows * part / parts, rows * (part + 1) / parts});
  });
}

// Calls sum(b, rows, first, second) for all parts of all samples, in parallel. The sums are (B, C); those of some of an
// NHWC map's pixels are added up in their order.
template <typename T, typename F> void sum_parts(const Shape& d, T* first, T* second, F sum) {
  Index parts = d.nhwc ? parts_of(d) : 1, channels = d.channels;
  std::vector<T> own(parts > 1 ? 2 * d.batch * parts * channels : 0);
  T* of_part = own.data();
  for_parts(d, [=](Index b, Index part, Rows rows) {
    T* at = of_part + 2 * (b * parts + part) * channels;
    parts > 1 ? sum(b, rows, at, at + channels) : sum(b, rows, first + b * channels, second + b * channels);
  });
  if (parts == 1) return;
  std::fill_n(first, d.batch * channels, T(0));
  std::fill_n(second, d.batch * channels, T(0));
  for (Index i = 0; i < d.batch * parts; ++i)
    for (Index c = 0; c < channels; ++c) {
      first[i / parts * channels + c] += of_part[2 * i * channels + c];
      second[i / parts * channels + c] += of_part[(2 * i + 1) * channels + c];
    }
}

}  // namespace
