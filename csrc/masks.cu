// sample_masks on the GPU: masks.h with one warp a clip, its scratch in shared memory (about 7 KB
// on the 8x14x14 grid), or in global memory where the grid is too large for that. Bytes: 8 *
// (context + target) written a clip. What takes the time is latency: one lane draws the lottery
// (about 460 dependent shared-memory steps a clip), and all clips of a batch run side by side.
#include "common.cuh"

namespace salt {
namespace {

struct Warp {
  static constexpr int32_t size = WARP, blocks = WARP, beyond = 0;
  int32_t lane;

  __device__ __forceinline__ static int32_t place(int32_t q) { return (q & 3) * WARP + (q >> 2); }

  __device__ __forceinline__ void sync() const { __syncwarp(); }
  __device__ __forceinline__ void check(bool holds) const {
    expect(holds, "sizes do not fit the grid");
  }
  __device__ __forceinline__ int32_t sum(int32_t x) const {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
    return x;
  }
  __device__ __forceinline__ void set(uint64_t* word, uint64_t mask) const {
    atomicOr(reinterpret_cast<unsigned long long*>(word), static_cast<unsigned long long>(mask));
  }
  __device__ __forceinline__ void fill(const Philox& philox, uint32_t first_block,
                                       uint32_t* out) const {
    philox.block(first_block + static_cast<uint32_t>(lane), out + lane, blocks);
  }
  __device__ __forceinline__ static int32_t count(uint64_t x) { return __popcll(x); }

  template <typename Integer>
  __device__ __forceinline__ int32_t list(const uint64_t* bits, int32_t words, Integer* out) const {
    int32_t found = 0;
    for (int32_t i = 0; i < 2 * words; ++i) {
      const uint32_t half = static_cast<uint32_t>(bits[i >> 1] >> (32 * (i & 1)));
      if (half >> lane & 1)
        out[found + __popc(half & ((1u << lane) - 1))] = static_cast<Integer>(32 * i + lane);
      found += __popc(half);
    }
    return found;
  }
  __device__ __forceinline__ void write(const uint64_t* bits, int32_t words, int32_t*,
                                        int64_t* out) const {
    list(bits, words, out);
  }
  template <class Random>
  __device__ __forceinline__ void draw(const Random& random, int32_t* pool, int32_t pool_size,
                                       int32_t done, int32_t take) const {
    for (int32_t q = 0; lane == 0 && q < take; ++q) {
      const int32_t i = done + q, j = i + random.peek(random.used + q, pool_size - i),
                    token = pool[j];
      pool[j] = pool[i];
      pool[i] = token;
    }
  }
  __device__ __forceinline__ void mark(const int32_t* pool, int32_t count, uint64_t* bits,
                                       int32_t words) const {
    for (int32_t i = lane; i < words; i += WARP) bits[i] = 0;
    sync();
    for (int32_t i = lane; i < count; i += WARP)
      set(bits + (pool[i] >> 6), uint64_t{1} << (pool[i] & 63));
  }
};

__global__ void __launch_bounds__(WARP, 1)
    draw_kernel(Draw draw, uint64_t* global_scratch, int64_t scratch_words) {
  extern __shared__ uint64_t shared_scratch[];
  const Warp team{static_cast<int32_t>(threadIdx.x)};
  for (int64_t i = blockIdx.x; i < draw.B; i += gridDim.x) {
    const int64_t id = draw.sample_ids[i];
    expect(id >= 0, "sample_ids must be at least 0");
    uint64_t* scratch = scratch_words ? global_scratch + i * scratch_words : shared_scratch;
    draw_masks(team, draw.spec, draw.seed, draw.epoch, static_cast<uint64_t>(id), scratch,
               draw.context + i * draw.spec.context, draw.target + i * draw.spec.kept);
    __syncwarp();
  }
}

}  // namespace

int64_t draw_scratch_cuda(const MaskSpec& spec) {
  const int64_t bytes = mask_scratch<Warp>(spec);
  return bytes <= 48 * 1024 ? 0 : bytes;
}

int draw_cuda(const Draw& draw, void* scratch, CUstream_st* stream) {
  const int64_t global = draw_scratch_cuda(draw.spec),
                shared = global ? 0 : mask_scratch<Warp>(draw.spec);
  const unsigned blocks = static_cast<unsigned>(draw.B < (1 << 30) ? draw.B : 1 << 30);
  draw_kernel<<<blocks, WARP, shared, stream>>>(draw, static_cast<uint64_t*>(scratch), global / 8);
  return cudaGetLastError();
}

}  // namespace salt
