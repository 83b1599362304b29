// Group normalisation with a residual and a ReLU on the CPU: the torch face. Divides the work, and merges what the
// slabs of each sample give.
#include "group_norm_act.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/group_norm_act.h"
#include "../common/options.h"
#include "memory.h"
#include "threads.h"

namespace bkind3d {
namespace {

constexpr int64_t block_rows = 128;          // at most, summed in the type of the arithmetic
constexpr int64_t block_elements = 4 << 10;  // about: they stay in the first-level cache
constexpr int64_t slab_elements = 32 << 10;  // about
constexpr int64_t small_work = 32 << 10;     // elements: fewer are not worth a second thread
constexpr int64_t stream_bytes = 8 << 20;    // a map larger than this is written past the caches

// Everything that forward and backward share. The tensors are those that the pointers need.
struct Call {
  GroupNormActArgs args{};
  Storage storage;
  int64_t samples;
  Tensor x, weight, bias;
  std::vector<double> partial;

  int64_t members() const { return args.voxels * (args.channels / args.groups); }  // of a group
};

Tensor parameter(const char* name, const Tensor& tensor, int64_t channels, ScalarType arithmetic) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == channels && tensor.scalar_type() == arithmetic, name,
                  ": expected (C,), float32, or float64 for float64 maps");
  return as_contiguous(tensor);
}

Tensor empty_map(const Tensor& x) {
  const auto sizes = x.sizes();
  Tensor made = empty_channels_last(x, std::vector<int64_t>(sizes.begin(), sizes.end()));
  advise_huge_pages(made.mutable_data_ptr(), made.numel() * bytes_of(storage_of("x", x)));
  return made;
}

Call prepare(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, const std::string& activation) {
  STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 5, "x: expected (N, C, H, W) or (N, C, X, Y, Z)");
  Call call;
  GroupNormActArgs& a = call.args;
  call.storage = storage_of("x", x);
  call.samples = x.size(0);
  a.channels = x.size(1);
  a.voxels = 1;
  for (int64_t i = 2; i < x.dim(); ++i) a.voxels *= x.size(i);
  STD_TORCH_CHECK(a.voxels > 0 && a.channels > 0, "x: expected no empty dimension but N");
  STD_TORCH_CHECK(groups > 0 && a.channels % groups == 0, "groups: expected a divisor of the channels");
  a.groups = groups;
  a.relu = parse_relu(activation);
  const ScalarType arithmetic = arithmetic_of(call.storage);
  call.weight = parameter("weight", weight, a.channels, arithmetic);
  call.bias = parameter("bias", bias, a.channels, arithmetic);
  call.x = as_channels_last(x);
  a.x = call.x.const_data_ptr();
  a.weight = call.weight.const_data_ptr();
  a.bias = call.bias.const_data_ptr();
  // Whole vectors, and as many as are summed side by side.
  const int64_t lanes = group_norm_act_loops().lanes[is_double(call.storage)];
  a.row = std::lcm(a.channels, lanes);
  while (a.row < 4 * lanes) a.row *= 2;
  a.block = std::clamp<int64_t>(block_elements / a.row, 8, block_rows);
  a.slab = std::max<int64_t>(1, slab_elements / a.row);
  a.slabs = ceil_divide(a.voxels * a.channels, a.slab * a.row);
  return call;
}

// Whether the loops write a map past the caches: whole registers alone, to multiples of their size.
bool past_caches(const Call& call, const void* map) {
  const int64_t bytes = call.args.voxels * call.args.channels * bytes_of(call.storage);
  const bool aligned = reinterpret_cast<uintptr_t>(map) % 64 == 0 && bytes % 64 == 0;
  return aligned && bytes_of(call.storage) >= 4 && call.samples * bytes > stream_bytes;
}

// Two passes over each sample, and merge(n) between them. The second may be null.
template <class Merge>
void in_two_passes(const Call& call, GroupNormActTask first, const Merge& merge, GroupNormActTask second) {
  const GroupNormActArgs& a = call.args;
  const int64_t samples = call.samples, bytes = scratch_bytes * a.row;
  const bool serial = samples * a.voxels * a.channels < small_work;
  if (serial || samples >= int64_t(torch::stable::get_num_threads())) {
    return for_each(samples, serial, bytes, [&](int64_t n, void* scratch) {
      first(a, n, 0, a.slabs, scratch);
      merge(n);
      if (second) second(a, n, 0, a.slabs, scratch);
    });
  }
  const auto all_slabs = [&](GroupNormActTask task) {
    for_each(samples * a.slabs, false, bytes, [&](int64_t item, void* scratch) {
      task(a, item / a.slabs, item % a.slabs, item % a.slabs + 1, scratch);
    });
  };
  all_slabs(first);
  for (int64_t n = 0; n < samples; ++n) merge(n);
  if (second) all_slabs(second);
}

// ---- forward ----

// Mean and 1 / sqrt(var + eps) of the groups of a sample.
template <class T>
void merge_statistics(const Call& call, int64_t n, double eps, T* mean, T* rstd) {
  const GroupNormActArgs& a = call.args;
  const double* of_sample = a.partial + n * a.slabs * 2 * a.groups;
  const int64_t group_of_slab = a.slab * a.row / a.groups;  // members, but for the last slab
  for (int64_t g = 0; g < a.groups; ++g) {
    Deviations<double> all{};
    for (int64_t s = 0, count = 0; s < a.slabs; ++s) {
      const double* slab = of_sample + 2 * (s * a.groups + g);
      const int64_t members = std::min(group_of_slab, call.members() - count);
      all = merged<double>(all, {slab[0], slab[1]}, double(count), double(members));
      count += members;
    }
    mean[n * a.groups + g] = T(all.mean);
    rstd[n * a.groups + g] = T(1 / std::sqrt(all.squares / double(call.members()) + eps));
  }
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> residual,
                                                  int64_t groups, double eps, std::string activation) {
  Call call = prepare(x, weight, bias, groups, activation);
  GroupNormActArgs& a = call.args;
  std::optional<Tensor> added;
  if (residual) added = map_like("residual", *residual, x);
  Tensor y = empty_map(x);
  Tensor mean = empty_beside(call.weight, {call.samples, groups});
  Tensor rstd = empty_beside(call.weight, {call.samples, groups});
  call.partial.resize(call.samples * a.slabs * 2 * groups);
  a.residual = added ? added->const_data_ptr() : nullptr;
  a.y = y.mutable_data_ptr();
  a.stream = past_caches(call, a.y);
  a.mean = mean.const_data_ptr();
  a.rstd = rstd.const_data_ptr();
  a.partial = call.partial.data();
  const GroupNormActLoops& loops = group_norm_act_loops();
  by_arithmetic(is_double(call.storage), [&](auto number) {
    using T = decltype(number);
    T *means = mean.mutable_data_ptr<T>(), *rstds = rstd.mutable_data_ptr<T>();
    const auto merge = [&](int64_t n) { merge_statistics(call, n, eps, means, rstds); };
    in_two_passes(call, loops.statistics[int(call.storage)], merge, loops.apply[int(call.storage)]);
  });
  return {y, mean, rstd};
}

// ---- backward ----

// The sums of a sample's channels, into the place of its first slab, and from them what its groups have in common.
template <class T>
void merge_sums(const Call& call, int64_t n, T* slope, T* offset) {
  const GroupNormActArgs& a = call.args;
  double* sums = a.partial + n * a.slabs * 2 * a.channels;
  for (int64_t s = 1; s < a.slabs; ++s)
    for (int64_t i = 0; i < 2 * a.channels; ++i) sums[i] += sums[s * 2 * a.channels + i];
  const T *weight = static_cast<const T*>(a.weight), *rstd = static_cast<const T*>(a.rstd) + n * a.groups;
  for (int64_t g = 0, c = 0; g < a.groups; ++g) {
    double weighted = 0, moment = 0;
    for (const int64_t next = c + a.channels / a.groups; c < next; ++c) {
      weighted += double(weight[c]) * sums[2 * c];
      moment += double(weight[c]) * sums[2 * c + 1];
    }
    const GroupGradient<double> group = group_gradient<double>(weighted, moment, rstd[g], double(call.members()));
    slope[n * a.groups + g] = T(group.slope);
    offset[n * a.groups + g] = T(group.offset);
  }
}

// Over the samples, in their order.
template <class T>
void add_parameters(const Call& call, T* grad_weight, T* grad_bias) {
  const GroupNormActArgs& a = call.args;
  const T* rstd = static_cast<const T*>(a.rstd);
  for (int64_t c = 0; c < a.channels; ++c) {
    double weight = 0, bias = 0;
    for (int64_t n = 0; n < call.samples; ++n) {
      const double* sums = a.partial + (n * a.slabs * a.channels + c) * 2;
      bias += sums[0];
      weight += sums[1] * double(rstd[n * a.groups + c / (a.channels / a.groups)]);
    }
    grad_weight[c] = T(weight);
    grad_bias[c] = T(bias);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias,
                                                                   std::optional<Tensor> output, Tensor mean,
                                                                   Tensor rstd, std::string activation, bool needs_x,
                                                                   bool needs_weight, bool needs_residual) {
  STD_TORCH_CHECK(mean.dim() == 2, "mean: expected (N, G) in the dtype of the weight");
  Call call = prepare(x, weight, bias, mean.size(1), activation);
  GroupNormActArgs& a = call.args;
  for (const auto& [name, tensor] : {std::pair("mean", &mean), std::pair("rstd", &rstd)})
    STD_TORCH_CHECK(has_shape(*tensor, {call.samples, a.groups}) && tensor->scalar_type() == call.weight.scalar_type(),
                    name, ": expected (N, G) in the dtype of the weight");
  STD_TORCH_CHECK(output || !a.relu || !needs_residual, "output: expected where a residual was added before a ReLU");
  const Tensor gradient = map_like("grad", grad, x), means = as_contiguous(mean), rstds = as_contiguous(rstd);
  std::optional<Tensor> kept;
  if (output) kept = map_like("output", *output, x);

  const std::vector<int64_t> channels{needs_weight ? a.channels : 0};
  Tensor grad_x = needs_x ? empty_map(x) : empty_beside(x, {0});
  Tensor grad_residual = needs_residual ? empty_map(x) : empty_beside(x, {0});
  Tensor grad_weight = empty_beside(call.weight, channels);
  Tensor grad_bias = empty_beside(call.weight, channels);
  if (!needs_x && !needs_weight && !needs_residual) return {grad_x, grad_weight, grad_bias, grad_residual};

  call.partial.resize(call.samples * a.slabs * 2 * a.channels);
  a.partial = call.partial.data();
  a.grad = gradient.const_data_ptr();
  a.output = kept ? kept->const_data_ptr() : nullptr;
  a.mean = means.const_data_ptr();
  a.rstd = rstds.const_data_ptr();
  a.grad_x = needs_x ? grad_x.mutable_data_ptr() : nullptr;
  a.stream = needs_x && past_caches(call, a.grad_x);
  a.grad_residual = needs_residual ? grad_residual.mutable_data_ptr() : nullptr;
  const GroupNormActLoops& loops = group_norm_act_loops();
  by_arithmetic(is_double(call.storage), [&](auto number) {
    using T = decltype(number);
    std::vector<T> slope(call.samples * a.groups), offset(call.samples * a.groups);
    a.slope = slope.data();
    a.offset = offset.data();
    const auto merge = [&](int64_t n) { merge_sums(call, n, slope.data(), offset.data()); };
    in_two_passes(call, loops.sums[int(call.storage)], merge, needs_x ? loops.gradient[int(call.storage)] : nullptr);
    if (needs_weight) add_parameters(call, grad_weight.mutable_data_ptr<T>(), grad_bias.mutable_data_ptr<T>());
  });
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

}  // namespace
}  // namespace bkind3d

STABLE_TORCH_LIBRARY_IMPL(bkind3d, CPU, m) {
  m.impl("group_norm_act", TORCH_BOX(&bkind3d::group_norm_act));
  m.impl("group_norm_act_backward", TORCH_BOX(&bkind3d::group_norm_act_backward));
}
