// csrc/common/rasterize_edges.h for NumPy. A segment's columns: ux, uy, across, lo, hi, inverse.
#include "csrc/common/rasterize_edges.h"

#include "binding.h"

using namespace bkind3d;

namespace {

template <class T>
pybind11::dict constants() {
  pybind11::dict d;
  d["lowest_score"] = double(lowest_score<T>);
  d["unit_roundoff"] = double(unit_roundoff<T>);
  d["tolerance"] = double(tolerance<T>);
  d["score_slack"] = double(score_slack<T>);
  d["min_length_squared"] = min_length_squared;
  return d;
}

}  // namespace

PYBIND11_MODULE(rasterize_edges, m) {
  m.attr("float32") = constants<float>();
  m.attr("float64") = constants<double>();
  // ax, ay, bx, by, sigma -> segment, in double as the kernels do
  binding::define_for<double, 5, 6>(m, "segment", [](const double* in, double* out) {
    const auto s = segment(in[0], in[1], in[2], in[3], in[4]);
    out[0] = s.ux, out[1] = s.uy, out[2] = s.across, out[3] = s.lo, out[4] = s.hi, out[5] = s.inverse;
  });
  // segment, x, y -> across, beyond, clamped
  binding::define<8, 3>(m, "offset", [](const auto* in, auto* out) {
    const auto o = offset(column(in[6], in[0], in[1], in[2]), in[7], in[0], in[1], in[3], in[4]);
    out[0] = o.across, out[1] = o.beyond, out[2] = o.clamped;
  });
  // segment, x, y, log weight -> score
  binding::define<9, 1>(m, "score", [](const auto* in, auto* out) {
    out[0] = score(offset(column(in[6], in[0], in[1], in[2]), in[7], in[0], in[1], in[3], in[4]), in[8]);
  });
  // clamped, lo, hi, inverse -> a, b
  binding::define<4, 2>(m, "shares", [](const auto* in, auto* out) {
    const auto s = shares(in[0], in[1], in[2], in[3]);
    out[0] = s.a, out[1] = s.b;
  });
  // x0, y0, x1, y1, sigma, segment, log weight -> upper, lower
  binding::define<12, 2>(m, "bounds", [](const auto* in, auto* out) {
    using T = std::remove_reference_t<decltype(out[0])>;
    const auto tile = tile_of(in[0], in[1], in[2], in[3], in[4]);
    const Bounds<T> b = bounds(tile, in[5], in[6], in[7], in[8], in[9], in[11]);
    out[0] = b.upper, out[1] = b.lower;
  });
}
