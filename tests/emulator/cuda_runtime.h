// Enough of CUDA to run kernels on the CPU, for tests: compile a .cu as C++, this folder on the include path. Linux.
//
// Each CUDA thread is a fiber, which runs until it meets a barrier or a shuffle; blocks run one after another. So a
// missing barrier shows as results that depend on emulator_order. Not modelled: races between blocks, the order in
// which memory is seen, launch bounds, speed. Only floats are shuffled, among whole warps.
#pragma once
#undef _FORTIFY_SOURCE                                          // it takes a longjmp between stacks for an error
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static thread_local                          // there is but one thread; see poison_shared

struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
using cudaStream_t = void*;
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; cudaStream_t stream; };
using cudaError_t = int;
constexpr cudaError_t cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return 0; }             // a wrong launch aborts instead
static dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::min;
#define rsqrtf(x) (1 / std::sqrt(x))                            // a macro, for C libraries that have such a function
using __half = _Float16;
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
struct __nv_bfloat16 { uint16_t bits; };                        // the upper half of a float
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  return std::memcpy(&result, &bits, 4), result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {uint16_t(value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};        // ties to even
}

extern "C" {
// The order in which threads take turns: 0 forward, 1 reverse, 2 shuffled, 3 rotated; 4 warp by warp, each as far as it
// can go, 5 the same from the last warp. Odd orders take the blocks in reverse, too.
int emulator_order = 0;
unsigned emulator_most_blocks = ~0u;                            // larger grids are cut to this, for kernels that loop
unsigned emulator_blocks = 0, emulator_threads = 0;             // of the last launch, before that; per block
}

namespace emulator {

struct Barrier {                                                // of a block or of a warp
  int threads = 0, arrived = 0, line = 0;                       // threads: those that have not exited
  unsigned opened = 0;
  float values[2][32];                                          // what lanes exchange at this meeting and at the next
  Barrier() { std::fill_n(*values, 64, NAN); }
};
struct Fiber {
  dim3 index;
  int lane;
  Barrier *warp, *at;                                           // at: where it waits, until that has opened again
  unsigned opened;
  bool started, finished;
  jmp_buf state;                                                // with _setjmp a switch is no system call
  char stack[(64 << 10) + 320];                                 // + 320: stacks a power of two apart share cache sets
};
alignas(Fiber) static char memory[1024 * sizeof(Fiber)];        // zero, and untouched before its use
static Fiber *const fibers = reinterpret_cast<Fiber*>(memory), *current;
static Barrier block, warps[32];
static jmp_buf scheduler;
static void (*kernel)(void*), *kernel_arguments;

template <class... Numbers> [[noreturn]] void die(const char* format, Numbers... numbers) {
  std::fprintf(stderr, "emulator: ");
  std::fprintf(stderr, format, numbers...);
  const dim3 b = blockIdx, t = threadIdx;
  std::fprintf(stderr, " (block %u,%u,%u thread %u,%u,%u)\n", b.x, b.y, b.z, t.x, t.y, t.z);
  std::abort();
}

inline void pause() {
  if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}
inline void open(Barrier& b) {
  b.arrived = 0;
  std::fill_n(b.values[++b.opened % 2], 32, NAN);               // all have read these; who has exited leaves the NaN
}
inline void wait(Barrier& b, int line) {
  if (b.arrived == 0) b.line = line;
  if (b.line != line) die("divergent barriers in lines %d and %d", b.line, line);
  if (++b.arrived == b.threads) return open(b);
  current->at = &b, current->opened = b.opened;
  pause();
}
inline void leave(Barrier& b) {
  if (--b.threads > 0 && b.arrived == b.threads) open(b);
}
inline void live() {                                            // a fiber serves one thread after another
  for (;; pause()) {
    kernel(kernel_arguments);
    if (*current->stack) die("stack overflow");
    leave(block), leave(*current->warp);
    current->finished = true;
  }
}
inline void resume(Fiber& fiber) {
  current = &fiber, threadIdx = fiber.index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack, context.uc_stack.ss_size = sizeof fiber.stack;
  makecontext(&context, live, 0);
  setcontext(&context);
}
inline bool turns(const int* begin, const int* end) {           // false if none of them can go on
  bool moved = false;
  for (; begin < end; ++begin)
    if (Fiber& f = fibers[*begin]; !f.finished && !(f.at && f.at->opened == f.opened))
      f.at = nullptr, resume(f), moved = true;
  return moved;
}

static thread_local char amid_shared;
inline int poison_shared(dl_phdr_info* library, size_t, void*) {        // NaN in this library's thread_local memory
  char* const data = static_cast<char*>(library->dlpi_tls_data);
  for (auto* s = library->dlpi_phdr; s < library->dlpi_phdr + library->dlpi_phnum; ++s)
    if (s->p_type == PT_TLS && data && data <= &amid_shared && &amid_shared < data + s->p_memsz)
      return std::memset(data, 0xff, s->p_memsz), 1;
  return 0;
}

inline void run_block(int threads) {
  static int order[1024];
  static uint32_t random = 1;
  block = Barrier(), block.threads = threads;
  std::fill_n(warps, 32, Barrier());
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[order[i] = i];
    f.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    f.lane = i % 32, f.warp = &warps[i / 32], f.at = nullptr, f.finished = false;
    ++f.warp->threads;
  }
  amid_shared = 0;                                              // such memory exists from its first use
  dl_iterate_phdr(poison_shared, nullptr);
  if (emulator_order == 1 || emulator_order == 5) std::reverse(order, order + threads);
  while (block.threads > 0) {
    if (emulator_order == 2)
      for (int i = threads; i > 1; --i)
        random = random * 1664525 + 1013904223, std::swap(order[i - 1], order[(random >> 8) % i]);
    if (emulator_order == 3) std::rotate(order, order + 1, order + threads);
    bool moved = false, greedy = emulator_order >= 4, again;
    for (int i = 0, next; i < threads; i = next) {
      next = greedy ? min(i + 32, threads) : threads;
      do moved |= again = turns(order + i, order + next); while (greedy && again);
    }
    if (moved) continue;
    const Fiber& stuck = *std::find_if(fibers, fibers + threads, [](const Fiber& f) { return !f.finished; });
    threadIdx = stuck.index;
    die("deadlock: not all threads come to the barrier in line %d", stuck.at->line);
  }
}

}  // namespace emulator

inline void __syncthreads(int line = __builtin_LINE()) { emulator::wait(emulator::block, line); }
inline void __syncwarp(int line = __builtin_LINE()) { emulator::wait(*emulator::current->warp, line); }

inline float __shfl_xor_sync(unsigned mask, float value, int other, int line = __builtin_LINE()) {
  const int lane = emulator::current->lane;
  emulator::Barrier& warp = *emulator::current->warp;
  if (!(mask >> lane & 1)) emulator::die("a shuffle whose mask leaves its caller out, line %d", line);
  float* const values = warp.values[warp.opened % 2];
  values[lane] = value;
  emulator::wait(warp, line);
  return values[lane ^ other];
}

template <class... Parameters, class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const dim3 g = gridDim = config->gridDim, b = blockDim = config->blockDim;
  const uint64_t threads = uint64_t(b.x) * b.y * b.z;
  if (g.x - 1 >= 0x7fffffff || g.y - 1 >= 65535 || g.z - 1 >= 65535 || b.z > 64 || threads - 1 >= 1024)
    emulator::die("invalid launch of %u,%u,%u blocks of %u,%u,%u threads", g.x, g.y, g.z, b.x, b.y, b.z);
  emulator_blocks = g.x * g.y * g.z, emulator_threads = unsigned(threads);
  gridDim.x = min(g.x, emulator_most_blocks), gridDim.y = min(g.y, emulator_most_blocks);
  auto call = [&] { kernel(arguments...); };
  emulator::kernel = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
  emulator::kernel_arguments = &call;
  const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * g.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t k = emulator_order % 2 ? blocks - 1 - i : i;
    blockIdx = dim3(k % gridDim.x, k / gridDim.x % gridDim.y, k / gridDim.x / gridDim.y);
    emulator::run_block(int(threads));
  }
  return 0;
}
