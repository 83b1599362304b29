// Kernels that are right and kernels that are wrong, for tests of the emulation itself: a program that runs one of
// them, by name, and prints what it computes.
#include <cstdio>
#include <string>
#include <vector>

#include "csrc/cuda/device.cuh"

using bkind3d::shared;

namespace {

struct Numbers {
  int values[64];
};

// The sum of 64 threads' numbers by shuffles and shared memory, in every thread; `barrier` off: a race.
template <bool Barrier>
__global__ void sum(int* out) {
  int x = int(threadIdx.x) + 1;
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  Numbers& numbers = shared<Numbers>();
  if (threadIdx.x % 32 == 0) numbers.values[threadIdx.x / 32] = x;
  if (Barrier) __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = numbers.values[0] + numbers.values[1];
}

__global__ void lanes(int* out) {
  const int lane = int(threadIdx.x);
  if (lane < 10) out[lane] = int(__ballot_sync(0x3ffu, lane % 3 == 0));
  if (lane >= 16) out[lane] = __shfl_down_sync(0xffff0000u, lane, 3, 8);
  __syncwarp();
  if (lane == 10) out[10] = out[9] + out[16];
  const int up = __shfl_up_sync(~0u, lane, 2), most = __reduce_max_sync(~0u, (lane * 7) % 32);
  const unsigned same = __match_any_sync(~0u, lane / 4);
  if (lane == 11) out[11] = up + most + int(same);
}

template <bool Atomic>
__global__ void count(int* out) {
  if (threadIdx.x) return;
  if (Atomic) {
    atomicAdd(out, 1);
  } else {
    ++*out;  // of all blocks
  }
}

__global__ void atomics(float* f, double* d, unsigned long long* u) {
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
  atomicAdd(u, 3);
  atomicMax(u + 1, threadIdx.x);
}

__global__ void beyond(int* out) {
  Numbers& numbers = shared<Numbers>();
  volatile int* end = numbers.values;
  end[threadIdx.x + 1] = 1;
  out[threadIdx.x] = end[threadIdx.x];
}

__global__ void divergent(int*) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void outside(int* out) { out[threadIdx.x] = __shfl_sync(1u, 1, 0); }

template <class... P>
void run(void (*kernel)(P...), unsigned blocks, P... arguments) {
  emulation::launch(blocks, 64, 0, [=] { kernel(arguments...); });
}

}  // namespace

int main(int, char** arguments) try {
  const std::string name = arguments[1];
  std::vector<int> out(128, -1);
  if (name == "sum") run(sum<true>, 2, out.data());
  if (name == "no barrier") run(sum<false>, 2, out.data());
  if (name == "lanes") emulation::launch(1, 32, 0, [&] { lanes(out.data()); });
  if (name == "count") run(count<true>, 5, out.data());
  if (name == "race of blocks") run(count<false>, 5, out.data());
  if (name == "beyond") run(beyond, 1, out.data());
  if (name == "divergent") run(divergent, 1, out.data());
  if (name == "outside") run(outside, 1, out.data());
  if (name == "atomics") {
    float f = 0;
    double d = 0;
    unsigned long long u[2] = {};
    run(atomics, 2, &f, &d, u);
    out = {int(f), int(d), int(u[0]), int(u[1])};
  }
  for (int x : out) std::printf("%d ", x);
} catch (const std::exception& error) {
  std::printf("%s", error.what());
}
