// Unprojection on the CPU: the torch face. Checks what the loops rely on, allocates, and hands out the work.
#include "unproject.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/options.h"
#include "memory.h"
#include "threads.h"

namespace bkind3d {
namespace {

constexpr int64_t small_work = 1 << 15;  // samples of one channel: less is not worth a second thread
constexpr int64_t rows_at_once = 8;
constexpr int64_t max_views = 255;       // counts are bytes
constexpr int64_t max_length = 1 << 24;  // exact in float
constexpr int64_t max_slabs = 8;

Tensor as(const Tensor& tensor, ScalarType type) { return as_contiguous(as_type(tensor, type)); }

// Whether offsets within one map fit 31 bits.
bool spans_31_bits(const Tensor& maps) {
  return (maps.size(2) - 1) * maps.stride(2) + (maps.size(3) - 1) * maps.stride(3) + maps.size(4) < (int64_t(1) << 31);
}

// Everything that forward and backward share, and the tensors that the pointers need alive.
struct Call {
  UnprojectArgs args{};
  Tensor features, q;
  std::optional<Tensor> mask, weights;
  ScalarType type, arithmetic;
};

Call prepare(const Tensor& features, const Tensor& q, const std::optional<Tensor>& view_mask,
             const std::optional<Tensor>& view_weights, const std::vector<int64_t>& shape,
             const std::string& aggregation, const std::string& unseen, bool dense) {
  STD_TORCH_CHECK(features.dim() == 5, "features: expected (N, M, C, H, W)");
  STD_TORCH_CHECK(shape.size() == 3, "shape: expected three integers");
  Call call;
  UnprojectArgs& a = call.args;
  const auto sizes = features.sizes();
  a.samples = sizes[0], a.views = sizes[1], a.channels = sizes[2], a.height = sizes[3], a.width = sizes[4];
  STD_TORCH_CHECK(1 <= a.views && a.views <= max_views && a.channels > 0 && a.height > 0 && a.width > 0,
                  "features: expected 1 to 255 views and no empty dimension but N");
  STD_TORCH_CHECK(q.dim() == 4 && q.size(0) == a.samples && q.size(1) == a.views && q.size(2) == 3 && q.size(3) == 4,
                  "q: expected (N, M, 3, 4)");
  for (int64_t length : shape)
    STD_TORCH_CHECK(0 <= length && length < max_length, "shape: expected lengths below 2^24");
  std::copy(shape.begin(), shape.end(), a.shape);
  a.aggregation = parse_aggregation(aggregation);
  a.exclude = parse_exclude(unseen);
  call.type = features.scalar_type();
  a.storage = storage_of("features", features);
  call.arithmetic = arithmetic_of(a.storage);

  // Used as they are when the channels lie together in the type of the arithmetic; else one copy, as small as the maps.
  Tensor maps = moved_last(features, 2);
  const bool fits = call.type == call.arithmetic && (maps.stride(4) == 1 || a.channels == 1) && spans_31_bits(maps) &&
                    (!dense || (maps.stride(3) == a.channels && maps.stride(2) == a.width * a.channels));
  call.features = fits ? maps : as(maps, call.arithmetic);
  a.features = call.features.const_data_ptr();
  a.stride_n = call.features.stride(0), a.stride_m = call.features.stride(1);
  a.stride_y = call.features.stride(2), a.stride_x = call.features.stride(3);
  STD_TORCH_CHECK(spans_31_bits(call.features) && std::max(a.height, a.width) < max_length,
                  "features: one map of (C, H, W) is too large for 32-bit offsets");
  call.q = as(q, call.arithmetic);
  a.q = call.q.const_data_ptr();
  if (view_mask) {
    STD_TORCH_CHECK(view_mask->scalar_type() == ScalarType::Bool && has_shape(*view_mask, {a.samples, a.views}),
                    "view_mask: expected (N, M) bool");
    call.mask = as_contiguous(*view_mask);
    a.mask = static_cast<const bool*>(call.mask->const_data_ptr());
  }
  STD_TORCH_CHECK(view_weights.has_value() == (a.aggregation == Aggregation::weighted),
                  "view_weights: expected with aggregation 'weighted' and with no other");
  if (view_weights) {
    STD_TORCH_CHECK(has_shape(*view_weights, {a.samples, a.views, a.channels}), "view_weights: expected (N, M, C)");
    call.weights = as(*view_weights, call.arithmetic);
    a.weights = call.weights->const_data_ptr();
  }
  return call;
}

int64_t voxels(const UnprojectArgs& a) { return a.shape[0] * a.shape[1] * a.shape[2]; }

bool is_small(const UnprojectArgs& a) { return a.samples * voxels(a) * a.views * a.channels < small_work; }

std::tuple<Tensor, Tensor> unproject(Tensor features, Tensor q, std::optional<Tensor> view_mask,
                                     std::optional<Tensor> view_weights, std::vector<int64_t> shape,
                                     std::string aggregation, std::string unseen) {
  Call call = prepare(features, q, view_mask, view_weights, shape, aggregation, unseen, false);
  UnprojectArgs& a = call.args;
  const std::vector<int64_t> size{a.samples, a.channels, shape[0], shape[1], shape[2]};
  Tensor volume = empty_channels_last(features, size);
  Tensor counts = empty_beside(features, {a.samples, shape[0], shape[1], shape[2]}, ScalarType::Byte);
  a.volume = volume.mutable_data_ptr();
  a.counts = static_cast<unsigned char*>(counts.mutable_data_ptr());
  advise_huge_pages(a.volume, volume.numel() * bytes_of(a.storage));
  const UnprojectLoops& loops = unproject_loops();
  const int64_t rows = a.samples * shape[0] * shape[1], groups = ceil_divide(rows, rows_at_once);
  for_each(groups, is_small(a), loops.scratch(a, false), [&](int64_t group, void* scratch) {
    loops.forward(a, group * rows_at_once, std::min(rows, (group + 1) * rows_at_once), scratch);
  });
  return {volume, counts};
}

// Threads share the work by samples and channels, where no two add to the same gradient. Only where that is not enough
// are the rows cut into slabs with gradients of their own, which are added up in order at the end: a few, and only
// where the voxels are many more than the pixels that each further slab has to clear and add. So the result depends on
// the number of threads, though never on their timing; `deterministic` fixes the partition as well.
void partition(UnprojectArgs& a, bool deterministic) {
  constexpr int64_t widest = 64, narrowest = 16;
  const int64_t threads = is_small(a) ? 1 : torch::stable::get_num_threads();
  auto tasks = [&] { return a.samples * ceil_divide(a.channels, a.channel_block); };
  a.channel_block = std::min<int64_t>(a.channels, deterministic ? narrowest : widest);
  while (a.channel_block > narrowest && tasks() < threads)
    a.channel_block = ceil_divide(a.channel_block / 2, narrowest) * narrowest;
  a.slabs = 1;
  if (!deterministic && tasks() > 0 && tasks() < threads)
    a.slabs = std::min<int64_t>({ceil_divide(threads, tasks()), a.shape[0] * a.shape[1], max_slabs,
                                 std::max<int64_t>(1, 4 * voxels(a) / (a.height * a.width))});
}

template <class T>
void add_slabs(T* gradient, int64_t count, int64_t slabs) {
  torch::stable::parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t slab = 1; slab < slabs; ++slab)
      for (int64_t i = begin; i < end; ++i) gradient[i] += gradient[slab * count + i];
  });
}

// Partial sums of the tasks of one sample, added in the order of the tasks.
template <class T>
void add_matrices(const UnprojectArgs& a, const std::vector<double>& partial, int64_t tasks, T* gradient) {
  const int64_t size = a.views * 12, per_sample = a.samples ? tasks / a.samples : 0;
  for (int64_t n = 0; n < a.samples; ++n)
    for (int64_t e = 0; e < size; ++e) {
      double total = 0;
      for (int64_t t = 0; t < per_sample; ++t) total += partial[(n * per_sample + t) * size + e];
      gradient[n * size + e] = static_cast<T>(total);
    }
}

template <class T>
void add_weights(const UnprojectArgs& a, const std::vector<double>& partial, T* gradient) {
  const int64_t blocks = ceil_divide(a.channels, a.channel_block);
  for (int64_t n = 0; n < a.samples; ++n)
    for (int64_t m = 0; m < a.views; ++m)
      for (int64_t c = 0; c < a.channels; ++c) {
        double total = 0;
        for (int64_t slab = 0; slab < a.slabs; ++slab) {
          const int64_t task = (n * blocks + c / a.channel_block) * a.slabs + slab;
          total += partial[(task * a.views + m) * a.channel_block + c % a.channel_block];
        }
        gradient[(n * a.views + m) * a.channels + c] = static_cast<T>(total);
      }
}

std::tuple<Tensor, Tensor, Tensor> unproject_backward(Tensor grad_volume, Tensor features, Tensor q,
                                                      std::optional<Tensor> view_mask,
                                                      std::optional<Tensor> view_weights, std::vector<int64_t> shape,
                                                      std::string aggregation, std::string unseen, bool needs_features,
                                                      bool needs_q, bool needs_weights, bool deterministic) {
  Call call = prepare(features, q, view_mask, view_weights, shape, aggregation, unseen, true);
  UnprojectArgs& a = call.args;
  STD_TORCH_CHECK(has_shape(grad_volume, {a.samples, a.channels, shape[0], shape[1], shape[2]}),
                  "grad_volume: expected (N, C, X, Y, Z)");
  STD_TORCH_CHECK(!needs_weights || view_weights, "needs_weights: there are no view_weights");
  grad_volume = as_type(grad_volume, call.type);
  a.grad_volume = grad_volume.const_data_ptr();
  for (int i = 0; i < 5; ++i) a.grad_stride[i] = grad_volume.stride(i);
  partition(a, deterministic);

  const int64_t tasks = a.samples * ceil_divide(a.channels, a.channel_block) * a.slabs;
  Tensor grad_features = empty_beside(features, {0}), accumulator = grad_features;
  if (needs_features) {
    const std::vector<int64_t> size{a.slabs * a.samples, a.views, a.height, a.width, a.channels};
    accumulator = zeros_beside(features, size, call.arithmetic);
    a.grad_features = accumulator.mutable_data_ptr();
  }
  std::vector<double> partial_q(needs_q ? tasks * a.views * 12 : 0);
  std::vector<double> partial_weights(needs_weights ? tasks * a.views * a.channel_block : 0);
  a.grad_q = needs_q ? partial_q.data() : nullptr;
  a.grad_weights = needs_weights ? partial_weights.data() : nullptr;

  const UnprojectLoops& loops = unproject_loops();
  if (voxels(a) > 0)
    for_each(tasks, is_small(a), loops.scratch(a, true),
             [&](int64_t task, void* scratch) { loops.backward(a, task, scratch); });

  if (needs_features) {
    const int64_t count = a.samples * a.views * a.height * a.width * a.channels;
    by_arithmetic(is_double(a.storage),
                  [&](auto number) { add_slabs(static_cast<decltype(number)*>(a.grad_features), count, a.slabs); });
    if (a.slabs > 1) accumulator = torch::stable::clone(torch::stable::narrow(accumulator, 0, 0, a.samples));
    grad_features = permuted(as_type(accumulator, call.type), {0, 1, 4, 2, 3});
  }
  Tensor grad_q = empty_beside(call.q, {0}), grad_weights = empty_beside(call.q, {0});
  if (needs_q) {
    grad_q = empty_beside(call.q, {a.samples, a.views, 3, 4});
    by_arithmetic(is_double(a.storage), [&](auto number) {
      add_matrices(a, partial_q, tasks, static_cast<decltype(number)*>(grad_q.mutable_data_ptr()));
    });
  }
  if (needs_weights) {
    grad_weights = empty_beside(call.q, {a.samples, a.views, a.channels});
    by_arithmetic(is_double(a.storage), [&](auto number) {
      add_weights(a, partial_weights, static_cast<decltype(number)*>(grad_weights.mutable_data_ptr()));
    });
  }
  return {grad_features, grad_q, grad_weights};
}

}  // namespace
}  // namespace bkind3d

STABLE_TORCH_LIBRARY_IMPL(bkind3d, CPU, m) {
  m.impl("unproject", TORCH_BOX(&bkind3d::unproject));
  m.impl("unproject_backward", TORCH_BOX(&bkind3d::unproject_backward));
}
