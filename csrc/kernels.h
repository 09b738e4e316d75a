// The kernels, over raw pointers: no torch header, so that they compile fast and stand alone.
// ops.cpp checks the arguments (but for the entries of `index` on a GPU, which the kernels assert)
// and allocates; a kernel only computes.
//
// *_cpu works on the items [begin, end) of its batch, and the caller splits the items over threads.
// *_cuda launches on `stream`. Every array is contiguous; rows of D elements lie one after another;
// nothing need be aligned beyond its element.
#pragma once
#include <cstdint>

#include "masks.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace salt {

enum class Type { u8, f16, bf16, f32, f64 };
enum class Kind { mse, l1, smooth_l1 };                  // in the order of ops.KINDS
enum class Normalise { none, layer_norm, standardise };  // in the order of ops.NORMALISATIONS
constexpr double LAYER_NORM_EPS = 1e-6;

// Masks of B clips: context [B, spec.context], target [B, spec.kept].
struct Draw {
  MaskSpec spec;
  uint64_t seed;
  uint32_t epoch;
  const int64_t* sample_ids;
  int64_t B;
  int64_t *context, *target;
};

// Rows of x [B, N, row_bytes] at index [B, K], to out [B, K, row_bytes] (gather), or the other way,
// with zeros elsewhere (scatter).
struct Rows {
  const char* x;
  const int64_t* index;
  int64_t B, N, K, row_bytes;
  char* out;
};

// out [B, K, D] = patches [B, N, D] * scale[channel] + shift[channel] at index [B, K], or all N
// rows (K = N) where it is null. Channel c is the D / channels entries from c * D / channels on.
constexpr int MAX_CHANNELS = 4;
struct Patches {
  const uint8_t* patches;
  const int64_t* index;
  int64_t B, N, K, D;
  int channels;
  float scale[MAX_CHANNELS], shift[MAX_CHANNELS];
  void* out;
  Type out_type;  // f32 or bf16
};

// With p = prediction [B, K, D] and y = the target rows [B, N, D] at index [B, K] (or all of [B, K,
// D], N = K, where index is null), normalised: per_token [B, K] = mean over D of error(p - y), and,
// where gradient is not null, gradient = scale * error'(p - y) in p's type. A = float, or double
// where the prediction is double: the type of sums, mean, rstd and per_token. A u8 target is a
// pixel, v / 255.
struct Loss {
  const void *prediction, *target;
  Type prediction_type, target_type;
  const int64_t* index;
  int64_t B, N, K, D;
  Kind kind;
  Normalise normalise;
  const void *mean, *rstd;  // A [N, D], of standardise
  double scale;
  void* per_token;  // A [B, K]
  void* gradient;
};

// A clip uint8 [T, 3, H, W] as patches [N, 3 * tubelet * patch * patch]: token n = (t * H / patch +
// y) * W / patch + x, vector (channel, dt, dy, dx).
struct Tubelets {
  const uint8_t* clip;
  int64_t T, H, W, patch, tubelet;
  uint8_t* out;
};

// Sums over n rows of float16 [n, D] and of their squares, added to sum and squares, double [D]:
// row after row, so that it does not matter in how many calls the rows come.
struct Moments {
  const void* rows;
  int64_t n, D;
  double *sum, *squares;
};

// A permutation of [0, n), n <= 2^62, that a key decides: out[i] = the image of index[i]. A Feistel
// network of alternating halves (Luby and Rackoff 1988) over the next power of two, walked until it
// falls below n (Black and Rogaway 2002).
constexpr int PERMUTE_ROUNDS = 8;
struct Permute {
  const int64_t* index;
  uint64_t n;
  uint32_t keys[PERMUTE_ROUNDS];
  int64_t* out;
};

// Softmax attention of each span's queries to its keys (asked[0] tokens to given[0], then asked[1]
// to given[1], ...), scale 1 / sqrt(d), bfloat16. lse: the scores' logsumexp, in units of ln(2);
// the backward pass reads all of these and writes the gradients.
struct Attention {
  const void *q, *k, *v;  // [B, queries or keys, (rows of) heads, d]
  int64_t q_row, k_row;   // numbers from token to token, of q and of k and v
  int64_t B, heads, d, spans;
  const int64_t *asked, *given;  // [spans], each above 0
  int64_t queries, keys;         // tokens of a clip: their sums
  void* out;                     // [B, queries, heads, d]
  float* lse;                    // [B, heads, queries]
  const void* gradient;          // [B, queries, heads, d]
  void *dq, *dk, *dv;            // as q, k and v
};

// out [C, R] = x [R, C], bfloat16, and sums [C] = the sum over x's rows: what a linear layer's
// backward pass needs of its gradient.
struct Transpose {
  const void* x;
  int64_t R, C;
  void* out;
  float* sums;
};

// out [n] = gelu(x [n]), or where there is a gradient [n] that times gelu'(x); bfloat16.
struct Gelu {
  const void* x;
  const void* gradient;
  void* out;
};

void draw_cpu(const Draw& draw, int64_t begin, int64_t end);           // items: clips
void gather_cpu(const Rows& rows, int64_t begin, int64_t end);         // items: rows of out
void scatter_cpu(const Rows& rows, int64_t begin, int64_t end);        // items: rows of out
void patches_cpu(const Patches& patches, int64_t begin, int64_t end);  // items: rows of out
void loss_cpu(const Loss& loss, int64_t begin, int64_t end);  // items: rows of the prediction
void patchify_cpu(const Tubelets& work, int64_t begin, int64_t end);  // items: tokens
void moments_cpu(const Moments& work, int64_t begin, int64_t end);    // items: columns
void permute_cpu(const Permute& work, int64_t begin, int64_t end);    // items: entries of index

// To be called where has_bf16() alone: the processor has AVX512_BF16, and AMX where has_amx(),
// which asks the system for it. Where the compiler cannot build them they are empty, and both are
// false.
constexpr int64_t TRANSPOSE_COLUMNS = 32;  // of x, an item
bool has_bf16();
bool has_amx();
void attention_bf16(const Attention& work, int64_t begin,
                    int64_t end);  // items: (clip, head, span)
void attention_backward_bf16(const Attention& work, int64_t begin, int64_t end);  // likewise
void transpose_bf16(const Transpose& work, int64_t begin,
                    int64_t end);                              // items: TRANSPOSE_COLUMNS columns
void gelu_bf16(const Gelu& work, int64_t begin, int64_t end);  // items: entries

// What this processor lets the kernels use: "avx512", "avx2" or "baseline"; SALT_SIMD in the
// environment asks for less.
const char* simd_level();

// Each returns the launch's cudaError_t. `scratch`: draw_scratch_cuda(spec) bytes a clip where that
// is not 0.
int64_t draw_scratch_cuda(const MaskSpec& spec);
int draw_cuda(const Draw& draw, void* scratch, CUstream_st* stream);
int gather_cuda(const Rows& rows, CUstream_st* stream);
int scatter_cuda(const Rows& rows, CUstream_st* stream);
int patches_cuda(const Patches& patches, CUstream_st* stream);
int loss_cuda(const Loss& loss, CUstream_st* stream);
int scale_cuda(const void* x, int64_t count, Type type, const void* factor, void* out,
               CUstream_st* stream);  // a factor of float, for f64 of double
int mean_cuda(const void* per_token, int64_t count, Type type, void* mean,
              CUstream_st* stream);  // of f32 or f64, in a fixed order

}  // namespace salt
