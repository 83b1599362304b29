// Edge maps on the CPU: the torch face. Checks what the loops rely on, allocates, and hands out the work.
#include "rasterize_edges.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../common/options.h"
#include "threads.h"

namespace bkind3d {
namespace {

constexpr int64_t int16_edges = 1 << 15;  // up to here the winner's index is int16
constexpr int64_t small_work = 1 << 16;   // pixels times edges, and 64 times edges: less is not worth a second thread

std::atomic<bool>& culling() {
  static std::atomic<bool> on{true};
  return on;
}

// Everything that forward and backward share, and the tensors that the pointers need alive.
struct Call {
  RasterizeEdgesArgs args{};
  ScalarType type;
  std::vector<EdgeMap> maps;
  std::vector<int> edges;
  Memory log_weights, tables;
  int64_t pixels = 0;                // of one sample, in all maps
  std::vector<int64_t> order, ends;  // maps from the largest to the smallest, and the end of their bands, as tasks
};

template <class T>
void take_logs(Call& call) {
  RasterizeEdgesArgs& a = call.args;
  const int64_t rows = a.samples > 0 && a.weight_stride[0] == 0 ? 1 : a.samples;
  call.log_weights = allocate(rows * a.count * int64_t(sizeof(T)));
  T* logs = reinterpret_cast<T*>(call.log_weights.get());
  const T* from = static_cast<const T*>(a.weights);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t e = 0; e < a.count; ++e) {
      const T w = from[n * a.weight_stride[0] + e * a.weight_stride[1]];
      logs[n * a.count + e] = w <= 0 ? -std::numeric_limits<T>::infinity() : std::log(w);
    }
  a.log_weights = logs;
  a.log_weight_stride = rows == 1 ? 0 : a.count;
}

void take_edges(Call& call, const Tensor& edges) {
  RasterizeEdgesArgs& a = call.args;
  STD_TORCH_CHECK(edges.dim() == 2 && edges.size(1) == 2 && edges.scalar_type() == ScalarType::Long,
                  "edges: expected (E, 2) int64");
  STD_TORCH_CHECK(edges.size(0) < std::numeric_limits<int>::max() && a.points < std::numeric_limits<int>::max(),
                  "edges: too many");
  const int64_t* from = edges.const_data_ptr<int64_t>();
  call.edges.resize(2 * edges.size(0));
  for (int64_t e = 0; e < edges.size(0); ++e)
    for (int64_t end = 0; end < 2; ++end) {
      const int64_t k = from[e * edges.stride(0) + end * edges.stride(1)];
      STD_TORCH_CHECK(0 <= k && k < a.points, "edges: expected keypoint indices 0 to ", a.points - 1, ", found ", k);
      call.edges[2 * e + end] = static_cast<int>(k);
    }
  a.edges = call.edges.data();
  a.count = edges.size(0);
  a.wide_winners = a.count > int16_edges;
}

void take_maps(Call& call, const std::vector<int64_t>& sizes, const std::vector<double>& sigmas) {
  RasterizeEdgesArgs& a = call.args;
  STD_TORCH_CHECK(!sigmas.empty() && sizes.size() == 2 * sigmas.size(), "sizes: expected (H, W) for each sigma");
  for (size_t i = 0; i < sigmas.size(); ++i) {
    const int64_t height = sizes[2 * i], width = sizes[2 * i + 1];
    STD_TORCH_CHECK(height >= 1 && width >= 1 && sigmas[i] > 0, "sizes and sigmas: expected positive numbers");
    STD_TORCH_CHECK(std::max(height, width) < (1 << 22), "sizes: expected less than 2^22 pixels a side");
    EdgeMap map{};
    map.height = height;
    map.width = width;
    map.sigma = sigmas[i];
    map.scale_x = double(width) / double(sizes[1]);
    map.scale_y = double(height) / double(sizes[0]);
    call.maps.push_back(map);
    call.pixels += height * width;
  }
  a.map = call.maps.data();
  a.maps = static_cast<int64_t>(call.maps.size());
}

int64_t bands(const EdgeMap& map) { return ceil_divide(map.height, band_rows); }

// The longest tasks first, so that all threads end at about the same time.
void order_tasks(Call& call) {
  call.order.resize(call.maps.size());
  std::iota(call.order.begin(), call.order.end(), 0);
  std::stable_sort(call.order.begin(), call.order.end(),
                   [&](int64_t i, int64_t j) { return call.maps[i].width > call.maps[j].width; });
  int64_t end = 0;
  for (const int64_t map : call.order) call.ends.push_back(end += call.args.samples * bands(call.maps[map]));
}

Call prepare(const Tensor& keypoints, const Tensor& weights, const Tensor& edges, const std::vector<int64_t>& sizes,
             const std::vector<double>& sigmas) {
  Call call;
  RasterizeEdgesArgs& a = call.args;
  call.type = keypoints.scalar_type();
  STD_TORCH_CHECK(keypoints.dim() == 3 && keypoints.size(2) == 2 &&
                      (call.type == ScalarType::Float || call.type == ScalarType::Double),
                  "keypoints: expected (N, K, 2) float32 or float64");
  a.is_double = call.type == ScalarType::Double;
  a.samples = keypoints.size(0);
  a.points = keypoints.size(1);
  a.keypoints = keypoints.const_data_ptr();
  for (int i = 0; i < 3; ++i) a.keypoint_stride[i] = keypoints.stride(i);
  take_edges(call, edges);
  take_maps(call, sizes, sigmas);
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(0) == a.samples && weights.size(1) == a.count &&
                      weights.scalar_type() == call.type,
                  "weights: expected (N, E) in the dtype of the keypoints");
  a.weights = weights.const_data_ptr();
  for (int i = 0; i < 2; ++i) a.weight_stride[i] = weights.stride(i);
  by_arithmetic(a.is_double, [&](auto number) { take_logs<decltype(number)>(call); });
  a.cull = culling().load(std::memory_order_relaxed);
  order_tasks(call);
  return call;
}

char* table(const Call& call, int64_t bytes, int64_t sample, int64_t map) {
  return call.tables.get() + (sample * call.args.maps + map) * bytes;
}

void make_tables(Call& call, const RasterizeEdgesLoops& loops, bool backward) {
  const RasterizeEdgesArgs& a = call.args;
  const int64_t bytes = loops.table_bytes(a, backward), count = a.samples * a.maps;
  call.tables = allocate(bytes * count);
  for_each(count, 64 * count * a.count < small_work, loops.scratch(a), [&](int64_t task, char* scratch) {
    const int64_t sample = task / a.maps, map = task % a.maps;
    loops.prepare(a, sample, map, backward, table(call, bytes, sample, map), scratch);
  });
}

struct Band {
  int64_t sample, map, band;
};

Band band_of(const Call& call, int64_t task) {
  const int64_t i = std::upper_bound(call.ends.begin(), call.ends.end(), task) - call.ends.begin();
  const int64_t map = call.order[i], count = bands(call.maps[map]), local = task - (i ? call.ends[i - 1] : 0);
  return {local / count, map, local % count};
}

bool is_small(const Call& call) { return call.args.samples * call.pixels * call.args.count < small_work; }

std::tuple<std::vector<Tensor>, Tensor> rasterize_edges(Tensor keypoints, Tensor weights, Tensor edges,
                                                        std::vector<int64_t> sizes, std::vector<double> sigmas) {
  Call call = prepare(keypoints, weights, edges, sizes, sigmas);
  const RasterizeEdgesArgs& a = call.args;
  const ScalarType index = a.wide_winners ? ScalarType::Int : ScalarType::Short;
  std::vector<Tensor> maps;
  Tensor winners = empty_beside(keypoints, {a.samples * call.pixels}, index);
  char* winner = static_cast<char*>(winners.mutable_data_ptr());
  for (EdgeMap& map : call.maps) {
    maps.push_back(empty_beside(keypoints, {a.samples, map.height, map.width}));
    map.values = maps.back().mutable_data_ptr();
    map.winners = winner;
    winner += a.samples * map.height * map.width * (a.wide_winners ? 4 : 2);
  }
  if (a.samples == 0) return {std::move(maps), winners};
  const RasterizeEdgesLoops& loops = rasterize_edges_loops();
  make_tables(call, loops, false);
  const int64_t bytes = loops.table_bytes(a, false);
  for_each(call.ends.back(), is_small(call), loops.scratch(a), [&](int64_t task, char* scratch) {
    const Band b = band_of(call, task);
    loops.forward(a, b.sample, b.map, b.band, table(call, bytes, b.sample, b.map), scratch);
  });
  return {std::move(maps), winners};
}

void take_gradients(Call& call, const std::vector<Tensor>& grads, const Tensor& winners) {
  const RasterizeEdgesArgs& a = call.args;
  STD_TORCH_CHECK(grads.size() == call.maps.size(), "grad_maps: expected one for each map");
  STD_TORCH_CHECK(winners.is_contiguous() && winners.numel() == a.samples * call.pixels &&
                      winners.scalar_type() == (a.wide_winners ? ScalarType::Int : ScalarType::Short),
                  "winners: expected those that the forward pass returned");
  const char* winner = static_cast<const char*>(winners.const_data_ptr());
  for (size_t i = 0; i < grads.size(); ++i) {
    EdgeMap& map = call.maps[i];
    const Tensor& grad = grads[i];
    STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == a.samples && grad.size(1) == map.height &&
                        grad.size(2) == map.width && grad.scalar_type() == call.type,
                    "grad_maps: expected the shapes and dtype of the maps");
    map.grad = grad.const_data_ptr();
    for (int d = 0; d < 3; ++d) map.grad_stride[d] = grad.stride(d);
    map.winners = const_cast<char*>(winner);  // only read
    winner += a.samples * map.height * map.width * (a.wide_winners ? 4 : 2);
  }
}

// The records of each band, in order of map, sample and band: room for one per edge, or per pixel if those are fewer.
// What is not written is never touched, so it takes no memory.
class Records {
 public:
  Records(const Call& call, int64_t bytes) : bytes_(bytes), number_(call.ends.back()) {
    int64_t end = 0, band = 0;
    for (const EdgeMap& map : call.maps) {
      const int64_t capacity = std::min<int64_t>(call.args.count, band_rows * map.width);
      groups_.push_back({end, band, capacity});
      end += call.args.samples * bands(map) * capacity * bytes;
      band += call.args.samples * bands(map);
    }
    memory_ = allocate(end);
  }
  char* at(const Call& call, const Band& b) const {
    const Group& group = groups_[b.map];
    return memory_.get() + group.offset + (b.sample * bands(call.maps[b.map]) + b.band) * group.capacity * bytes_;
  }
  int64_t& number(const Call& call, const Band& b) {
    return number_[groups_[b.map].first_band + b.sample * bands(call.maps[b.map]) + b.band];
  }

 private:
  struct Group {
    int64_t offset, first_band, capacity;  // of a map: where its records start, bands before, records of one band
  };
  int64_t bytes_;
  Memory memory_;
  std::vector<Group> groups_;
  std::vector<int64_t> number_;
};

template <class T>
void finish(const RasterizeEdgesArgs& a, int64_t sample, const std::vector<double>& points,
            const std::vector<double>& weights, Tensor& grad_keypoints, Tensor& grad_weights) {
  T* to = static_cast<T*>(grad_keypoints.mutable_data_ptr()) + sample * a.points * 2;
  for (int64_t i = 0; i < 2 * a.points; ++i) to[i] = static_cast<T>(points[i]);
  to = static_cast<T*>(grad_weights.mutable_data_ptr()) + sample * a.count;
  for (int64_t e = 0; e < a.count; ++e) to[e] = static_cast<T>(weights[e]);
}

std::tuple<Tensor, Tensor> rasterize_edges_backward(std::vector<Tensor> grad_maps, Tensor keypoints, Tensor weights,
                                                    Tensor edges, Tensor winners, std::vector<int64_t> sizes,
                                                    std::vector<double> sigmas, bool) {
  Call call = prepare(keypoints, weights, edges, sizes, sigmas);
  const RasterizeEdgesArgs& a = call.args;
  take_gradients(call, grad_maps, winners);
  Tensor grad_keypoints = empty_beside(keypoints, {a.samples, a.points, 2});
  Tensor grad_weights = empty_beside(weights, {a.samples, a.count});
  if (a.samples == 0) return {grad_keypoints, grad_weights};
  const RasterizeEdgesLoops& loops = rasterize_edges_loops();
  make_tables(call, loops, true);
  const int64_t bytes = loops.table_bytes(a, true);
  Records records(call, loops.record_bytes());
  for_each(call.ends.back(), is_small(call), loops.scratch(a), [&](int64_t task, char* scratch) {
    const Band b = band_of(call, task);
    records.number(call, b) =
        loops.backward(a, b.sample, b.map, b.band, table(call, bytes, b.sample, b.map), records.at(call, b), scratch);
  });
  for_each(a.samples, is_small(call), 0, [&](int64_t sample, char*) {
    std::vector<double> points(2 * a.points), sums(a.count);
    for (int64_t map = 0; map < a.maps; ++map)
      for (int64_t band = 0; band < bands(call.maps[map]); ++band) {
        const Band b{sample, map, band};
        loops.collect(a, sample, map, table(call, bytes, sample, map), records.at(call, b), records.number(call, b),
                      points.data(), sums.data());
      }
    by_arithmetic(a.is_double, [&](auto number) {
      finish<decltype(number)>(a, sample, points, sums, grad_keypoints, grad_weights);
    });
  });
  return {grad_keypoints, grad_weights};
}

void set_culling(bool on) { culling() = on; }

}  // namespace
}  // namespace bkind3d

STABLE_TORCH_LIBRARY_IMPL(bkind3d, CPU, m) {
  m.impl("rasterize_edges", TORCH_BOX(&bkind3d::rasterize_edges));
  m.impl("rasterize_edges_backward", TORCH_BOX(&bkind3d::rasterize_edges_backward));
}

STABLE_TORCH_LIBRARY_IMPL(bkind3d, CompositeExplicitAutograd, m) {
  m.impl("set_rasterize_edges_culling", TORCH_BOX(&bkind3d::set_culling));
}
