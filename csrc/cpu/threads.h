// Work items over torch's threads, each thread with aligned scratch of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace bkind3d {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;

inline Memory allocate(int64_t bytes) {
  Memory memory(static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Calls work(item, scratch) for items 0 to count - 1; whoever is free takes the next.
template <class Work>
void for_each(int64_t count, bool serial, int64_t scratch_bytes, const Work& work) {
  std::atomic<int64_t> next{0};
  auto body = [&](int64_t, int64_t) {
    if (next.load(std::memory_order_relaxed) >= count) return;
    const Memory scratch = allocate(scratch_bytes);
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(item, scratch.get());
  };
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  if (serial || threads <= 1) return body(0, 1);
  torch::stable::parallel_for(0, threads, 1, body);
}

}  // namespace bkind3d
