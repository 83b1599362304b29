// What the torch faces of all operations read from their arguments alike, on both devices: dtypes, shapes, maps and
// names of options. The one header of this folder that knows torch; loops and kernels do not include it.
#pragma once

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

inline torch::headeronly::MemoryFormat channels_last_of(const Tensor& x) {
  using torch::headeronly::MemoryFormat;
  return x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// A map in the shape and dtype of x and beside it, channels-last.
inline Tensor map_like(const char* name, const Tensor& tensor, const Tensor& x) {
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(
      has_shape(tensor, std::vector<int64_t>(sizes.begin(), sizes.end())) && tensor.scalar_type() == x.scalar_type(),
      name, ": expected the shape and dtype of x");
  STD_TORCH_CHECK(tensor.device() == x.device(), name, ": expected the device of the other arguments");
  return torch::stable::contiguous(tensor, channels_last_of(x));
}

// Dimension `from` moved to the end.
inline Tensor moved_last(Tensor tensor, int64_t from) {
  for (; from + 1 < tensor.dim(); ++from) tensor = torch::stable::transpose(tensor, from, from + 1);
  return tensor;
}

}  // namespace bkind3d
