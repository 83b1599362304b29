// What the torch faces of all operations read from their arguments alike, on both devices: dtypes, shapes, maps and
// names of options. The one header of this folder that knows torch; loops and kernels do not include it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "storage.h"
#include "unproject.h"

namespace bkind3d {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Storage storage_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
}

inline bool is_double(Storage storage) { return storage == Storage::float64; }

inline ScalarType arithmetic_of(Storage storage) { return is_double(storage) ? ScalarType::Double : ScalarType::Float; }

inline int64_t bytes_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

inline Aggregation parse_aggregation(const std::string& name) {
  constexpr const char* names[] = {"softmax", "mean", "sum", "max", "weighted"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<Aggregation>(i);
  STD_TORCH_CHECK(false, "aggregation '", name, "': expected softmax, mean, sum, max or weighted");
}

// Of the option `unseen`: whether views that do not see a voxel are left out.
inline bool parse_exclude(const std::string& name) {
  STD_TORCH_CHECK(name == "zero" || name == "exclude", "unseen '", name, "': expected zero or exclude");
  return name == "exclude";
}

// Of the option `activation`: whether there is one.
inline bool parse_relu(const std::string& name) {
  STD_TORCH_CHECK(name == "relu" || name == "none", "activation '", name, "': expected relu or none");
  return name == "relu";
}

inline bool has_shape(const Tensor& tensor, const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  return std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end());
}

// ---- tensors that are made ----
//
// By functions of the shim, and only where there is something to make: those of torch::stable go by name through the
// dispatcher, for a microsecond or two, which is what counts where a problem is small.

inline Tensor empty_beside(const Tensor& like, const std::vector<int64_t>& size, ScalarType type) {
  int32_t number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), size.data(), static_cast<int64_t>(size.size()),
                                                          &number, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

inline Tensor empty_beside(const Tensor& like, const std::vector<int64_t>& size) {
  return empty_beside(like, size, like.scalar_type());
}

inline Tensor zeros_beside(const Tensor& like, const std::vector<int64_t>& size, ScalarType type) {
  int32_t number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_zeros(like.get(), size.data(), static_cast<int64_t>(size.size()),
                                                          &number, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

// The same memory with its dimensions in another order.
inline Tensor permuted(const Tensor& tensor, const std::vector<int64_t>& order) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<int64_t> size, stride;
  for (const int64_t i : order) size.push_back(sizes[i]), stride.push_back(strides[i]);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(order.size()),
                                                               size.data(), stride.data(), 0, &made));
  return Tensor(made);
}

// Dimension `from` moved to the end.
inline Tensor moved_last(const Tensor& tensor, int64_t from) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (i != from) order.push_back(i);
  order.push_back(from);
  return permuted(tensor, order);
}

// New (N, C, ...) in the dtype of `like`, with the channels last in memory.
inline Tensor empty_channels_last(const Tensor& like, const std::vector<int64_t>& size) {
  std::vector<int64_t> last{size[0]}, order{0, int64_t(size.size()) - 1};
  for (size_t i = 2; i < size.size(); ++i) last.push_back(size[i]), order.push_back(int64_t(i) - 1);
  last.push_back(size[1]);
  return permuted(empty_beside(like, last), order);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor as_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// (N, C, ...) with the channels last in memory, as it is or a copy.
inline Tensor as_channels_last(const Tensor& x) {
  using torch::headeronly::MemoryFormat;
  if (moved_last(x, 1).is_contiguous()) return x;
  return torch::stable::contiguous(x, x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
}

// A map in the shape and dtype of x and beside it, channels-last.
inline Tensor map_like(const char* name, const Tensor& tensor, const Tensor& x) {
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(
      has_shape(tensor, std::vector<int64_t>(sizes.begin(), sizes.end())) && tensor.scalar_type() == x.scalar_type(),
      name, ": expected the shape and dtype of x");
  STD_TORCH_CHECK(tensor.device() == x.device(), name, ": expected the device of the other arguments");
  return as_channels_last(tensor);
}

}  // namespace bkind3d
