// The fibers behind cuda_emulation.h. Compiled without instrumentation: what it does is not the kernel's doing, and
// the sanitizers are told what orders the kernel's accesses. x86-64.
#include "cuda_emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(EMULATION_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ON_ADDRESS(...) __VA_ARGS__
#else
#define ON_ADDRESS(...)
#endif
#if defined(EMULATION_THREAD)
#include <sanitizer/tsan_interface.h>
#define ON_THREAD(...) __VA_ARGS__
#else
#define ON_THREAD(...)
#endif

// Saves the registers that a function keeps and the stack pointer, and goes on where `to` was saved.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace emulation {
namespace {

constexpr std::size_t stack_bytes = 128 << 10, static_bytes = 48 << 10, dynamic_most = 227 << 10, gap = 64;

// Those that wait for one another: the threads of a block, or the lanes of a mask.
struct Group {
  unsigned mask = 0, arrived = 0;  // lanes, or how many threads
  Kind kind{};
  std::uint64_t generation = 0;
  Values values[2];
  char order[2];  // what ThreadSanitizer knows the two latest barriers by
};

struct Fiber {
  Thread thread;
  unsigned number;
  char* stack;
  void* pointer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<std::list<Group>> warps;  // a group for each mask that was used
  Group all;
  char* memory;  // of the block: shared, then the stacks
  std::size_t memory_bytes, used = 0;
  std::vector<std::pair<const void*, std::size_t>> objects;  // key and place
  char* dynamic;
  std::uint64_t progress = 0;
};

std::mutex mutex;
bool descending = false;
const std::function<void()>* kernel;
Block* block;
Fiber* fiber;  // that runs; null: the scheduler
void* scheduler_pointer;
[[maybe_unused]] void *scheduler_fake_stack, *scheduler_tsan;
[[maybe_unused]] const void* scheduler_stack;
[[maybe_unused]] std::size_t scheduler_stack_bytes;
[[maybe_unused]] char launch_order;
std::string error;

// ---- changing from one stack to another ----

void resume(Fiber& f) {
  fiber = &f;
  ON_ADDRESS(__sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack, stack_bytes);)
  ON_THREAD(__tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);)
  emulation_switch(&scheduler_pointer, f.pointer);
  ON_ADDRESS(__sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);)
  fiber = nullptr;
}

void arrive_on_fiber() {
  ON_ADDRESS(__sanitizer_finish_switch_fiber(fiber->fake_stack, &scheduler_stack, &scheduler_stack_bytes);)
}

void back_to_scheduler() {
  Fiber& f = *fiber;
  ON_ADDRESS(__sanitizer_start_switch_fiber(f.done ? nullptr : &f.fake_stack, scheduler_stack, scheduler_stack_bytes);)
  ON_THREAD(__tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);)
  emulation_switch(&f.pointer, scheduler_pointer);
  arrive_on_fiber();
}

void body() {
  arrive_on_fiber();
  (*kernel)();
  ON_THREAD(__tsan_release(&launch_order);)
  fiber->done = true;
  ++block->progress;
  back_to_scheduler();
}

void prepare(Fiber& f) {
  void** top = reinterpret_cast<void**>(f.stack + stack_bytes) - 1;  // as after a call: 8 bytes off a multiple of 16
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&body);
  f.pointer = top - 6;
  ON_THREAD(f.tsan = __tsan_create_fiber(0);)
}

// ---- waiting ----

// An error ends the launch: its fibers are left where they are, and nothing on their stacks needs an end.
[[noreturn]] void fail(const std::string& message) {
  const dim3 at = fiber->thread.index, of = fiber->thread.block;
  error = message + " (thread " + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
          " of block " + std::to_string(of.x) + ", " + std::to_string(of.y) + ", " + std::to_string(of.z) + ")";
  for (;;) back_to_scheduler();
}

// The last to arrive lets all go on.
std::uint64_t wait(Group& group, bool complete, [[maybe_unused]] bool orders) {
  const std::uint64_t mine = group.generation;
  ON_THREAD(if (orders) __tsan_release(&group.order[mine % 2]);)
  ++block->progress;
  if (complete) {
    group.arrived = 0;
    ++group.generation;
  }
  while (group.generation == mine) back_to_scheduler();
  ON_THREAD(if (orders) __tsan_acquire(&group.order[mine % 2]);)
  return mine;
}

Group& lanes(unsigned mask) {
  std::list<Group>& warp = block->warps[fiber->number / 32];
  for (Group& group : warp)
    if (group.mask == mask) return group;
  warp.emplace_back();
  warp.back().mask = mask;
  return warp.back();
}

// ---- a block ----

void run_block(Block& b, dim3 grid, dim3 size, dim3 index, std::size_t dynamic_bytes) {
  block = &b;
  const unsigned count = size.x * size.y * size.z;
  // Fresh memory for each block: what an earlier one did there is no race, and what is read unwritten is NaN.
  const std::size_t shared_bytes = static_bytes + ((dynamic_bytes + 2 * gap + 4095) & ~std::size_t(4095));
  b.memory_bytes = shared_bytes + count * stack_bytes;
  void* memory = mmap(nullptr, b.memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  b.memory = static_cast<char*>(memory);
  b.dynamic = b.memory + static_bytes + gap;
  for (std::size_t i = 0; i < shared_bytes; ++i) static_cast<volatile char*>(b.memory)[i] = char(0xff);
  ON_ADDRESS(__asan_poison_memory_region(b.memory, shared_bytes);)
  ON_ADDRESS(__asan_unpoison_memory_region(b.dynamic, dynamic_bytes);)
  b.warps.resize((count + 31) / 32);
  b.fibers.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    const dim3 at(i % size.x, i / size.x % size.y, i / size.x / size.y);
    b.fibers[i].thread = {at, index, size, grid};
    b.fibers[i].number = i;
    b.fibers[i].stack = b.memory + shared_bytes + i * stack_bytes;
    prepare(b.fibers[i]);
  }
  std::uint64_t before = ~std::uint64_t(0);
  while (before != b.progress && error.empty()) {
    before = b.progress;
    for (unsigned i = 0; i < count && error.empty(); ++i) {
      Fiber& f = b.fibers[descending ? count - 1 - i : i];
      if (!f.done) resume(f);
    }
  }
  const auto waiting = std::count_if(b.fibers.begin(), b.fibers.end(), [](const Fiber& f) { return !f.done; });
  if (waiting && error.empty())
    error = std::to_string(waiting) + " threads wait at a barrier or shuffle that the others do not reach";
  ON_THREAD(for (Fiber& f : b.fibers) __tsan_destroy_fiber(f.tsan);)
  ON_ADDRESS(__asan_unpoison_memory_region(b.memory, shared_bytes);)
  munmap(b.memory, b.memory_bytes);
}

}  // namespace

const Thread& current() { return fiber->thread; }
int lane() { return int(fiber->number % 32); }
void* dynamic_shared() { return block->dynamic; }

void* shared(const void* key, std::size_t bytes) {
  for (const auto& [other, place] : block->objects)
    if (other == key) return block->memory + place;
  const std::size_t place = block->used;
  if (place + bytes > static_bytes) fail("more than 48 KiB of shared memory");
  block->objects.emplace_back(key, place);
  ON_ADDRESS(__asan_unpoison_memory_region(block->memory + place, bytes);)
  block->used = (place + bytes + gap + 15) & ~std::size_t(15);
  return block->memory + place;
}

void wait_for_block() {
  Group& all = block->all;
  wait(all, ++all.arrived == block->fibers.size(), true);
}

Values wait_for_lanes(Kind kind, unsigned mask, std::uint64_t value) {
  const unsigned own = 1u << lane(), first = fiber->number / 32 * 32;
  const unsigned there = block->fibers.size() - first < 32 ? (1u << (block->fibers.size() - first)) - 1 : ~0u;
  if (there == (mask & there)) mask = there;  // lanes that a short last warp does not have
  if (!(mask & own) || (mask & ~there)) fail("the lane is not in the mask of its shuffle, or the mask not in the warp");
  Group& group = lanes(mask);
  if (group.arrived && group.kind != kind) fail("lanes of one mask meet at different instructions");
  group.kind = kind;
  group.values[group.generation % 2].of[lane()] = value;
  group.arrived |= own;
  return group.values[wait(group, group.arrived == mask, kind == Kind::syncwarp) % 2];
}

void launch(dim3 grid, dim3 size, std::size_t dynamic_bytes, const std::function<void()>& function) {
  const std::lock_guard lock(mutex);
  const std::size_t count = std::size_t(size.x) * size.y * size.z;
  if (count == 0 || count > 1024) throw std::runtime_error("emulated launch: 1 to 1024 threads in a block");
  if (dynamic_bytes > dynamic_most) throw std::runtime_error("emulated launch: too much dynamic shared memory");
  kernel = &function;
  error.clear();
  ON_THREAD(scheduler_tsan = __tsan_get_current_fiber();)
  const std::uint64_t blocks_in_grid = std::uint64_t(grid.x) * grid.y * grid.z;
  std::list<Block> blocks;  // kept to the end, since nothing before it orders their threads and this one
  for (std::uint64_t i = 0; i < blocks_in_grid && error.empty(); ++i) {
    const std::uint64_t at = descending ? blocks_in_grid - 1 - i : i;
    const dim3 index(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
    run_block(blocks.emplace_back(), grid, size, index, dynamic_bytes);
  }
  ON_THREAD(__tsan_acquire(&launch_order);)
  if (!error.empty()) throw std::runtime_error("emulated launch: " + error);
}

}  // namespace emulation

// Blocks and threads from the last to the first: a result that changes depends on their order.
extern "C" __attribute__((visibility("default"))) void emulation_descending(int on) { emulation::descending = on; }
