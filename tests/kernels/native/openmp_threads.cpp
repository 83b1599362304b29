// OpenMP's parallel regions on new threads, for ThreadSanitizer: it cannot see how libgomp, which is not instrumented,
// hands a region to its threads and waits for them, but it knows pthread_create and pthread_join. Preloaded, this takes
// the place of libgomp's function of the same name. Enough for torch's parallel_for and no more: no barriers, and a
// region within a region runs on one thread.
#include <thread>
#include <vector>

extern "C" int omp_get_max_threads();

namespace {
thread_local int region_threads = 0, region_thread = 0;  // 0 threads: not within a region

void run(void (*body)(void*), void* data, int threads, int thread) {
  region_threads = threads;
  region_thread = thread;
  body(data);
  region_threads = region_thread = 0;
}
}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int omp_in_parallel() { return region_threads > 1; }
EXPORT int omp_get_num_threads() { return region_threads ? region_threads : 1; }
EXPORT int omp_get_thread_num() { return region_thread; }

EXPORT void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  if (region_threads) return body(data);
  const int count = threads ? static_cast<int>(threads) : omp_get_max_threads();
  std::vector<std::thread> others;
  for (int i = 1; i < count; ++i) others.emplace_back(run, body, data, count, i);
  run(body, data, count, 0);
  for (std::thread& other : others) other.join();
}
