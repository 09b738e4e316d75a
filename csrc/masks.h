// Drawing the context and target tokens of one clip. The same code runs on the host and on the device; ops.sample_masks_reference
// is the same in Python, and all three agree bit for bit, so whatever order numbers are drawn in here is part of the format.
//
//   in   spec (below), (seed, epoch, sample id)
//   out  context[spec.context], target[spec.target]: sorted token numbers n = (t * H + y) * W + x, disjoint
//
// Bytes: 8 * (context + target) written a clip; everything else stays in N bytes + 4 N bytes of scratch. The limit is the
// integer arithmetic of about (blocks + tokens dropped) / 4 Philox blocks.
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

enum : uint8_t { COMPLEMENT = 0, UNION = 1, DROPPED = 2 };

// Move `count` tokens, drawn uniformly without replacement from those in state `from`, to state `to`.
SALT_HD void move_tokens(Philox& random, uint8_t* state, int32_t* pool, int32_t n, uint8_t from, uint8_t to, int32_t count) {
  if (count <= 0) return;
  int32_t size = 0;
  for (int32_t i = 0; i < n; ++i) {
    pool[size] = i;  // size <= i, so the write stays inside even where it does not count
    size += state[i] == from;
  }
  for (int32_t i = 0; i < count; ++i) {  // partial Fisher-Yates shuffle
    const int32_t j = i + static_cast<int32_t>(random.below(static_cast<uint32_t>(size - i)));
    const int32_t token = pool[j];
    pool[j] = pool[i];
    state[token] = to;
  }
}

// state: N bytes of scratch; pool: N of scratch.
SALT_HD void draw_masks(const MaskSpec& spec, uint64_t seed, uint32_t epoch, uint64_t sample_id, uint8_t* state, int32_t* pool,
                        int64_t* context, int64_t* target) {
  Philox random(seed, epoch, sample_id, spec.stream);
  const int32_t plane = spec.H * spec.W, n = spec.T * plane;
  const bool spans_time = spec.n_sizes > 0;       // then the union is drawn on one plane and repeated over time
  const int32_t depth = spans_time ? 1 : spec.T, repeat = spans_time ? spec.T : 1;
  int32_t size[3] = {1, 0, 0};
  if (spans_time) {
    const uint32_t row = random.below(static_cast<uint32_t>(spec.n_sizes));
    size[1] = spec.sizes[2 * row], size[2] = spec.sizes[2 * row + 1];
  }
  int32_t in_union = 0;
  for (int32_t attempt = 0; attempt <= spec.redraws; ++attempt) {
    for (int32_t i = 0; i < depth * plane; ++i) state[i] = COMPLEMENT;
    const int32_t blocks = spec.min_blocks + static_cast<int32_t>(random.below(static_cast<uint32_t>(spec.max_blocks - spec.min_blocks + 1)));
    for (int32_t b = 0; b < blocks; ++b) {
      if (!spans_time)
        for (int a = 0; a < 3; ++a) size[a] = spec.low[a] + static_cast<int32_t>(random.below(static_cast<uint32_t>(spec.high[a] - spec.low[a] + 1)));
      const int32_t t0 = spans_time ? 0 : static_cast<int32_t>(random.below(static_cast<uint32_t>(spec.T - size[0] + 1)));
      const int32_t y0 = static_cast<int32_t>(random.below(static_cast<uint32_t>(spec.H - size[1] + 1)));
      const int32_t x0 = static_cast<int32_t>(random.below(static_cast<uint32_t>(spec.W - size[2] + 1)));
      for (int32_t t = t0; t < t0 + size[0]; ++t)
        for (int32_t y = y0; y < y0 + size[1]; ++y) {
          uint8_t* row = state + (t * spec.H + y) * spec.W;
          for (int32_t x = x0; x < x0 + size[2]; ++x) row[x] = UNION;
        }
    }
    in_union = 0;
    for (int32_t i = 0; i < depth * plane; ++i) in_union += state[i];
    in_union *= repeat;
    if (in_union >= spec.target && n - in_union >= spec.context) break;
  }
  for (int32_t i = plane; spans_time && i < n; ++i) state[i] = state[i - plane];

  const int32_t short_of_context = spec.context - (n - in_union), short_of_target = spec.target - in_union;
  if (short_of_context > 0) {  // at most one side can be short, since context + target <= n
    move_tokens(random, state, pool, n, UNION, COMPLEMENT, short_of_context);
    in_union -= short_of_context;
  } else if (short_of_target > 0) {
    move_tokens(random, state, pool, n, COMPLEMENT, UNION, short_of_target);
    in_union += short_of_target;
  }
  move_tokens(random, state, pool, n, COMPLEMENT, DROPPED, n - in_union - spec.context);
  move_tokens(random, state, pool, n, UNION, DROPPED, in_union - spec.target);

  for (int32_t i = 0, c = 0, u = 0; i < n; ++i) {
    if (state[i] == COMPLEMENT) context[c++] = i;
    if (state[i] == UNION) target[u++] = i;
  }
}

}  // namespace salt
