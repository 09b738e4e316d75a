// The CPU kernels. AVX-512 and AVX2 versions of each hot function are compiled beside the plain one
// and chosen at run time; all three give the same bits: sums run in LANES lanes whatever the width,
// and nothing is contracted (-ffp-contract=off).
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "files.h"
#include "kernels.h"
#include "pointwise.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SALT_X86 1
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // GCC 12 says it of its own intrinsics' undefined lanes
#include <immintrin.h>
#define SALT_AVX512 \
  __attribute__((   \
      target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi,bmi2,popcnt,prefer-vector-width=512")))
#define SALT_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#endif
#if defined(__GNUC__)
#define SALT_INLINE \
  __attribute__((   \
      always_inline))  // into a version of its caller, whose instruction set it then takes
#else
#define SALT_INLINE
#endif

namespace salt {
namespace {

enum class Simd { baseline, avx2, avx512 };

Simd detect() {
#ifdef SALT_X86
  const char* asked = std::getenv("SALT_SIMD");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool plain = asked && !std::strcmp(asked, "baseline"),
             less = plain || (asked && !std::strcmp(asked, "avx2"));
  if (avx512 && avx2 && !less) return Simd::avx512;
  if (avx2 && !plain) return Simd::avx2;
#endif
  return Simd::baseline;
}
const Simd SIMD = detect();

// ------------------------------------------------------------------------------------------------
// masks

#ifdef SALT_X86
struct Avx512 : Serial {
  // two a lane, so that neither chain waits for its products
  static constexpr int32_t blocks = 32, beyond = 16;
  static constexpr int32_t MARKED = 64;  // words of a bitmap that is made by way of bytes, 4 KB
  static SALT_HD int32_t place(int32_t q) { return q; }

  SALT_AVX512 static inline __m512i all(uint32_t x) {
    return _mm512_set1_epi32(static_cast<int>(x));
  }
  // high and low halves of the sixteen products x * factor; `factor` in the even entries
  SALT_AVX512 static inline void multiply(__m512i x, __m512i factor, __m512i& high, __m512i& low) {
    const __m512i even = _mm512_mul_epu32(x, factor),
                  odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
    high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  }
  // Philox::block for `blocks` of them. Lane 4 k + m has block 4 m + k, so that transposing by
  // fours puts the numbers in order.
  SALT_AVX512 void fill(const Philox& philox, uint32_t first_block, uint32_t* out) const {
    const __m512i lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0),
                  m0 = all(0xD2511F53u), m1 = all(0xCD9E8D57u);
    __m512i c0[2], c1[2], c2[2], c3[2];
    for (int i = 0; i < 2; ++i) {
      const __m512i block =
          _mm512_add_epi32(all(first_block + 16 * static_cast<uint32_t>(i)), lanes);
      c0[i] = _mm512_or_si512(all(philox.counter[0]), block);
      c1[i] = all(philox.counter[1]), c2[i] = all(philox.counter[2]);
      c3[i] = all(philox.counter[3]);
    }
    uint32_t k0 = philox.key[0], k1 = philox.key[1];
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        __m512i high0, low0, high1, low1;
        multiply(c0[i], m0, high0, low0), multiply(c2[i], m1, high1, low1);
        c0[i] = _mm512_xor_si512(_mm512_xor_si512(high1, c1[i]), all(k0));
        c2[i] = _mm512_xor_si512(_mm512_xor_si512(high0, c3[i]), all(k1));
        c1[i] = low1, c3[i] = low0;
      }
    for (int i = 0; i < 2; ++i, out += 64) {
      const __m512i a = _mm512_unpacklo_epi32(c0[i], c1[i]),
                    b = _mm512_unpackhi_epi32(c0[i], c1[i]),
                    c = _mm512_unpacklo_epi32(c2[i], c3[i]),
                    d = _mm512_unpackhi_epi32(c2[i], c3[i]);
      _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, c));
      _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(a, c));
      _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(b, d));
      _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(b, d));
    }
  }
  // By a byte a token: in a bitmap's words one would wait for the one before.
  SALT_AVX512 void mark(const int32_t* pool, int32_t count, uint64_t* bits, int32_t words) const {
    if (words > MARKED) return Serial::mark(pool, count, bits, words);
    uint8_t bytes[64 * MARKED];
    for (int32_t i = 0; i < words; ++i) _mm512_storeu_si512(bytes + 64 * i, _mm512_setzero_si512());
    for (int32_t i = 0; i < count; ++i) bytes[pool[i]] = 0xFF;
    for (int32_t i = 0; i < words; ++i)
      bits[i] = _mm512_movepi8_mask(_mm512_loadu_si512(bytes + 64 * i));
  }
  // Compressed in a register: to memory it takes 100 cycles on some processors. What a store writes
  // beyond its set bits, up to `beyond` numbers, the next one overwrites.
  SALT_AVX512 int32_t list(const uint64_t* bits, int32_t words, int32_t* out) const {
    __m512i here = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    int32_t* next = out;
    for (int32_t i = 0; i < words; ++i) {
      const uint64_t word = bits[i];
      int32_t* const to[4] = {next, next + count(word & 0xFFFF), next + count(word & 0xFFFFFFFF),
                              next + count(word & 0xFFFFFFFFFFFF)};
      next += count(word);
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const __mmask16 mask = static_cast<__mmask16>(word >> (16 * part));
        _mm512_storeu_si512(to[part], _mm512_maskz_compress_epi32(mask, here));
        here = _mm512_add_epi32(here, all(16));
      }
    }
    return static_cast<int32_t>(next - out);
  }
  SALT_AVX512 void write(const uint64_t* bits, int32_t words, int32_t* pool, int64_t* out) const {
    const int32_t found = list(bits, words, pool);
    for (int32_t i = 0; i < found; ++i) out[i] = pool[i];
  }
};

// Runs body(team), compiled for what the processor has.
template <class Body>
SALT_AVX512 void run_avx512(const Body& body) {
  body(Avx512{});
}
template <class Body>
SALT_AVX2 void run_avx2(const Body& body) {
  body(Serial{});
}
template <class Body>
void run(const Body& body) {
  if (SIMD == Simd::avx512) return run_avx512(body);
  if (SIMD == Simd::avx2) return run_avx2(body);
  body(Serial{});
}
#else
template <class Body>
void run(const Body& body) {
  body(Serial{});
}
#endif

template <class Team>
inline SALT_INLINE void draw_clips(const Draw& draw, int64_t begin, int64_t end) {
  std::vector<uint64_t> room(static_cast<size_t>(mask_scratch<Team>(draw.spec) + 7) / 8);
  uint64_t* scratch = room.data();
  for (int64_t i = begin; i < end; ++i)
    draw_masks(Team{}, draw.spec, draw.seed, draw.epoch, static_cast<uint64_t>(draw.sample_ids[i]),
               scratch, draw.context + i * draw.spec.context, draw.target + i * draw.spec.kept);
}

}  // namespace

void draw_cpu(const Draw& draw, int64_t begin, int64_t end) {
  run([&](auto team) SALT_INLINE { draw_clips<decltype(team)>(draw, begin, end); });
}

// ------------------------------------------------------------------------------------------------
// rows

namespace {
// The row of `source` that output row r = (b, k) reads, of N rows a clip.
inline SALT_INLINE int64_t source_row(const int64_t* index, int64_t r, int64_t N, int64_t K) {
  return index ? r / K * N + index[r] : r;
}
}  // namespace

void gather_cpu(const Rows& rows, int64_t begin, int64_t end) {
  const int64_t bytes = rows.row_bytes;
  if (bytes == 0) return;
  for (int64_t r = begin; r < end; ++r)
    std::memcpy(rows.out + r * bytes, rows.x + source_row(rows.index, r, rows.N, rows.K) * bytes,
                static_cast<size_t>(bytes));
}

void scatter_cpu(const Rows& rows, int64_t begin, int64_t end) {
  const int64_t bytes = rows.row_bytes, N = rows.N, K = rows.K;
  if (bytes == 0) return;
  std::vector<const char*>
      source;  // of the output rows of one clip that are asked for here, or null for zeros
  for (int64_t r = begin; r < end;) {
    const int64_t b = r / N, first = r - b * N, last = end < (b + 1) * N ? end - b * N : N;
    source.assign(static_cast<size_t>(last - first), nullptr);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t n = rows.index[b * K + k];
      if (n >= first && n < last)
        source[static_cast<size_t>(n - first)] = rows.x + (b * K + k) * bytes;
    }
    for (const char* from : source) {
      char* to = rows.out + r++ * bytes;
      from ? std::memcpy(to, from, static_cast<size_t>(bytes))
           : std::memset(to, 0, static_cast<size_t>(bytes));
    }
  }
}

namespace {

// ------------------------------------------------------------------------------------------------
// numbers

struct pixel {
  uint8_t value;
};
struct half {
  uint16_t bits;
};
struct bfloat {
  uint16_t bits;
};

SALT_INLINE inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
SALT_INLINE inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

SALT_INLINE inline float load(float x) { return x; }
SALT_INLINE inline double load(double x) { return x; }
SALT_INLINE inline float load(pixel x) { return static_cast<float>(x.value) / 255.0f; }
SALT_INLINE inline float load(bfloat x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
SALT_INLINE inline float load(half x) {
  // Shift exponent and mantissa into place and let one multiplication by 2^112 rebias the exponent:
  // right for normal and subnormal numbers alike. Infinity and nan get the largest exponent put
  // back.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16,
                 magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return float_of(bits_of(float_of(magnitude) * 5.192296858534828e33f) | sign | special);
}

SALT_INLINE inline void store(float& out, float x) { out = x; }
SALT_INLINE inline void store(double& out, double x) { out = x; }
SALT_INLINE inline void store(bfloat& out, float x) {  // round to nearest even; a nan stays one
  const uint32_t u = bits_of(x);
  out.bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// Ask for a row that comes up soon: the processor's own prefetcher stops at the end of the row at
// hand, and the next lies elsewhere.
constexpr int AHEAD = 6;  // rows
template <int write>
inline SALT_INLINE void prefetch(const void* array, int64_t row, int64_t row_bytes) {
#if defined(__GNUC__)
  const char* from = static_cast<const char*>(array) + row * row_bytes;
  for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(from + i, write, 2);
#endif
}

// ------------------------------------------------------------------------------------------------
// patches

template <typename Out>
inline SALT_INLINE void patch_rows(const Patches& a, int64_t begin, int64_t end) {
  const int64_t span = a.D / a.channels;
  for (int64_t r = begin; r < end; ++r) {
    if (r + AHEAD < end) prefetch<0>(a.patches, source_row(a.index, r + AHEAD, a.N, a.K), a.D);
    const uint8_t* __restrict__ row = a.patches + source_row(a.index, r, a.N, a.K) * a.D;
    Out* __restrict__ out = static_cast<Out*>(a.out) + r * a.D;
    for (int c = 0; c < a.channels; ++c) {
      const float scale = a.scale[c], shift = a.shift[c];
      for (int64_t d = c * span; d < (c + 1) * span; ++d)
        store(out[d], static_cast<float>(row[d]) * scale + shift);
    }
  }
}

// ------------------------------------------------------------------------------------------------
// loss

constexpr int LANES = 32;  // partial sums in a fixed order: the compiler may vectorise them, and
                           // the result does not depend on how wide

template <typename A, typename Term>
inline SALT_INLINE A lane_sum(int64_t D, const Term& term) {
  A sums[LANES] = {};
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES)
    for (int l = 0; l < LANES; ++l) sums[l] += term(d + l);
  for (int l = 0; d < D; ++d, ++l) sums[l] += term(d);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}

#ifdef SALT_X86
SALT_AVX512 void convert_avx512(const half* from, int64_t D, float* to) {
  int64_t d = 0;
  for (; d + 16 <= D; d += 16)
    _mm512_storeu_ps(
        to + d, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + d))));
  for (; d < D; ++d) to[d] = load(from[d]);
}
#endif

// The target row in the space of the loss, in `buffer`.
template <class Team, typename A>
inline SALT_INLINE void target_row(const Loss& a, int64_t row, int64_t position, A* buffer) {
  const int64_t D = a.D;
  const auto convert = [&](auto* from) SALT_INLINE {
    for (int64_t d = 0; d < D; ++d) buffer[d] = static_cast<A>(load(from[d]));
  };
  switch (a.target_type) {
    case Type::u8:
      convert(static_cast<const pixel*>(a.target) + row * D);
      break;
    case Type::f16:
#ifdef SALT_X86
      if constexpr (std::is_same_v<Team, Avx512> && std::is_same_v<A, float>)
        convert_avx512(static_cast<const half*>(a.target) + row * D, D, buffer);
      else
#endif
        convert(static_cast<const half*>(a.target) + row * D);
      break;
    case Type::bf16:
      convert(static_cast<const bfloat*>(a.target) + row * D);
      break;
    case Type::f32:
      convert(static_cast<const float*>(a.target) + row * D);
      break;
    case Type::f64:
      convert(static_cast<const double*>(a.target) + row * D);
      break;
  }
  if (a.normalise == Normalise::layer_norm) {
    const A mean =
        lane_sum<A>(D, [&](int64_t d) SALT_INLINE { return buffer[d]; }) / static_cast<A>(D);
    const A variance =
        lane_sum<A>(
            D, [&](int64_t d) SALT_INLINE { return (buffer[d] - mean) * (buffer[d] - mean); }) /
        static_cast<A>(D);
    const A rstd = 1 / std::sqrt(variance + static_cast<A>(LAYER_NORM_EPS));
    for (int64_t d = 0; d < D; ++d) buffer[d] = (buffer[d] - mean) * rstd;
  } else if (a.normalise == Normalise::standardise) {
    const A *mean = static_cast<const A*>(a.mean) + position * D,
            *rstd = static_cast<const A*>(a.rstd) + position * D;
    for (int64_t d = 0; d < D; ++d) buffer[d] = (buffer[d] - mean[d]) * rstd[d];
  }
}

inline SALT_INLINE int64_t size_of(Type type) {
  return type == Type::u8 ? 1 : type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
}

template <class Team, Kind kind, typename P, typename A>
inline SALT_INLINE void loss_rows(const Loss& a, int64_t begin, int64_t end, A* y) {
  const int64_t D = a.D;
  const A scale = static_cast<A>(a.scale * slope_factor(kind));
  const int64_t target_bytes = D * size_of(a.target_type),
                prediction_bytes = D * static_cast<int64_t>(sizeof(P));
  for (int64_t r = begin; r < end; ++r) {
    const int64_t position = a.index ? a.index[r] : r % a.K;
    if (const int64_t ahead = r + AHEAD; ahead < end) {
      prefetch<0>(a.target, source_row(a.index, ahead, a.N, a.K), target_bytes);
      prefetch<0>(a.prediction, ahead, prediction_bytes);
      if (a.gradient) prefetch<1>(a.gradient, ahead, prediction_bytes);
    }
    target_row<Team>(a, source_row(a.index, r, a.N, a.K), position, y);
    const P* p = static_cast<const P*>(a.prediction) + r * D;
    P* gradient = static_cast<P*>(a.gradient) + (a.gradient ? r * D : 0);
    const A sum = a.gradient ? lane_sum<A>(D,
                                           [&](int64_t d) SALT_INLINE {
                                             const A difference = static_cast<A>(load(p[d])) - y[d];
                                             store(gradient[d], scale * slope_of(kind, difference));
                                             return error_of(kind, difference);
                                           })
                             : lane_sum<A>(D, [&](int64_t d) SALT_INLINE {
                                 return error_of(kind, static_cast<A>(load(p[d])) - y[d]);
                               });
    static_cast<A*>(a.per_token)[r] = sum / static_cast<A>(D);
  }
}

template <typename P, typename A>
void loss_kinds(const Loss& a, int64_t begin, int64_t end) {
  std::vector<A> row(static_cast<size_t>(a.D));
  switch (a.kind) {
    case Kind::mse:
      return run([&](auto team) SALT_INLINE {
        loss_rows<decltype(team), Kind::mse, P, A>(a, begin, end, row.data());
      });
    case Kind::l1:
      return run([&](auto team) SALT_INLINE {
        loss_rows<decltype(team), Kind::l1, P, A>(a, begin, end, row.data());
      });
    case Kind::smooth_l1:
      return run([&](auto team) SALT_INLINE {
        loss_rows<decltype(team), Kind::smooth_l1, P, A>(a, begin, end, row.data());
      });
  }
}

}  // namespace

void patches_cpu(const Patches& a, int64_t begin, int64_t end) {
  if (a.out_type == Type::f32)
    return run([&](auto) SALT_INLINE { patch_rows<float>(a, begin, end); });
  run([&](auto) SALT_INLINE { patch_rows<bfloat>(a, begin, end); });
}

void loss_cpu(const Loss& a, int64_t begin, int64_t end) {
  switch (a.prediction_type) {
    case Type::bf16:
      return loss_kinds<bfloat, float>(a, begin, end);
    case Type::f32:
      return loss_kinds<float, float>(a, begin, end);
    case Type::f64:
      return loss_kinds<double, double>(a, begin, end);
    case Type::u8:
    case Type::f16:
      return;  // refused by the caller
  }
}

// ------------------------------------------------------------------------------------------------
// the data path

namespace {

// Round to nearest even; beyond 65504 infinity. As the processors' own conversion does it.
SALT_INLINE inline void store(half& out, float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude >= 0x47800000u)
    h = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // 65536 and more, infinity; nan
  else if (magnitude < 0x38800000u)
    h = bits_of(float_of(magnitude) + 0.5f) -
        0x3f000000u;  // subnormal: the sum lines the bits up and rounds
  else
    h = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  out.bits = static_cast<uint16_t>(sign | h);
}

inline SALT_INLINE void dequantise(const int8_t* __restrict__ q, const float* __restrict__ scale,
                                   float token, int64_t D, half* __restrict__ out) {
  for (int64_t d = 0; d < D; ++d) store(out[d], static_cast<float>(q[d]) * scale[d] * token);
}

#ifdef SALT_X86
SALT_AVX512 void dequantise_avx512(const int8_t* q, const float* scale, float token, int64_t D,
                                   half* out) {
  const __m512 factor = _mm512_set1_ps(token);
  int64_t d = 0;
  for (; d + 16 <= D; d += 16) {
    const __m512 x = _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + d))));
    const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_loadu_ps(scale + d)), factor);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d),
                        _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
  }
  for (; d < D; ++d) store(out[d], static_cast<float>(q[d]) * scale[d] * token);
}
#endif

// PATCH: pixels, as the compiler knows them, or 0
template <int64_t PATCH>
inline SALT_INLINE void patchify_tokens(const Tubelets& a, int64_t begin, int64_t end) {
  const int64_t p = PATCH ? PATCH : a.patch, h = a.H / p, w = a.W / p, span = a.tubelet * p * p;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t t = n / (h * w), y = n / w % h, x = n % w;
    uint8_t* __restrict__ out = a.out + n * 3 * span;
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t dt = 0; dt < a.tubelet; ++dt)
        for (int64_t dy = 0; dy < p; ++dy)
          std::memcpy(out + c * span + (dt * p + dy) * p,
                      a.clip + (((t * a.tubelet + dt) * 3 + c) * a.H + y * p + dy) * a.W + x * p,
                      static_cast<size_t>(p));
  }
}

inline SALT_INLINE void moments_columns(const Moments& a, int64_t begin, int64_t end) {
  constexpr int64_t BLOCK = 512;
  double sum[BLOCK], squares[BLOCK];
  const half* rows = static_cast<const half*>(a.rows);
  for (int64_t first = begin; first < end; first += BLOCK) {
    const int64_t count = first + BLOCK < end ? BLOCK : end - first;
    std::memcpy(sum, a.sum + first, sizeof(double) * static_cast<size_t>(count));
    std::memcpy(squares, a.squares + first, sizeof(double) * static_cast<size_t>(count));
    for (int64_t i = 0; i < a.n; ++i) {
      const half* row = rows + i * a.D + first;
      for (int64_t d = 0; d < count; ++d) {
        const double x = static_cast<double>(load(row[d]));
        sum[d] += x, squares[d] += x * x;
      }
    }
    std::memcpy(a.sum + first, sum, sizeof(double) * static_cast<size_t>(count));
    std::memcpy(a.squares + first, squares, sizeof(double) * static_cast<size_t>(count));
  }
}

SALT_INLINE inline uint32_t scramble(uint32_t x) {  // MurmurHash3's finaliser
  x ^= x >> 16, x *= 0x85EBCA6Bu, x ^= x >> 13, x *= 0xC2B2AE35u;
  return x ^ x >> 16;
}

inline SALT_INLINE void permute_entries(const Permute& a, int64_t begin, int64_t end) {
  int bits = 2;
  while (bits < 62 && (uint64_t{1} << bits) < a.n) ++bits;
  const int low_bits = bits / 2, high_bits = bits - low_bits;
  const uint32_t low_mask = (1u << low_bits) - 1,
                 high_mask = (1u << high_bits) - 1;  // at most 31 bits each
  for (int64_t i = begin; i < end; ++i) {
    uint64_t x = static_cast<uint64_t>(a.index[i]);
    do {
      uint32_t high = static_cast<uint32_t>(x >> low_bits),
               low = static_cast<uint32_t>(x) & low_mask;
      for (int round = 0; round < PERMUTE_ROUNDS; round += 2) {
        high ^= scramble(low ^ a.keys[round]) & high_mask;
        low ^= scramble(high ^ a.keys[round + 1]) & low_mask;
      }
      x = static_cast<uint64_t>(high) << low_bits | low;
    } while (x >= a.n);
    a.out[i] = static_cast<int64_t>(x);
  }
}

}  // namespace

void dequantise_row(const int8_t* q, const float* scale, float token, int64_t D, uint16_t* out) {
#ifdef SALT_X86
  if (SIMD == Simd::avx512)
    return dequantise_avx512(q, scale, token, D, reinterpret_cast<half*>(out));
#endif
  run([&](auto) SALT_INLINE { dequantise(q, scale, token, D, reinterpret_cast<half*>(out)); });
}

void patchify_cpu(const Tubelets& work, int64_t begin, int64_t end) {
  run([&](auto) SALT_INLINE {
    work.patch == 16 ? patchify_tokens<16>(work, begin, end) : patchify_tokens<0>(work, begin, end);
  });
}
void moments_cpu(const Moments& work, int64_t begin, int64_t end) {
  run([&](auto) SALT_INLINE { moments_columns(work, begin, end); });
}
void permute_cpu(const Permute& work, int64_t begin, int64_t end) {
  run([&](auto) SALT_INLINE { permute_entries(work, begin, end); });
}

const char* simd_level() {
  return SIMD == Simd::avx512 ? "avx512" : SIMD == Simd::avx2 ? "avx2" : "baseline";
}

}  // namespace salt
