// Attention in bfloat16 for processors with AMX, whose tiles multiply 16 x 32 by 32 x 16 numbers at
// once, or with AVX512_BF16, whose vectors multiply and add 32 pairs; and a transposition for AMX.
// PyTorch's own attention gets a tenth of the tiles' rate in its backward pass, a fifth of the
// vectors', and half of the tiles' in a product with a transposed matrix.
//
// Attention of one span of n tokens and one head of d channels (padded to multiples of 32 with
// zeros), by blocks of 32 x 32 scores that never leave the cache: forward 4 n^2 d operations and
// n^2 powers of 2, backward 10 n^2 d and n^2. An item is one (clip, head, span); nothing is summed
// across items, so the thread count does not show in the result.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 11
#define SALT_HAS_AMX 1
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // GCC 12 says it of its own intrinsics' undefined lanes
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define SALT_AMX         \
  __attribute__((target( \
      "amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")))
#define SALT_AMX_INLINE SALT_AMX __attribute__((always_inline)) inline
#endif

namespace salt {

#ifndef SALT_HAS_AMX

bool has_bf16() { return false; }
bool has_amx() { return false; }
void attention_bf16(const Attention&, int64_t, int64_t) {}
void attention_backward_bf16(const Attention&, int64_t, int64_t) {}
void transpose_bf16(const Transpose&, int64_t, int64_t) {}
void gelu_bf16(const Gelu&, int64_t, int64_t) {}

#else

bool has_bf16() {
  static const bool found = [] {
    const char* asked = std::getenv("SALT_SIMD");
    if (asked && (!std::strcmp(asked, "baseline") || !std::strcmp(asked, "avx2"))) return false;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
      return false;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);  // AVX512_BF16
  }();
  return found;
}

bool has_amx() {
  static const bool found = [] {
    const char* asked = std::getenv("SALT_SIMD");
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_bf16() || (asked && !std::strcmp(asked, "avx512")) ||
        !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 22 & 1))
      return false;
    constexpr int REQUEST = 0x1023,
                  TILE_DATA =
                      18;  // ARCH_REQ_XCOMP_PERM: Linux gives a process the tiles when it asks
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return found;
}

namespace {

using bf16 = uint16_t;
constexpr int64_t TILE = 16, STEP = 32;  // rows of a tile, and columns of numbers with two bytes; a
                                         // block of results is STEP x STEP

int64_t padded(int64_t x) { return (x + STEP - 1) / STEP * STEP; }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// What multiplies blocks. C float [32, 32] = (add ? C : 0) + A [32, 32 steps] B [32 steps, 32]. A
// by rows, lda apart; B in the layout of `interleave`, its two columns of tiles `panel` apart.

// Eight rows of C at a time: sixteen sums, as many as hide the latency of an addition.
struct Vectors {
  template <bool add>
  static SALT_AMX_INLINE void multiply(float* C, int64_t ldc, const bf16* A, int64_t lda,
                                       const bf16* B, int64_t panel, int64_t steps) {
    constexpr int ROWS = 8;
    for (int64_t r = 0; r < STEP; r += ROWS, C += ROWS * ldc, A += ROWS * lda) {
      __m512 left[ROWS], right[ROWS];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        left[i] = add ? _mm512_loadu_ps(C + i * ldc) : _mm512_setzero_ps();
        right[i] = add ? _mm512_loadu_ps(C + i * ldc + TILE) : _mm512_setzero_ps();
      }
      for (int64_t pair = 0; pair < TILE * steps; ++pair) {
        const __m512bh b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(B + pair * STEP)),
                       b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(B + panel + pair * STEP));
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
          int32_t two;
          std::memcpy(&two, A + i * lda + 2 * pair, 4);
          const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
          left[i] = _mm512_dpbf16_ps(left[i], a, b0);
          right[i] = _mm512_dpbf16_ps(right[i], a, b1);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        _mm512_storeu_ps(C + i * ldc, left[i]);
        _mm512_storeu_ps(C + i * ldc + TILE, right[i]);
      }
    }
  }
};

// The tiles of this thread, all 16 x 64 bytes, while it lives.
struct Tiles {
  SALT_AMX Tiles() {
    static constexpr TileConfig config;  // GCC's intrinsic names the first 8 of these 64 bytes
                                         // alone as read, so a local's others may never be written
    _tile_loadconfig(&config);
  }
  SALT_AMX ~Tiles() { _tile_release(); }

  template <bool add>
  static SALT_AMX_INLINE void multiply(float* C, int64_t ldc, const bf16* A, int64_t lda,
                                       const bf16* B, int64_t panel, int64_t steps) {
    asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
    const int64_t c = ldc * 4, a = lda * 2;
    if (add) {
      _tile_loadd(0, C, c);
      _tile_loadd(1, C + TILE, c);
      _tile_loadd(2, C + TILE * ldc, c);
      _tile_loadd(3, C + TILE * ldc + TILE, c);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; ++s, A += STEP, B += TILE * STEP) {
      _tile_loadd(4, A, a);
      _tile_loadd(6, B, 64);
      _tile_loadd(7, B + panel, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, A + TILE * lda, a);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, C, c);
    _tile_stored(1, C + TILE, c);
    _tile_stored(2, C + TILE * ldc, c);
    _tile_stored(3, C + TILE * ldc + TILE, c);
  }
};

// 32 x 32 numbers of two bytes transposed in registers: 8 x 8 in each lane of 128 bits, then the
// lanes.
SALT_AMX_INLINE void transpose_block(__m512i* r) {
  for (int g = 0; g < 32; g += 8) {
    __m512i a[8], b[8];
    for (int i = 0; i < 4; ++i)
      a[2 * i] = _mm512_unpacklo_epi16(r[g + 2 * i], r[g + 2 * i + 1]),
            a[2 * i + 1] = _mm512_unpackhi_epi16(r[g + 2 * i], r[g + 2 * i + 1]);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j)
        b[4 * i + 2 * j] = _mm512_unpacklo_epi32(a[4 * i + j], a[4 * i + 2 + j]),
                      b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi32(a[4 * i + j], a[4 * i + 2 + j]);
    for (int j = 0; j < 4; ++j)
      r[g + 2 * j] = _mm512_unpacklo_epi64(b[j], b[4 + j]),
                r[g + 2 * j + 1] = _mm512_unpackhi_epi64(b[j], b[4 + j]);
  }
  __m512i out[32];
  for (int j = 0; j < 8; ++j) {  // lane l of r[8 g + j] is column 8 l + j of rows 8 g to 8 g + 7
    const __m512i ab0 = _mm512_shuffle_i32x4(r[j], r[8 + j], 0x44),
                  ab1 = _mm512_shuffle_i32x4(r[j], r[8 + j], 0xee);
    const __m512i cd0 = _mm512_shuffle_i32x4(r[16 + j], r[24 + j], 0x44),
                  cd1 = _mm512_shuffle_i32x4(r[16 + j], r[24 + j], 0xee);
    out[j] = _mm512_shuffle_i32x4(ab0, cd0, 0x88),
    out[8 + j] = _mm512_shuffle_i32x4(ab0, cd0, 0xdd);
    out[16 + j] = _mm512_shuffle_i32x4(ab1, cd1, 0x88),
             out[24 + j] = _mm512_shuffle_i32x4(ab1, cd1, 0xdd);
  }
  for (int i = 0; i < 32; ++i) r[i] = out[i];
}

SALT_AMX_INLINE __m512 to_float(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
SALT_AMX_INLINE __mmask32 first(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : count <= 0 ? 0 : (__mmask32{1} << count) - 1;
}

// to [C, R] = from [R, C], in rows ldt and ldf apart; rows and columns beyond R and C read as
// zeros, and `rows` x `columns` of `to` are written. sums [C], where it is not null: the sum over
// the rows of `from`.
SALT_AMX void transpose(const bf16* from, int64_t ldf, int64_t R, int64_t C, bf16* to, int64_t ldt,
                        int64_t rows, int64_t columns, float* sums = nullptr) {
  for (int64_t c = 0; c < rows; c += STEP) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int64_t r = 0; r < columns; r += STEP) {
      __m512i block[32];
      const __mmask32 read = first(C - c), written = first(columns - r);
      for (int64_t i = 0; i < 32; ++i)
        block[i] = r + i < R ? _mm512_maskz_loadu_epi16(read, from + (r + i) * ldf + c)
                             : _mm512_setzero_si512();
      for (int64_t i = 0; sums && i < 32; ++i) {
        low = _mm512_add_ps(low, to_float(_mm512_castsi512_si256(block[i])));
        high = _mm512_add_ps(high, to_float(_mm512_extracti64x4_epi64(block[i], 1)));
      }
      transpose_block(block);
      for (int64_t i = 0; i < std::min<int64_t>(32, rows - c); ++i)
        _mm512_mask_storeu_epi16(to + (c + i) * ldt + r, written, block[i]);
    }
    if (sums)
      _mm512_mask_storeu_ps(sums + c, static_cast<__mmask16>(first(C - c)), low),
          _mm512_mask_storeu_ps(sums + c + TILE, static_cast<__mmask16>(first(C - c - TILE)), high);
  }
}

// Rows of a head to [NP, DP] with zeros around.
SALT_AMX void pad(const bf16* from, int64_t ldf, int64_t n, int64_t d, bf16* to, int64_t NP,
                  int64_t DP) {
  for (int64_t r = 0; r < NP; ++r)
    for (int64_t c = 0; c < DP; c += STEP)
      _mm512_storeu_si512(to + r * DP + c,
                          r < n ? _mm512_maskz_loadu_epi16(first(d - c), from + r * ldf + c)
                                : _mm512_setzero_si512());
}

struct Interleave {
  alignas(64) uint16_t low[32], high[32];
};
constexpr Interleave make_interleave() {
  Interleave x{};
  for (int j = 0; j < 16; ++j)
    x.low[2 * j] = static_cast<uint16_t>(j), x.low[2 * j + 1] = static_cast<uint16_t>(32 + j),
              x.high[2 * j] = static_cast<uint16_t>(16 + j),
              x.high[2 * j + 1] = static_cast<uint16_t>(48 + j);
  return x;
}
constexpr Interleave INTERLEAVE = make_interleave();

// Two rows of 32, as the second operand of a tile's product wants them: entry by entry side by
// side, to two columns of tiles.
SALT_AMX_INLINE void interleave(__m512i even, __m512i odd, bf16* left, bf16* right) {
  _mm512_storeu_si512(left,
                      _mm512_permutex2var_epi16(even, _mm512_load_si512(INTERLEAVE.low), odd));
  _mm512_storeu_si512(right,
                      _mm512_permutex2var_epi16(even, _mm512_load_si512(INTERLEAVE.high), odd));
}

// x [R, C] as the second operand of a product: to [C / 16, R / 2, 16, 2].
SALT_AMX void interleave(const bf16* x, int64_t ldx, int64_t R, int64_t C, bf16* to) {
  for (int64_t c = 0; c < C; c += STEP)
    for (int64_t r = 0; r < R; r += 2) {
      bf16* left = to + (c / TILE * (R / 2) + r / 2) * STEP;
      interleave(_mm512_loadu_si512(x + r * ldx + c), _mm512_loadu_si512(x + (r + 1) * ldx + c),
                 left, left + R / 2 * STEP);
    }
}

// 2^x of a finite x or a nan, which stays one; relative error below 4e-6, 0 below -149.
SALT_AMX_INLINE __m512 power_of_2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
               f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);  // ln(2)^k / k!, by Horner
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1));
  return _mm512_scalef_ps(p, whole);
}
// The same of a score, for x <= 1: what is not finite is brought there, but a nan, which passes in
// this order of operands.
SALT_AMX_INLINE __m512 power_of_score(__m512 x) {
  return power_of_2(_mm512_min_ps(_mm512_set1_ps(1), _mm512_max_ps(_mm512_set1_ps(-200), x)));
}

SALT_AMX_INLINE __m512i to_bf16(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// Phi(x), the normal distribution, relative error below 3e-5; density: Phi'(x) sqrt(2 pi).
// Phi(-|x|) is that times a polynomial in 1 / (1 + p |x|), as Hastings' of erfc (Abramowitz and
// Stegun 1964, 7.1.26), here fitted to the least relative error, which is what small values keep.
SALT_AMX_INLINE __m512 normal(__m512 x, __m512& density) {
  const __m512 size = _mm512_min_ps(_mm512_set1_ps(20), _mm512_abs_ps(x)),  // a nan passes
      denominator = _mm512_fmadd_ps(size, _mm512_set1_ps(0.376f), _mm512_set1_ps(1));
  __m512 t = _mm512_rcp14_ps(denominator);
  t = _mm512_mul_ps(t, _mm512_fnmadd_ps(t, denominator, _mm512_set1_ps(2)));
  density = power_of_2(_mm512_mul_ps(_mm512_mul_ps(size, size), _mm512_set1_ps(-0.72134752f)));
  __m512 q = _mm512_set1_ps(-0.09085675f);
  q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(0.1987432f));
  q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(0.08471236f));
  q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(0.15791373f));
  q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(0.1494776f));
  q = _mm512_mul_ps(_mm512_mul_ps(q, t), density);
  return _mm512_mask_sub_ps(q, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ),
                            _mm512_set1_ps(1), q);
}

SALT_AMX_INLINE __m512 gelu(__m512 x) {
  __m512 density;
  return _mm512_mul_ps(x, normal(x, density));
}
SALT_AMX_INLINE __m512 gelu_slope(__m512 x) {
  __m512 density;
  const __m512 below = normal(x, density);
  return _mm512_fmadd_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.39894228f)), density, below);
}

// gelu of 32 numbers, or with `slope` the gradient times its derivative.
template <bool slope>
SALT_AMX_INLINE __m512i gelu(__m512i x, __m512i gradient) {
  const __m512 low = to_float(_mm512_castsi512_si256(x)),
               high = to_float(_mm512_extracti64x4_epi64(x, 1));
  if (!slope) return to_bf16(gelu(low), gelu(high));
  return to_bf16(_mm512_mul_ps(gelu_slope(low), to_float(_mm512_castsi512_si256(gradient))),
                 _mm512_mul_ps(gelu_slope(high), to_float(_mm512_extracti64x4_epi64(gradient, 1))));
}

template <bool slope>
SALT_AMX void gelu(const bf16* x, const bf16* gradient, bf16* out, int64_t count) {
  const __m512i none = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + STEP <= count; i += STEP)  // whole vectors apart: masked stores are slow on a Zen 5
    _mm512_storeu_si512(out + i, gelu<slope>(_mm512_loadu_si512(x + i),
                                             slope ? _mm512_loadu_si512(gradient + i) : none));
  const __mmask32 rest = first(count - i);
  if (rest)
    _mm512_mask_storeu_epi16(
        out + i, rest,
        gelu<slope>(_mm512_maskz_loadu_epi16(rest, x + i),
                    slope ? _mm512_maskz_loadu_epi16(rest, gradient + i) : none));
}

// A buffer in the caller's scratch, on a cache line.
struct Scratch {
  std::vector<char> bytes;
  size_t used = 0;
  template <typename T>
  size_t reserve(int64_t count) {
    const size_t at = used;
    used += (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    return at;
  }
  template <typename T>
  T* at(size_t place) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64 + place);
  }
  void allocate() { bytes.resize(used + 64); }
};

struct Span {
  int64_t clip, head, query, key, asked, given;  // query, key: the clip's first ones, of as many
};

// Item number `item` of the (clip, head, span): heads next to each other, so that threads get like
// shares.
Span span_of(const Attention& a, int64_t item) {
  const int64_t s = item % a.spans, h = item / a.spans % a.heads, b = item / a.spans / a.heads;
  int64_t query = 0, key = 0;
  for (int64_t i = 0; i < s; ++i) query += a.asked[i], key += a.given[i];
  return {b, h, query, key, a.asked[s], a.given[s]};
}

int64_t longest(const Attention& a) {
  return std::max(*std::max_element(a.asked, a.asked + a.spans),
                  *std::max_element(a.given, a.given + a.spans));
}

template <class Blocks>
SALT_AMX void attention(const Attention& a, int64_t begin, int64_t end) {
  if (begin == end) return;
  [[maybe_unused]] const Blocks blocks;
  const int64_t d = a.d, DP = padded(d), most = padded(longest(a)), out_row = a.heads * d,
                lds = most + TILE, ldp = most + STEP;
  const float c = static_cast<float>(
      1.4426950408889634 / std::sqrt(static_cast<double>(d)));  // scores in units of ln(2)
  Scratch scratch;
  const size_t q_at = scratch.reserve<bf16>(most * DP), k_at = scratch.reserve<bf16>(most * DP),
               v_at = scratch.reserve<bf16>(most * DP), t_at = scratch.reserve<bf16>(most * DP);
  const size_t s_at = scratch.reserve<float>(STEP * lds), p_at = scratch.reserve<bf16>(STEP * ldp),
               o_at = scratch.reserve<float>(STEP * STEP);
  scratch.allocate();
  bf16 *Q = scratch.at<bf16>(q_at), *K = scratch.at<bf16>(k_at), *V = scratch.at<bf16>(v_at),
       *temporary = scratch.at<bf16>(t_at), *P = scratch.at<bf16>(p_at);
  float *S = scratch.at<float>(s_at), *O = scratch.at<float>(o_at), share[STEP];
  for (int64_t item = begin; item < end; ++item) {
    const Span span = span_of(a, item);
    const int64_t m = span.asked, n = span.given, MP = padded(m), NP = padded(n),
                  query = span.clip * a.queries + span.query,
                  key = (span.clip * a.keys + span.key) * a.k_row + span.head * d;
    const bf16 *q = static_cast<const bf16*>(a.q) + query * a.q_row + span.head * d,
               *k = static_cast<const bf16*>(a.k) + key, *v = static_cast<const bf16*>(a.v) + key;
    bf16* out = static_cast<bf16*>(a.out) + query * out_row + span.head * d;
    float* lse = a.lse + (span.clip * a.heads + span.head) * a.queries + span.query;
    pad(q, a.q_row, m, d, Q, MP, DP);
    transpose(k, a.k_row, n, d, temporary, NP, DP, NP);  // [DP, NP]
    interleave(temporary, NP, DP, NP, K);
    pad(v, a.k_row, n, d, temporary, NP, DP);
    interleave(temporary, DP, NP, DP, V);
    for (int64_t i = 0; i < MP; i += STEP) {  // 32 queries
      for (int64_t j = 0; j < NP; j += STEP)
        Blocks::template multiply<false>(S + j, lds, Q + i * DP, DP, K + j / TILE * (DP / 2) * STEP,
                                         DP / 2 * STEP, DP / STEP);
      for (int64_t r = 0; r < std::min(STEP, m - i); ++r) {
        float* s = S + r * lds;
        const __mmask16 tail =
            static_cast<__mmask16>(first((n - 1) % TILE + 1));  // of the last 16 keys that hold any
        const int64_t last = (n - 1) / TILE * TILE;
        __m512 top =
            _mm512_mask_blend_ps(tail, _mm512_set1_ps(-INFINITY), _mm512_loadu_ps(s + last));
        for (int64_t j = 0; j < last; j += TILE) top = _mm512_max_ps(top, _mm512_loadu_ps(s + j));
        const float most_of_row = _mm512_reduce_max_ps(top);
        const __m512 highest = _mm512_set1_ps(most_of_row), factor = _mm512_set1_ps(c);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < NP; j += STEP) {
          __m512 p[2];
          for (int64_t half = 0; half < 2; ++half) {
            const int64_t from = j + half * TILE;
            const __mmask16 real = from < last    ? static_cast<__mmask16>(0xffff)
                                   : from == last ? tail
                                                  : static_cast<__mmask16>(0);
            p[half] = _mm512_maskz_mov_ps(
                real,
                power_of_score(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(s + from), highest),
                                             factor)));  // exact at the highest, however large
            sum = _mm512_add_ps(sum, p[half]);
          }
          _mm512_storeu_si512(P + r * ldp + j, to_bf16(p[0], p[1]));
        }
        const float total = _mm512_reduce_add_ps(sum);
        share[r] = 1 / total;
        lse[i + r] = most_of_row * c + std::log2(total);
      }
      for (int64_t k = 0; k < DP; k += STEP) {
        Blocks::template multiply<false>(O, STEP, P, ldp, V + k / TILE * (NP / 2) * STEP,
                                         NP / 2 * STEP, NP / STEP);
        for (int64_t r = 0; r < std::min(STEP, m - i); ++r) {
          const __m512 scale = _mm512_set1_ps(share[r]),
                       low = _mm512_mul_ps(_mm512_loadu_ps(O + r * STEP), scale),
                       high = _mm512_mul_ps(_mm512_loadu_ps(O + r * STEP + TILE), scale);
          _mm512_mask_storeu_epi16(out + (i + r) * out_row + k, first(d - k), to_bf16(low, high));
        }
      }
    }
  }
}

// With P = softmax(Q K' / sqrt(d)), dP = dO V' and dS = P * (dP - rowsum(dO * O)):  dV = P' dO,  dQ
// = dS K / sqrt(d),  dK = dS' Q / sqrt(d). By blocks of QUERIES x KEYS, in which P and dS are kept;
// dV and dK are summed transposed, so that P and dS are second operands.
template <class Blocks>
SALT_AMX void attention_backward(const Attention& a, int64_t begin, int64_t end) {
  if (begin == end) return;
  constexpr int64_t QUERIES = 128, KEYS = 256;  // QUERIES >= DP: P's place serves dK and dV, too
  [[maybe_unused]] const Blocks blocks;
  const int64_t d = a.d, DP = padded(d), most = padded(longest(a)), out_row = a.heads * d,
                ldt = most + STEP, lds = KEYS + STEP;
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(d))),
              c = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(d)));
  Scratch scratch;
  const int64_t head = most * DP;
  const size_t q_at = scratch.reserve<bf16>(head), g_at = scratch.reserve<bf16>(head),
               kt_at = scratch.reserve<bf16>(head), vt_at = scratch.reserve<bf16>(head),
               k_at = scratch.reserve<bf16>(head);
  const size_t qt_at = scratch.reserve<bf16>(DP * ldt), gt_at = scratch.reserve<bf16>(DP * ldt),
               dq_at = scratch.reserve<float>(head);
  const size_t p_at = scratch.reserve<bf16>(QUERIES * KEYS),
               ds_at = scratch.reserve<bf16>(QUERIES * lds),
               dsb_at = scratch.reserve<bf16>(QUERIES * KEYS);
  const size_t dk_at = scratch.reserve<float>(DP * KEYS), dv_at = scratch.reserve<float>(DP * KEYS),
               s_at = scratch.reserve<float>(STEP * STEP),
               dp_at = scratch.reserve<float>(STEP * STEP);
  const size_t delta_at = scratch.reserve<float>(most), lse_at = scratch.reserve<float>(most);
  scratch.allocate();
  bf16 *Q = scratch.at<bf16>(q_at), *G = scratch.at<bf16>(g_at), *KT = scratch.at<bf16>(kt_at),
       *VT = scratch.at<bf16>(vt_at), *K = scratch.at<bf16>(k_at), *QT = scratch.at<bf16>(qt_at),
       *GT = scratch.at<bf16>(gt_at);
  bf16 *P = scratch.at<bf16>(p_at), *dS = scratch.at<bf16>(ds_at), *dSB = scratch.at<bf16>(dsb_at);
  float *dQ = scratch.at<float>(dq_at), *dK = scratch.at<float>(dk_at),
        *dV = scratch.at<float>(dv_at), *S = scratch.at<float>(s_at),
        *dP = scratch.at<float>(dp_at);
  float *delta = scratch.at<float>(delta_at), *shift = scratch.at<float>(lse_at);
  for (int64_t item = begin; item < end; ++item) {
    const Span span = span_of(a, item);
    const int64_t m = span.asked, n = span.given, MP = padded(m), NP = padded(n),
                  token = span.clip * a.queries + span.query,
                  query = token * a.q_row + span.head * d,
                  key = (span.clip * a.keys + span.key) * a.k_row + span.head * d,
                  written = token * out_row + span.head * d;
    const bf16 *q = static_cast<const bf16*>(a.q) + query, *k = static_cast<const bf16*>(a.k) + key,
               *v = static_cast<const bf16*>(a.v) + key,
               *o = static_cast<const bf16*>(a.out) + written,
               *g = static_cast<const bf16*>(a.gradient) + written;
    bf16 *dq = static_cast<bf16*>(a.dq) + query, *dk = static_cast<bf16*>(a.dk) + key,
         *dv = static_cast<bf16*>(a.dv) + key;
    const float* lse = a.lse + (span.clip * a.heads + span.head) * a.queries + span.query;
    transpose(k, a.k_row, n, d, QT, NP, DP, NP);
    interleave(QT, NP, DP, NP, KT);
    transpose(v, a.k_row, n, d, QT, NP, DP, NP);
    interleave(QT, NP, DP, NP, VT);
    pad(k, a.k_row, n, d, Q, NP, DP);
    interleave(Q, DP, NP, DP, K);
    pad(q, a.q_row, m, d, Q, MP, DP);
    pad(g, out_row, m, d, G, MP, DP);
    transpose(q, a.q_row, m, d, QT, ldt, DP, MP);
    transpose(g, out_row, m, d, GT, ldt, DP, MP);
    for (int64_t r = 0; r < MP; ++r) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t k = 0; k < d && r < m; k += TILE) {
        const __mmask16 real = static_cast<__mmask16>(first(std::min(TILE, d - k)));
        sum = _mm512_fmadd_ps(to_float(_mm256_maskz_loadu_epi16(real, g + r * out_row + k)),
                              to_float(_mm256_maskz_loadu_epi16(real, o + r * out_row + k)), sum);
      }
      delta[r] = _mm512_reduce_add_ps(sum), shift[r] = r < m ? -lse[r] : 0;
    }
    for (int64_t j0 = 0; j0 < NP; j0 += KEYS) {
      const int64_t keys = std::min(KEYS, NP - j0);
      for (int64_t i0 = 0; i0 < MP; i0 += QUERIES) {
        const int64_t queries = std::min(QUERIES, MP - i0), panel = queries / 2 * STEP;
        for (int64_t i = 0; i < queries; i += STEP)
          for (int64_t j = 0; j < keys; j += STEP) {
            Blocks::template multiply<false>(S, STEP, Q + (i0 + i) * DP, DP,
                                             KT + (j0 + j) / TILE * (DP / 2) * STEP, DP / 2 * STEP,
                                             DP / STEP);
            Blocks::template multiply<false>(dP, STEP, G + (i0 + i) * DP, DP,
                                             VT + (j0 + j) / TILE * (DP / 2) * STEP, DP / 2 * STEP,
                                             DP / STEP);
            for (int64_t r = 0; r < STEP; r += 2) {
              __m512i p[2], ds[2];
              for (int64_t e = 0; e < 2; ++e) {
                const __m512 factor = _mm512_set1_ps(c), by = _mm512_set1_ps(shift[i0 + i + r + e]),
                             less = _mm512_set1_ps(delta[i0 + i + r + e]);
                const float *s = S + (r + e) * STEP, *dp = dP + (r + e) * STEP;
                const __m512 low = power_of_score(_mm512_fmadd_ps(_mm512_loadu_ps(s), factor, by)),
                             high = power_of_score(
                                 _mm512_fmadd_ps(_mm512_loadu_ps(s + TILE), factor, by));
                p[e] = to_bf16(low, high);
                ds[e] =
                    to_bf16(_mm512_mul_ps(low, _mm512_sub_ps(_mm512_loadu_ps(dp), less)),
                            _mm512_mul_ps(high, _mm512_sub_ps(_mm512_loadu_ps(dp + TILE), less)));
                _mm512_storeu_si512(dS + (i + r + e) * lds + j, ds[e]);
              }
              const int64_t place = j / TILE * panel + (i + r) / 2 * STEP;
              interleave(p[0], p[1], P + place, P + place + panel);
              interleave(ds[0], ds[1], dSB + place, dSB + place + panel);
            }
          }
        for (int64_t k = 0; k < DP; k += STEP) {
          for (int64_t j = 0; j < keys; j += STEP) {
            const auto sum = [&](float* to, const bf16* left,
                                 const bf16* right) __attribute__((always_inline)) SALT_AMX {
              if (i0 == 0)
                Blocks::template multiply<false>(to + k * KEYS + j, KEYS, left + k * ldt + i0, ldt,
                                                 right + j / TILE * panel, panel, queries / STEP);
              else
                Blocks::template multiply<true>(to + k * KEYS + j, KEYS, left + k * ldt + i0, ldt,
                                                right + j / TILE * panel, panel, queries / STEP);
            };
            sum(dV, GT, P), sum(dK, QT, dSB);
          }
          for (int64_t i = 0; i < queries; i += STEP) {
            const bf16* right = K + (k / TILE * (NP / 2) + j0 / 2) * STEP;
            if (j0 == 0)
              Blocks::template multiply<false>(dQ + (i0 + i) * DP + k, DP, dS + i * lds, lds, right,
                                               NP / 2 * STEP, keys / STEP);
            else
              Blocks::template multiply<true>(dQ + (i0 + i) * DP + k, DP, dS + i * lds, lds, right,
                                              NP / 2 * STEP, keys / STEP);
          }
        }
      }
      const auto write = [&](const float* from, float factor,
                             bf16* to) SALT_AMX {  // [DP, keys] to rows of a head
        for (int64_t k = 0; k < DP; ++k)
          for (int64_t j = 0; j < keys; j += STEP) {
            const float* x = from + k * KEYS + j;
            _mm512_storeu_si512(
                P + k * keys + j,
                to_bf16(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(factor)),
                        _mm512_mul_ps(_mm512_loadu_ps(x + TILE), _mm512_set1_ps(factor))));
          }
        transpose(P, keys, DP, keys, to + j0 * a.k_row, a.k_row, std::min(keys, n - j0), d);
      };
      write(dK, scale, dk), write(dV, 1, dv);
    }
    for (int64_t r = 0; r < m; ++r)
      for (int64_t k = 0; k < d; k += STEP) {
        const float* x = dQ + r * DP + k;
        const __m512 factor = _mm512_set1_ps(scale);
        _mm512_mask_storeu_epi16(dq + r * a.q_row + k, first(d - k),
                                 to_bf16(_mm512_mul_ps(_mm512_loadu_ps(x), factor),
                                         _mm512_mul_ps(_mm512_loadu_ps(x + TILE), factor)));
      }
  }
}

}  // namespace

void attention_bf16(const Attention& a, int64_t begin, int64_t end) {
  (has_amx() ? attention<Tiles> : attention<Vectors>)(a, begin, end);
}

void attention_backward_bf16(const Attention& a, int64_t begin, int64_t end) {
  (has_amx() ? attention_backward<Tiles> : attention_backward<Vectors>)(a, begin, end);
}

void transpose_bf16(const Transpose& work, int64_t begin, int64_t end) {
  const int64_t from = begin * STEP, to = std::min(work.C, end * STEP);
  transpose(static_cast<const bf16*>(work.x) + from, work.C, work.R, to - from,
            static_cast<bf16*>(work.out) + from * work.R, work.R, to - from, work.R,
            work.sums + from);
}

void gelu_bf16(const Gelu& work, int64_t begin, int64_t end) {
  const bf16 *x = static_cast<const bf16*>(work.x) + begin,
             *gradient = static_cast<const bf16*>(work.gradient);
  bf16* out = static_cast<bf16*>(work.out) + begin;
  gradient ? gelu<true>(x, gradient + begin, out, end - begin)
           : gelu<false>(x, gradient, out, end - begin);
}

#endif

}  // namespace salt
