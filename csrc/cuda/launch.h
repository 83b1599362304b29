// What faces and launch functions hand on without CUDA's headers: a stream, and a constant that kernels divide by.
#pragma once

#include <cstdint>

namespace bkind3d {

struct Stream {
  void* handle = nullptr;  // cudaStream_t
};

// Division of 0 <= n < 2^31 by 1 <= divisor < 2^31 as a multiplication and a shift: quotient() of device.cuh.
struct Divider {
  unsigned divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  // Round-up method: multiplier = ceil(2^(32 + shift) / divisor) - 2^32, shift = ceil(log2(divisor)).
  explicit Divider(int64_t d) : divisor(unsigned(d)), shift(0) {
    while ((int64_t(1) << shift) < d) ++shift;
    multiplier = unsigned(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - uint64_t(d))) / uint64_t(d) + 1);
  }
};

}  // namespace bkind3d
