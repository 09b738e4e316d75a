// What the CUDA kernels share. No torch header: each .cu compiles in seconds and stands alone.
#pragma once
#undef NDEBUG  // a wrong index ends in a device assert, in every build
#include <cuda_runtime.h>

#include <cassert>

#include "kernels.h"

namespace salt {

// assert(holds), and nothing is kept in registers for what comes after a failure.
__device__ __forceinline__ void expect(bool holds, const char* message) {
  if (!holds) {
    __assert_fail(message, "salt_ops", 0, "");
    __builtin_unreachable();
  }
}

constexpr int WARP = 32, WARPS = 4;  // lanes a warp, warps a block
constexpr unsigned ALL = 0xffffffffu;

// A grid over `rows` rows, `a_block` of them a block, of B clips. Kernels stride over what is
// beyond it, by FOR_CLIPS and FOR_ROWS: no division, which for 64-bit numbers is a call and makes
// the compiler spill.
inline dim3 grid_of(int64_t B, int64_t rows, int64_t a_block) {
  const int64_t x = (rows + a_block - 1) / a_block;
  return dim3(static_cast<unsigned>(x < (int64_t{1} << 30) ? x : int64_t{1} << 30),
              static_cast<unsigned>(B < 65535 ? B : 65535));
}
#define FOR_CLIPS(b, B) for (int64_t b = blockIdx.y; b < (B); b += gridDim.y)
#define FOR_ROWS(k, K)                                                                     \
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP; k < (K); \
       k += static_cast<int64_t>(gridDim.x) * WARPS)

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// N values of T that one instruction loads or stores (two or more where they exceed 16 bytes).
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

// Entry i of the index, or `position` where there is no index: a row of 0 <= n < N.
__device__ __forceinline__ int64_t position_of(const int64_t* index, int64_t i, int64_t position,
                                               int64_t N) {
  const int64_t n = index ? index[i] : position;
  expect(n >= 0 && n < N, "index is out of range");
  return n;
}

}  // namespace salt
