// Drawing the context and target tokens of one clip. The same code runs on the host and on the device; ops.sample_masks_reference
// is the same in Python, and all three agree bit for bit, so whatever order numbers are drawn in here is part of the format.
//
//   in   spec (below), (seed, epoch, sample id)
//   out  context[spec.context], target[spec.target]: sorted token numbers n = (t * H + y) * W + x, disjoint
//
// The union and its complement are bitmaps of N bits: blocks are set a row at a time, counting is popcount, and listing visits the
// set bits alone, so that no branch depends on a random bit. Bytes: 8 * (context + target) written a clip; N / 4 + 4 N of scratch.
// The limit is integer arithmetic: (tokens dropped) / 4 Philox blocks and about three visits to each token.
#pragma once
#include "philox.h"

namespace salt {

struct MaskSpec {
  int32_t T, H, W;                 // token grid
  int32_t context, target;         // how many of each
  int32_t min_blocks, max_blocks;  // blocks in the union
  int32_t redraws;                 // further draws allowed where the union or its complement is too small
  int32_t n_sizes;                 // > 0: a clip takes one (h, w) of `sizes` for all its blocks, which span all of time;
  const int32_t* sizes;            //      [n_sizes, 2]
  int32_t low[3], high[3];         // n_sizes == 0: each block draws (t, h, w), low <= size <= high
  uint32_t stream;                 // the family's Philox stream
};

SALT_HD int32_t mask_words(const MaskSpec& spec) { return (spec.T * spec.H * spec.W + 63) / 64; }  // uint64 words of one bitmap

SALT_HD int32_t lowest_bit(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(x)) - 1;
#else
  return __builtin_ctzll(x);
#endif
}

SALT_HD int32_t count_bits(const uint64_t* bits, int32_t words) {
  int32_t count = 0;
  for (int32_t i = 0; i < words; ++i) {
#if defined(__CUDA_ARCH__)
    count += __popcll(bits[i]);
#else
    count += __builtin_popcountll(bits[i]);
#endif
  }
  return count;
}

// Set `length` bits from `start` on.
SALT_HD void set_bits(uint64_t* bits, int32_t start, int32_t length) {
  while (length > 0) {
    const int32_t offset = start & 63, here = length < 64 - offset ? length : 64 - offset;
    bits[start >> 6] |= (here == 64 ? ~uint64_t{0} : (uint64_t{1} << here) - 1) << offset;
    start += here, length -= here;
  }
}

// Write the numbers of the set bits, in order; returns how many. Integer is the output's type.
template <typename Integer>
SALT_HD int32_t list_bits(const uint64_t* bits, int32_t words, Integer* out) {
  int32_t size = 0;
  for (int32_t i = 0; i < words; ++i)
    for (uint64_t rest = bits[i]; rest; rest &= rest - 1) out[size++] = static_cast<Integer>(64 * i + lowest_bit(rest));
  return size;
}

// Move `count` tokens, drawn uniformly without replacement from the set `from`, to the set `to` (dropped where `to` is null).
SALT_HD void move_tokens(Philox& random, uint64_t* from, uint64_t* to, int32_t* pool, int32_t words, int32_t count) {
  if (count <= 0) return;
  const int32_t size = list_bits(from, words, pool);
  for (int32_t i = 0; i < count; ++i) {  // partial Fisher-Yates shuffle
    const int32_t j = i + static_cast<int32_t>(random.below(static_cast<uint32_t>(size - i)));
    const int32_t token = pool[j];
    pool[j] = pool[i];
    from[token >> 6] &= ~(uint64_t{1} << (token & 63));
    if (to) to[token >> 6] |= uint64_t{1} << (token & 63);
  }
}

// bits: 2 * mask_words(spec) words of scratch; pool: N of scratch.
SALT_HD void draw_masks(const MaskSpec& spec, uint64_t seed, uint32_t epoch, uint64_t sample_id, uint64_t* bits, int32_t* pool,
                        int64_t* context, int64_t* target) {
  Philox random(seed, epoch, sample_id, spec.stream);
  const int32_t plane = spec.H * spec.W, n = spec.T * plane, words = mask_words(spec);
  uint64_t *in_union = bits, *rest = bits + words;
  const bool spans_time = spec.n_sizes > 0;  // then the union is drawn on one plane and repeated over time
  const int32_t drawn = spans_time ? plane : n, drawn_words = (drawn + 63) / 64, repeat = spans_time ? spec.T : 1;
  int32_t size[3] = {1, 0, 0};
  if (spans_time) {
    const uint32_t row = random.below(static_cast<uint32_t>(spec.n_sizes));
    size[1] = spec.sizes[2 * row], size[2] = spec.sizes[2 * row + 1];
  }
  int32_t covered = 0;
  for (int32_t attempt = 0; attempt <= spec.redraws; ++attempt) {
    for (int32_t i = 0; i < words; ++i) in_union[i] = 0;
    const int32_t blocks = spec.min_blocks + static_cast<int32_t>(random.below(static_cast<uint32_t>(spec.max_blocks - spec.min_blocks + 1)));
    for (int32_t b = 0; b < blocks; ++b) {
      if (!spans_time)
        for (int a = 0; a < 3; ++a) size[a] = spec.low[a] + static_cast<int32_t>(random.below(static_cast<uint32_t>(spec.high[a] - spec.low[a] + 1)));
      const int32_t t0 = spans_time ? 0 : static_cast<int32_t>(random.below(static_cast<uint32_t>(spec.T - size[0] + 1)));
      const int32_t y0 = static_cast<int32_t>(random.below(static_cast<uint32_t>(spec.H - size[1] + 1)));
      const int32_t x0 = static_cast<int32_t>(random.below(static_cast<uint32_t>(spec.W - size[2] + 1)));
      for (int32_t t = t0; t < t0 + size[0]; ++t)
        for (int32_t y = y0; y < y0 + size[1]; ++y) set_bits(in_union, (t * spec.H + y) * spec.W + x0, size[2]);
    }
    covered = count_bits(in_union, drawn_words) * repeat;
    if (covered >= spec.target && n - covered >= spec.context) break;
  }
  if (spans_time) {  // rest holds the plane while it is copied
    for (int32_t i = 0; i < drawn_words; ++i) rest[i] = in_union[i];
    for (int32_t t = 1; t < spec.T; ++t)
      for (int32_t i = 0; i < drawn_words; ++i) {
        const int32_t at = t * plane + 64 * i, word = at >> 6, offset = at & 63;
        in_union[word] |= rest[i] << offset;
        if (offset && word + 1 < words) in_union[word + 1] |= rest[i] >> (64 - offset);
      }
  }
  for (int32_t i = 0; i < words; ++i) rest[i] = ~in_union[i];
  if (n & 63) rest[words - 1] &= (uint64_t{1} << (n & 63)) - 1;

  const int32_t short_of_context = spec.context - (n - covered), short_of_target = spec.target - covered;
  if (short_of_context > 0) {  // at most one side can be short, since context + target <= n
    move_tokens(random, in_union, rest, pool, words, short_of_context);
    covered -= short_of_context;
  } else if (short_of_target > 0) {
    move_tokens(random, rest, in_union, pool, words, short_of_target);
    covered += short_of_target;
  }
  move_tokens(random, rest, nullptr, pool, words, n - covered - spec.context);
  move_tokens(random, in_union, nullptr, pool, words, covered - spec.target);
  list_bits(rest, words, context);
  list_bits(in_union, words, target);
}

}  // namespace salt
