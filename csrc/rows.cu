// masked_gather, masked_scatter and patch_normalise on the GPU: one warp an output row, as wide as
// alignment allows, several loads in flight. Bytes: gather 2 * B * K * row; scatter B * (K + N) *
// row (each output row is written once, with zeros or with its source); patch_normalise B * K * D *
// (1 + sizeof(out)). The limit is memory bandwidth.
#include <cuda_bf16.h>

#include "common.cuh"

namespace salt {
namespace {

constexpr int UNROLL = 4;

template <typename V>
__device__ __forceinline__ void copy_row(const char* from, char* to, int vectors) {
  const V* source = reinterpret_cast<const V*>(from);
  V* out = reinterpret_cast<V*>(to);
  for (int first = threadIdx.x % WARP; first < vectors; first += WARP * UNROLL) {
    V held[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (first + u * WARP < vectors) held[u] = source[first + u * WARP];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (first + u * WARP < vectors) out[first + u * WARP] = held[u];
  }
}

template <typename V>
__global__ void __launch_bounds__(WARP* WARPS) gather_kernel(Rows a) {
  FOR_CLIPS(b, a.B) FOR_ROWS(k, a.K) {
    const int64_t r = b * a.K + k, row = b * a.N + position_of(a.index, r, k, a.N);
    copy_row<V>(a.x + row * a.row_bytes, a.out + r * a.row_bytes,
                static_cast<int>(a.row_bytes / static_cast<int64_t>(sizeof(V))));
  }
}

constexpr int CHUNK =
    64;  // output rows of one clip that a block writes; it reads the clip's index once for them

template <typename V>
__global__ void __launch_bounds__(WARP* WARPS) scatter_kernel(Rows a) {
  __shared__ int source[CHUNK];  // of each output row: k, or -1
  const int vectors = static_cast<int>(a.row_bytes / static_cast<int64_t>(sizeof(V)));
  FOR_CLIPS(b, a.B)
  for (int64_t first = blockIdx.x * static_cast<int64_t>(CHUNK); first < a.N;
       first += gridDim.x * static_cast<int64_t>(CHUNK)) {
    for (int i = threadIdx.x; i < CHUNK; i += WARP * WARPS) source[i] = -1;
    __syncthreads();
    for (int64_t k = threadIdx.x; k < a.K; k += WARP * WARPS) {
      const int64_t n = position_of(a.index, b * a.K + k, k, a.N) - first;
      if (n >= 0 && n < CHUNK) source[n] = static_cast<int>(k);
    }
    __syncthreads();
    for (int i = threadIdx.x / WARP; i < CHUNK && first + i < a.N; i += WARPS) {
      char* to = a.out + (b * a.N + first + i) * a.row_bytes;
      if (source[i] >= 0)
        copy_row<V>(a.x + (b * a.K + source[i]) * a.row_bytes, to, vectors);
      else
        for (int v = threadIdx.x % WARP; v < vectors; v += WARP) reinterpret_cast<V*>(to)[v] = V{};
    }
    __syncthreads();
  }
}

__device__ __forceinline__ void store(float& out, float x) { out = x; }
__device__ __forceinline__ void store(__nv_bfloat16& out, float x) { out = __float2bfloat16_rn(x); }

// VEC entries a lane: 16 bytes of output, or one where rows or channels do not divide into that. A
// product and a sum, each rounded, as on the CPU, so that the bits are the same.
template <typename Out, int VEC>
__global__ void __launch_bounds__(WARP* WARPS) patches_kernel(Patches a, int span) {
  const int D = static_cast<int>(a.D);
  FOR_CLIPS(b, a.B) FOR_ROWS(k, a.K) {
    const uint8_t* row = a.patches + (b * a.N + position_of(a.index, b * a.K + k, k, a.N)) * a.D;
    Out* out = static_cast<Out*>(a.out) + (b * a.K + k) * a.D;
    for (int first = threadIdx.x % WARP * VEC; first < D; first += WARP * VEC * UNROLL) {
      Pack<uint8_t, VEC> held[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (first + u * WARP * VEC < D)
          held[u] = *reinterpret_cast<const Pack<uint8_t, VEC>*>(row + first + u * WARP * VEC);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int d = first + u * WARP * VEC;
        if (d >= D) break;
        float scale = a.scale[0], shift = a.shift[0];
#pragma unroll
        for (int c = 1; c < MAX_CHANNELS; ++c)
          if (c < a.channels && d >= c * span) scale = a.scale[c], shift = a.shift[c];
        Pack<Out, VEC> made;
#pragma unroll
        for (int v = 0; v < VEC; ++v)
          store(made.value[v],
                __fadd_rn(__fmul_rn(static_cast<float>(held[u].value[v]), scale), shift));
        *reinterpret_cast<Pack<Out, VEC>*>(out + d) = made;
      }
    }
  }
}

template <typename Out>
void launch_patches(const Patches& a, CUstream_st* stream) {
  constexpr int VEC = 16 / sizeof(Out);
  const dim3 grid = grid_of(a.B, a.K, WARPS);
  const int span = static_cast<int>(a.D) / a.channels;
  if (span % VEC == 0 && aligned(a.patches, VEC) && aligned(a.out, 16))
    patches_kernel<Out, VEC><<<grid, WARP * WARPS, 0, stream>>>(a, span);
  else
    patches_kernel<Out, 1><<<grid, WARP * WARPS, 0, stream>>>(a, span);
}

// Bytes of the widest vector that divides the rows of both arrays.
int64_t width_of(const Rows& a) {
  for (const int64_t width : {16, 4, 2})
    if (a.row_bytes % width == 0 && aligned(a.x, width) && aligned(a.out, width)) return width;
  return 1;
}

}  // namespace

int gather_cuda(const Rows& a, CUstream_st* stream) {
  const dim3 grid = grid_of(a.B, a.K, WARPS);
  switch (width_of(a)) {
    case 16:
      gather_kernel<uint4><<<grid, WARP * WARPS, 0, stream>>>(a);
      break;
    case 4:
      gather_kernel<uint32_t><<<grid, WARP * WARPS, 0, stream>>>(a);
      break;
    case 2:
      gather_kernel<uint16_t><<<grid, WARP * WARPS, 0, stream>>>(a);
      break;
    default:
      gather_kernel<uint8_t><<<grid, WARP * WARPS, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

int scatter_cuda(const Rows& a, CUstream_st* stream) {
  const dim3 grid = grid_of(a.B, a.N, CHUNK);
  switch (width_of(a)) {
    case 16:
      scatter_kernel<uint4><<<grid, WARP * WARPS, 0, stream>>>(a);
      break;
    case 4:
      scatter_kernel<uint32_t><<<grid, WARP * WARPS, 0, stream>>>(a);
      break;
    case 2:
      scatter_kernel<uint16_t><<<grid, WARP * WARPS, 0, stream>>>(a);
      break;
    default:
      scatter_kernel<uint8_t><<<grid, WARP * WARPS, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

int patches_cuda(const Patches& a, CUstream_st* stream) {
  a.out_type == Type::f32 ? launch_patches<float>(a, stream)
                          : launch_patches<__nv_bfloat16>(a, stream);
  return cudaGetLastError();
}

}  // namespace salt
