// Hints to the system about large outputs.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace bkind3d {

// Asks for huge pages under a freshly allocated region of 4 MB or more. A region that large is first touched by the
// kernel that fills it, and one fault for every 4 KB costs up to a third of an operation that is bound by memory. Where
// the system gives huge pages on request alone ("madvise", the default of most distributions) this is the request;
// elsewhere it does nothing. Only a hint: it cannot fail.
static inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] long long bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < (4LL << 20)) return;
  static const unsigned long page = static_cast<unsigned long>(sysconf(_SC_PAGESIZE));
  const unsigned long start = (reinterpret_cast<unsigned long>(data) + page - 1) / page * page;
  const unsigned long end = (reinterpret_cast<unsigned long>(data) + static_cast<unsigned long>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

}  // namespace bkind3d
