// Philox-4x32-10, the counter-based generator of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
// Integer arithmetic only: the same bits from any compiler, on the host and on the device.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SALT_HD __host__ __device__ __forceinline__
#else
#define SALT_HD inline
#endif

namespace salt {

struct Philox {
  uint32_t key[2];
  uint32_t counter[4];  // counter[0] holds the block number in its low 28 bits and the stream in its high 4
  uint32_t out[4];
  uint32_t used;

  // The stream of one (seed, epoch, sample, stream): 2^28 blocks of four 32-bit numbers.
  SALT_HD Philox(uint64_t seed, uint32_t epoch, uint64_t sample_id, uint32_t stream) {
    key[0] = static_cast<uint32_t>(seed);
    key[1] = static_cast<uint32_t>(seed >> 32);
    counter[0] = stream << 28;
    counter[1] = epoch;
    counter[2] = static_cast<uint32_t>(sample_id);
    counter[3] = static_cast<uint32_t>(sample_id >> 32);
    used = 4;
  }

  SALT_HD void block() {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
    ++counter[0];
    used = 0;
  }

  SALT_HD uint32_t next() {
    if (used == 4) block();
    return out[used++];
  }

  // A whole number in [0, n): the high half of next() * n. A value's probability is off 1/n by less than 2^-32.
  SALT_HD uint32_t below(uint32_t n) { return static_cast<uint32_t>((static_cast<uint64_t>(next()) * n) >> 32); }
};

}  // namespace salt
