// A decoder's planes -> RGB of another size, by AVX2: the bits that swscale makes of them, from
// tables that salt/scaling.py has got out of swscale.
//
// out[c][y][x]: each of the three planes is summed across its rows, shifted to 15 bits, then down
// its columns, then the three make a pixel, all in whole numbers as swscale does it. Bytes: each
// plane in once, 3 size^2 out once; a crop of 240x240 to 224x224 reads 86 KB and writes 151 KB.
// What lies between, 16 bits a number, is 215 KB there and stays in the second-level cache.
#pragma once
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace salt {

// out[i] = the sum over j < taps of in[from[i] + j] * weight[i][j]
struct Axis {
  int64_t in, taps;
  std::vector<int32_t> from;
  std::vector<int16_t> weight;
};

class Scaling {
 public:
  // across, down: of luma and of chroma, `size` outputs each. colour: offset of y, then what y, u
  // and v are multiplied by: {offset, y, u to green, u to blue, v to red, v to green}. Throws
  // std::invalid_argument where a plane is too small for windows of 16 bytes.
  Scaling(int64_t size, const std::array<Axis, 2>& across, const std::array<Axis, 2>& down,
          const std::array<int32_t, 6>& colour);

  // planes: y, u and v, rows `strides` bytes apart. out: red, green and blue, uint8 [3, size,
  // size].
  void convert(const std::array<const uint8_t*, 3>& planes, const std::array<int64_t, 3>& strides,
               uint8_t* out) const;

  std::pair<int64_t, int64_t> shape(bool chroma) const {  // rows, columns
    return {down[chroma].in, across[chroma].in};
  }
  int64_t bytes() const { return 3 * size * size; }

 private:
  // By blocks of 16 outputs. Each four of them look at the same `spans` windows of 16 bytes, from
  // `first` on; `steps` of a block: each window's pairs of taps.
  struct Across {
    int64_t in, spans, pairs, steps;
    std::vector<int64_t> first;     // [block, 4]
    std::vector<uint8_t> shuffles;  // [block, step, 64]: places in the window; 128: not there
    std::vector<int16_t> weights;   // [block, step, 32]
    Across(const Axis& axis, int64_t size, int64_t padded);
  };
  struct Down {
    int64_t in, pairs;
    std::vector<int64_t> from;     // first row of an output
    std::vector<int32_t> weights;  // [size, pairs]: two of 16 bits, the first row's in the low ones
    Down(const Axis& axis, int64_t size);
  };
  template <int64_t PAIRS>
  void rows(bool chroma, const uint8_t* in, int64_t stride, int16_t* out) const;
  template <int64_t LUMA, int64_t CHROMA>
  void pixels(const std::array<const int16_t*, 3>& planes, uint8_t* out) const;

  int64_t size, padded;  // padded: to whole blocks
  std::array<Across, 2> across;
  std::array<Down, 2> down;
  std::array<int32_t, 6> colour;
};

}  // namespace salt
