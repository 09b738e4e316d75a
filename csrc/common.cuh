// What the CUDA kernels share. No torch header: each .cu compiles in seconds and stands alone.
#pragma once
#undef NDEBUG  // a wrong index ends in a device assert, in every build
#include <cassert>
#include <cuda_runtime.h>

#include "kernels.h"

namespace salt {

// assert(holds), and nothing is kept in registers for what comes after a failure.
__device__ __forceinline__ void expect(bool holds, const char* message) {
  if (!holds) {
    __assert_fail(message, "salt_ops", 0, "");
    __builtin_unreachable();
  }
}

constexpr int WARP = 32, WARPS = 8;  // lanes a warp, warps a block
constexpr unsigned ALL = 0xffffffffu;

// Blocks for `items` items; kernels stride over what is beyond the grid.
inline unsigned blocks_for(int64_t items, int64_t a_block) {
  const int64_t blocks = (items + a_block - 1) / a_block;
  return static_cast<unsigned>(blocks < (int64_t{1} << 30) ? blocks : int64_t{1} << 30);
}

inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0; }

// N values of T that one instruction loads or stores (two or more where they exceed 16 bytes).
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

__device__ __forceinline__ int64_t warp_number() { return static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP; }
__device__ __forceinline__ int64_t warps_in_grid() { return static_cast<int64_t>(gridDim.x) * WARPS; }

// The row that output row r = (b, k) reads: row index[b, k] of clip b's N, or row r where there is no index.
__device__ __forceinline__ int64_t position_of(const int64_t* index, int64_t r, int64_t N, int64_t K) {
  const int64_t n = index ? index[r] : r % K;
  expect(n >= 0 && n < N, "index is out of range");
  return n;
}

}  // namespace salt
