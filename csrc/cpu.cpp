#include "cpu.h"

#include <cstring>
#include <vector>

namespace salt {

void draw_masks_cpu(const MaskSpec& spec, uint64_t seed, uint32_t epoch, const int64_t* sample_ids, int64_t begin, int64_t end,
                    int64_t* context, int64_t* target) {
  std::vector<uint64_t> bits(2 * static_cast<size_t>(mask_words(spec)));
  std::vector<int32_t> pool(static_cast<size_t>(spec.T) * spec.H * spec.W);
  for (int64_t i = begin; i < end; ++i)
    draw_masks(spec, seed, epoch, static_cast<uint64_t>(sample_ids[i]), bits.data(), pool.data(), context + i * spec.context,
               target + i * spec.target);
}

void gather_cpu(const char* x, const int64_t* index, int64_t N, int64_t K, int64_t row_bytes, int64_t begin, int64_t end, char* out) {
  for (int64_t r = begin; r < end; ++r)
    std::memcpy(out + r * row_bytes, x + (r / K * N + index[r]) * row_bytes, static_cast<size_t>(row_bytes));
}

void scatter_cpu(const char* x, const int64_t* index, int64_t N, int64_t K, int64_t row_bytes, int64_t begin, int64_t end, char* out) {
  for (int64_t r = begin; r < end; ++r)
    std::memcpy(out + (r / K * N + index[r]) * row_bytes, x + r * row_bytes, static_cast<size_t>(row_bytes));
}

namespace {

struct half { uint16_t bits; };
struct bfloat { uint16_t bits; };

inline uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bfloat x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float load(half x) {
  // Shift exponent and mantissa into place and let one multiplication by 2^112 rebias the exponent: right for normal and
  // subnormal numbers alike. Infinity and nan get the largest exponent put back.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return float_of(bits_of(float_of(magnitude) * 5.192296858534828e33f) | sign | special);
}

inline void store(float& out, float x) { out = x; }
inline void store(double& out, double x) { out = x; }
inline void store(bfloat& out, float x) {  // round to nearest even; a nan stays one
  const uint32_t u = bits_of(x);
  out.bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// Sixteen partial sums in a fixed order: the compiler may vectorise it, and the result does not depend on how wide.
template <typename P, typename Y, typename A>
inline __attribute__((always_inline)) double mse_row(const P* p, const Y* y, P* gradient, int64_t D, A scale) {
  constexpr int LANES = 16;
  A sums[LANES] = {};
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES)
    for (int l = 0; l < LANES; ++l) {
      const A difference = static_cast<A>(load(p[d + l])) - static_cast<A>(load(y[d + l]));
      sums[l] += difference * difference;
      if (gradient) store(gradient[d + l], scale * difference);
    }
  for (int l = 0; d < D; ++d, ++l) {
    const A difference = static_cast<A>(load(p[d])) - static_cast<A>(load(y[d]));
    sums[l] += difference * difference;
    if (gradient) store(gradient[d], scale * difference);
  }
  double sum = 0;
  for (A s : sums) sum += static_cast<double>(s);
  return D > 0 ? sum / static_cast<double>(D) : 0;
}

struct Rows {
  const int64_t* index;
  int64_t N, K, D, begin, end;
  double scale;
  double* per_token;
};

template <typename P, typename Y, typename A>
inline __attribute__((always_inline)) void mse_rows(const Rows& rows, const P* prediction, const Y* target, P* gradient) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const Y* y = target + (rows.index ? r / rows.K * rows.N + rows.index[r] : r) * rows.D;
    P* g = gradient ? gradient + r * rows.D : nullptr;
    rows.per_token[r] = mse_row<P, Y, A>(prediction + r * rows.D, y, g, rows.D, static_cast<A>(rows.scale));
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
#define SALT_X86 1
template <typename P, typename Y, typename A>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) void mse_avx512(const Rows& rows, const P* p, const Y* y, P* g) {
  mse_rows<P, Y, A>(rows, p, y, g);
}
template <typename P, typename Y, typename A>
__attribute__((target("avx2"))) void mse_avx2(const Rows& rows, const P* p, const Y* y, P* g) {
  mse_rows<P, Y, A>(rows, p, y, g);
}
#endif

enum class Simd { baseline, avx2, avx512 };

Simd detect() {
#ifdef SALT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return Simd::avx512;
  if (__builtin_cpu_supports("avx2")) return Simd::avx2;
#endif
  return Simd::baseline;
}
const Simd SIMD = detect();

template <typename P, typename Y, typename A>
void mse_dispatch(const Rows& rows, const void* p, const void* y, void* g) {
  const P* prediction = static_cast<const P*>(p);
  const Y* target = static_cast<const Y*>(y);
  P* gradient = static_cast<P*>(g);
#ifdef SALT_X86
  if (SIMD == Simd::avx512) return mse_avx512<P, Y, A>(rows, prediction, target, gradient);
  if (SIMD == Simd::avx2) return mse_avx2<P, Y, A>(rows, prediction, target, gradient);
#endif
  mse_rows<P, Y, A>(rows, prediction, target, gradient);
}

template <typename P, typename A>
void mse_target(const Rows& rows, const void* p, const void* y, Type target_type, void* g) {
  switch (target_type) {
    case Type::f16: return mse_dispatch<P, half, A>(rows, p, y, g);
    case Type::bf16: return mse_dispatch<P, bfloat, A>(rows, p, y, g);
    case Type::f32: return mse_dispatch<P, float, A>(rows, p, y, g);
    case Type::f64: return mse_dispatch<P, double, A>(rows, p, y, g);
  }
}

}  // namespace

void mse_cpu(const void* prediction, Type prediction_type, const void* target, Type target_type, const int64_t* index, int64_t N,
             int64_t K, int64_t D, double scale, int64_t begin, int64_t end, double* per_token, void* gradient) {
  const Rows rows{index, N, K, D, begin, end, scale, per_token};
  switch (prediction_type) {
    case Type::bf16: return mse_target<bfloat, float>(rows, prediction, target, target_type, gradient);
    case Type::f32: return mse_target<float, float>(rows, prediction, target, target_type, gradient);
    case Type::f64: return mse_target<double, double>(rows, prediction, target, target_type, gradient);
    case Type::f16: return;  // refused by the caller
  }
}

const char* simd_level() { return SIMD == Simd::avx512 ? "avx512" : SIMD == Simd::avx2 ? "avx2" : "baseline"; }

}  // namespace salt
