// frames.h. Windows of 16 bytes are shuffled to pairs of taps, which one instruction multiplies and
// adds; rows are summed in pairs likewise.
#include "frames.h"

#include <algorithm>
#include <stdexcept>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SALT_FRAMES 1
#define SALT_AVX2 __attribute__((target("avx2")))
#endif

namespace salt {
namespace {

constexpr int64_t BLOCK = 16, GROUP = 4, WINDOW = 16;  // outputs; outputs; bytes

}  // namespace

Scaling::Across::Across(const Axis& axis, int64_t size, int64_t padded)
    : in(axis.in), spans(1), pairs((axis.taps + 1) / 2) {
  const auto from = [&](int64_t i) { return int64_t{axis.from[static_cast<size_t>(i)]}; };
  for (int64_t i = 0; i < padded; i += GROUP) {
    int64_t low = in, high = 0;
    for (int64_t j = std::min(i, size - 1); j < std::min(i + GROUP, size); ++j)
      low = std::min(low, from(j)), high = std::max(high, from(j) + axis.taps);
    first.push_back(low), spans = std::max(spans, (high - low + WINDOW - 1) / WINDOW);
  }
  if (in < spans * WINDOW) throw std::invalid_argument("the rows are too short");
  for (int64_t& low : first) low = std::min(low, in - spans * WINDOW);
  steps = spans * pairs;
  shuffles.assign(static_cast<size_t>(padded / BLOCK * steps * 64), 128);
  weights.assign(shuffles.size() / 2, 0);
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < axis.taps; ++j) {
      const int64_t place = from(i) + j - first[static_cast<size_t>(i / GROUP)],
                    step = i / BLOCK * steps + place / WINDOW * pairs + j / 2;
      const size_t at = static_cast<size_t>(step * 32 + i % BLOCK * 2 + j % 2);
      shuffles[2 * at] = static_cast<uint8_t>(place % WINDOW);
      weights[at] = axis.weight[static_cast<size_t>(i * axis.taps + j)];
    }
}

Scaling::Down::Down(const Axis& axis, int64_t size) : in(axis.in), pairs((axis.taps + 1) / 2) {
  if (in < 2 * pairs) throw std::invalid_argument("the columns are too short");
  weights.assign(static_cast<size_t>(size * pairs), 0);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t first = axis.from[static_cast<size_t>(i)];
    from.push_back(std::min(first, in - 2 * pairs));
    for (int64_t j = 0; j < axis.taps; ++j) {
      const int64_t row = first + j - from.back();
      const uint16_t weight =
          static_cast<uint16_t>(axis.weight[static_cast<size_t>(i * axis.taps + j)]);
      weights[static_cast<size_t>(i * pairs + row / 2)] |=
          static_cast<int32_t>(uint32_t{weight} << (16 * (row % 2)));
    }
  }
}

Scaling::Scaling(int64_t outputs, const std::array<Axis, 2>& x, const std::array<Axis, 2>& y,
                 const std::array<int32_t, 6>& coefficients)
    : size(outputs),
      padded((outputs + BLOCK - 1) / BLOCK * BLOCK),
      across{Across(x[0], size, padded), Across(x[1], size, padded)},
      down{Down(y[0], size), Down(y[1], size)},
      colour(coefficients) {}

#ifdef SALT_FRAMES
namespace {

SALT_AVX2 inline __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// Eight outputs: pairs of taps, shuffled out of the windows from `first` on, and summed.
template <int64_t PAIRS>
SALT_AVX2 inline __m256i eight(const uint8_t* row, const int64_t* first, const uint8_t* shuffle,
                               const int16_t* weight, int64_t spans, int64_t pairs) {
  __m256i sum = _mm256_setzero_si256();
  for (int64_t span = 0; span < (PAIRS ? 1 : spans); ++span) {
    const __m128i* low = reinterpret_cast<const __m128i*>(row + first[0] + span * WINDOW);
    const __m128i* high = reinterpret_cast<const __m128i*>(row + first[1] + span * WINDOW);
    const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                                  _mm_loadu_si128(high), 1);
    for (int64_t pair = 0; pair < (PAIRS ? PAIRS : pairs); ++pair, shuffle += 64, weight += 32) {
      const __m256i two = _mm256_shuffle_epi8(bytes, load(shuffle));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(two, load(weight)));
    }
  }
  return _mm256_srai_epi32(sum, 7);
}

// Sixteen columns of a plane, summed down: low and high halves of each lane.
struct Sixteen {
  __m256i low, high;
};
template <int64_t PAIRS>
SALT_AVX2 inline Sixteen summed(const int16_t* rows, int64_t padded, const int32_t* weights,
                                int64_t pairs, int32_t start) {
  Sixteen sum{_mm256_set1_epi32(start), _mm256_set1_epi32(start)};
  for (int64_t i = 0; i < (PAIRS ? PAIRS : pairs); ++i, rows += 2 * padded) {
    const __m256i a = load(rows), b = load(rows + padded), both = _mm256_set1_epi32(weights[i]);
    sum.low = _mm256_add_epi32(sum.low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), both));
    sum.high = _mm256_add_epi32(sum.high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), both));
  }
  return {_mm256_srai_epi32(sum.low, 10), _mm256_srai_epi32(sum.high, 10)};
}

SALT_AVX2 inline __m256i times(__m256i x, int32_t factor) {
  return _mm256_mullo_epi32(x, _mm256_set1_epi32(factor));
}
// 30 bits -> 8, out of range to the nearest
SALT_AVX2 inline __m256i to_8_bits(__m256i x) {
  const __m256i most = _mm256_set1_epi32((1 << 30) - 1);
  return _mm256_srli_epi32(_mm256_min_epi32(_mm256_max_epi32(x, _mm256_setzero_si256()), most), 22);
}

}  // namespace

// Block by block, so that its tables stay in registers.
template <int64_t PAIRS>
SALT_AVX2 void Scaling::rows(bool chroma, const uint8_t* in, int64_t stride, int16_t* out) const {
  const Across& a = across[chroma];
  for (int64_t block = 0; block < padded / BLOCK; ++block) {
    const int64_t* first = a.first.data() + 4 * block;
    const uint8_t* shuffle = a.shuffles.data() + block * a.steps * 64;
    const int16_t* weight = a.weights.data() + block * a.steps * 32;
    for (int64_t y = 0; y < down[chroma].in; ++y) {
      const uint8_t* row = in + y * stride;
      const __m256i low = eight<PAIRS>(row, first, shuffle, weight, a.spans, a.pairs),
                    high =
                        eight<PAIRS>(row, first + 2, shuffle + 32, weight + 16, a.spans, a.pairs);
      // saturated to 15 bits and a sign, as swscale does it
      const __m256i packed = _mm256_packs_epi32(low, high);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + y * padded + block * BLOCK),
                          _mm256_permute4x64_epi64(packed, 0xD8));
    }
  }
}

template <int64_t LUMA, int64_t CHROMA>
SALT_AVX2 void Scaling::pixels(const std::array<const int16_t*, 3>& planes, uint8_t* out) const {
  constexpr int32_t HALF = 1 << 9, MIDDLE = 128 << 19;  // rounding; chroma's zero
  const __m256i offset = _mm256_set1_epi32(colour[0]), round = _mm256_set1_epi32(1 << 21);
  for (int64_t y = 0; y < size; ++y) {
    const Down &luma = down[0], &chroma = down[1];
    const int32_t *of_y = luma.weights.data() + y * luma.pairs,
                  *of_c = chroma.weights.data() + y * chroma.pairs;
    const int64_t from = luma.from[static_cast<size_t>(y)] * padded,
                  from_c = chroma.from[static_cast<size_t>(y)] * padded;
    for (int64_t x = 0; x < padded; x += BLOCK) {
      const Sixteen l = summed<LUMA>(planes[0] + from + x, padded, of_y, luma.pairs, HALF),
                    u = summed<CHROMA>(planes[1] + from_c + x, padded, of_c, chroma.pairs,
                                       HALF - MIDDLE),
                    v = summed<CHROMA>(planes[2] + from_c + x, padded, of_c, chroma.pairs,
                                       HALF - MIDDLE);
      __m256i rgb[3][2];
      for (int half = 0; half < 2; ++half) {
        const __m256i l0 = half ? l.high : l.low, u0 = half ? u.high : u.low,
                      v0 = half ? v.high : v.low;
        const __m256i grey =
            _mm256_add_epi32(times(_mm256_sub_epi32(l0, offset), colour[1]), round);
        rgb[0][half] = to_8_bits(_mm256_add_epi32(grey, times(v0, colour[4])));
        rgb[1][half] = to_8_bits(
            _mm256_add_epi32(grey, _mm256_add_epi32(times(v0, colour[5]), times(u0, colour[2]))));
        rgb[2][half] = to_8_bits(_mm256_add_epi32(grey, times(u0, colour[3])));
      }
      for (int c = 0; c < 3; ++c) {
        const __m256i words = _mm256_packs_epi32(rgb[c][0], rgb[c][1]),
                      bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0xD8);
        uint8_t* const to = out + (c * size + y) * size + x;
        const __m128i sixteen = _mm256_castsi256_si128(bytes);
        if (x + BLOCK <= size) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to), sixteen);
        } else {
          alignas(16) uint8_t rest[BLOCK];
          _mm_store_si128(reinterpret_cast<__m128i*>(rest), sixteen);
          std::copy_n(rest, size - x, to);
        }
      }
    }
  }
}

void Scaling::convert(const std::array<const uint8_t*, 3>& planes,
                      const std::array<int64_t, 3>& strides, uint8_t* out) const {
  thread_local std::vector<int16_t> room;
  room.resize(static_cast<size_t>((down[0].in + 2 * down[1].in) * padded));
  int16_t* next = room.data();
  std::array<const int16_t*, 3> scaled;
  for (size_t p = 0; p < 3; ++p) {
    const bool chroma = p > 0;
    const Across& a = across[chroma];
    if (a.steps == 1)
      rows<1>(chroma, planes[p], strides[p], next);
    else if (a.steps == 2 && a.spans == 1)
      rows<2>(chroma, planes[p], strides[p], next);
    else
      rows<0>(chroma, planes[p], strides[p], next);
    scaled[p] = next, next += down[chroma].in * padded;
  }
  if (down[0].pairs == 2 && down[1].pairs == 1) return pixels<2, 1>(scaled, out);
  if (down[0].pairs == 1 && down[1].pairs == 1) return pixels<1, 1>(scaled, out);
  pixels<0, 0>(scaled, out);
}
#else
void Scaling::convert(const std::array<const uint8_t*, 3>&, const std::array<int64_t, 3>&,
                      uint8_t*) const {
  throw std::invalid_argument("built without AVX2");
}
#endif

}  // namespace salt
