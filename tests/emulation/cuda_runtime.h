// Enough of CUDA to run the project's kernels on a CPU, a block at a time, for `make emulate`:
// every thread of a block is a fibre that runs until it reaches a barrier or a shuffle. It finds
// wrong indices, wrong sums and missing outputs, and lets AddressSanitizer and
// UndefinedBehaviorSanitizer look at the device code; it does not find races. the Makefile turns
// `kernel<<<...>>>(...)` into salt_launch.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
constexpr int cudaErrorInvalidValue = 1;
inline int cudaGetLastError() { return 0; }

namespace emulation {

enum class State { runs, at_warp_barrier, at_block_barrier, done };
struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
};
inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline unsigned current;
inline dim3 thread_index, block_index, grid;
inline std::function<void()> body;
inline std::vector<uint64_t> shared;
inline uint64_t slots[1024];  // what each thread offers in a shuffle

constexpr size_t STACK = 256 * 1024;

inline void wait(State at) {
  fibres[current].state = at;
  swapcontext(&fibres[current].context, &scheduler);
}

inline void enter() {
  body();
  fibres[current].state = State::done;
  swapcontext(&fibres[current].context, &scheduler);
}

// Let those go on that all wait at one barrier: threads [begin, end), of which some may be done.
inline bool release(size_t begin, size_t end, State barrier) {
  bool waits = false;
  for (size_t i = begin; i < end; ++i) {
    if (fibres[i].state != barrier && fibres[i].state != State::done) return false;
    waits = waits || fibres[i].state == barrier;
  }
  for (size_t i = begin; i < end; ++i)
    if (fibres[i].state == barrier) fibres[i].state = State::runs;
  return waits;
}

inline void run_block(unsigned threads) {
  if (fibres.size() != threads) fibres = std::vector<Fibre>(threads);
  for (Fibre& fibre : fibres) {
    if (!fibre.stack) fibre.stack.reset(new char[STACK]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get(), fibre.context.uc_stack.ss_size = STACK,
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
    fibre.state = State::runs;
  }
  for (;;) {
    bool moved = false;
    for (current = 0; current < threads; ++current)
      if (fibres[current].state == State::runs) {
        moved = true;
        thread_index.x = current;
        swapcontext(&scheduler, &fibres[current].context);
      }
    for (size_t warp = 0; warp < threads; warp += 32)
      moved |= release(warp, warp + 32 < threads ? warp + 32 : threads, State::at_warp_barrier);
    moved |= release(0, threads, State::at_block_barrier);
    if (!moved) break;
  }
  for (const Fibre& fibre : fibres)
    if (fibre.state != State::done)
      std::fprintf(stderr, "emulation: threads wait at different barriers\n"), std::abort();
}

template <typename Kernel>
auto launcher(Kernel kernel, dim3 blocks, unsigned threads, size_t shared_bytes) {
  return [=](auto... arguments) {
    body = [=] { kernel(arguments...); };
    grid = blocks;
    for (block_index.y = 0; block_index.y < blocks.y; ++block_index.y)
      for (block_index.x = 0; block_index.x < blocks.x; ++block_index.x) {
        shared.assign(shared_bytes / 8 + 1, 0xA5A5A5A5A5A5A5A5ull);
        shared.resize(shared_bytes / 8);
        run_block(threads);
      }
  };
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid
#define salt_launch(kernel, blocks, threads, shared_bytes, stream)                                 \
  (static_cast<void>(stream), emulation::launcher([](auto... arguments) { kernel(arguments...); }, \
                                                  dim3(blocks), threads, shared_bytes))

inline void __syncwarp() { emulation::wait(emulation::State::at_warp_barrier); }
inline void __syncthreads() { emulation::wait(emulation::State::at_block_barrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  std::memcpy(&emulation::slots[threadIdx.x], &value, sizeof value);
  __syncwarp();
  std::memcpy(&value, &emulation::slots[threadIdx.x ^ static_cast<unsigned>(mask)], sizeof value);
  __syncwarp();
  return value;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline void atomicOr(unsigned long long* where, unsigned long long bits) { *where |= bits; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
