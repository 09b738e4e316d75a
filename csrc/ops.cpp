// The torch side of salt_ops: operator definitions, argument checks, threads. The kernels are in cpu.cpp (and, for GPUs, beside
// it); autograd and fake kernels are registered in ops.py. Registered operators run without the GIL.
#include <ATen/Parallel.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <tuple>

#include "cpu.h"

namespace {

using at::Tensor;
using std::optional;

constexpr int64_t BYTES_A_TASK = 1 << 16;  // less than this is not worth a thread

salt::Type type_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kHalf: return salt::Type::f16;
    case at::kBFloat16: return salt::Type::bf16;
    case at::kFloat: return salt::Type::f32;
    case at::kDouble: return salt::Type::f64;
    default: TORCH_CHECK(false, name, " is ", x.scalar_type(), "; it must be float16, bfloat16, float32 or float64");
  }
}

// index [B, K] int64 with 0 <= index < N; returns it contiguous.
Tensor checked_index(const Tensor& index, int64_t B, int64_t N) {
  TORCH_CHECK(index.scalar_type() == at::kLong, "index is ", index.scalar_type(), "; it must be int64");
  TORCH_CHECK(index.dim() == 2 && index.size(0) == B, "index has shape ", index.sizes(), "; it must be [", B, ", K]");
  const Tensor rows = index.contiguous();
  const int64_t* data = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); ++i)
    TORCH_CHECK_INDEX(data[i] >= 0 && data[i] < N, "index[", i / rows.size(1), ", ", i % rows.size(1), "] is ", data[i], "; it must be in [0, ", N, ")");
  return rows;
}

int64_t grain(int64_t row_bytes) { return std::max<int64_t>(1, BYTES_A_TASK / std::max<int64_t>(1, row_bytes)); }

std::tuple<Tensor, Tensor> sample_masks(const Tensor& sample_ids, int64_t epoch, int64_t seed, at::IntArrayRef grid, at::IntArrayRef counts,
                                        at::IntArrayRef blocks, int64_t redraws, const Tensor& sizes, at::IntArrayRef low,
                                        at::IntArrayRef high, int64_t stream) {
  TORCH_CHECK(sample_ids.scalar_type() == at::kLong && sample_ids.dim() == 1, "sample_ids must be int64 [B]");
  TORCH_CHECK(sizes.scalar_type() == at::kInt && sizes.dim() == 2 && sizes.size(1) == 2, "sizes must be int32 [S, 2]");
  TORCH_CHECK(grid.size() == 3 && counts.size() == 2 && blocks.size() == 2 && low.size() == 3 && high.size() == 3, "grid, low and high have three entries, counts and blocks two");
  const int64_t n = grid[0] * grid[1] * grid[2];
  TORCH_CHECK(grid[0] > 0 && grid[1] > 0 && grid[2] > 0 && n < (int64_t{1} << 26), "grid must be positive and hold fewer than 2^26 tokens");
  TORCH_CHECK(counts[0] > 0 && counts[1] > 0 && counts[0] + counts[1] <= n, "counts (", counts[0], ", ", counts[1], ") do not fit ", n, " tokens");
  TORCH_CHECK(blocks[0] >= 0 && blocks[0] <= blocks[1] && redraws >= 0 && stream >= 0 && stream < 16, "blocks, redraws or stream out of range");
  const Tensor ids = sample_ids.contiguous(), table = sizes.contiguous();
  for (int64_t i = 0; i < table.size(0); ++i)
    TORCH_CHECK(table.const_data_ptr<int32_t>()[2 * i] >= 1 && table.const_data_ptr<int32_t>()[2 * i] <= grid[1] &&
                table.const_data_ptr<int32_t>()[2 * i + 1] >= 1 && table.const_data_ptr<int32_t>()[2 * i + 1] <= grid[2], "sizes[", i, "] does not fit the grid");
  for (int a = 0; a < 3; ++a)
    TORCH_CHECK(table.size(0) > 0 || (low[a] >= 1 && low[a] <= high[a] && high[a] <= grid[a]), "low and high must satisfy 1 <= low <= high <= grid");

  salt::MaskSpec spec{};
  spec.T = grid[0], spec.H = grid[1], spec.W = grid[2];
  spec.context = counts[0], spec.target = counts[1];
  spec.min_blocks = blocks[0], spec.max_blocks = blocks[1];
  spec.redraws = redraws, spec.n_sizes = table.size(0), spec.sizes = table.const_data_ptr<int32_t>();
  for (int a = 0; a < 3; ++a) spec.low[a] = low[a], spec.high[a] = high[a];
  spec.stream = stream;
  const int64_t B = ids.numel();
  Tensor context = at::empty({B, counts[0]}, ids.options()), target = at::empty({B, counts[1]}, ids.options());
  const int64_t* id = ids.const_data_ptr<int64_t>();
  int64_t *c = context.mutable_data_ptr<int64_t>(), *t = target.mutable_data_ptr<int64_t>();
  at::parallel_for(0, B, 4, [&](int64_t begin, int64_t end) {
    salt::draw_masks_cpu(spec, static_cast<uint64_t>(seed), static_cast<uint32_t>(epoch), id, begin, end, c, t);
  });
  return {context, target};
}

Tensor masked_gather(const Tensor& x, const Tensor& index) {
  TORCH_CHECK(x.dim() == 3, "x has shape ", x.sizes(), "; it must be [B, N, D]");
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2);
  const Tensor source = x.contiguous(), rows = checked_index(index, B, N);
  const int64_t K = rows.size(1), row_bytes = D * x.element_size();
  Tensor out = at::empty({B, K, D}, x.options());
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* at_row = rows.const_data_ptr<int64_t>();
  at::parallel_for(0, B * K, grain(row_bytes), [&](int64_t begin, int64_t end) { salt::gather_cpu(from, at_row, N, K, row_bytes, begin, end, to); });
  return out;
}

Tensor masked_scatter(const Tensor& rows_in, const Tensor& index, int64_t N) {
  TORCH_CHECK(rows_in.dim() == 3, "x has shape ", rows_in.sizes(), "; it must be [B, K, D]");
  const int64_t B = rows_in.size(0), K = rows_in.size(1), D = rows_in.size(2);
  const Tensor source = rows_in.contiguous(), rows = checked_index(index, B, N);
  TORCH_CHECK(rows.size(1) == K, "index has ", rows.size(1), " columns and x ", K, " rows");
  const int64_t row_bytes = D * rows_in.element_size();
  Tensor out = at::zeros({B, N, D}, rows_in.options());
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* at_row = rows.const_data_ptr<int64_t>();
  at::parallel_for(0, B * K, grain(row_bytes), [&](int64_t begin, int64_t end) { salt::scatter_cpu(from, at_row, N, K, row_bytes, begin, end, to); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> masked_mse(const Tensor& prediction, const Tensor& target, const optional<Tensor>& index, bool need_gradient) {
  TORCH_CHECK(prediction.dim() == 3 && target.dim() == 3, "prediction and target must have three dimensions, not ", prediction.sizes(), " and ", target.sizes());
  const int64_t B = prediction.size(0), K = prediction.size(1), D = prediction.size(2), N = target.size(1);
  TORCH_CHECK(target.size(0) == B && target.size(2) == D && (index.has_value() || N == K), "target has shape ", target.sizes(), ", which does not fit prediction ", prediction.sizes());
  const salt::Type prediction_type = type_of(prediction, "prediction"), target_type = type_of(target, "target");
  TORCH_CHECK(prediction_type != salt::Type::f16, "prediction is float16; it must be bfloat16, float32 or float64");
  const Tensor p = prediction.contiguous(), y = target.contiguous();
  Tensor rows;
  if (index.has_value()) {
    rows = checked_index(*index, B, N);
    TORCH_CHECK(rows.size(1) == K, "index has ", rows.size(1), " columns and prediction ", K, " rows");
  }
  const bool wide = prediction_type == salt::Type::f64;
  Tensor per_token = at::empty({B, K}, prediction.options().dtype(at::kDouble));
  Tensor gradient = need_gradient ? at::empty({B, K, D}, prediction.options()) : at::empty({0}, prediction.options());
  const int64_t count = B * K * D;
  const double scale = count > 0 ? 2.0 / static_cast<double>(count) : 0;
  double* errors = per_token.mutable_data_ptr<double>();
  at::parallel_for(0, B * K, grain(D * p.element_size()), [&](int64_t begin, int64_t end) {
    salt::mse_cpu(p.const_data_ptr(), prediction_type, y.const_data_ptr(), target_type, rows.defined() ? rows.const_data_ptr<int64_t>() : nullptr,
                  N, K, D, scale, begin, end, errors, need_gradient ? gradient.mutable_data_ptr() : nullptr);
  });
  double sum = 0;  // in token order, so that the thread count does not show
  for (int64_t r = 0; r < B * K; ++r) sum += errors[r];
  const auto out = prediction.options().dtype(wide ? at::kDouble : at::kFloat);
  Tensor loss = at::full({}, count > 0 ? sum / static_cast<double>(B * K) : 0.0, out);
  return {loss, wide ? per_token : per_token.to(at::kFloat), gradient};
}

}  // namespace

TORCH_LIBRARY(salt_ops, m) {
  m.def("sample_masks(Tensor sample_ids, int epoch, int seed, int[] grid, int[] counts, int[] blocks, int redraws, Tensor sizes, int[] low, int[] high, int stream) -> (Tensor, Tensor)");
  m.def("masked_gather(Tensor x, Tensor index) -> Tensor");
  m.def("masked_scatter(Tensor x, Tensor index, int n) -> Tensor");
  m.def("masked_mse(Tensor prediction, Tensor target, Tensor? index, bool need_gradient) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(salt_ops, CPU, m) {
  m.impl("sample_masks", &sample_masks);
  m.impl("masked_gather", &masked_gather);
  m.impl("masked_scatter", &masked_scatter);
  m.impl("masked_mse", &masked_mse);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The SALT-VLA kernels; importing this registers torch.ops.salt_ops.*";
  m.def("build_info", [] {
    pybind11::dict info;
    info["devices"] = std::vector<std::string>{"cpu"};
    info["architectures"] = std::vector<std::string>{};
    info["simd"] = salt::simd_level();
    return info;
  });
}
