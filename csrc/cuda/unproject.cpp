// Unprojection in CUDA: the torch face. Checks what the kernels rely on, allocates, and launches.
#include "unproject.h"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "face.h"

namespace bkind3d {
namespace {

constexpr int64_t max_views = 255;  // counts are bytes

// Everything that forward and backward share, and the tensors that the pointers need alive.
struct Call {
  UnprojectArgs args{};
  Tensor features, q;
  std::optional<Tensor> mask, weights;
  Storage storage;
  ScalarType type, arithmetic;
};

// Whether packs of `bytes` can be read as they are: channels together, every pixel aligned.
bool in_packs(const Tensor& last, int64_t bytes, int64_t size) {
  if (reinterpret_cast<uintptr_t>(last.const_data_ptr()) % bytes) return false;
  for (int64_t i = 0; i + 1 < last.dim(); ++i)
    if (last.size(i) > 1 && last.stride(i) * size % bytes) return false;
  return true;
}

bool channels_together(const Tensor& last) {
  return last.stride(last.dim() - 1) == 1 || last.size(last.dim() - 1) == 1;
}

Call prepare(const Tensor& features, const Tensor& q, const std::optional<Tensor>& view_mask,
             const std::optional<Tensor>& view_weights, const std::vector<int64_t>& shape,
             const std::string& aggregation, const std::string& unseen, bool dense) {
  STD_TORCH_CHECK(features.dim() == 5, "features: expected (N, M, C, H, W)");
  STD_TORCH_CHECK(shape.size() == 3, "shape: expected three integers");
  Call call;
  UnprojectArgs& a = call.args;
  // Sizes and options.
  const int64_t n = features.size(0), m = features.size(1), c = features.size(2);
  const int64_t h = features.size(3), w = features.size(4), limit = int64_t(1) << 24;  // exact in float
  STD_TORCH_CHECK(1 <= m && m <= max_views && c > 0 && h > 0 && w > 0,
                  "features: expected 1 to 255 views and no empty dimension but N");
  call.type = features.scalar_type();
  call.storage = storage_of("features", features);
  call.arithmetic = arithmetic_of(call.storage);
  const int64_t size = bytes_of(call.storage);
  STD_TORCH_CHECK(n < limit && c < limit && h < limit && w < limit, "features: expected dimensions below 2^24");
  for (int64_t length : shape) STD_TORCH_CHECK(0 <= length && length < limit, "shape: expected lengths below 2^24");
  STD_TORCH_CHECK(shape[0] * shape[1] < (int64_t(1) << 31) && shape[0] * shape[1] * shape[2] < (int64_t(1) << 31),
                  "shape: too many voxels");
  a.samples = int(n), a.views = int(m), a.channels = int(c), a.height = int(h), a.width = int(w);
  a.x = int(shape[0]), a.y = int(shape[1]), a.z = int(shape[2]);
  a.aggregation = parse_aggregation(aggregation);
  a.exclude = parse_exclude(unseen);

  // Features: used as they are, or one copy.
  const Tensor maps = moved_last(features, 2);
  const bool packed = c * size % 16 == 0;
  const bool as_they_are = channels_together(maps) && (!packed || in_packs(maps, 16, size)) &&
                           (!dense || (maps.stride(3) == c && maps.stride(2) == w * c));
  call.features = as_they_are ? maps : as_contiguous(maps);
  const Tensor& f = call.features;
  const int64_t last_byte = ((h - 1) * f.stride(2) + (w - 1) * f.stride(3) + c) * size;
  STD_TORCH_CHECK(last_byte < no_pixel, "features: one map of (C, H, W) is too large for 32-bit offsets");
  a.features = static_cast<const char*>(f.const_data_ptr());
  a.stride_n = f.stride(0) * size, a.stride_m = f.stride(1) * size;
  a.stride_y = unsigned(f.stride(2)), a.stride_x = unsigned(f.stride(3));
  // Matrices, mask, weights.
  STD_TORCH_CHECK(q.dim() == 4 && q.size(0) == n && q.size(1) == m && q.size(2) == 3 && q.size(3) == 4,
                  "q: expected (N, M, 3, 4)");
  call.q = plain("q", q, call.arithmetic, n * m * 12, features);
  if (reinterpret_cast<uintptr_t>(call.q.const_data_ptr()) % 16) call.q = torch::stable::clone(call.q);
  a.q = call.q.const_data_ptr();
  if (view_mask) {
    STD_TORCH_CHECK(view_mask->scalar_type() == ScalarType::Bool && has_shape(*view_mask, {n, m}),
                    "view_mask: expected (N, M) bool");
    call.mask = plain("view_mask", *view_mask, ScalarType::Bool, n * m, features);
    a.mask = static_cast<const bool*>(call.mask->const_data_ptr());
  }
  STD_TORCH_CHECK(view_weights.has_value() == (a.aggregation == Aggregation::weighted),
                  "view_weights: expected with aggregation 'weighted' and with no other");
  if (view_weights) {
    STD_TORCH_CHECK(has_shape(*view_weights, {n, m, c}), "view_weights: expected (N, M, C)");
    call.weights = plain("view_weights", *view_weights, call.arithmetic, n * m * c, features);
    a.weights = call.weights->const_data_ptr();
  }
  return call;
}

std::tuple<Tensor, Tensor> unproject(Tensor features, Tensor q, std::optional<Tensor> view_mask,
                                     std::optional<Tensor> view_weights, std::vector<int64_t> shape,
                                     std::string aggregation, std::string unseen) {
  const Call call = prepare(features, q, view_mask, view_weights, shape, aggregation, unseen, false);
  const int64_t n = features.size(0), c = features.size(2);
  Tensor volume = empty_channels_last(features, {n, c, shape[0], shape[1], shape[2]});
  Tensor counts = empty_beside(features, {n, shape[0], shape[1], shape[2]}, ScalarType::Byte);
  const OnDevice device(volume);
  launch_unproject(device.stream(), call.args, call.storage, volume.mutable_data_ptr(),
                   static_cast<unsigned char*>(counts.mutable_data_ptr()));
  return {volume, counts};
}

std::tuple<Tensor, Tensor, Tensor> unproject_backward(Tensor grad_volume, Tensor features, Tensor q,
                                                      std::optional<Tensor> view_mask,
                                                      std::optional<Tensor> view_weights, std::vector<int64_t> shape,
                                                      std::string aggregation, std::string unseen, bool needs_features,
                                                      bool needs_q, bool needs_weights, bool deterministic) {
  const Call call = prepare(features, q, view_mask, view_weights, shape, aggregation, unseen, true);
  const UnprojectArgs& a = call.args;
  const int64_t n = a.samples, m = a.views, c = a.channels, h = a.height, w = a.width;
  STD_TORCH_CHECK(has_shape(grad_volume, {n, c, shape[0], shape[1], shape[2]}),
                  "grad_volume: expected (N, C, X, Y, Z)");
  STD_TORCH_CHECK(grad_volume.device() == features.device(), "grad_volume: expected the device of the features");
  STD_TORCH_CHECK(!needs_weights || view_weights, "needs_weights: there are no view_weights");
  grad_volume = as_type(grad_volume, call.type);
  Tensor gradient = moved_last(grad_volume, 1);
  gradient = as_contiguous(gradient);
  if (reinterpret_cast<uintptr_t>(gradient.const_data_ptr()) % 16) gradient = torch::stable::clone(gradient);

  UnprojectGradients g{};
  g.volume = gradient.const_data_ptr();
  auto zeros = [&](const std::vector<int64_t>& size, ScalarType type) { return zeros_beside(features, size, type); };
  auto empty = [&](bool wanted, const std::vector<int64_t>& size, ScalarType type) {
    return empty_beside(features, wanted ? size : std::vector<int64_t>{0}, type);
  };
  // Without samples nothing is asked of the kernels.
  const bool wants_maps = needs_features && n > 0, wants_q = needs_q && n > 0, wants_weights = needs_weights && n > 0;

  // The maps, with the channels last.
  const std::vector<int64_t> maps_size{n, m, h, w, c};
  Tensor grad_maps = needs_features && !deterministic ? zeros(maps_size, call.arithmetic)
                                                      : empty(needs_features, maps_size, call.type);
  std::optional<Tensor> fixed, largest;
  if (wants_maps && deterministic) {
    fixed = zeros(maps_size, ScalarType::Long);
    largest = zeros({n}, ScalarType::Int);
    g.fixed = static_cast<long long*>(fixed->mutable_data_ptr());
    g.largest = static_cast<unsigned*>(largest->mutable_data_ptr());
  }
  if (wants_maps) g.maps = grad_maps.mutable_data_ptr();

  // Matrices and weights, from partial sums.
  Tensor grad_q = empty(needs_q, {n, m, 3, 4}, call.arithmetic);
  Tensor grad_weights = empty(needs_weights, {n, m, c}, call.arithmetic);
  const UnprojectPartials size = unproject_partials(a, call.storage, wants_q, wants_weights);
  std::optional<Tensor> q_partials, weight_partials;
  if (wants_q) {
    q_partials = zeros({n, size.q_rows, size.q_columns}, call.arithmetic);
    g.q_partials = q_partials->mutable_data_ptr();
    g.q = grad_q.mutable_data_ptr();
  }
  if (wants_weights) {
    weight_partials = zeros({n, size.weight_rows, size.weight_columns}, call.arithmetic);
    g.weight_partials = weight_partials->mutable_data_ptr();
    g.weights = grad_weights.mutable_data_ptr();
  }

  const OnDevice device(gradient);
  launch_unproject_backward(device.stream(), a, call.storage, g);
  if (needs_features) {
    grad_maps = permuted(as_type(grad_maps, call.type), {0, 1, 4, 2, 3});
  }
  return {grad_maps, grad_q, grad_weights};
}

}  // namespace
}  // namespace bkind3d

BKIND3D_KERNELS(m) {
  m.impl("unproject", TORCH_BOX(&bkind3d::unproject));
  m.impl("unproject_backward", TORCH_BOX(&bkind3d::unproject_backward));
}
