// Philox-4x32-10, the counter-based generator of Salmon et al., "Parallel Random Numbers: As Easy
// as 1, 2, 3" (SC 2011). Integer arithmetic only: the same bits from any compiler, on the host and
// on the device.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SALT_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SALT_HD \
  inline __attribute__((always_inline))  // so that a caller's instruction set reaches in here
#else
#define SALT_HD inline
#endif

namespace salt {

// The stream of one (seed, epoch, sample, stream): 2^28 blocks of four 32-bit numbers.
struct Philox {
  uint32_t key[2];
  uint32_t counter[4];  // counter[0] holds the block number in its low 28 bits and the stream in
                        // its high 4

  SALT_HD Philox(uint64_t seed, uint32_t epoch, uint64_t sample_id, uint32_t stream)
      : key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        counter{stream << 28, epoch, static_cast<uint32_t>(sample_id),
                static_cast<uint32_t>(sample_id >> 32)} {}

  // The four numbers of block `block`, to out[0], out[stride], out[2 stride] and out[3 stride].
  SALT_HD void block(uint32_t block, uint32_t* out, int32_t stride) const {
    uint32_t c0 = counter[0] | block, c1 = counter[1], c2 = counter[2], c3 = counter[3],
             k0 = key[0], k1 = key[1];
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[stride] = c1, out[2 * stride] = c2, out[3 * stride] = c3;
  }
};

}  // namespace salt
