// 3D soft-argmax on the CPU: the torch face. Allocates, divides the work, and merges the slabs of each row.
#include "soft_argmax3d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "../common/options.h"
#include "memory.h"
#include "moments.h"

namespace bkind3d {
namespace {

constexpr int64_t block_voxels = 1024;     // at most; the loops have room for as many
constexpr int64_t slab_voxels = 32 << 10;  // less is not worth a second thread
constexpr int64_t stream_bytes = 8 << 20;  // a gradient larger than this is written past the caches

int64_t voxels(const SoftArgmaxArgs& a) { return a.shape[0] * a.shape[1] * a.shape[2]; }

// Everything that forward and backward share. `logits` must stay alive.
SoftArgmaxArgs prepare(const Tensor& logits, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 5, "logits: expected (N, J, X, Y, Z)");
  SoftArgmaxArgs a{};
  a.logits = logits.const_data_ptr();
  for (int i = 0; i < 5; ++i) a.strides[i] = logits.stride(i);
  a.joints = logits.size(1);
  for (int i = 0; i < 3; ++i) a.shape[i] = logits.size(2 + i);
  STD_TORCH_CHECK(voxels(a) > 0 && a.joints > 0, "logits: expected no empty dimension but N");
  if (a.shape[2] == 1) a.strides[4] = 1;  // of no meaning then
  a.beta = 1.0 / temperature;
  a.segments = ceil_divide(a.shape[2], block_voxels);
  a.segment = a.segments > 1 ? block_voxels : a.shape[2];
  a.lines_per_block = a.segments > 1 ? 1 : std::min(block_voxels / a.shape[2], a.shape[0] * a.shape[1]);
  const int64_t lines = a.shape[0] * a.shape[1];
  a.blocks = a.segments > 1 ? lines * a.segments : ceil_divide(lines, a.lines_per_block);
  a.blocks_per_slab = std::max<int64_t>(1, slab_voxels / (a.lines_per_block * a.segment));
  a.slabs = ceil_divide(a.blocks, a.blocks_per_slab);
  a.rows_per_task = a.strides[4] == 1 ? 1 : a.joints;
  return a;
}

// All tasks; whoever is free takes the next.
void run(SoftArgmaxTask work, const SoftArgmaxArgs& a, int64_t rows) {
  const int64_t tasks = rows / a.rows_per_task * a.slabs;
  std::atomic<int64_t> next{0};
  auto body = [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(a, task);
  };
  const int64_t worthwhile = std::min(tasks, ceil_divide(rows * voxels(a), slab_voxels));
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), worthwhile);
  if (threads <= 1) return body(0, 1);
  torch::stable::parallel_for(0, threads, 1, body);
}

// ---- forward ----

MomentsOutputs soft_argmax3d(Tensor logits, double temperature, bool covariance) {
  const Storage storage = storage_of("logits", logits);
  SoftArgmaxArgs a = prepare(logits, temperature);
  a.covariance = covariance;
  const int64_t n = logits.size(0), rows = n * a.joints;
  std::vector<Moments<double>> moments(rows * a.slabs);
  a.moments = moments.data();
  run(soft_argmax3d_loops().forward[int(storage)], a, rows);
  return moments_outputs(logits, n, a.joints, is_double(storage), a.moments, a.slabs, a.beta, covariance);
}

// ---- backward ----

Tensor soft_argmax3d_backward(Tensor grad_mean, Tensor grad_peak, std::optional<Tensor> grad_covariance, Tensor logits,
                              double temperature, Tensor mean, Tensor covariance, Tensor maximum, Tensor total,
                              Tensor argmax) {
  const Storage storage = storage_of("logits", logits);
  SoftArgmaxArgs a = prepare(logits, temperature);
  const int64_t n = logits.size(0), rows = n * a.joints;
  const std::vector<VolumeGradient<double>> volumes =
      volume_gradients(rows, a.beta, grad_mean, grad_peak, grad_covariance, mean, covariance, maximum, total, argmax);
  const std::vector<int64_t> size{n, a.joints, a.shape[0], a.shape[1], a.shape[2]};
  Tensor grad = empty_beside(logits, size);
  const int64_t bytes = rows * voxels(a) * bytes_of(storage);
  a.volumes = volumes.data();
  a.grad = grad.mutable_data_ptr();
  a.stream = bytes > stream_bytes;
  advise_huge_pages(a.grad, bytes);
  run(soft_argmax3d_loops().backward[int(storage)], a, rows);
  return grad;
}

}  // namespace
}  // namespace bkind3d

STABLE_TORCH_LIBRARY_IMPL(bkind3d, CPU, m) {
  m.impl("soft_argmax3d", TORCH_BOX(&bkind3d::soft_argmax3d));
  m.impl("soft_argmax3d_backward", TORCH_BOX(&bkind3d::soft_argmax3d_backward));
}
