// The CPU kernels, over raw pointers: no torch header, so that they compile fast and stand alone.
// Each works on the rows [begin, end) of its batch; the caller splits the rows over threads.
#pragma once
#include <cstdint>
#include "masks.h"

namespace salt {

enum class Type { f16, bf16, f32, f64 };

// Masks of the clips sample_ids[begin..end): context [B, spec.context], target [B, spec.target].
void draw_masks_cpu(const MaskSpec& spec, uint64_t seed, uint32_t epoch, const int64_t* sample_ids, int64_t begin, int64_t end,
                    int64_t* context, int64_t* target);

// out[r] = x[r / K, index[r]] for the rows r in [begin, end) of [B * K]; row_bytes a row, N rows a clip.
void gather_cpu(const char* x, const int64_t* index, int64_t N, int64_t K, int64_t row_bytes, int64_t begin, int64_t end, char* out);

// out[r / K, index[r]] = x[r]: the transpose. `out` holds zeros, and the indices of a clip are unique.
void scatter_cpu(const char* x, const int64_t* index, int64_t N, int64_t K, int64_t row_bytes, int64_t begin, int64_t end, char* out);

// For the rows r of prediction [B * K, D] and the target rows they ask for (target [B, N, D] at index [B, K], or [B * K, D]
// where index is null): per_token[r] = mean over D of (prediction - target)^2, and, where gradient is not null,
// gradient[r] = scale * (prediction - target) in the prediction's type. One pass: each row of each operand is touched once.
void mse_cpu(const void* prediction, Type prediction_type, const void* target, Type target_type, const int64_t* index, int64_t N,
             int64_t K, int64_t D, double scale, int64_t begin, int64_t end, double* per_token, void* gradient);

// What this processor lets the kernels use: "avx512", "avx2" or "baseline".
const char* simd_level();

}  // namespace salt
