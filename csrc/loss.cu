// masked_mse on the GPU: one warp a prediction row, one pass over prediction and target row, the
// gradient written in the same pass; a backward pass multiplies it by what comes in. Bytes: B * K *
// D * (2 * sizeof(prediction) + sizeof(target)), and 4 * B * K of per-token errors that the mean
// reads; layer_norm reads the target row three times, twice from cache, and standardise mean and
// rstd [N, D], which stay in L2. The limit is memory bandwidth. Sums run in an order fixed by the
// shape alone, so that every run gives the same bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.cuh"
#include "pointwise.h"

namespace salt {
namespace {

template <typename A>
__device__ __forceinline__ A load(uint8_t x) {
  return static_cast<A>(__fdiv_rn(static_cast<float>(x), 255.0f));
}
template <typename A>
__device__ __forceinline__ A load(__half x) {
  return static_cast<A>(__half2float(x));
}
template <typename A>
__device__ __forceinline__ A load(__nv_bfloat16 x) {
  return static_cast<A>(__bfloat162float(x));
}
template <typename A>
__device__ __forceinline__ A load(float x) {
  return static_cast<A>(x);
}
template <typename A>
__device__ __forceinline__ A load(double x) {
  return static_cast<A>(x);
}
__device__ __forceinline__ void store(float& out, float x) { out = x; }
__device__ __forceinline__ void store(double& out, double x) { out = x; }
__device__ __forceinline__ void store(__nv_bfloat16& out, float x) { out = __float2bfloat16_rn(x); }

template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
  return x;
}

template <typename P, typename Y, typename A, int VEC>
__global__ void __launch_bounds__(WARP* WARPS, 4) loss_kernel(Loss a) {
  constexpr int UNROLL =
      VEC > 4 ? 2
              : 4;  // 2 to 3 KB of loads in flight a warp, with 20 warps or more a multiprocessor
  const int lane = threadIdx.x % WARP, D = static_cast<int>(a.D);
  const A scale = static_cast<A>(a.scale * slope_factor(a.kind)), count = static_cast<A>(a.D);
  FOR_CLIPS(b, a.B) FOR_ROWS(k, a.K) {
    const int64_t r = b * a.K + k, position = position_of(a.index, r, k, a.N);
    const P* prediction = static_cast<const P*>(a.prediction) + r * a.D;
    const Y* target = static_cast<const Y*>(a.target) + (b * a.N + position) * a.D;
    P* gradient = a.gradient ? static_cast<P*>(a.gradient) + r * a.D : nullptr;

    A center = 0, factor = 1;  // layer_norm: y becomes (y - center) * factor
    if (a.normalise == Normalise::layer_norm) {
      A sum = 0, squares = 0;
      for (int d = lane * VEC; d < D; d += WARP * VEC) {
        const Pack<Y, VEC> y = *reinterpret_cast<const Pack<Y, VEC>*>(target + d);
#pragma unroll
        for (int v = 0; v < VEC; ++v) sum += load<A>(y.value[v]);
      }
      center = warp_sum(sum) / count;
      for (int d = lane * VEC; d < D; d += WARP * VEC) {
        const Pack<Y, VEC> y = *reinterpret_cast<const Pack<Y, VEC>*>(target + d);
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          const A difference = load<A>(y.value[v]) - center;
          squares += difference * difference;
        }
      }
      factor = 1 / sqrt(warp_sum(squares) / count + static_cast<A>(LAYER_NORM_EPS));
    }
    const A *mean = static_cast<const A*>(a.mean) + position * a.D,
            *rstd = static_cast<const A*>(a.rstd) + position * a.D;

    A error = 0;
    for (int first = lane * VEC; first < D; first += WARP * VEC * UNROLL) {
      Pack<P, VEC> p[UNROLL];
      Pack<Y, VEC> y[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (first + u * WARP * VEC < D) {
          p[u] = *reinterpret_cast<const Pack<P, VEC>*>(prediction + first + u * WARP * VEC);
          y[u] = *reinterpret_cast<const Pack<Y, VEC>*>(target + first + u * WARP * VEC);
        }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int d = first + u * WARP * VEC;
        if (d >= D) break;
        Pack<A, VEC> wanted;
#pragma unroll
        for (int v = 0; v < VEC; ++v) wanted.value[v] = load<A>(y[u].value[v]);
        if (a.normalise == Normalise::layer_norm) {
#pragma unroll
          for (int v = 0; v < VEC; ++v) wanted.value[v] = (wanted.value[v] - center) * factor;
        } else if (a.normalise == Normalise::standardise) {
          const Pack<A, VEC> m = *reinterpret_cast<const Pack<A, VEC>*>(mean + d),
                             s = *reinterpret_cast<const Pack<A, VEC>*>(rstd + d);
#pragma unroll
          for (int v = 0; v < VEC; ++v)
            wanted.value[v] = (wanted.value[v] - m.value[v]) * s.value[v];
        }
        Pack<P, VEC> slope;
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          const A difference = load<A>(p[u].value[v]) - wanted.value[v];
          error += error_of(a.kind, difference);
          store(slope.value[v], scale * slope_of(a.kind, difference));
        }
        if (gradient) *reinterpret_cast<Pack<P, VEC>*>(gradient + d) = slope;
      }
    }
    error = warp_sum(error);
    if (lane == 0) static_cast<A*>(a.per_token)[r] = error / count;
  }
}

template <typename P, typename Y, typename A>
void launch(const Loss& a, CUstream_st* stream) {
  constexpr int VEC = 16 / sizeof(P);
  const dim3 grid = grid_of(a.B, a.K, WARPS);
  if (a.D % VEC == 0 && aligned(a.prediction, 16) && aligned(a.gradient, 16) &&
      aligned(a.target, alignof(Pack<Y, VEC>)) && aligned(a.mean, 16) && aligned(a.rstd, 16))
    loss_kernel<P, Y, A, VEC><<<grid, WARP * WARPS, 0, stream>>>(a);
  else
    loss_kernel<P, Y, A, 1><<<grid, WARP * WARPS, 0, stream>>>(a);
}

template <typename P, typename A>
void launch_target(const Loss& a, CUstream_st* stream) {
  switch (a.target_type) {
    case Type::u8:
      return launch<P, uint8_t, A>(a, stream);
    case Type::f16:
      return launch<P, __half, A>(a, stream);
    case Type::bf16:
      return launch<P, __nv_bfloat16, A>(a, stream);
    case Type::f32:
      return launch<P, float, A>(a, stream);
    case Type::f64:
      return launch<P, double, A>(a, stream);
  }
}

constexpr int PACKS = 4;  // of 16 bytes that a thread of scale_kernel has in flight

// out = x * *factor, rounded once. The factor is read where it lies, so that the host need not
// wait.
template <typename P, typename A>
__global__ void __launch_bounds__(WARP* WARPS)
    scale_kernel(const P* x, int64_t count, bool aligned, const A* factor, P* out) {
  constexpr int VEC = 16 / sizeof(P);
  constexpr int64_t THREADS = WARP * WARPS;
  const A scale = *factor;
  const int64_t packs = aligned ? count / VEC : 0,
                first = blockIdx.x * THREADS * PACKS + threadIdx.x;
  Pack<P, VEC> held[PACKS];
#pragma unroll
  for (int u = 0; u < PACKS; ++u) {
    const int64_t i = first + u * THREADS;
    if (i < packs) held[u] = reinterpret_cast<const Pack<P, VEC>*>(x)[i];
  }
#pragma unroll
  for (int u = 0; u < PACKS; ++u) {
    const int64_t i = first + u * THREADS;
    if (i >= packs) continue;
#pragma unroll
    for (int v = 0; v < VEC; ++v) store(held[u].value[v], scale * load<A>(held[u].value[v]));
    reinterpret_cast<Pack<P, VEC>*>(out)[i] = held[u];
  }
  const int64_t stride = gridDim.x * THREADS;
  for (int64_t i = VEC * packs + blockIdx.x * THREADS + threadIdx.x; i < count; i += stride)
    store(out[i], scale * load<A>(x[i]));
}

template <typename P, typename A>
void launch_scale(const void* x, int64_t count, const void* factor, void* out,
                  CUstream_st* stream) {
  constexpr int64_t a_block = static_cast<int64_t>(WARP) * WARPS * PACKS * (16 / sizeof(P));
  const auto blocks = static_cast<unsigned>((count + a_block - 1) / a_block);
  scale_kernel<P, A><<<blocks, WARP * WARPS, 0, stream>>>(
      static_cast<const P*>(x), count, aligned(x, 16) && aligned(out, 16),
      static_cast<const A*>(factor), static_cast<P*>(out));
}

constexpr int MEAN_THREADS = 1024;

template <typename A>
__global__ void __launch_bounds__(MEAN_THREADS)
    mean_kernel(const A* x, int64_t count, bool aligned, A* mean) {
  __shared__ A warps[WARP];
  const int64_t packs = aligned ? count / 4 : 0;
  A sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < packs; i += MEAN_THREADS) {
    const Pack<A, 4> four = reinterpret_cast<const Pack<A, 4>*>(x)[i];
    sum += (four.value[0] + four.value[1]) + (four.value[2] + four.value[3]);
  }
  for (int64_t i = 4 * packs + threadIdx.x; i < count; i += MEAN_THREADS) sum += x[i];
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sum;
  __syncthreads();
  if (threadIdx.x < WARP) {
    sum = warp_sum(warps[threadIdx.x]);
    if (threadIdx.x == 0) *mean = sum / static_cast<A>(count);
  }
}

}  // namespace

int loss_cuda(const Loss& a, CUstream_st* stream) {
  switch (a.prediction_type) {
    case Type::bf16:
      launch_target<__nv_bfloat16, float>(a, stream);
      break;
    case Type::f32:
      launch_target<float, float>(a, stream);
      break;
    case Type::f64:
      launch_target<double, double>(a, stream);
      break;
    case Type::u8:
    case Type::f16:
      return cudaErrorInvalidValue;  // refused by the caller
  }
  return cudaGetLastError();
}

int scale_cuda(const void* x, int64_t count, Type type, const void* factor, void* out,
               CUstream_st* stream) {
  switch (type) {
    case Type::bf16:
      launch_scale<__nv_bfloat16, float>(x, count, factor, out, stream);
      break;
    case Type::f32:
      launch_scale<float, float>(x, count, factor, out, stream);
      break;
    case Type::f64:
      launch_scale<double, double>(x, count, factor, out, stream);
      break;
    case Type::u8:
    case Type::f16:
      return cudaErrorInvalidValue;  // no gradient is of these
  }
  return cudaGetLastError();
}

int mean_cuda(const void* x, int64_t count, Type type, void* mean, CUstream_st* stream) {
  if (type == Type::f64)
    mean_kernel<<<1, MEAN_THREADS, 0, stream>>>(static_cast<const double*>(x), count,
                                                aligned(x, 16), static_cast<double*>(mean));
  else
    mean_kernel<<<1, MEAN_THREADS, 0, stream>>>(static_cast<const float*>(x), count, aligned(x, 16),
                                                static_cast<float*>(mean));
  return cudaGetLastError();
}

}  // namespace salt
