// Drawing the context and target tokens of one clip. The same code runs on the host and on the
// device; ops.sample_masks_reference is the same in Python, and all three agree bit for bit, so
// whatever order numbers are drawn in here is part of the format.
//
//   in   spec (below), (seed, epoch, sample id)
//   out  context[spec.context], target[spec.kept]: sorted token numbers n = (t * H + y) * W + x,
//   disjoint
//
// The union and its complement are bitmaps of N bits: blocks are set a row at a time, counting is
// popcount, and listing visits the set bits alone. Bytes: 8 * (context + target) written a clip; 3
// N / 8 + 4 N of scratch. The limit is integer arithmetic: (tokens dropped) / 4 Philox blocks and
// about three visits to each token.
//
// A clip is drawn by a team: one thread on the host (Serial, below), one warp on the device
// (masks.cu). All of a team's lanes run the same path; `team.lane` and `team.size` share out the
// loops over words, rows and tokens, and only a lottery's draws are one after another.
#pragma once
#include "philox.h"

namespace salt {

struct MaskSpec {
  int32_t T, H, W;                 // token grid
  int32_t context, target;         // how many of each
  int32_t kept;                    // of the target, drawn at random; the rest is neither
  int32_t min_blocks, max_blocks;  // blocks in the union
  int32_t redraws;  // further draws allowed where the union or its complement is too small
  int32_t n_sizes;  // > 0: a clip takes one (h, w) of `sizes` for all its blocks, which span all of
                    // time;
  const int32_t* sizes;     //      [n_sizes, 2]
  int32_t low[3], high[3];  // n_sizes == 0: each block draws (t, h, w), low <= size <= high
  uint32_t stream;          // the family's Philox stream
};

SALT_HD int32_t tokens(const MaskSpec& spec) { return spec.T * spec.H * spec.W; }
SALT_HD int32_t mask_words(const MaskSpec& spec) {
  return (tokens(spec) + 63) / 64;
}  // uint64 words of one bitmap

// Scratch of one team, in bytes: three bitmaps (and a word that reading past a plane may touch),
// numbers, and a pool of tokens with room for what `list` may write beyond them.
template <class Team>
SALT_HD int64_t mask_scratch(const MaskSpec& spec) {
  return 8 * (3 * static_cast<int64_t>(mask_words(spec)) + 1) + 16 * Team::blocks +
         4 * ((static_cast<int64_t>(tokens(spec)) + Team::beyond + 1) / 2 * 2);
}

// One thread that does it all.
struct Serial {
  static constexpr int32_t lane = 0, size = 1, beyond = 0;
  static constexpr int32_t blocks = 16;  // of Philox made at a time; where number q of them lies:
  static SALT_HD int32_t place(int32_t q) { return (q & 3) * blocks + (q >> 2); }
  SALT_HD void sync() const {}
  SALT_HD void check(bool) const {}  // the caller has
  SALT_HD int32_t sum(int32_t x) const { return x; }
  SALT_HD void set(uint64_t* word, uint64_t mask) const { *word |= mask; }
  SALT_HD void fill(const Philox& philox, uint32_t first_block, uint32_t* out) const {
    for (int32_t i = 0; i < blocks; ++i)
      philox.block(first_block + static_cast<uint32_t>(i), out + i, blocks);
  }
  // Bring to pool[done, done + take) what the next numbers draw from pool[done, size). They are
  // turned to places before the first swap, since loads wait for stores at places not yet known.
  template <class Random>
  SALT_HD void draw(const Random& random, int32_t* pool, int32_t size, int32_t done,
                    int32_t take) const {
    int32_t at[Random::SIZE];
    for (int32_t q = 0; q < take; ++q)
      at[q] = done + q + random.peek(random.used + q, size - done - q);
    for (int32_t q = 0; q < take; ++q) {
      const int32_t token = pool[at[q]];
      pool[at[q]] = pool[done + q];
      pool[done + q] = token;
    }
  }
  // The bitmap of pool[0, count).
  SALT_HD void mark(const int32_t* pool, int32_t count, uint64_t* bits, int32_t words) const {
    for (int32_t i = 0; i < words; ++i) bits[i] = 0;
    for (int32_t i = 0; i < count; ++i) bits[pool[i] >> 6] |= uint64_t{1} << (pool[i] & 63);
  }
#if !defined(__CUDA_ARCH__)
  static SALT_HD int32_t count(uint64_t x) { return __builtin_popcountll(x); }

  // Write the numbers of the set bits, in order; returns how many. Integer is the output's type.
  template <typename Integer>
  SALT_HD int32_t list(const uint64_t* bits, int32_t words, Integer* out) const {
    int32_t found = 0;
    for (int32_t i = 0; i < words; ++i)
      for (uint64_t rest = bits[i]; rest; rest &= rest - 1)
        out[found++] = static_cast<Integer>(64 * i + __builtin_ctzll(rest));
    return found;
  }
  // The same for what leaves, with a pool to use.
  SALT_HD void write(const uint64_t* bits, int32_t words, int32_t*, int64_t* out) const {
    list(bits, words, out);
  }
#endif
};

// The numbers of one Philox stream in order, made `Team::blocks` blocks at a time.
template <class Team>
struct Numbers {
  static constexpr int32_t SIZE = 4 * Team::blocks;
  const Philox philox;
  uint32_t* const buffer;  // [SIZE]
  uint32_t next_block = 0;
  int32_t used = SIZE;

  SALT_HD Numbers(const Philox& philox, uint32_t* buffer) : philox(philox), buffer(buffer) {}

  SALT_HD int32_t available(const Team& team) {  // in the batch at hand, at least 1
    if (used == SIZE) {
      team.sync();
      team.fill(philox, next_block, buffer);
      next_block += Team::blocks, used = 0;
      team.sync();
    }
    return SIZE - used;
  }

  // Number q of the batch, as a whole number in [0, n): the high half of number * n. A value's
  // probability is off 1/n by less than 2^-32.
  SALT_HD int32_t peek(int32_t q, int32_t n) const {
    return static_cast<int32_t>(
        (static_cast<uint64_t>(buffer[Team::place(q)]) * static_cast<uint32_t>(n)) >> 32);
  }

  SALT_HD int32_t below(const Team& team, int32_t n) {
    available(team);
    return peek(used++, n);
  }
};

// Set `length` bits from `start` on. The word after the last one must exist; no bit of it changes.
template <class Team>
SALT_HD void set_bits(const Team& team, uint64_t* bits, int32_t start, int32_t length) {
  for (; length > 0; start += 64, length -= 64) {
    const int32_t word = start >> 6, offset = start & 63;
    const uint64_t mask = length < 64 ? (uint64_t{1} << length) - 1 : ~uint64_t{0},
                   beyond = mask >> 1 >> (63 - offset);
    team.set(bits + word, mask << offset);
    if (Team::size == 1 || beyond) team.set(bits + word + 1, beyond);
  }
}

// 64 bits from bit `start` on; the word after the last one asked for must be readable.
SALT_HD uint64_t bits_at(const uint64_t* bits, int32_t start) {
  const int32_t word = start >> 6, offset = start & 63;
  return offset ? bits[word] >> offset | bits[word + 1] << (64 - offset) : bits[word];
}

// Move `count` tokens, drawn uniformly without replacement from the set `from`, to the set `to`
// (dropped where `to` is null).
template <class Team>
SALT_HD void move_tokens(const Team& team, Numbers<Team>& random, uint64_t* from, uint64_t* to,
                         uint64_t* moved, int32_t* pool, int32_t words, int32_t count) {
  if (count <= 0) return;
  const int32_t size = team.list(from, words, pool);
  team.sync();
  for (int32_t done = 0; done < count;) {  // partial Fisher-Yates: the tokens drawn stand first
    const int32_t here = random.available(team), take = here < count - done ? here : count - done;
    team.draw(random, pool, size, done, take);
    random.used += take, done += take;
  }
  team.sync();
  team.mark(pool, count, moved, words);
  team.sync();
  for (int32_t i = team.lane; i < words; i += Team::size) {
    from[i] &= ~moved[i];
    if (to) to[i] |= moved[i];
  }
  team.sync();
}

// scratch: mask_scratch<Team>(spec) bytes, 8-aligned.
template <class Team>
SALT_HD void draw_masks(const Team& team, const MaskSpec& spec, uint64_t seed, uint32_t epoch,
                        uint64_t sample_id, uint64_t* scratch, int64_t* context, int64_t* target) {
  const int32_t plane = spec.H * spec.W, n = tokens(spec), words = mask_words(spec);
  uint64_t *in_union = scratch, *rest = scratch + words, *moved = rest + words;
  uint32_t* buffer = reinterpret_cast<uint32_t*>(moved + words + 1);
  int32_t* pool = reinterpret_cast<int32_t*>(buffer + Numbers<Team>::SIZE);
  Numbers<Team> random(Philox(seed, epoch, sample_id, spec.stream), buffer);

  const bool spans_time =
      spec.n_sizes > 0;  // then the union is drawn on one plane, in `rest`, and repeated over time
  uint64_t* drawn = spans_time ? rest : in_union;
  const int32_t drawn_words = spans_time ? (plane + 63) / 64 : words;
  int32_t size[3] = {1, 0, 0};
  if (spans_time) {
    const int32_t row = random.below(team, spec.n_sizes);
    size[1] = spec.sizes[2 * row], size[2] = spec.sizes[2 * row + 1];
    team.check(size[1] >= 1 && size[1] <= spec.H && size[2] >= 1 && size[2] <= spec.W);
  }
  int32_t covered = 0;
  for (int32_t attempt = 0; attempt <= spec.redraws; ++attempt) {
    for (int32_t i = team.lane; i < drawn_words + (spans_time ? 1 : 0); i += Team::size)
      drawn[i] = 0;
    team.sync();
    const int32_t blocks =
        spec.min_blocks + random.below(team, spec.max_blocks - spec.min_blocks + 1);
    for (int32_t b = 0; b < blocks; ++b) {
      if (!spans_time)
        for (int a = 0; a < 3; ++a)
          size[a] = spec.low[a] + random.below(team, spec.high[a] - spec.low[a] + 1);
      const int32_t t0 = spans_time ? 0 : random.below(team, spec.T - size[0] + 1);
      const int32_t y0 = random.below(team, spec.H - size[1] + 1);
      const int32_t x0 = random.below(team, spec.W - size[2] + 1);
      for (int32_t t = t0; t < t0 + size[0]; ++t)
        for (int32_t y = y0 + team.lane; y < y0 + size[1]; y += Team::size)
          set_bits(team, drawn, (t * spec.H + y) * spec.W + x0, size[2]);
    }
    team.sync();
    covered = 0;
    for (int32_t i = team.lane; i < drawn_words; i += Team::size) covered += Team::count(drawn[i]);
    covered = team.sum(covered) * (spans_time ? spec.T : 1);
    if (covered >= spec.target && n - covered >= spec.context) break;
  }
  if (spans_time)
    for (int32_t i = team.lane; i < words;
         i += Team::size) {  // word i holds the plane's bits from (64 i) mod plane on, and around
      uint64_t word = 0;
      for (int32_t filled = 0, at = 64 * i % plane; filled < 64; filled += plane - at, at = 0)
        word |= (bits_at(rest, at) &
                 (plane - at < 64 ? (uint64_t{1} << (plane - at)) - 1 : ~uint64_t{0}))
                << filled;
      in_union[i] = word;
    }
  team.sync();
  const uint64_t last = n & 63 ? (uint64_t{1} << (n & 63)) - 1 : ~uint64_t{0};
  for (int32_t i = team.lane; i < words; i += Team::size) {
    const uint64_t valid = i + 1 < words ? ~uint64_t{0} : last;
    rest[i] = ~in_union[i] & valid;
    in_union[i] &= valid;
  }
  team.sync();

  const int32_t short_of_context = spec.context - (n - covered),
                short_of_target = spec.target - covered;
  if (short_of_context > 0) {  // at most one side can be short, since context + target <= n
    move_tokens(team, random, in_union, rest, moved, pool, words, short_of_context);
    covered -= short_of_context;
  } else if (short_of_target > 0) {
    move_tokens(team, random, rest, in_union, moved, pool, words, short_of_target);
    covered += short_of_target;
  }
  move_tokens(team, random, rest, nullptr, moved, pool, words, n - covered - spec.context);
  move_tokens(team, random, in_union, nullptr, moved, pool, words, covered - spec.kept);
  team.write(rest, words, pool, context);
  team.sync();
  team.write(in_union, words, pool, target);
}

}  // namespace salt
