// Edge maps in CUDA: the torch face. Checks what the kernels rely on, allocates, and launches.
#include "rasterize_edges.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../common/rasterize_edges.h"
#include "face.h"

namespace bkind3d {
namespace {

constexpr int64_t int16_edges = 1 << 15;                  // up to here the winner's index is int16
constexpr int64_t most_edges = (int64_t(1) << 31) - 256;  // threads count beyond the last by as many as a block has
constexpr int64_t longest = 1 << 22;                      // pixels of a side

#if defined(BKIND3D_EMULATED)
bool culling = true;
#else
constexpr bool culling = true;
#endif

// Everything that forward and backward share.
struct Call {
  RasterizeEdgesArgs args{};
  ScalarType type;
  bool is_double;
  std::vector<EdgeMap> maps;
  int64_t pixels = 0;  // of one sample, in all maps

  EdgeMaps all_maps() const { return {maps.data(), int64_t(maps.size())}; }
};

void take_maps(Call& call, const std::vector<int64_t>& sizes, const std::vector<double>& sigmas) {
  STD_TORCH_CHECK(!sigmas.empty() && sizes.size() == 2 * sigmas.size(), "sizes: expected (H, W) for each sigma");
  RasterizeEdgesArgs& a = call.args;
  for (size_t i = 0; i < sigmas.size(); ++i) {
    const int64_t height = sizes[2 * i], width = sizes[2 * i + 1];
    STD_TORCH_CHECK(height >= 1 && width >= 1 && sigmas[i] > 0, "sizes and sigmas: expected positive numbers");
    STD_TORCH_CHECK(std::max(height, width) < longest && height * width < (int64_t(1) << 31),
                    "sizes: expected less than 2^22 pixels a side, and 2^31 in a map");
    EdgeMap map{};
    map.height = int(height);
    map.width = int(width);
    map.sigma = sigmas[i];
    map.first_winner = a.samples * call.pixels;
    map.first_frame = int64_t(i) * a.samples * a.count;
    call.maps.push_back(map);
    call.pixels += height * width;
  }
  a.first_height = call.maps[0].height;
  a.first_width = call.maps[0].width;
}

Call prepare(const Tensor& keypoints, const Tensor& weights, const Tensor& edges, const std::vector<int64_t>& sizes,
             const std::vector<double>& sigmas) {
  Call call;
  RasterizeEdgesArgs& a = call.args;
  call.type = keypoints.scalar_type();
  call.is_double = call.type == ScalarType::Double;
  STD_TORCH_CHECK(keypoints.dim() == 3 && keypoints.size(2) == 2 && (call.type == ScalarType::Float || call.is_double),
                  "keypoints: expected (N, K, 2) float32 or float64");
  STD_TORCH_CHECK(edges.dim() == 2 && edges.size(1) == 2 && edges.scalar_type() == ScalarType::Long,
                  "edges: expected (E, 2) int64");
  STD_TORCH_CHECK(edges.size(0) < most_edges, "edges: too many");
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(0) == keypoints.size(0) && weights.size(1) == edges.size(0) &&
                      weights.scalar_type() == call.type,
                  "weights: expected (N, E) in the dtype of the keypoints");
  STD_TORCH_CHECK(weights.device() == keypoints.device(), "weights: expected the device of the keypoints");
  STD_TORCH_CHECK(edges.device() == keypoints.device(), "edges: expected the device of the keypoints");
  a.keypoints = keypoints.const_data_ptr();
  a.weights = weights.const_data_ptr();
  a.edges = edges.const_data_ptr<int64_t>();
  for (int i = 0; i < 3; ++i) a.keypoint_stride[i] = keypoints.stride(i);
  for (int i = 0; i < 2; ++i) a.weight_stride[i] = weights.stride(i);
  for (int i = 0; i < 2; ++i) a.edge_stride[i] = edges.stride(i);
  a.samples = keypoints.size(0);
  a.points = keypoints.size(1);
  a.count = int(edges.size(0));
  a.wide_winners = a.count > int16_edges;
  const double slack = call.is_double ? score_slack<double> : score_slack<float>;
  a.slack = culling ? slack : std::numeric_limits<double>::infinity();
  take_maps(call, sizes, sigmas);
  return call;
}

Tensor bytes_like(const Tensor& tensor, int64_t bytes) { return empty_beside(tensor, {bytes}, ScalarType::Byte); }

std::tuple<std::vector<Tensor>, Tensor> rasterize_edges(Tensor keypoints, Tensor weights, Tensor edges,
                                                        std::vector<int64_t> sizes, std::vector<double> sigmas) {
  Call call = prepare(keypoints, weights, edges, sizes, sigmas);
  RasterizeEdgesArgs& a = call.args;
  std::vector<Tensor> maps;
  for (EdgeMap& map : call.maps) {
    maps.push_back(empty_beside(keypoints, {a.samples, map.height, map.width}));
    map.values = maps.back().mutable_data_ptr();
  }
  const ScalarType index = a.wide_winners ? ScalarType::Int : ScalarType::Short;
  const Tensor winners = empty_beside(keypoints, {a.samples * call.pixels}, index);
  a.winners = winners.mutable_data_ptr();
  const Tensor table = bytes_like(keypoints, rasterize_edges_scratch(a, call.all_maps(), call.is_double).table);
  const OnDevice device(keypoints);
  launch_rasterize_edges(device.stream(), a, call.all_maps(), call.is_double, table.mutable_data_ptr());
  return {std::move(maps), winners};
}

void take_gradients(Call& call, const std::vector<Tensor>& grads, const Tensor& winners, const Tensor& keypoints) {
  RasterizeEdgesArgs& a = call.args;
  STD_TORCH_CHECK(grads.size() == call.maps.size(), "grad_maps: expected one for each map");
  STD_TORCH_CHECK(winners.is_contiguous() && winners.numel() == a.samples * call.pixels &&
                      winners.scalar_type() == (a.wide_winners ? ScalarType::Int : ScalarType::Short) &&
                      winners.device() == keypoints.device(),
                  "winners: expected those that the forward pass returned");
  a.winners = const_cast<void*>(winners.const_data_ptr());  // backward reads them
  for (size_t i = 0; i < grads.size(); ++i) {
    EdgeMap& map = call.maps[i];
    const Tensor& grad = grads[i];
    STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == a.samples && grad.size(1) == map.height &&
                        grad.size(2) == map.width && grad.scalar_type() == call.type &&
                        grad.device() == keypoints.device(),
                    "grad_maps: expected the shapes, dtype and device of the maps");
    map.grad = grad.const_data_ptr();
    for (int d = 0; d < 3; ++d) map.grad_stride[d] = grad.stride(d);
  }
}

std::tuple<Tensor, Tensor> rasterize_edges_backward(std::vector<Tensor> grad_maps, Tensor keypoints, Tensor weights,
                                                    Tensor edges, Tensor winners, std::vector<int64_t> sizes,
                                                    std::vector<double> sigmas, bool) {
  Call call = prepare(keypoints, weights, edges, sizes, sigmas);
  take_gradients(call, grad_maps, winners, keypoints);
  const RasterizeEdgesArgs& a = call.args;
  Tensor grad_keypoints = empty_beside(keypoints, {a.samples, a.points, 2});
  Tensor grad_weights = empty_beside(weights, {a.samples, int64_t(a.count)});
  const RasterizeEdgesScratch bytes = rasterize_edges_scratch(a, call.all_maps(), call.is_double);
  const Tensor table = bytes_like(keypoints, bytes.table), words = bytes_like(keypoints, bytes.words);
  const Tensor records = bytes_like(keypoints, bytes.records), ends = bytes_like(keypoints, bytes.ends);
  const OnDevice device(keypoints);
  launch_rasterize_edges_backward(
      device.stream(), a, call.all_maps(), call.is_double,
      {grad_keypoints.mutable_data_ptr(), grad_weights.mutable_data_ptr(), table.mutable_data_ptr(),
       words.mutable_data_ptr(), records.mutable_data_ptr(), ends.mutable_data_ptr()});
  return {grad_keypoints, grad_weights};
}

}  // namespace
}  // namespace bkind3d

#if defined(BKIND3D_EMULATED)
// With and without culling, tests see the same bits.
extern "C" __attribute__((visibility("default"))) void rasterize_edges_culling(int on) { bkind3d::culling = on; }
#endif

BKIND3D_KERNELS(m) {
  m.impl("rasterize_edges", TORCH_BOX(&bkind3d::rasterize_edges));
  m.impl("rasterize_edges_backward", TORCH_BOX(&bkind3d::rasterize_edges_backward));
}
