// What operators need of PyTorch: its stable C interface, found by name when they are registered.
//
// So no header of PyTorch's is needed to compile them, and no library of its to link. Only _native.cpp includes this.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <utility>

namespace {

using Index = std::int64_t;
using Value = std::uint64_t;  // an argument or a result of an operator; a tensor by its handle, what may be missing
                              // by the address of a value or null
struct Object;
using Handle = Object*;
using Kernel = void (*)(Value* stack, std::uint64_t arguments, std::uint64_t results);

// In the order in which native.py finds them.
struct Api {
  int (*init_impl)(const char* name, const char* dispatch_key, const char* file, std::uint32_t line, void** library);
  int (*library_impl)(void* library, const char* name, Kernel kernel);
  int (*data_ptr)(Handle, void**);
  int (*dim)(Handle, Index*);
  int (*sizes)(Handle, Index**);
  int (*strides)(Handle, Index**);
  int (*dtype)(Handle, std::int32_t*);
  int (*empty_strided)(Index dim, const Index* sizes, const Index* strides, std::int32_t dtype,
                       std::int32_t device_type, std::int32_t device, Handle*);
  int (*copy)(Handle to, Handle from, std::int32_t non_blocking);
  int (*new_handle)(Handle of, Handle*);
  int (*delete_tensor)(Handle);
  int (*undefined)(Handle*);
  int (*delete_value)(Value*);  // null before PyTorch 2.13, where the operator deletes
};

Api api;

void check(int error) {
  if (error) throw std::runtime_error("timm_eca: a call of PyTorch's C interface failed.");
}

// Numbers of types, by which PyTorch's files too tell them.
enum : std::int32_t { kInt64 = 4, kFloat32 = 6, kFloat64 = 7, kBFloat16 = 15 };

// A tensor that is an operator's own: an argument, or what it makes.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(Handle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) api.delete_tensor(handle_);
  }

  static Tensor empty(Index dim, const Index* sizes, const Index* strides, std::int32_t dtype) {
    Handle made;
    check(api.empty_strided(dim, sizes, strides, dtype, 0, 0, &made));  // device 0 of type 0 is the CPU
    return Tensor(made);
  }

  static Tensor empty(std::initializer_list<Index> shape, std::int32_t dtype) {
    Index strides[8], stride = 1;
    for (Index i = Index(shape.size()); i-- > 0; stride *= shape.begin()[i]) strides[i] = stride;
    return empty(Index(shape.size()), shape.begin(), strides, dtype);
  }

  // One of another's sizes and strides.
  static Tensor like(const Tensor& other, std::int32_t dtype) {
    return empty(other.dim(), other.sizes(), other.strides(), dtype);
  }

  explicit operator bool() const { return handle_; }
  Handle release() { return std::exchange(handle_, nullptr); }

  Index dim() const {
    Index dim;
    check(api.dim(handle_, &dim));
    return dim;
  }
  const Index* sizes() const {
    Index* sizes;
    check(api.sizes(handle_, &sizes));
    return sizes;
  }
  const Index* strides() const {
    Index* strides;
    check(api.strides(handle_, &strides));
    return strides;
  }
  std::int32_t dtype() const {
    std::int32_t dtype;
    check(api.dtype(handle_, &dtype));
    return dtype;
  }
  template <typename T> T* data() const {
    if (!handle_) return nullptr;
    void* data;
    check(api.data_ptr(handle_, &data));
    return static_cast<T*>(data);
  }

  Index numel() const {
    const Index* sizes = this->sizes();
    Index count = 1;
    for (Index i = 0, dim = this->dim(); i < dim; ++i) count *= sizes[i];
    return count;
  }

  // Whether the elements lie side by side, in the order of the dimensions given.
  bool is_dense(std::initializer_list<Index> order) const {
    const Index *sizes = this->sizes(), *strides = this->strides();
    Index stride = 1;
    for (auto i = order.end(); i-- != order.begin(); stride *= sizes[*i])
      if (sizes[*i] != 1 && strides[*i] != stride) return false;
    return true;
  }

  bool is_contiguous() const {
    const Index *sizes = this->sizes(), *strides = this->strides();
    Index stride = 1;
    for (Index i = dim(); i-- > 0; stride *= sizes[i])
      if (sizes[i] != 1 && strides[i] != stride) return false;
    return true;
  }

  void copy(const Tensor& from) { check(api.copy(handle_, from.handle_, 0)); }

  // A contiguous copy in a type.
  Tensor to(std::int32_t dtype) const {
    Index strides[8], stride = 1;
    for (Index i = dim(); i-- > 0; stride *= sizes()[i]) strides[i] = stride;
    Tensor copy = empty(dim(), sizes(), strides, dtype);
    copy.copy(*this);
    return copy;
  }

  // The same tensor, held once more.
  Tensor same() const {
    Handle same;
    check(api.new_handle(handle_, &same));
    return Tensor(same);
  }

 private:
  Handle handle_ = nullptr;
};

// An operator's arguments, taken in their order, and its results, given in theirs.
class Stack {
 public:
  explicit Stack(Value* values) : next_(values), given_(values) {}

  Tensor tensor() { return Tensor(as<Handle>(*next_++)); }
  Tensor optional() {
    Value* value = as<Value*>(*next_++);
    if (!value) return Tensor();
    Tensor tensor(as<Handle>(*value));
    if (api.delete_value)
      api.delete_value(value);
    else
      delete value;
    return tensor;
  }
  double number() { return as<double>(*next_++); }
  Index integer() { return as<Index>(*next_++); }
  bool flag() { return as<bool>(*next_++); }

  void give(bool value) { *given_++ = value; }
  // None where there is no tensor: an empty one takes as long to make as any.
  void give(Tensor tensor) {
    Handle handle = tensor.release();
    if (!handle) check(api.undefined(&handle));
    *given_++ = reinterpret_cast<Value>(handle);
  }
  // For graphs, whose operators cannot return None.
  void give_or_empty(Tensor tensor, std::int32_t dtype) {
    give(tensor ? std::move(tensor) : Tensor::empty({0}, dtype));
  }

 private:
  template <typename T> static T as(Value value) {
    T result;
    std::memcpy(&result, &value, sizeof result);
    return result;
  }

  Value *next_, *given_;
};

}  // namespace
