// The kernels alone, for `make sanitize`: AddressSanitizer watches arrays of exactly the size
// promised, UndefinedBehaviorSanitizer the arithmetic, and every result is compared with a plain
// loop. Random shapes, odd widths, no rows at all, every type, loss and normalisation, arrays an
// element off alignment. With SALT_EMULATE the CUDA kernels, which emulation/cuda_runtime.h runs on
// the CPU, else the CPU's.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../csrc/files.h"
#include "../csrc/frames.h"
#include "../csrc/kernels.h"

using namespace salt;

namespace {

std::mt19937_64 engine(1);
int64_t whole(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(engine);
}

// `count` elements of `size` bytes with nothing readable after them, one element off alignment in
// half of all cases.
struct Array {
  int64_t before;
  std::unique_ptr<char[]> bytes;
  explicit Array(int64_t count, int64_t size)
      : before(whole(0, 1) * size), bytes(new char[static_cast<size_t>(before + count * size)]) {}
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(bytes.get() + before);
  }
};

#ifdef SALT_EMULATE
const char* kernels() { return "CUDA kernels, emulated"; }
void gather(const Rows& a) {
  if (a.B * a.K * a.row_bytes > 0) gather_cuda(a, nullptr);
}
void scatter(const Rows& a) {
  if (a.B * a.N * a.row_bytes > 0) scatter_cuda(a, nullptr);
}
void patches(const Patches& a) {
  if (a.B * a.K * a.D > 0) patches_cuda(a, nullptr);
}
void loss(const Loss& a) {
  if (a.B * a.K > 0) loss_cuda(a, nullptr);
}
void draw(const Draw& a) {
  std::vector<uint64_t> scratch(static_cast<size_t>(draw_scratch_cuda(a.spec) * a.B / 8));
  draw_cuda(a, scratch.data(), nullptr);
}
#else
// In two parts, as two threads would have them.
template <typename Kernel, typename Work>
void in_parts(Kernel kernel, const Work& work, int64_t items) {
  kernel(work, 0, items / 3), kernel(work, items / 3, items);
}
const char* kernels() { return simd_level(); }
void gather(const Rows& a) { in_parts(gather_cpu, a, a.B * a.K); }
void scatter(const Rows& a) { in_parts(scatter_cpu, a, a.B * a.N); }
void patches(const Patches& a) { in_parts(patches_cpu, a, a.B * a.K); }
void loss(const Loss& a) { in_parts(loss_cpu, a, a.B * a.K); }
void draw(const Draw& a) { in_parts(draw_cpu, a, a.B); }
#endif

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "sanitize: %s is wrong (%s)\n", what, kernels());
  std::exit(1);
}

int64_t size_of(Type type) {
  return type == Type::u8 ? 1 : type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
}

// A value that every type holds exactly, written as `type`; u8 holds 255 times it.
void put(Array& array, int64_t i, Type type, double value) {
  float f = static_cast<float>(value);
  uint32_t u;
  std::memcpy(&u, &f, 4);
  switch (type) {
    case Type::u8:
      array.as<uint8_t>()[i] = static_cast<uint8_t>(value * 255);
      break;
    case Type::f16:
      array.as<uint16_t>()[i] = static_cast<uint16_t>(
          u == 0 ? 0 : (u >> 16 & 0x8000u) | (((u >> 23 & 255u) - 112) << 10) | (u >> 13 & 0x3ffu));
      break;
    case Type::bf16:
      array.as<uint16_t>()[i] = static_cast<uint16_t>(u >> 16);
      break;
    case Type::f32:
      array.as<float>()[i] = f;
      break;
    case Type::f64:
      array.as<double>()[i] = value;
      break;
  }
}

double get(Array& array, int64_t i, Type type) {
  if (type == Type::f32) return array.as<float>()[i];
  if (type == Type::f64) return array.as<double>()[i];
  uint32_t u = static_cast<uint32_t>(array.as<uint16_t>()[i]) << 16;  // bf16
  if (type == Type::f16 && (u & 0x7fff0000u))
    u = (u & 0x80000000u) |
        (((u & 0x7fff0000u) >> 3) + (112u << 23));  // no subnormal, infinity or nan here
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

std::vector<int64_t> rows_of(int64_t B, int64_t N, int64_t K) {
  std::vector<int64_t> index, all(static_cast<size_t>(N));
  for (int64_t n = 0; n < N; ++n) all[static_cast<size_t>(n)] = n;
  for (int64_t b = 0; b < B; ++b) {
    std::shuffle(all.begin(), all.end(), engine);
    index.insert(index.end(), all.begin(), all.begin() + K);
  }
  return index;
}

void check_rows() {
  const int64_t B = whole(0, 3), N = whole(1, 150), K = whole(0, N),
                bytes = whole(0, 1) ? whole(0, 70) : 16 * whole(0, 200);
  const std::vector<int64_t> index = rows_of(B, N, K);
  Array x(B * N, bytes), out(B * K, bytes), back(B * N, bytes);
  for (int64_t i = 0; i < B * N * bytes; ++i) x.as<char>()[i] = static_cast<char>(whole(1, 100));
  gather({x.as<char>(), index.data(), B, N, K, bytes, out.as<char>()});
  for (int64_t r = 0; r < B * K; ++r)
    expect(!std::memcmp(out.as<char>() + r * bytes,
                        x.as<char>() + (r / K * N + index[static_cast<size_t>(r)]) * bytes,
                        static_cast<size_t>(bytes)),
           "gather");
  scatter({out.as<char>(), index.data(), B, N, K, bytes, back.as<char>()});
  std::vector<char> wanted(static_cast<size_t>(B * N * bytes), 0);
  for (int64_t r = 0; r < B * K; ++r)
    std::copy_n(out.as<char>() + r * bytes, bytes,
                wanted.data() + (r / K * N + index[static_cast<size_t>(r)]) * bytes);
  expect(std::equal(wanted.begin(), wanted.end(), back.as<char>()), "scatter");
}

void check_patches() {
  const int channels = static_cast<int>(whole(1, MAX_CHANNELS));
  const int64_t B = whole(0, 3), N = whole(1, 20), K = whole(0, N),
                D = channels * (whole(0, 1) ? whole(0, 50) : 16 * whole(0, 20));
  const std::vector<int64_t> index = rows_of(B, N, K);
  for (const Type type : {Type::f32, Type::bf16})
    for (const bool indexed : {true, false}) {
      const int64_t rows = indexed ? K : N;
      Array x(B * N, D), out(B * rows, D * size_of(type));
      for (int64_t i = 0; i < B * N * D; ++i)
        x.as<uint8_t>()[i] = static_cast<uint8_t>(whole(0, 255));
      Patches a{x.as<uint8_t>(),
                indexed ? index.data() : nullptr,
                B,
                N,
                rows,
                D,
                channels,
                {0.5f, 2, 1, 4},
                {1, -3, 0, 2},
                out.as<char>(),
                type};
      patches(a);
      for (int64_t r = 0; r < B * rows; ++r)
        for (int64_t d = 0; d < D; ++d) {
          const int64_t c = d / (D / channels),
                        row = indexed ? r / rows * N + index[static_cast<size_t>(r)] : r;
          const double wanted =
              x.as<uint8_t>()[row * D + d] * static_cast<double>(a.scale[c]) + a.shift[c];
          expect(std::abs(get(out, r * D + d, type) - wanted) <= (type == Type::bf16 ? 4 : 0),
                 "patch_normalise");
        }
    }
}

void check_loss(Type pt, Type yt, Kind kind, Normalise normalise, bool indexed) {
  const int64_t B = whole(0, 3), N = whole(1, 12), K = indexed ? whole(0, N) : N,
                D = whole(0, 1) ? whole(0, 100) : 8 * whole(1, 150);
  const std::vector<int64_t> index = rows_of(B, N, K);
  const Type sums = pt == Type::f64 ? Type::f64 : Type::f32;
  Array p(B * K * D, size_of(pt)), y(B * N * D, size_of(yt)), mean(N * D, size_of(sums)),
      rstd(N * D, size_of(sums)), tokens(B * K, size_of(sums)), gradient(B * K * D, size_of(pt));
  std::vector<double> pv(static_cast<size_t>(B * K * D)), yv(static_cast<size_t>(B * N * D)),
      mv(static_cast<size_t>(N * D)), rv(static_cast<size_t>(N * D));
  const auto fill = [](std::vector<double>& values, Array& array, Type type) {
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = type == Type::u8 ? static_cast<double>(whole(0, 1))
                                   : static_cast<double>(whole(-16, 16)) / 8;
      put(array, static_cast<int64_t>(i), type, values[i]);
    }
  };
  fill(pv, p, pt), fill(yv, y, yt), fill(mv, mean, sums), fill(rv, rstd, sums);
  Loss a{};
  a.prediction = p.as<char>(), a.target = y.as<char>(), a.prediction_type = pt, a.target_type = yt,
  a.index = indexed ? index.data() : nullptr;
  a.B = B, a.N = N, a.K = K, a.D = D, a.kind = kind, a.normalise = normalise,
  a.mean = mean.as<char>(), a.rstd = rstd.as<char>(), a.scale = 0.75;
  a.per_token = tokens.as<char>(), a.gradient = whole(0, 3) ? gradient.as<char>() : nullptr;
  loss(a);
#ifdef SALT_EMULATE
  if (B * K > 0) {
    Array mean_of(1, size_of(sums));
    mean_cuda(tokens.as<char>(), B * K, sums, mean_of.as<char>(), nullptr);
    double sum = 0;
    for (int64_t r = 0; r < B * K; ++r) sum += get(tokens, r, sums);
    if (D > 0)
      expect(std::abs(get(mean_of, 0, sums) - sum / static_cast<double>(B * K)) <= 1e-5 * (1 + sum),
             "the mean");
    if (a.gradient && D > 0) {
      const int64_t count = B * K * D;
      Array factor(1, size_of(sums)), scaled(count, size_of(pt));
      put(factor, 0, sums, -2.7109375);  // of more bits than bfloat16 has
      scale_cuda(gradient.as<char>(), count, pt, factor.as<char>(), scaled.as<char>(), nullptr);
      for (int64_t i = 0; i < count; ++i) {
        const double wanted = -2.7109375 * get(gradient, i, pt),
                     off = std::abs(get(scaled, i, pt) - wanted);
        const double unit = pt == Type::bf16 ? 0x1p-8 : pt == Type::f32 ? 0x1p-23 : 0x1p-52;
        expect(off <= unit * std::abs(wanted), "a scaled gradient");
      }
    }
  }
#endif
  for (int64_t r = 0; D > 0 && r < B * K; ++r) {
    const int64_t n = indexed ? index[static_cast<size_t>(r)] : r % K, row = r / K * N + n;
    double m = 0, v = 0, sum = 0;
    for (int64_t d = 0; d < D; ++d)
      m += yv[static_cast<size_t>(row * D + d)] / static_cast<double>(D);
    for (int64_t d = 0; d < D; ++d)
      v += std::pow(yv[static_cast<size_t>(row * D + d)] - m, 2) / static_cast<double>(D);
    for (int64_t d = 0; d < D; ++d) {
      double wanted = yv[static_cast<size_t>(row * D + d)];
      if (normalise == Normalise::layer_norm) wanted = (wanted - m) / std::sqrt(v + LAYER_NORM_EPS);
      if (normalise == Normalise::standardise)
        wanted = (wanted - mv[static_cast<size_t>(n * D + d)]) * rv[static_cast<size_t>(n * D + d)];
      const double e = pv[static_cast<size_t>(r * D + d)] - wanted, size = std::abs(e);
      sum += kind == Kind::mse  ? e * e
             : kind == Kind::l1 ? size
             : size < 1         ? e * e / 2
                                : size - 0.5;
      const double slope = kind == Kind::mse  ? 2 * e
                           : kind == Kind::l1 ? (e > 0) - (e < 0)
                                              : std::fmax(-1, std::fmin(1, e));
      const bool unclear = kind == Kind::l1 && size < 1e-4;  // the sign of a rounding error
      if (a.gradient && !unclear)
        expect(std::abs(get(gradient, r * D + d, pt) - 0.75 * slope) <=
                   (pt == Type::bf16 ? 0.01 : 1e-4) * (1 + std::abs(slope)),
               "the gradient");
    }
    expect(std::abs(get(tokens, r, sums) - sum / static_cast<double>(D)) <= 1e-4 * (1 + sum),
           "the loss");
  }
}

void check_masks() {
  Draw work{};
  MaskSpec& spec = work.spec;
  spec.T = static_cast<int32_t>(whole(1, 20)), spec.H = static_cast<int32_t>(whole(1, 15)),
  spec.W = static_cast<int32_t>(whole(1, 15));
  const int32_t n = tokens(spec);
  if (n < 2) return;
  spec.context = static_cast<int32_t>(whole(1, n - 1)),
  spec.target = static_cast<int32_t>(whole(1, n - spec.context));
  spec.kept = static_cast<int32_t>(whole(1, spec.target));
  spec.min_blocks = static_cast<int32_t>(whole(0, 4)),
  spec.max_blocks = spec.min_blocks + static_cast<int32_t>(whole(0, 4)),
  spec.redraws = static_cast<int32_t>(whole(0, 5));
  std::vector<int32_t> sizes;
  for (int64_t i = whole(0, 5); i > 0; --i)
    sizes.push_back(static_cast<int32_t>(whole(1, spec.H))),
        sizes.push_back(static_cast<int32_t>(whole(1, spec.W)));
  spec.n_sizes = static_cast<int32_t>(sizes.size() / 2), spec.sizes = sizes.data();
  const int32_t sides[3] = {spec.T, spec.H, spec.W};
  for (int a = 0; a < 3; ++a)
    spec.low[a] = static_cast<int32_t>(whole(1, sides[a])),
    spec.high[a] = static_cast<int32_t>(whole(spec.low[a], sides[a]));
  const int64_t B = whole(0, 4);
  std::vector<int64_t> ids;
  for (int64_t b = 0; b < B; ++b) ids.push_back(whole(0, INT64_MAX));
  Array context(B * spec.context, 8), target(B * spec.kept, 8);
  work.seed = engine(), work.epoch = static_cast<uint32_t>(engine()), work.sample_ids = ids.data(),
  work.B = B;
  work.context = context.as<int64_t>(), work.target = target.as<int64_t>();
  if (B > 0) draw(work);
#ifdef SALT_EMULATE
  std::vector<int64_t> context_cpu(static_cast<size_t>(B * spec.context)),
      target_cpu(static_cast<size_t>(B * spec.kept));
  Draw same = work;
  same.context = context_cpu.data(), same.target = target_cpu.data();
  draw_cpu(same, 0, B);
  expect(std::equal(context_cpu.begin(), context_cpu.end(), work.context) &&
             std::equal(target_cpu.begin(), target_cpu.end(), work.target),
         "a mask, which is not the CPU's,");
#endif
  for (int64_t b = 0; b < B; ++b) {
    std::vector<int> seen(static_cast<size_t>(n), 0);
    for (const auto& [list, count] : {std::pair{work.context + b * spec.context, spec.context},
                                      std::pair{work.target + b * spec.kept, spec.kept}})
      for (int32_t i = 0; i < count; ++i) {
        expect(list[i] >= 0 && list[i] < n && (i == 0 || list[i] > list[i - 1]), "a mask's order");
        expect(!seen[static_cast<size_t>(list[i])]++, "a mask's disjointness");
      }
  }
}

#ifndef SALT_EMULATE
void check_patchify() {
  const int64_t tubelet = whole(1, 3), patch = whole(1, 17), T = tubelet * whole(1, 3),
                H = patch * whole(1, 3), W = patch * whole(1, 3);
  const int64_t N = T / tubelet * (H / patch) * (W / patch), P = 3 * tubelet * patch * patch;
  Array clip(T * H * W * 3, 1), out(N * P, 1);
  for (int64_t i = 0; i < T * H * W * 3; ++i)
    clip.as<uint8_t>()[i] = static_cast<uint8_t>(whole(0, 255));
  in_parts(patchify_cpu, Tubelets{clip.as<uint8_t>(), T, H, W, patch, tubelet, out.as<uint8_t>()},
           N);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t y = 0; y < H; ++y)
      for (int64_t x = 0; x < W; ++x)
        for (int64_t c = 0; c < 3; ++c) {
          const int64_t n = (t / tubelet * (H / patch) + y / patch) * (W / patch) + x / patch,
                        entry =
                            ((c * tubelet + t % tubelet) * patch + y % patch) * patch + x % patch;
          expect(
              out.as<uint8_t>()[n * P + entry] == clip.as<uint8_t>()[((t * 3 + c) * H + y) * W + x],
              "patchify");
        }
}

Axis axis_of(int64_t in, int64_t size) {
  Axis axis{in, whole(1, std::min<int64_t>(in, 9)), {}, {}};
  const int64_t wander = whole(0, 20);  // of the first input, about where it would be
  for (int64_t i = 0; i < size; ++i) {
    const int64_t first = i * in / size + whole(-wander, wander);
    axis.from.push_back(static_cast<int32_t>(std::clamp<int64_t>(first, 0, in - axis.taps)));
    for (int64_t j = 0; j < axis.taps; ++j)
      axis.weight.push_back(static_cast<int16_t>(whole(-9000, 17000)));
  }
  return axis;
}

void check_scaling() {
  if (!std::strcmp(simd_level(), "baseline")) return;
  const int64_t size = whole(8, 70);
  std::array<Axis, 2> across, down;
  std::array<int32_t, 6> colour;
  for (int32_t& number : colour) number = static_cast<int32_t>(whole(-9000, 18000));
  for (size_t p = 0; p < 2; ++p)
    across[p] = axis_of(whole(112, 250), size), down[p] = axis_of(whole(10, 90), size);
  const Scaling work(size, across, down, colour);
  std::vector<Array> planes;
  std::array<const uint8_t*, 3> from;
  std::array<int64_t, 3> strides;
  std::array<std::vector<int32_t>, 3> sums;  // of 17 bits, [size, size]
  for (size_t p = 0; p < 3; ++p) {
    const Axis &x = across[p > 0], &y = down[p > 0];
    strides[p] = x.in + whole(0, 30);
    planes.emplace_back((y.in - 1) * strides[p] + x.in, 1);
    uint8_t* plane = planes.back().as<uint8_t>();
    for (int64_t i = 0; i < (y.in - 1) * strides[p] + x.in; ++i)
      plane[i] = static_cast<uint8_t>(whole(0, 255));
    from[p] = plane;
    for (int64_t i = 0; i < size * size; ++i) {
      const size_t row = static_cast<size_t>(i / size), column = static_cast<size_t>(i % size);
      int64_t sum = (1 << 9) - (p ? 128 << 19 : 0);
      for (int64_t dy = 0; dy < y.taps; ++dy) {
        int64_t of_row = 0;
        for (int64_t dx = 0; dx < x.taps; ++dx)
          of_row += plane[(y.from[row] + dy) * strides[p] + x.from[column] + dx] *
                    x.weight[column * static_cast<size_t>(x.taps) + static_cast<size_t>(dx)];
        sum += std::clamp<int64_t>(of_row >> 7, -32768, 32767) *
               y.weight[row * static_cast<size_t>(y.taps) + static_cast<size_t>(dy)];
      }
      sums[p].push_back(static_cast<int32_t>(static_cast<uint32_t>(sum)) >> 10);
    }
  }
  Array out(3 * size * size, 1);
  work.convert(from, strides, out.as<uint8_t>());
  for (size_t i = 0; i < static_cast<size_t>(size * size); ++i) {
    const int64_t y = sums[0][i], u = sums[1][i], v = sums[2][i],
                  grey = (y - colour[0]) * colour[1] + (1 << 21);
    const int64_t wide[3] = {grey + v * colour[4], grey + v * colour[5] + u * colour[2],
                             grey + u * colour[3]};
    for (size_t c = 0; c < 3; ++c) {
      const int32_t wrapped = static_cast<int32_t>(static_cast<uint32_t>(wide[c]));
      expect(out.as<uint8_t>()[c * static_cast<size_t>(size * size) + i] ==
                 std::clamp(wrapped, 0, (1 << 30) - 1) >> 22,
             "scaling");
    }
  }
}

void check_moments() {
  const int64_t n = whole(0, 5), D = whole(1, 1200);
  Array rows(n * D, 2), sum(D, 8), squares(D, 8);
  for (int64_t i = 0; i < n * D; ++i) put(rows, i, Type::f16, static_cast<double>(whole(-4, 4)));
  for (int64_t d = 0; d < D; ++d) sum.as<double>()[d] = 1, squares.as<double>()[d] = 2;
  in_parts(moments_cpu, Moments{rows.as<char>(), n, D, sum.as<double>(), squares.as<double>()}, D);
  for (int64_t d = 0; d < D; ++d) {
    double wanted = 1, wanted_squares = 2;
    for (int64_t i = 0; i < n; ++i)
      wanted += get(rows, i * D + d, Type::f16),
          wanted_squares += get(rows, i * D + d, Type::f16) * get(rows, i * D + d, Type::f16);
    expect(sum.as<double>()[d] == wanted && squares.as<double>()[d] == wanted_squares, "moments");
  }
}

void check_permute() {
  const int64_t n = whole(1, 300);
  std::vector<int64_t> index(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) index[static_cast<size_t>(i)] = i;
  Array out(n, 8);
  Permute work{index.data(), static_cast<uint64_t>(n), {}, out.as<int64_t>()};
  for (uint32_t& key : work.keys) key = static_cast<uint32_t>(engine());
  in_parts(permute_cpu, work, n);
  std::vector<char> taken(static_cast<size_t>(n), 0);
  for (int64_t i = 0; i < n; ++i)
    expect(out.as<int64_t>()[i] >= 0 && out.as<int64_t>()[i] < n &&
               !taken[static_cast<size_t>(out.as<int64_t>()[i])]++,
           "permute");
}

// Attention and its gradient, of tokens to each other or to others, against sums in double, over
// arrays that end where they should.
void check_attention() {
  if (!has_bf16()) return;
  const bool cross = whole(0, 1);
  const int64_t B = whole(0, 2), heads = whole(1, 3), d = whole(1, 128), spans = whole(1, 3),
                D = heads * d, q_row = cross ? D : 3 * D, k_row = cross ? 2 * D : 3 * D,
                first = cross ? 0 : D;  // of a token's keys
  std::vector<int64_t> asked, given;
  for (int64_t s = 0; s < spans; ++s) {
    asked.push_back(whole(1, s == 0 && whole(0, 5) == 0 ? 300 : 70));
    given.push_back(cross ? whole(1, s == 0 && whole(0, 5) == 0 ? 300 : 70) : asked.back());
  }
  int64_t M = 0, N = 0;
  for (int64_t s = 0; s < spans; ++s)
    M += asked[static_cast<size_t>(s)], N += given[static_cast<size_t>(s)];
  Array of_q(B * M * q_row, 2), of_kv(cross ? B * N * k_row : 0, 2), to_q(B * M * q_row, 2),
      to_kv(cross ? B * N * k_row : 0, 2), out(B * M * D, 2), gradient(B * M * D, 2),
      lse(B * heads * M, 4);
  Array &seen = cross ? of_kv : of_q, &to_seen = cross ? to_kv : to_q;
  for (int64_t i = 0; i < B * M * q_row; ++i)
    put(of_q, i, Type::bf16, static_cast<double>(whole(-8, 8)) / 4);
  for (int64_t i = 0; cross && i < B * N * k_row; ++i)
    put(of_kv, i, Type::bf16, static_cast<double>(whole(-8, 8)) / 4);
  for (int64_t i = 0; i < B * M * D; ++i)
    put(gradient, i, Type::bf16, static_cast<double>(whole(-8, 8)) / 8);
  const auto at = [](Array& array, int64_t numbers) { return array.as<char>() + 2 * numbers; };
  const Attention work{at(of_q, 0),
                       at(seen, first),
                       at(seen, first + D),
                       q_row,
                       k_row,
                       B,
                       heads,
                       d,
                       spans,
                       asked.data(),
                       given.data(),
                       M,
                       N,
                       out.as<char>(),
                       lse.as<float>(),
                       gradient.as<char>(),
                       at(to_q, 0),
                       at(to_seen, first),
                       at(to_seen, first + D)};
  in_parts(attention_bf16, work, B * heads * spans);
  in_parts(attention_backward_bf16, work, B * heads * spans);
  double off = 0, size = 0;
  const auto compare = [&](Array& array, int64_t i, double wanted) {
    off += std::pow(get(array, i, Type::bf16) - wanted, 2), size += wanted * wanted;
  };
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t s = 0, x = 0, y = 0; s < spans;
           x += asked[static_cast<size_t>(s)], y += given[static_cast<size_t>(s)], ++s) {
        const int64_t m = asked[static_cast<size_t>(s)], n = given[static_cast<size_t>(s)];
        const auto place_q = [&](int64_t i, int64_t e) {
          return (b * M + x + i) * q_row + h * d + e;
        };
        const auto place_k = [&](int64_t j, int64_t e) {
          return (b * N + y + j) * k_row + first + h * d + e;
        };
        const auto query = [&](int64_t i, int64_t e) {
          return get(of_q, place_q(i, e), Type::bf16);
        };
        const auto key = [&](int64_t j, int64_t e) { return get(seen, place_k(j, e), Type::bf16); };
        const auto value = [&](int64_t j, int64_t e) {
          return get(seen, place_k(j, e) + D, Type::bf16);
        };
        const auto upstream = [&](int64_t i, int64_t e) {
          return get(gradient, (b * M + x + i) * D + h * d + e, Type::bf16);
        };
        std::vector<double> q(static_cast<size_t>(m * d)), k(static_cast<size_t>(n * d)),
            v(k);  // their gradients
        for (int64_t i = 0; i < m; ++i) {
          std::vector<double> p(static_cast<size_t>(n)), dp(p), o(static_cast<size_t>(d));
          double most = -1e300, sum = 0, delta = 0;
          for (int64_t j = 0; j < n; ++j) {
            double score = 0;
            for (int64_t e = 0; e < d; ++e) score += query(i, e) * key(j, e);
            p[static_cast<size_t>(j)] = score / std::sqrt(static_cast<double>(d)),
            most = std::max(most, p[static_cast<size_t>(j)]);
          }
          for (double& each : p) each = std::exp(each - most), sum += each;
          for (int64_t j = 0; j < n; ++j) {
            p[static_cast<size_t>(j)] /= sum;
            for (int64_t e = 0; e < d; ++e)
              o[static_cast<size_t>(e)] += p[static_cast<size_t>(j)] * value(j, e),
                  dp[static_cast<size_t>(j)] += upstream(i, e) * value(j, e);
          }
          expect(std::abs(lse.as<float>()[(b * heads + h) * M + x + i] -
                          (most + std::log(sum)) / std::log(2.0)) < 1e-3 * (1 + std::abs(most)),
                 "attention's logsumexp");
          for (int64_t e = 0; e < d; ++e)
            compare(out, (b * M + x + i) * D + h * d + e, o[static_cast<size_t>(e)]),
                delta += upstream(i, e) * o[static_cast<size_t>(e)];
          for (int64_t j = 0; j < n; ++j)
            for (int64_t e = 0; e < d; ++e) {
              const double ds = p[static_cast<size_t>(j)] * (dp[static_cast<size_t>(j)] - delta) /
                                std::sqrt(static_cast<double>(d));
              q[static_cast<size_t>(i * d + e)] += ds * key(j, e),
                  k[static_cast<size_t>(j * d + e)] += ds * query(i, e),
                  v[static_cast<size_t>(j * d + e)] += p[static_cast<size_t>(j)] * upstream(i, e);
            }
        }
        for (int64_t e = 0; e < d; ++e) {
          for (int64_t i = 0; i < m; ++i)
            compare(to_q, place_q(i, e), q[static_cast<size_t>(i * d + e)]);
          for (int64_t j = 0; j < n; ++j)
            compare(to_seen, place_k(j, e), k[static_cast<size_t>(j * d + e)]),
                compare(to_seen, place_k(j, e) + D, v[static_cast<size_t>(j * d + e)]);
        }
      }
  expect(std::sqrt(off) <= 1e-2 * std::sqrt(size), "attention");
}

void check_transpose() {
  if (!has_bf16()) return;
  const int64_t R = whole(0, 150), C = whole(1, 150),
                items = (C + TRANSPOSE_COLUMNS - 1) / TRANSPOSE_COLUMNS;
  Array x(R * C, 2), out(R * C, 2), sums(C, 4);
  for (int64_t i = 0; i < R * C; ++i) put(x, i, Type::bf16, static_cast<double>(whole(-8, 8)) / 4);
  in_parts(transpose_bf16, Transpose{x.as<char>(), R, C, out.as<char>(), sums.as<float>()}, items);
  for (int64_t c = 0; c < C; ++c) {
    double sum = 0;
    for (int64_t r = 0; r < R; ++r)
      sum += get(x, r * C + c, Type::bf16),
          expect(get(out, c * R + r, Type::bf16) == get(x, r * C + c, Type::bf16), "transpose");
    expect(sums.as<float>()[c] == sum, "the sums over rows");
  }
}

void check_gelu() {
  if (!has_bf16()) return;
  const int64_t n = whole(0, 200);
  Array x(n, 2), gradient(n, 2), out(n, 2), back(n, 2);
  for (int64_t i = 0; i < n; ++i)
    put(x, i, Type::bf16, static_cast<double>(whole(-64, 64)) / 16),
        put(gradient, i, Type::bf16, static_cast<double>(whole(-8, 8)) / 4);
  in_parts(gelu_bf16, Gelu{x.as<char>(), nullptr, out.as<char>()}, n);
  in_parts(gelu_bf16, Gelu{x.as<char>(), gradient.as<char>(), back.as<char>()}, n);
  for (int64_t i = 0; i < n; ++i) {
    const double v = get(x, i, Type::bf16), g = get(gradient, i, Type::bf16),
                 below = std::erfc(-v / std::sqrt(2.0)) / 2,
                 slope = below + v * std::exp(-v * v / 2) / std::sqrt(2 * 3.14159265358979323846);
    expect(std::abs(get(out, i, Type::bf16) - v * below) <= 4e-3 * std::abs(v * below), "gelu");
    expect(std::abs(get(back, i, Type::bf16) - g * slope) <= 4e-3 * std::abs(g * slope) + 1e-5,
           "gelu's gradient");
  }
}

// A file of records, rows of any width, read by several threads: through the map, and, where it has
// grown since it was opened, without it.
void check_files() {
  const int64_t R = whole(1, 4), N = whole(1, 900),
                D = whole(0, 1) ? 64 * whole(1, 4) : whole(1, 200), head = whole(0, 200);
  const bool scaled = whole(0, 1), grows = whole(0, 3) == 0;
  std::vector<char> content(static_cast<size_t>(head + R * N * D));
  for (char& byte : content) byte = static_cast<char>(whole(-128, 127));
  char path[] = "/tmp/salt-sanitize-XXXXXX";
  const int made = mkstemp(path);
  const size_t first = grows ? content.size() / 2 : content.size();
  expect(made >= 0 && write(made, content.data(), first) == static_cast<ssize_t>(first),
         "a temporary file");
  const File file(path);
  expect(write(made, content.data() + first, content.size() - first) ==
             static_cast<ssize_t>(content.size() - first),
         "a temporary file");
  Array wanted(R * N, 1), out(R * N * D, scaled ? 2 : 1), scale(R * D, 4), tokens(R * N, 4);
  const bool by_token = whole(0, 1);
  for (int64_t i = 0; i < R * N; ++i) wanted.as<uint8_t>()[i] = whole(0, 2) > 0;
  for (int64_t i = 0; i < R * D; ++i) scale.as<float>()[i] = static_cast<float>(whole(1, 4));
  for (int64_t i = 0; i < R * N; ++i)
    tokens.as<float>()[i] = by_token ? static_cast<float>(whole(1, 4)) : 1.0f;
  std::vector<Record> records;
  for (int64_t r = 0; r < R; ++r)
    records.push_back({&file, head + r * N * D, wanted.as<uint8_t>() + r * N,
                       out.as<char>() + r * N * D * (scaled ? 2 : 1),
                       scaled ? scale.as<float>() + r * D : nullptr,
                       by_token ? tokens.as<float>() + r * N : nullptr});
  file.advise(0, 100);
  expect(read_rows(records, N, D, static_cast<int>(whole(1, 3))).record < 0, "reading a file");
  for (int64_t i = 0; i < R * N; ++i)
    for (int64_t d = 0; wanted.as<uint8_t>()[i] && d < D; ++d) {
      const char stored = content[static_cast<size_t>(head + i * D + d)];
      const double factor =
          static_cast<double>(scale.as<float>()[i / N * D + d]) * tokens.as<float>()[i];
      expect(scaled ? get(out, i * D + d, Type::f16) == stored * factor
                    : out.as<char>()[i * D + d] == stored,
             "a row of a file");
    }
  expect(ftruncate(made, head + (R * N - 1) * D) == 0, "a temporary file");
  wanted.as<uint8_t>()[R * N - 1] = 1;
  expect(read_rows(records, N, D, 2).record == R - 1, "the error of a file cut short");
  close(made), unlink(path);
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  for (int round = 0; round < rounds; ++round) {
    for (int i = 0; i < 20; ++i) check_rows(), check_patches(), check_masks();
#ifndef SALT_EMULATE
    for (int i = 0; i < 5; ++i)
      check_patchify(), check_moments(), check_permute(), check_files(), check_transpose(),
          check_gelu(), check_scaling();
    check_attention();
#endif
    for (const Type p : {Type::bf16, Type::f32, Type::f64})
      for (const Type y : {Type::u8, Type::f16, Type::bf16, Type::f32, Type::f64})
        for (const Kind kind : {Kind::mse, Kind::l1, Kind::smooth_l1})
          for (const Normalise normalise :
               {Normalise::none, Normalise::layer_norm, Normalise::standardise})
            for (const bool indexed : {true, false}) check_loss(p, y, kind, normalise, indexed);
  }
  std::printf("sanitize: %d rounds clean, %s\n", rounds, kernels());
}
