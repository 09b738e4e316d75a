// The torch side of salt_ops: operator definitions, argument checks, allocation, threads and
// streams. The kernels are in cpu.cpp and
// *.cu; autograd and fake kernels are registered in ops.py. Registered operators run without the
// GIL.
#include <ATen/Parallel.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <memory>
#include <system_error>
#include <tuple>
#include <vector>

#include "files.h"
#include "frames.h"
#include "kernels.h"
#include "salt_sources.h"  // written by setup.py: SALT_SOURCES, the digest of csrc/

#ifdef SALT_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace {

using at::Tensor;
using std::optional;

constexpr int64_t BYTES_A_TASK = 1 << 16;  // less than this is not worth a thread
constexpr int64_t CLIPS_A_TASK = 32;  // of masks, likewise: 80 us; a loader's thread that draws 24
                                      // clips wakes no team of its own

// `items` items on the CPU's threads, or one launch on the current stream of x's device.
template <typename Host, typename Device>
void compute(const Tensor& x, int64_t items, int64_t item_bytes, const Host& host,
             const Device& device) {
  if (items == 0) return;
#ifdef SALT_CUDA
  if (x.is_cuda()) {
    const c10::cuda::CUDAGuard guard(x.device());
    C10_CUDA_CHECK(static_cast<cudaError_t>(device(c10::cuda::getCurrentCUDAStream().stream())));
    return;
  }
#endif
  at::parallel_for(0, items, std::max<int64_t>(1, BYTES_A_TASK / std::max<int64_t>(1, item_bytes)),
                   host);
}

salt::Type type_of(const Tensor& x, const char* name, at::ArrayRef<at::ScalarType> allowed,
                   const char* listed) {
  TORCH_CHECK(std::find(allowed.begin(), allowed.end(), x.scalar_type()) != allowed.end(), name,
              " is ", x.scalar_type(), "; it must be ", listed);
  switch (x.scalar_type()) {
    case at::kByte:
      return salt::Type::u8;
    case at::kHalf:
      return salt::Type::f16;
    case at::kBFloat16:
      return salt::Type::bf16;
    case at::kFloat:
      return salt::Type::f32;
    default:
      return salt::Type::f64;
  }
}

void check_device(const Tensor& x, const Tensor& like, const char* name) {
  TORCH_CHECK(x.device() == like.device(), name, " is on ", x.device(), ", the first argument on ",
              like.device());
}

// Kernels count a clip's rows and a row's bytes in 32 bits.
void check_sizes(const Tensor& x) {
  TORCH_CHECK(x.size(1) < (int64_t{1} << 31) &&
                  x.size(2) * static_cast<int64_t>(x.element_size()) < (int64_t{1} << 30),
              "a clip has fewer than 2^31 rows of less than 1 GB; not ", x.sizes());
}

// index [B, K] int64, 0 <= index < N, on the device of `like`; returns it contiguous. On a GPU the
// kernels assert the range.
Tensor checked_index(const Tensor& index, const Tensor& like, int64_t B, int64_t N) {
  TORCH_CHECK(index.scalar_type() == at::kLong, "index is ", index.scalar_type(),
              "; it must be int64");
  TORCH_CHECK(index.dim() == 2 && index.size(0) == B, "index has shape ", index.sizes(),
              "; it must be [", B, ", K]");
  TORCH_CHECK(index.size(1) < (int64_t{1} << 31), "index has shape ", index.sizes(),
              "; it must have fewer than 2^31 columns");
  check_device(index, like, "index");
  const Tensor rows = index.contiguous();
  if (rows.is_cpu()) {
    const int64_t* data = rows.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < rows.numel(); ++i)
      TORCH_CHECK_INDEX(data[i] >= 0 && data[i] < N, "index[", i / rows.size(1), ", ",
                        i % rows.size(1), "] is ", data[i], "; it must be in [0, ", N, ")");
  }
  return rows;
}

// grid [3], counts [3] of context, target and what is kept of it, blocks [2] fewest and most,
// redraws, sizes [S, 2], low [3], high [3] and stream are those of a MaskSpec.
std::tuple<Tensor, Tensor> sample_masks(const Tensor& sample_ids, int64_t epoch, int64_t seed,
                                        at::IntArrayRef grid, at::IntArrayRef counts,
                                        at::IntArrayRef blocks, int64_t redraws,
                                        const Tensor& sizes, at::IntArrayRef low,
                                        at::IntArrayRef high, int64_t stream) {
  TORCH_CHECK(sample_ids.scalar_type() == at::kLong && sample_ids.dim() == 1,
              "sample_ids must be int64 [B]");
  TORCH_CHECK(sizes.scalar_type() == at::kInt && sizes.dim() == 2 && sizes.size(1) == 2,
              "sizes must be int32 [S, 2]");
  check_device(sizes, sample_ids, "sizes");
  TORCH_CHECK(epoch >= 0 && epoch <= 0xFFFFFFFFll && seed >= 0,
              "epoch must be in [0, 2^32) and seed in [0, 2^63)");
  TORCH_CHECK(grid.size() == 3 && counts.size() == 3 && blocks.size() == 2 && low.size() == 3 &&
                  high.size() == 3,
              "a mask takes 3 sides of the grid, 3 counts, 2 numbers of blocks, 3 low and 3 high");
  int64_t n = 1;
  for (const int64_t side : grid) {
    TORCH_CHECK(side > 0 && side < (1 << 26) && n * side < (1 << 26),
                "grid must be positive and hold fewer than 2^26 tokens");
    n *= side;
  }
  TORCH_CHECK(counts[0] > 0 && counts[1] > 0 && counts[0] <= n && counts[1] <= n - counts[0] &&
                  counts[2] > 0 && counts[2] <= counts[1],
              "counts (", counts[0], ", ", counts[1], ", ", counts[2], ") do not fit ", n,
              " tokens");
  TORCH_CHECK(blocks[0] >= 0 && blocks[0] <= blocks[1] && blocks[1] < (1 << 20) && redraws >= 0 &&
                  redraws < (1 << 20) && stream >= 0 && stream < 16,
              "blocks, redraws or stream out of range");
  const Tensor ids = sample_ids.contiguous(), table = sizes.contiguous();
  if (ids.is_cpu()) {  // a GPU's kernel asserts these
    const int64_t* id = ids.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < ids.numel(); ++i)
      TORCH_CHECK_VALUE(id[i] >= 0, "sample_ids[", i, "] is ", id[i], "; it must be at least 0");
    const int32_t* size = table.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < 2 * table.size(0); ++i)
      TORCH_CHECK(size[i] >= 1 && size[i] <= grid[1 + i % 2], "sizes[", i / 2,
                  "] does not fit the grid");
  }
  for (int a = 0; a < 3; ++a)
    TORCH_CHECK(table.size(0) > 0 || (low[a] >= 1 && low[a] <= high[a] && high[a] <= grid[a]),
                "low and high must satisfy 1 <= low <= high <= grid");

  salt::Draw draw{};
  salt::MaskSpec& spec = draw.spec;
  spec.T = grid[0], spec.H = grid[1], spec.W = grid[2];
  spec.context = counts[0], spec.target = counts[1], spec.kept = counts[2];
  spec.min_blocks = blocks[0], spec.max_blocks = blocks[1];
  spec.redraws = redraws, spec.n_sizes = table.size(0),
  spec.sizes = table.const_data_ptr<int32_t>();
  for (int a = 0; a < 3; ++a) spec.low[a] = low[a], spec.high[a] = high[a];
  spec.stream = stream;
  draw.B = ids.numel(), draw.sample_ids = ids.const_data_ptr<int64_t>(), draw.seed = seed,
  draw.epoch = epoch;
  Tensor context = at::empty({draw.B, counts[0]}, ids.options()),
         target = at::empty({draw.B, counts[2]}, ids.options());
  draw.context = context.mutable_data_ptr<int64_t>(),
  draw.target = target.mutable_data_ptr<int64_t>();
  compute(
      ids, draw.B, BYTES_A_TASK / CLIPS_A_TASK,
      [&](int64_t begin, int64_t end) { salt::draw_cpu(draw, begin, end); },
      [&](auto stream) {
        const int64_t bytes = salt::draw_scratch_cuda(spec) *
                              draw.B;  // freed to this stream's pool, so it outlives the kernel
        const Tensor scratch = at::empty({(bytes + 7) / 8}, ids.options());
        return salt::draw_cuda(draw, scratch.mutable_data_ptr(), stream);
      });
  return {context, target};
}

Tensor masked_gather(const Tensor& x, const Tensor& index) {
  TORCH_CHECK(x.dim() == 3, "x has shape ", x.sizes(), "; it must be [B, N, D]");
  check_sizes(x);
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2);
  const Tensor source = x.contiguous(), rows = checked_index(index, x, B, N);
  Tensor out = at::empty({B, rows.size(1), D}, x.options());
  const salt::Rows a{static_cast<const char*>(source.const_data_ptr()),
                     rows.const_data_ptr<int64_t>(),
                     B,
                     N,
                     rows.size(1),
                     D * static_cast<int64_t>(x.element_size()),
                     static_cast<char*>(out.mutable_data_ptr())};
  compute(
      x, D > 0 ? B * a.K : 0, a.row_bytes,
      [&](int64_t begin, int64_t end) { salt::gather_cpu(a, begin, end); },
      [&](auto stream) { return salt::gather_cuda(a, stream); });
  return out;
}

Tensor masked_scatter(const Tensor& x, const Tensor& index, int64_t N) {
  TORCH_CHECK(x.dim() == 3 && N >= 0, "x has shape ", x.sizes(), " and n is ", N,
              "; they must be [B, K, D] and at least 0");
  check_sizes(x);
  const int64_t B = x.size(0), K = x.size(1), D = x.size(2);
  const Tensor source = x.contiguous(), rows = checked_index(index, x, B, N);
  TORCH_CHECK(rows.size(1) == K, "index has ", rows.size(1), " columns and x ", K, " rows");
  Tensor out = at::empty({B, N, D}, x.options());
  const salt::Rows a{static_cast<const char*>(source.const_data_ptr()),
                     rows.const_data_ptr<int64_t>(),
                     B,
                     N,
                     K,
                     D * static_cast<int64_t>(x.element_size()),
                     static_cast<char*>(out.mutable_data_ptr())};
  compute(
      x, D > 0 ? B * N : 0, a.row_bytes,
      [&](int64_t begin, int64_t end) { salt::scatter_cpu(a, begin, end); },
      [&](auto stream) { return salt::scatter_cuda(a, stream); });
  return out;
}

Tensor patch_normalise(const Tensor& patches, const optional<Tensor>& index,
                       at::ArrayRef<double> scale, at::ArrayRef<double> shift,
                       at::ScalarType dtype) {
  TORCH_CHECK(patches.dim() == 3, "patches have shape ", patches.sizes(),
              "; they must be [B, N, D]");
  check_sizes(patches);
  TORCH_CHECK(patches.scalar_type() == at::kByte, "patches are ", patches.scalar_type(),
              "; they must be uint8");
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16,
              "patch_normalise makes float32 or bfloat16, not ", dtype);
  const int64_t B = patches.size(0), N = patches.size(1), D = patches.size(2),
                channels = scale.size();
  TORCH_CHECK(channels >= 1 && channels <= salt::MAX_CHANNELS && shift.size() == scale.size() &&
                  D % channels == 0,
              "scale and shift need one entry for each of 1 to ", salt::MAX_CHANNELS,
              " channels, which must divide the patch's ", D, " entries; they have ", scale.size(),
              " and ", shift.size());
  const Tensor source = patches.contiguous();
  Tensor rows;
  if (index.has_value()) rows = checked_index(*index, patches, B, N);
  salt::Patches a{source.const_data_ptr<uint8_t>(),
                  rows.defined() ? rows.const_data_ptr<int64_t>() : nullptr,
                  B,
                  N,
                  rows.defined() ? rows.size(1) : N,
                  D,
                  static_cast<int>(channels),
                  {},
                  {},
                  nullptr,
                  dtype == at::kFloat ? salt::Type::f32 : salt::Type::bf16};
  for (int64_t c = 0; c < channels; ++c)
    a.scale[c] = static_cast<float>(scale[c]), a.shift[c] = static_cast<float>(shift[c]);
  Tensor out = at::empty({B, a.K, D}, patches.options().dtype(dtype));
  a.out = out.mutable_data_ptr();
  compute(
      patches, D > 0 ? B * a.K : 0, D * static_cast<int64_t>(out.element_size()),
      [&](int64_t begin, int64_t end) { salt::patches_cpu(a, begin, end); },
      [&](auto stream) { return salt::patches_cuda(a, stream); });
  return out;
}

template <typename Choice>
Choice chosen(c10::string_view word, std::initializer_list<const char*> words, const char* what) {
  int i = 0;
  for (const char* known : words) {
    if (word == known) return static_cast<Choice>(i);
    ++i;
  }
  TORCH_CHECK(false, "unknown ", what, " '", word, "'");
}

// [N, D] of the type that sums are in, or undefined where the loss does not standardise.
Tensor statistics(const optional<Tensor>& x, const Tensor& prediction, int64_t N, int64_t D,
                  at::ScalarType type, const char* name) {
  TORCH_CHECK(x.has_value() && x->defined(), "standardise needs mean and rstd");
  TORCH_CHECK(x->dim() == 2 && x->size(0) == N && x->size(1) == D, name, " has shape ", x->sizes(),
              "; it must be [", N, ", ", D, "]");
  check_device(*x, prediction, name);
  return x->to(type).contiguous();
}

std::tuple<Tensor, Tensor, Tensor> masked_mse(const Tensor& prediction, const Tensor& target,
                                              const optional<Tensor>& index, c10::string_view kind,
                                              c10::string_view normalise,
                                              const optional<Tensor>& mean,
                                              const optional<Tensor>& rstd, double weight,
                                              bool need_gradient) {
  TORCH_CHECK(prediction.dim() == 3 && target.dim() == 3,
              "prediction and target must have three dimensions, not ", prediction.sizes(), " and ",
              target.sizes());
  const int64_t B = prediction.size(0), K = prediction.size(1), D = prediction.size(2),
                N = target.size(1);
  TORCH_CHECK(target.size(0) == B && target.size(2) == D && (index.has_value() || N == K),
              "target has shape ", target.sizes(), ", which does not fit prediction ",
              prediction.sizes());
  check_device(target, prediction, "target");
  check_sizes(prediction), check_sizes(target);
  salt::Loss a{};
  a.prediction_type = type_of(prediction, "prediction", {at::kBFloat16, at::kFloat, at::kDouble},
                              "bfloat16, float32 or float64");
  a.target_type =
      type_of(target, "target", {at::kByte, at::kHalf, at::kBFloat16, at::kFloat, at::kDouble},
              "uint8, float16, bfloat16, float32 or float64");
  a.kind = chosen<salt::Kind>(kind, {"mse", "l1", "smooth_l1"}, "loss");
  a.normalise = chosen<salt::Normalise>(normalise, {"none", "layer_norm", "standardise"},
                                        "target normalisation");
  const Tensor p = prediction.contiguous(), y = target.contiguous();
  Tensor rows, m, r;
  if (index.has_value()) {
    rows = checked_index(*index, prediction, B, N);
    TORCH_CHECK(rows.size(1) == K, "index has ", rows.size(1), " columns and prediction ", K,
                " rows");
  }
  const at::ScalarType sums = a.prediction_type == salt::Type::f64 ? at::kDouble : at::kFloat;
  if (a.normalise == salt::Normalise::standardise) {
    m = statistics(mean, prediction, N, D, sums, "mean"),
    r = statistics(rstd, prediction, N, D, sums, "rstd");
    a.mean = m.const_data_ptr(), a.rstd = r.const_data_ptr();
  }
  const auto options = prediction.options().memory_format(c10::nullopt);
  Tensor per_token = at::empty({B, K}, options.dtype(sums)),
         loss = at::empty({}, options.dtype(sums));
  Tensor gradient = need_gradient ? at::empty({B, K, D}, options) : at::empty({0}, options);
  a.prediction = p.const_data_ptr(), a.target = y.const_data_ptr(),
  a.index = rows.defined() ? rows.const_data_ptr<int64_t>() : nullptr;
  a.B = B, a.N = N, a.K = K, a.D = D;
  a.scale = weight / static_cast<double>(B * K * D);
  a.per_token = per_token.mutable_data_ptr(),
  a.gradient = need_gradient ? gradient.mutable_data_ptr() : nullptr;
  compute(
      prediction, B * K, D * static_cast<int64_t>(p.element_size()),
      [&](int64_t begin, int64_t end) { salt::loss_cpu(a, begin, end); },
      [&](auto stream) { return salt::loss_cuda(a, stream); });
  if (prediction.is_cpu()) {
    const auto mean_of = [&](const auto* tokens) {
      double sum = 0;  // in token order, so that the thread count does not show
      for (int64_t i = 0; i < B * K; ++i) sum += static_cast<double>(tokens[i]);
      return sum / static_cast<double>(B * K);
    };
    loss.fill_(sums == at::kDouble ? mean_of(per_token.const_data_ptr<double>())
                                   : mean_of(per_token.const_data_ptr<float>()));
  } else {
    compute(
        prediction, 1, 0, [](int64_t, int64_t) {},
        [&](auto stream) {
          return salt::mean_cuda(per_token.const_data_ptr(), B * K,
                                 sums == at::kDouble ? salt::Type::f64 : salt::Type::f32,
                                 loss.mutable_data_ptr(), stream);
        });
  }
  return {loss, per_token, gradient};
}

#ifdef SALT_CUDA
// x * factor, of one number that stays on the GPU: a gradient that masked_mse has left.
Tensor scaled(const Tensor& x, const Tensor& factor) {
  const salt::Type type =
      type_of(x, "x", {at::kBFloat16, at::kFloat, at::kDouble}, "bfloat16, float32 or float64");
  TORCH_CHECK(factor.numel() == 1, "factor has shape ", factor.sizes(), "; it must be one number");
  check_device(factor, x, "factor");
  const Tensor source = x.contiguous(),
               by = factor.to(type == salt::Type::f64 ? at::kDouble : at::kFloat);
  Tensor out = at::empty_like(source);
  compute(
      x, x.numel(), 0, [](int64_t, int64_t) {},
      [&](auto stream) {
        return salt::scale_cuda(source.const_data_ptr(), x.numel(), type, by.const_data_ptr(),
                                out.mutable_data_ptr(), stream);
      });
  return out;
}
#endif

// ---- the data path: on the host alone, called outside the GIL

void check_host(const Tensor& x, at::ScalarType type, const char* name) {
  TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == type, name,
              " must be a contiguous ", type, " tensor on the CPU, not ", x.scalar_type(), " ",
              x.sizes());
}

void patchify(const Tensor& clip, int64_t patch, int64_t tubelet, const Tensor& out) {
  check_host(clip, at::kByte, "clip"), check_host(out, at::kByte, "out");
  TORCH_CHECK(
      clip.dim() == 4 && clip.size(1) == 3 && patch > 0 && tubelet > 0 &&
          clip.size(0) % tubelet == 0 && clip.size(2) % patch == 0 && clip.size(3) % patch == 0,
      "clip has shape ", clip.sizes(), "; it must be [T, 3, H, W] and divide into patches of ",
      patch, " and tubelets of ", tubelet);
  const int64_t T = clip.size(0), H = clip.size(2), W = clip.size(3),
                N = T / tubelet * (H / patch) * (W / patch), P = 3 * tubelet * patch * patch;
  TORCH_CHECK(out.dim() == 2 && out.size(0) == N && out.size(1) == P, "out has shape ", out.sizes(),
              "; it must be [", N, ", ", P, "]");
  salt::patchify_cpu(
      {clip.const_data_ptr<uint8_t>(), T, H, W, patch, tubelet, out.mutable_data_ptr<uint8_t>()}, 0,
      N);
}

void add_moments(const Tensor& rows, const Tensor& sum, const Tensor& squares) {
  check_host(rows, at::kHalf, "rows"), check_host(sum, at::kDouble, "sum"),
      check_host(squares, at::kDouble, "squares");
  const int64_t D = sum.numel();
  TORCH_CHECK(rows.dim() >= 1 && squares.numel() == D && rows.numel() == rows.size(0) * D,
              "rows have shape ", rows.sizes(), ", sum ", sum.sizes(), " and squares ",
              squares.sizes());
  salt::moments_cpu({rows.const_data_ptr(), rows.size(0), D, sum.mutable_data_ptr<double>(),
                     squares.mutable_data_ptr<double>()},
                    0, D);
}

Tensor permute(const Tensor& index, int64_t n, const std::vector<int64_t>& keys) {
  check_host(index, at::kLong, "index");
  TORCH_CHECK(n >= 1 && n <= (int64_t{1} << 62) && keys.size() == salt::PERMUTE_ROUNDS,
              "n must be in [1, 2^62] and there must be ", salt::PERMUTE_ROUNDS, " keys");
  const int64_t* at_index = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i)
    TORCH_CHECK_INDEX(at_index[i] >= 0 && at_index[i] < n, "index[", i, "] is ", at_index[i],
                      "; it must be in [0, ", n, ")");
  Tensor out = at::empty_like(index);
  salt::Permute work{at_index, static_cast<uint64_t>(n), {}, out.mutable_data_ptr<int64_t>()};
  for (int i = 0; i < salt::PERMUTE_ROUNDS; ++i)
    work.keys[i] = static_cast<uint32_t>(keys[static_cast<size_t>(i)]);
  salt::permute_cpu(work, 0, index.numel());
  return out;
}

// (inputs, from int32 [size], weights int16 [size, taps])
using AxisTables = std::tuple<int64_t, Tensor, Tensor>;

salt::Axis axis_of(const AxisTables& tables, int64_t size) {
  const auto& [in, from, weight] = tables;
  check_host(from, at::kInt, "from"), check_host(weight, at::kShort, "weights");
  TORCH_CHECK(from.dim() == 1 && weight.dim() == 2 && from.size(0) == size &&
                  weight.size(0) == size && weight.size(1) > 0,
              "from and weights have shapes ", from.sizes(), " and ", weight.sizes(),
              "; they must be [", size, "] and [", size, ", taps]");
  salt::Axis axis{in, weight.size(1), {}, {}};
  axis.from.assign(from.const_data_ptr<int32_t>(), from.const_data_ptr<int32_t>() + size);
  axis.weight.assign(weight.const_data_ptr<int16_t>(),
                     weight.const_data_ptr<int16_t>() + weight.numel());
  for (const int32_t first : axis.from)
    TORCH_CHECK(first >= 0 && first + axis.taps <= in, "from is ", first, "; with ", axis.taps,
                " taps it must lie in ", in, " inputs");
  return axis;
}

std::shared_ptr<salt::Scaling> scaling(int64_t size, const std::array<AxisTables, 2>& across,
                                       const std::array<AxisTables, 2>& down,
                                       const std::array<int32_t, 6>& colour) {
  TORCH_CHECK(size > 0, "size is ", size, "; it must be above 0");
  TORCH_CHECK(std::strcmp(salt::simd_level(), "baseline"), "frames are scaled by AVX2 alone");
  return std::make_shared<salt::Scaling>(
      size, std::array{axis_of(across[0], size), axis_of(across[1], size)},
      std::array{axis_of(down[0], size), axis_of(down[1], size)}, colour);
}

// Of each plane: (its bytes, where the first row starts, bytes from a row to the next).
using Plane = std::tuple<pybind11::buffer, int64_t, int64_t>;

void convert(const salt::Scaling& work, const std::array<Plane, 3>& planes,
             const pybind11::buffer& out) {
  const auto bytes_of = [](const pybind11::buffer_info& info) { return info.size * info.itemsize; };
  std::array<const uint8_t*, 3> from;
  std::array<int64_t, 3> strides;
  for (size_t p = 0; p < 3; ++p) {
    const auto& [buffer, start, stride] = planes[p];
    const pybind11::buffer_info info = buffer.request();
    const auto [rows, columns] = work.shape(p > 0);
    TORCH_CHECK(
        start >= 0 && stride >= columns && start + (rows - 1) * stride + columns <= bytes_of(info),
        "plane ", p, " has ", bytes_of(info), " bytes, rows of ", stride, " from ", start, " on; ",
        rows, " rows of ", columns, " are needed");
    from[p] = static_cast<const uint8_t*>(info.ptr) + start, strides[p] = stride;
  }
  const pybind11::buffer_info info = out.request(true);
  TORCH_CHECK(bytes_of(info) == work.bytes() && PyBuffer_IsContiguous(info.view(), 'C'),
              "out must be ", work.bytes(), " bytes in one piece");
  const pybind11::gil_scoped_release released;
  work.convert(from, strides, static_cast<uint8_t*>(info.ptr));
}

using Files = std::vector<std::shared_ptr<salt::File>>;

void advise(const Files& files, const std::vector<int64_t>& starts, int64_t bytes) {
  TORCH_CHECK(files.size() == starts.size(), files.size(), " files and ", starts.size(), " starts");
  for (size_t i = 0; i < files.size(); ++i) files[i]->advise(starts[i], bytes);
}

// Returns (record, row, errno) of the first error, record -1 where there is none.
std::tuple<int64_t, int64_t, int64_t> read_rows(const Files& files,
                                                const std::vector<int64_t>& starts,
                                                int64_t row_bytes, const optional<Tensor>& wanted,
                                                const Tensor& out, const optional<Tensor>& scale,
                                                const optional<Tensor>& tokens, int64_t threads) {
  const int64_t R = static_cast<int64_t>(files.size());
  TORCH_CHECK(out.is_cpu() && out.is_contiguous() && out.dim() == 3 && out.size(0) == R &&
                  static_cast<int64_t>(starts.size()) == R,
              "out has shape ", out.sizes(), "; it must be contiguous [", R, ", N, D] on the CPU");
  const int64_t N = out.size(1), out_bytes = out.size(2) * static_cast<int64_t>(out.element_size());
  TORCH_CHECK(row_bytes > 0 && out_bytes == (scale.has_value() ? 2 : 1) * row_bytes && threads >= 1,
              "rows of ", row_bytes, " bytes do not fit out ", out.sizes());
  if (wanted.has_value()) {
    check_host(*wanted, at::kByte, "wanted");
    TORCH_CHECK(wanted->dim() == 2 && wanted->size(0) == R && wanted->size(1) == N,
                "wanted has shape ", wanted->sizes(), "; it must be [", R, ", ", N, "]");
  }
  if (scale.has_value()) {
    check_host(*scale, at::kFloat, "scale");
    TORCH_CHECK(out.scalar_type() == at::kHalf && scale->dim() == 2 && scale->size(0) == R &&
                    scale->size(1) == row_bytes,
                "scale has shape ", scale->sizes(), "; it must be [", R, ", ", row_bytes,
                "], and out float16");
  }
  if (tokens.has_value()) {
    check_host(*tokens, at::kFloat, "tokens");
    TORCH_CHECK(
        scale.has_value() && tokens->dim() == 2 && tokens->size(0) == R && tokens->size(1) == N,
        "tokens has shape ", tokens->sizes(), "; it must be [", R, ", ", N, "], beside a scale");
  }
  std::vector<salt::Record> records(static_cast<size_t>(R));
  char* const base = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t r = 0; r < R; ++r) {
    TORCH_CHECK(starts[static_cast<size_t>(r)] >= 0, "starts must be at least 0");
    records[static_cast<size_t>(r)] = {
        files[static_cast<size_t>(r)].get(),
        starts[static_cast<size_t>(r)],
        wanted.has_value() ? wanted->const_data_ptr<uint8_t>() + r * N : nullptr,
        base + r * N * out_bytes,
        scale.has_value() ? scale->const_data_ptr<float>() + r * row_bytes : nullptr,
        tokens.has_value() ? tokens->const_data_ptr<float>() + r * N : nullptr};
  }
  const salt::ReadError error = salt::read_rows(records, N, row_bytes, static_cast<int>(threads));
  return {error.record, error.row, error.number};
}

// ------------------------------------------------------------------------------------------------
// AMX

void check_bf16(const Tensor& x, const char* name) {
  TORCH_CHECK(x.is_cpu() && x.scalar_type() == at::kBFloat16, name, " is ", x.scalar_type(), " on ",
              x.device(), "; it must be bfloat16 on the CPU");
}

// Attention of queries to keys and values, in one piece each: q [B, queries, heads, d] and kv [B,
// keys, 2, heads, d]; or where there is no kv, of q = qkv [B, tokens, 3, heads, d] to itself.
salt::Attention attention_work(const Tensor& q, const Tensor* kv, at::IntArrayRef asked,
                               at::IntArrayRef given) {
  TORCH_CHECK(salt::has_bf16(), "this processor has neither AMX nor AVX512_BF16");
  const Tensor& k = kv ? *kv : q;
  check_bf16(q, kv ? "q" : "qkv"), check_bf16(k, "kv");
  const int64_t heads = q.size(-2), d = q.size(-1), parts = kv ? 2 : 3;
  TORCH_CHECK(k.dim() == 5 && k.size(2) == parts && d >= 1 && d <= 128, kv ? "kv" : "qkv",
              " has shape ", k.sizes(), "; it must be [B, tokens, ", parts,
              ", heads, d] with 1 <= d <= 128");
  TORCH_CHECK(!kv || (q.dim() == 4 && q.size(0) == k.size(0) && heads == k.size(3) &&
                      d == k.size(4) && asked.size() == given.size()),
              "q has shape ", q.sizes(), " and ", asked.size(), " spans; kv ", k.sizes(), " and ",
              given.size());
  const auto check = [](at::IntArrayRef lengths, int64_t tokens) {
    int64_t sum = 0;
    for (const int64_t n : lengths) {
      TORCH_CHECK(n >= 1 && n <= tokens, "a span has ", n, " of ", tokens, " tokens");
      sum += n;
    }
    TORCH_CHECK(sum == tokens, "lengths add up to ", sum, ", and a clip has ", tokens, " tokens");
  };
  check(asked, q.size(1)), check(given, k.size(1));
  salt::Attention work{};
  work.q_row = (kv ? 1 : 3) * heads * d, work.k_row = parts * heads * d;
  work.B = q.size(0), work.heads = heads, work.d = d;
  work.queries = q.size(1), work.keys = k.size(1);
  work.spans = static_cast<int64_t>(asked.size());
  work.asked = asked.data(), work.given = given.data();
  return work;
}

// Where keys and values, or queries, keys and values, lie in a tensor that holds them.
using Places = std::array<void*, 3>;
Places places(const salt::Attention& work, const Tensor& q, const Tensor* kv) {
  const auto at = [&](const Tensor& x, int64_t part) -> void* {
    return static_cast<char*>(const_cast<void*>(x.const_data_ptr())) +
           part * work.heads * work.d * static_cast<int64_t>(x.element_size());
  };
  return kv ? Places{at(q, 0), at(*kv, 0), at(*kv, 1)} : Places{at(q, 0), at(q, 1), at(q, 2)};
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor* kv, at::IntArrayRef asked,
                                  at::IntArrayRef given) {
  TORCH_CHECK(q.dim() >= 2, "q has shape ", q.sizes());
  salt::Attention work = attention_work(q, kv, asked, given);
  const Tensor whole = q.contiguous(), seen = kv ? kv->contiguous() : Tensor();
  Tensor out = at::empty({work.B, work.queries, work.heads, work.d}, q.options()),
         lse = at::empty({work.B, work.heads, work.queries}, q.options().dtype(at::kFloat));
  const Places from = places(work, whole, kv ? &seen : nullptr);
  work.q = from[0], work.k = from[1], work.v = from[2];
  work.out = out.mutable_data_ptr(), work.lse = lse.mutable_data_ptr<float>();
  at::parallel_for(0, work.B * work.heads * work.spans, 1,
                   [&](int64_t begin, int64_t end) { salt::attention_bf16(work, begin, end); });
  return {out, lse};
}

// The gradients of q (or qkv), and of kv where there is one.
std::tuple<Tensor, Tensor> attend_backward(const Tensor& gradient, const Tensor& q,
                                           const Tensor* kv, const Tensor& out, const Tensor& lse,
                                           at::IntArrayRef asked, at::IntArrayRef given) {
  TORCH_CHECK(q.dim() >= 2, "q has shape ", q.sizes());
  salt::Attention work = attention_work(q, kv, asked, given);
  check_bf16(gradient, "gradient");
  check_bf16(out, "out");
  const at::DimVector shape{work.B, work.queries, work.heads, work.d},
      lse_shape{work.B, work.heads, work.queries};
  TORCH_CHECK(gradient.sizes() == at::IntArrayRef(shape) && out.sizes() == at::IntArrayRef(shape),
              "gradient and out have shapes ", gradient.sizes(), " and ", out.sizes(),
              "; they must be ", at::IntArrayRef(shape));
  TORCH_CHECK(
      lse.is_cpu() && lse.scalar_type() == at::kFloat && lse.sizes() == at::IntArrayRef(lse_shape),
      "lse must be float32 ", at::IntArrayRef(lse_shape));
  const Tensor whole = q.contiguous(), seen = kv ? kv->contiguous() : Tensor(),
               result = out.contiguous(), upstream = gradient.contiguous(), sums = lse.contiguous();
  Tensor to_q = at::empty(whole.sizes(), whole.options()),
         to_kv = kv ? at::empty(seen.sizes(), seen.options()) : Tensor();
  const Places from = places(work, whole, kv ? &seen : nullptr),
               to = places(work, to_q, kv ? &to_kv : nullptr);
  work.q = from[0], work.k = from[1], work.v = from[2];
  work.dq = to[0], work.dk = to[1], work.dv = to[2];
  work.out = const_cast<void*>(result.const_data_ptr()),
  work.lse = const_cast<float*>(sums.const_data_ptr<float>());
  work.gradient = upstream.const_data_ptr();
  at::parallel_for(0, work.B * work.heads * work.spans, 1, [&](int64_t begin, int64_t end) {
    salt::attention_backward_bf16(work, begin, end);
  });
  return {to_q, to_kv};
}

std::tuple<Tensor, Tensor> attention(const Tensor& qkv, at::IntArrayRef lengths) {
  return attend(qkv, nullptr, lengths, lengths);
}

Tensor attention_backward(const Tensor& gradient, const Tensor& qkv, const Tensor& out,
                          const Tensor& lse, at::IntArrayRef lengths) {
  return std::get<0>(attend_backward(gradient, qkv, nullptr, out, lse, lengths, lengths));
}

std::tuple<Tensor, Tensor> cross_attention(const Tensor& q, const Tensor& kv, at::IntArrayRef asked,
                                           at::IntArrayRef given) {
  return attend(q, &kv, asked, given);
}

std::tuple<Tensor, Tensor> cross_attention_backward(const Tensor& gradient, const Tensor& q,
                                                    const Tensor& kv, const Tensor& out,
                                                    const Tensor& lse, at::IntArrayRef asked,
                                                    at::IntArrayRef given) {
  return attend_backward(gradient, q, &kv, out, lse, asked, given);
}

std::tuple<Tensor, Tensor> transpose_and_sum(const Tensor& x) {
  TORCH_CHECK(salt::has_bf16(), "this processor has neither AMX nor AVX512_BF16");
  check_bf16(x, "x");
  TORCH_CHECK(x.dim() == 2, "x has shape ", x.sizes(), "; it must be [R, C]");
  const Tensor rows = x.contiguous();
  Tensor out = at::empty({x.size(1), x.size(0)}, x.options()),
         sums = at::zeros({x.size(1)}, x.options().dtype(at::kFloat));
  const salt::Transpose work{rows.const_data_ptr(), x.size(0), x.size(1), out.mutable_data_ptr(),
                             sums.mutable_data_ptr<float>()};
  const int64_t items = (work.C + salt::TRANSPOSE_COLUMNS - 1) / salt::TRANSPOSE_COLUMNS;
  at::parallel_for(
      0, work.R ? items : 0,
      std::max<int64_t>(1,
                        BYTES_A_TASK / std::max<int64_t>(1, work.R * 2 * salt::TRANSPOSE_COLUMNS)),
      [&](int64_t begin, int64_t end) { salt::transpose_bf16(work, begin, end); });
  return {out, sums};
}

// gelu(x), or where there is a gradient, that of x.
Tensor gelu_of(const Tensor& x, const Tensor* gradient) {
  TORCH_CHECK(salt::has_bf16(), "this processor has neither AMX nor AVX512_BF16");
  check_bf16(x, "x");
  const Tensor from = x.contiguous(), upstream = gradient ? gradient->contiguous() : Tensor();
  Tensor out = at::empty(from.sizes(), from.options());
  const salt::Gelu work{from.const_data_ptr(), gradient ? upstream.const_data_ptr() : nullptr,
                        out.mutable_data_ptr()};
  at::parallel_for(0, from.numel(), BYTES_A_TASK / 2,
                   [&](int64_t begin, int64_t end) { salt::gelu_bf16(work, begin, end); });
  return out;
}

Tensor gelu(const Tensor& x) { return gelu_of(x, nullptr); }

Tensor gelu_backward(const Tensor& gradient, const Tensor& x) {
  check_bf16(gradient, "gradient");
  TORCH_CHECK(gradient.sizes() == x.sizes(), "gradient has shape ", gradient.sizes(),
              "; it must be ", x.sizes());
  return gelu_of(x, &gradient);
}

}  // namespace

TORCH_LIBRARY(salt_ops, m) {
  m.def("attention(Tensor qkv, int[] lengths) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor gradient, Tensor qkv, Tensor out, Tensor lse, int[] lengths) -> "
      "Tensor");
  m.def("cross_attention(Tensor q, Tensor kv, int[] asked, int[] given) -> (Tensor, Tensor)");
  m.def(
      "cross_attention_backward(Tensor gradient, Tensor q, Tensor kv, Tensor out, Tensor lse, "
      "int[] asked, int[] given) -> (Tensor, Tensor)");
  m.def("transpose_and_sum(Tensor x) -> (Tensor, Tensor)");
  m.def("gelu(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor gradient, Tensor x) -> Tensor");
  m.def(
      "sample_masks(Tensor sample_ids, int epoch, int seed, int[] grid, int[] counts, int[] "
      "blocks, int redraws, Tensor sizes, int[] low, int[] high, int stream) -> (Tensor, Tensor)");
  m.def("scaled(Tensor x, Tensor factor) -> Tensor");  // CUDA alone
  m.def("masked_gather(Tensor x, Tensor index) -> Tensor");
  m.def("masked_scatter(Tensor x, Tensor index, int n) -> Tensor");
  m.def(
      "patch_normalise(Tensor patches, Tensor? index, float[] scale, float[] shift, ScalarType "
      "dtype) -> Tensor");
  m.def(
      "masked_mse(Tensor prediction, Tensor target, Tensor? index, str kind, str normalise, "
      "Tensor? mean, Tensor? rstd, float weight, bool need_gradient) -> (Tensor, Tensor, Tensor)");
}

// Tensors of a device meet the same checks and allocations; only `compute` tells them apart.
#define SALT_REGISTER(key)                       \
  TORCH_LIBRARY_IMPL(salt_ops, key, m) {         \
    m.impl("sample_masks", &sample_masks);       \
    m.impl("masked_gather", &masked_gather);     \
    m.impl("masked_scatter", &masked_scatter);   \
    m.impl("patch_normalise", &patch_normalise); \
    m.impl("masked_mse", &masked_mse);           \
  }
SALT_REGISTER(CPU)
TORCH_LIBRARY_IMPL(salt_ops, CPU, m) {
  m.impl("attention", &attention);
  m.impl("attention_backward", &attention_backward);
  m.impl("cross_attention", &cross_attention);
  m.impl("cross_attention_backward", &cross_attention_backward);
  m.impl("transpose_and_sum", &transpose_and_sum);
  m.impl("gelu", &gelu);
  m.impl("gelu_backward", &gelu_backward);
}
#ifdef SALT_CUDA
SALT_REGISTER(CUDA)
TORCH_LIBRARY_IMPL(salt_ops, CUDA, m) { m.impl("scaled", &scaled); }
#endif

#ifndef SALT_ARCHITECTURES
#define SALT_ARCHITECTURES ""
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The SALT-VLA kernels; importing this registers torch.ops.salt_ops.*";
  const auto released = pybind11::call_guard<pybind11::gil_scoped_release>();
  pybind11::class_<salt::File, std::shared_ptr<salt::File>>(m, "File")
      .def(pybind11::init([](const std::string& path) {
        try {
          return std::make_shared<salt::File>(path);
        } catch (const std::system_error& error) {
          errno = error.code().value();
          PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
          throw pybind11::error_already_set();
        }
      }))
      .def("resident", &salt::File::resident);
  pybind11::class_<salt::Scaling, std::shared_ptr<salt::Scaling>>(m, "Scaling")
      .def(pybind11::init(&scaling))
      .def("convert", &convert);
  m.def("patchify", &patchify, released);
  m.def("add_moments", &add_moments, released);
  m.def("permute", &permute, released);
  m.def("advise", &advise, released);
  m.def("read_rows", &read_rows, released);
  m.def("build_info", [] {
    pybind11::dict info;
    info["devices"] = std::vector<std::string>{
        "cpu",
#ifdef SALT_CUDA
        "cuda",
#endif
    };
    info["architectures"] = SALT_ARCHITECTURES;
    info["sources"] = SALT_SOURCES;
    info["simd"] = salt::simd_level();
    info["bf16"] = salt::has_bf16();
    info["amx"] = salt::has_amx();
    return info;
  });
}
