// The passes of a fused tail as operators of PyTorch, `torch.ops.timm_eca`, for CPUs. native.py has their schemas.
//
// _passes.h and _pooled.h have what they compute, _torch.h what they need of PyTorch. No header of Python's or
// PyTorch's is needed.

#include <algorithm>
#include <cmath>
#include <vector>

#include "_passes.h"
#include "_pooled.h"
#include "_torch.h"

extern "C" int omp_get_max_threads();  // of the OpenMP runtime that PyTorch has loaded

namespace {

template <typename T> constexpr std::int32_t kType = 0;
template <> constexpr std::int32_t kType<float> = kFloat32;
template <> constexpr std::int32_t kType<double> = kFloat64;
template <> constexpr std::int32_t kType<BFloat16> = kBFloat16;

// Calls run(M(), T()) with the type of a map's elements and that of its vectors. Returns false for other types.
template <typename F> bool by_type(const Tensor& map, F run) {
  switch (map.dtype()) {
    case kFloat32: return run(float(), float());
    case kFloat64: return run(double(), double());
    case kBFloat16: return run(BFloat16(), float());
    default: return false;
  }
}

// ---- arguments ----

bool is_nchw(const Tensor& map) { return map.is_dense({0, 1, 2, 3}); }
bool is_nhwc(const Tensor& map) { return map.is_dense({0, 2, 3, 1}); }
bool is_map(const Tensor& t) { return t.dim() == 4 && t.numel() && (is_nchw(t) || is_nhwc(t)); }

Shape shape_of(const Tensor& map) {
  const Index* sizes = map.sizes();
  return {sizes[0], sizes[1], sizes[2] * sizes[3], !is_nchw(map), omp_get_max_threads()};
}

// Has a map laid out as another, of the same sizes and type. Returns false where it has others.
bool lay_out(Tensor& map, const Tensor& like) {
  const Index *own = map.sizes(), *sizes = like.sizes();
  std::int32_t dtype = like.dtype();
  if (map.dim() != 4 || !std::equal(own, own + 4, sizes) || map.dtype() != dtype) return false;
  if (!(is_nchw(like) ? is_nchw(map) : is_nhwc(map))) {
    Tensor copy = Tensor::like(like, dtype);
    copy.copy(map);
    map = std::move(copy);
  }
  return true;
}

// Returns a vector's elements in a type; it becomes a copy where it has another or they are not side by side.
template <typename T> T* elements(Tensor& t) {
  if (t && !(t.dtype() == kType<T> && t.is_contiguous())) t = t.to(kType<T>);
  return t.data<T>();
}

// Whether a vector, if there is one, has so many elements, of a type that a map may come with.
template <typename M, typename T> bool is_vector(const Tensor& t, Index count) {
  if (!t) return true;
  std::int32_t dtype = t.dtype();
  return t.dim() <= 3 && t.numel() == count && (dtype == kType<T> || dtype == kType<M>);
}

// The vectors that all operators take.
struct Vectors {
  Tensor gamma, beta, kernel, mean, var, drop;

  static Vectors read(Stack& s) {
    return {s.optional(), s.optional(), s.optional(), s.optional(), s.optional(), s.optional()};
  }

  template <typename M, typename T> bool fit(const Shape& d) const {
    for (const Tensor* t : {&gamma, &beta, &mean, &var})
      if (!is_vector<M, T>(*t, d.channels)) return false;
    if (bool(mean) != bool(var)) return false;
    return is_vector<M, T>(drop, d.batch) && (!kernel || is_vector<M, T>(kernel, kernel.numel()));
  }

  template <typename T> Weights<T> weights(double eps) {
    const T *g = elements<T>(gamma), *b = elements<T>(beta), *k = elements<T>(kernel);
    return {g, b, k, elements<T>(mean), elements<T>(var), elements<T>(drop), kernel ? kernel.numel() : 0, T(eps)};
  }
};

// Statistics that are updated, in whatever type they are kept.
struct Running {
  Tensor mean, var, seen;

  static Running read(Stack& s) { return {s.optional(), s.optional(), s.optional()}; }

  template <typename M, typename T> bool fit(const Shape& d) const {
    bool counts = !seen || (seen.numel() == 1 && seen.dtype() == kInt64);
    return counts && bool(mean) == bool(var) && is_vector<M, T>(mean, d.channels) && is_vector<M, T>(var, d.channels);
  }

  // By the moments of a batch; a factor that is no number is one over the batches seen.
  template <typename T> void update(const Shape& d, const T* batch_mean, const T* batch_var, double factor) {
    Index batches = seen ? ++*seen.data<Index>() : 0;
    if (!mean) return;
    if (std::isnan(factor)) factor = batches ? 1.0 / double(batches) : 0.0;
    Tensor kept_mean = mean.same(), kept_var = var.same();
    T *own_mean = elements<T>(kept_mean), *own_var = elements<T>(kept_var);
    update_running(d, batch_mean, batch_var, own_mean, own_var, factor);
    if (own_mean != mean.data<T>()) mean.copy(kept_mean);
    if (own_var != var.data<T>()) var.copy(kept_var);
  }
};

// The gradients of gamma, beta and the kernel, which are given in their types.
struct Gradients {
  Tensor gamma, beta, kernel;

  explicit Gradients(const Vectors& of)
      : types_{of.gamma ? of.gamma.dtype() : 0, of.beta ? of.beta.dtype() : 0, of.kernel ? of.kernel.dtype() : 0} {}

  void make(Index channels, Index size, std::int32_t dtype) {
    gamma = Tensor::empty({channels}, dtype), beta = Tensor::empty({channels}, dtype);
    if (size) kernel = Tensor::empty({1, 1, size}, dtype);
  }

  void give(Stack& s) {
    const std::int32_t* type = types_;
    for (Tensor* t : {&gamma, &beta, &kernel}) {
      s.give(*t && *type && *type != t->dtype() ? t->to(*type) : std::move(*t));
      ++type;
    }
  }

 private:
  std::int32_t types_[3];
};

// ---- operators ----

void infer(Value* stack, std::uint64_t, std::uint64_t) {
  Stack s(stack);
  Tensor z = s.tensor(), shortcut = s.optional();
  Vectors own = Vectors::read(s);
  Tensor pooled = s.optional();
  Tensor other_gamma = s.optional(), other_beta = s.optional(), other_mean = s.optional(), other_var = s.optional();
  double eps = s.number(), other_eps = s.number();
  Act act = Act(s.integer());
  s.give(by_type(z, [&](auto m, auto t) {
    using M = decltype(m);
    using T = decltype(t);
    if (!is_map(z)) return false;
    Shape d = shape_of(z);
    for (const Tensor* v : {&other_gamma, &other_beta, &other_mean, &other_var})
      if (!is_vector<M, T>(*v, d.channels)) return false;
    if (!own.fit<M, T>(d) || !own.mean || bool(other_mean) != bool(other_var)) return false;
    if (!is_vector<M, T>(pooled, d.batch * d.channels)) return false;
    if (shortcut && !lay_out(shortcut, z)) return false;
    Other<M, T> other{shortcut.data<M>(), elements<T>(other_gamma), elements<T>(other_beta), elements<T>(other_mean),
                      elements<T>(other_var), T(other_eps)};
    Weights<T> w = own.weights<T>(eps);
    std::vector<T> unkept(pooled || !own.kernel ? 0 : d.batch * d.channels);
    T* means = pooled ? elements<T>(pooled) : unkept.data();
    forward<M, T>(d, z.data<M>(), other, z.data<M>(), w, nullptr, nullptr, means, nullptr, nullptr,
                  pooled ? Read::kNothing : Read::kPool, act);
    return true;
  }));
}

// Runs an operator in a graph, whose maps may be laid out as a compiler has chosen, on one that it takes.
template <typename F> void on_dense(Value* stack, const char* refusal, F run) {
  Tensor z = Tensor(reinterpret_cast<Handle>(stack[0])), dense = is_map(z) ? z.same() : z.to(z.dtype());
  bool apart = dense.data<void>() != z.data<void>();
  stack[0] = reinterpret_cast<Value>(dense.same().release());
  if (!run()) throw std::runtime_error(refusal);
  if (apart) z.copy(dense);
}

void graph_infer(Value* stack, std::uint64_t arguments, std::uint64_t) {
  on_dense(stack, "timm_eca::graph_infer_ takes float32, float64 and bfloat16.", [=] {
    infer(stack, arguments, 1);
    return Stack(stack).flag();
  });
}

// In place. Returns the mean of what the convolution after it makes, or nothing where such tensors are not taken.
void norm_pool(Value* stack, std::uint64_t, std::uint64_t) {
  Stack s(stack);
  Tensor z = s.tensor();
  Vectors own;
  for (Tensor* t : {&own.gamma, &own.beta, &own.mean, &own.var}) *t = s.optional();
  double eps = s.number();
  Act act = Act(s.integer());
  Tensor weight = s.tensor(), bias = s.optional(), pooled;
  by_type(z, [&](auto m, auto t) {
    using M = decltype(m);
    using T = decltype(t);
    if (!is_map(z) || weight.dtype() != z.dtype() || z.dtype() != kType<T> || weight.dim() != 4) return false;
    Shape d = shape_of(z);
    const Index* sizes = weight.sizes();
    Index made = sizes[0], size = sizes[2];
    if (sizes[1] != d.channels || sizes[3] != size || (size != 1 && size != 3)) return false;
    if (!own.fit<M, T>(d) || !own.mean || !own.var || !is_vector<M, T>(bias, made)) return false;
    bool nhwc = is_nhwc(weight);
    if (!nhwc && !is_nchw(weight)) return false;
    pooled = Tensor::empty({d.batch, made}, kType<T>);
    Conv<T> conv{weight.data<T>(), elements<T>(bias), made, size, z.sizes()[3], nhwc};
    norm_pool(d, z.data<M>(), own.weights<T>(eps), conv, pooled.data<T>(), act);
    return true;
  });
  s.give_or_empty(std::move(pooled), z.dtype());
}

void graph_norm_pool(Value* stack, std::uint64_t arguments, std::uint64_t) {
  on_dense(stack, "timm_eca::graph_norm_pool_ takes float32 or float64, and weights of that type.", [=] {
    norm_pool(stack, arguments, 1);
    Tensor pooled = Stack(stack).tensor();
    bool taken = pooled.numel();
    stack[0] = reinterpret_cast<Value>(pooled.release());
    return taken;
  });
}

void tail(Value* stack, std::uint64_t, std::uint64_t) {
  Stack s(stack);
  Tensor z = s.tensor(), shortcut = s.optional();
  Vectors own = Vectors::read(s);
  Running running = Running::read(s);
  double factor = s.number(), eps = s.number();
  Act act = Act(s.integer());
  bool inplace = s.flag(), of_batch = !own.mean;
  Tensor out, pooled, mean, var;
  bool taken = by_type(z, [&](auto m, auto t) {
    using M = decltype(m);
    using T = decltype(t);
    if (!is_map(z)) return false;
    Shape d = shape_of(z);
    if (of_batch && d.batch * d.area == 1) return false;  // batch norm has its own error for a single value
    if (!own.fit<M, T>(d) || !running.fit<M, T>(d) || (shortcut && !lay_out(shortcut, z))) return false;
    if (!inplace) out = Tensor::like(z, kType<M>);
    if (own.kernel) pooled = Tensor::empty({d.batch, d.channels}, kType<T>);
    std::vector<T> unkept(own.kernel ? 0 : d.batch * d.channels);
    T* means = own.kernel ? pooled.data<T>() : unkept.data();
    Weights<T> w = own.weights<T>(eps);
    if (of_batch) {
      mean = Tensor::empty({d.channels}, kType<T>), var = Tensor::empty({d.channels}, kType<T>);
      w.mean = mean.data<T>(), w.var = var.data<T>();
    }
    forward<M, T>(d, z.data<M>(), {shortcut.data<M>()}, (inplace ? z : out).data<M>(), w, mean.data<T>(), var.data<T>(),
                  means, nullptr, nullptr, of_batch ? Read::kMoments : Read::kPool, act);
    running.update(d, w.mean, w.var, factor);
    return true;
  });
  s.give(taken);
  for (Tensor* t : {&out, &pooled, &mean, &var}) s.give(std::move(*t));
}

void tail_backward(Value* stack, std::uint64_t, std::uint64_t) {
  Stack s(stack);
  Tensor grad = s.tensor(), out = s.optional(), z = s.tensor(), pooled = s.optional();
  Vectors own = Vectors::read(s);
  double eps = s.number();
  Act act = Act(s.integer());
  bool of_batch = s.flag(), for_z = s.flag();
  Gradients of(own);
  Tensor masked, dz;
  bool taken = by_type(z, [&](auto m, auto t) {
    using M = decltype(m);
    using T = decltype(t);
    if (!is_map(z)) z = z.to(kType<M>);  // a hook on saved tensors may have laid it out anew
    if (!lay_out(grad, z) || (out && !lay_out(out, z))) return false;
    Shape d = shape_of(z);
    if (for_z) dz = Tensor::like(z, kType<M>);
    if (out) masked = for_z && !own.kernel ? dz.same() : Tensor::like(z, kType<M>);
    Weights<T> w = own.weights<T>(eps);
    of.make(d.channels, w.size, kType<T>);
    backward<M, T>(d, grad.data<M>(), out.data<M>(), z.data<M>(), out ? masked.data<M>() : grad.data<M>(),
                   dz.data<M>(), w, elements<T>(pooled), of.gamma.data<T>(), of.beta.data<T>(), of.kernel.data<T>(),
                   nullptr, nullptr, nullptr, nullptr, of_batch, act);
    return true;
  });
  if (!taken) throw std::runtime_error("timm_eca: a tail's gradient has another shape or type than its map.");
  if (!own.kernel) masked = Tensor();
  s.give(std::move(dz)), s.give(std::move(masked));
  of.give(s);
}

void gains(Value* stack, std::uint64_t, std::uint64_t) {
  Stack s(stack);
  Tensor z = s.tensor();
  Vectors own = Vectors::read(s);
  double eps = s.number();
  bool of_batch = !own.mean;
  Tensor pooled, mean, var, scale, offset;
  bool taken = by_type(z, [&](auto m, auto t) {
    using M = decltype(m);
    using T = decltype(t);
    if (z.dim() != 4) return false;
    if (!is_map(z)) z = z.to(kType<M>);
    Shape d = shape_of(z);
    if (!own.fit<M, T>(d)) return false;
    for (Tensor* v : {&pooled, &scale, &offset}) *v = Tensor::empty({d.batch, d.channels}, kType<T>);
    Weights<T> w = own.weights<T>(eps);
    if (of_batch) {
      mean = Tensor::empty({d.channels}, kType<T>), var = Tensor::empty({d.channels}, kType<T>);
      w.mean = mean.data<T>(), w.var = var.data<T>();
    }
    forward<M, T>(d, z.data<M>(), {}, nullptr, w, mean.data<T>(), var.data<T>(), pooled.data<T>(), scale.data<T>(),
                  offset.data<T>(), of_batch ? Read::kMoments : Read::kPool, Act::kNone);
    return true;
  });
  if (!taken) throw std::runtime_error("timm_eca::gains takes float32, float64 and bfloat16.");
  std::int32_t dtype = pooled.dtype();
  for (Tensor* t : {&pooled, &mean, &var, &scale, &offset}) s.give_or_empty(std::move(*t), dtype);
}

void gains_backward(Value* stack, std::uint64_t, std::uint64_t) {
  Stack s(stack);
  Tensor dots = s.tensor(), total = s.tensor(), pooled = s.tensor();
  Vectors own = Vectors::read(s);
  double eps = s.number();
  Index area = s.integer();
  bool of_batch = s.flag();
  Gradients of(own);
  Tensor shift, slope;
  bool taken = by_type(pooled, [&](auto, auto t) {
    using T = decltype(t);
    Shape d{pooled.sizes()[0], pooled.sizes()[1], area, false, omp_get_max_threads()};
    Tensor dot, scale;
    for (Tensor* v : {&dot, &scale, &shift}) *v = Tensor::empty({d.batch, d.channels}, kType<T>);
    slope = Tensor::empty({d.channels}, kType<T>);
    dot.copy(dots), shift.copy(total);
    Weights<T> w = own.weights<T>(eps);
    of.make(d.channels, w.size, kType<T>);
    backward<T, T>(d, nullptr, nullptr, nullptr, nullptr, nullptr, w, elements<T>(pooled), of.gamma.data<T>(),
                   of.beta.data<T>(), of.kernel.data<T>(), dot.data<T>(), shift.data<T>(), scale.data<T>(),
                   slope.data<T>(), of_batch, Act::kNone);
    return true;
  });
  if (!taken) throw std::runtime_error("timm_eca::gains_backward takes float32 and float64.");
  s.give(std::move(shift)), s.give(std::move(slope)), of.give(s);
}

}  // namespace

// What native.py's schemas are to be: the same number is there, and grows with each change of what operators take.
extern "C" int timm_eca_interface() { return 4; }

// Makes the operators' kernels known to PyTorch, which has their schemas. Returns whether it took them.
extern "C" bool timm_eca_register(const Api* found) {
  api = *found;
  void* library;  // stays: PyTorch forgets the kernels when it goes
  if (api.init_impl("timm_eca", "CPU", "_native.cpp", 0, &library)) return false;
  struct { const char* name; Kernel kernel; } operators[] = {
      {"infer_", infer}, {"graph_infer_", graph_infer}, {"norm_pool_", norm_pool},
      {"graph_norm_pool_", graph_norm_pool}, {"tail", tail}, {"tail_backward", tail_backward},
      {"gains", gains}, {"gains_backward", gains_backward}};
  for (auto& own : operators)
    if (api.library_impl(library, own.name, own.kernel)) return false;
  return true;
}
