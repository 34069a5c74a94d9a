// The whole surface of the native core: plain structs, raw pointers, no torch.
//
// Everything is one of two indexed products over the nonzeros (r, k, w) of a pattern, with lanes =
// spatial positions x batch samples:
//     gather product   D[r, p] = bias[r] + sum_k  w * S[channel(k), p * step + tap(k)]
//     sampled product  dw[j]   = sum_p  G[r(j), p] * S[channel(j), p * step + tap(j)],  and  sum_p  G[r, p]  beside it
// Forward is a gather product over the pattern's rows; the input gradient is the same product over
// the transposed rows, once per phase of the stride; a linear layer is the case of one position.
#pragma once
#include <cmath>
#include <cstdint>
#include <string>

namespace sparse_ft {

// What activations are stored as. Weights, statistics and the gradients of both are float, as is all arithmetic.
enum class Element { kFloat, kBfloat16 };
struct Bf16 {  // the upper half of a float
    uint16_t bits;
};
inline int64_t element_bytes(Element element) { return element == Element::kFloat ? sizeof(float) : sizeof(Bf16); }

// A 4-D activation (sample n, channel c, row y, column x); strides in elements. Either n has stride 1 (batch-last),
// or there is one position and c has (token-major): generated products are right for no other layout.
struct View {
    void* data;
    int64_t n, c, y, x;
};

constexpr int64_t kMaxTaps = 4096;  // kernel height x width

// A grid of positions. Forward has one plane; the input gradient has one for each phase of the
// stride, whose rows hold just the taps that reach it.
struct Plane {
    const int32_t* row_ptr;        // rows + 1 entries into col and perm
    int64_t height, width;         // positions
    int64_t dest_y, dest_x;        // destination of position (0, 0)
    const int32_t *tap_y, *tap_x;  // source offset of each kernel row and column; kNoTap: not in this plane
};
constexpr int32_t kNoTap = INT32_MIN;

class Programs;  // programs.h

struct Geometry {
    int64_t batch;
    int64_t groups, rows_per_group, channels_per_group;  // channel = group * channels_per_group + col / taps
    int64_t taps_h, taps_w;
    int64_t source_h, source_w;
    int64_t step_y, step_x;            // source step from one position to the next
    int64_t dest_step_y, dest_step_x;  // destination step from one position to the next
};

enum class Activation { kIdentity, kRelu, kRelu6, kSilu, kHardswish, kGelu, kGeluTanh };

// A norm and an activation that a batch-last source's values go through on their way into a product, by channel:
// activation((x - mean) * scale + offset). What lies outside the source stays zero.
struct SourceNorm {
    const float *mean, *scale, *offset;
    Activation activation;
};

// What a product's results go through before they are stored to a batch-last destination, by row:
// activation((result - mean) * scale + offset + residual). The residual, which may be null, lies as the destination
// and has its type.
struct ResultNorm {
    const float *mean, *scale, *offset;
    const void* residual;
    Activation activation;
};

// Where a product puts the mean and the biased variance of every row of its results, if it can take them on the way:
// `measured` says whether it did.
struct Moments {
    float *mean, *variance;
    bool measured = false;
};

struct Product {
    Geometry geometry;
    Element element;  // of source, dest and grad
    int64_t plane_count;
    const Plane* planes;
    int64_t nnz;
    const int32_t* col;  // channel-in-group * taps + tap, strictly increasing within a row
    const float* values;
    const int32_t* perm;       // value of entry j is values[perm[j]]; null: values[j]
    const float* bias;         // null: 0
    View source, dest;         // dest may be null data in a sampled product
    const SourceNorm* norm;    // of the source; may be null
    const ResultNorm* result;  // gather product: may be null
    Moments* moments;          // gather product of one plane: may be null
    View grad;                 // sampled product: G; unused otherwise
    float* value_grad;         // sampled product: dw (nnz)
    float* row_sums;           // sampled product: the sum of every row of G; may be null
    Programs* programs;        // where this pattern's generated kernels are kept; null: generate none
    int threads;
};

// Batch normalisation over a batch-last activation, where channel c is `size` contiguous elements, with what follows
// it: y = activation((x - mean) * rstd * weight + bias + residual). Activations are `channels` * `size` elements.
struct Norm {
    int64_t channels, size;
    Element element;  // of x, residual, y and output, and of their gradients
    Activation activation;
    const void *x, *residual;        // residual may be null
    const float *weight, *bias;      // per channel; may be null
    float *mean, *variance, *rstd;   // per channel
    bool measure;                    // forward: mean and variance are x's, written here; otherwise given
    float eps;                       // forward writes rstd from it and the variance
    void* y;                         // null: statistics only
    bool training;                   // backward: mean and variance depend on x
    const void *grad, *output;       // backward: output (y) tells the slope where it can; may be null
    void *grad_x, *grad_residual;    // may be null
    float *grad_weight, *grad_bias;  // may be null
    int threads;
};

// To the last bit the same, whoever computes a norm.
inline float variance_of(double v) { return float(v > 0 ? v : (v <= 0 ? 0.0 : v)); }  // NaN stays NaN
inline float reciprocal_deviation(float variance, float eps) { return float(1.0 / std::sqrt(double(variance) + eps)); }

// A depthwise convolution in batch-last layout with the norms on both sides of it. The inner norm's x is the
// convolution's source, the outer norm's x its result. Backward, the gradient of the outer norm's result comes in, and
// that of the inner norm's x goes to the destination of `sums`.
struct NormDepthwise {
    Product sums;      // forward: the convolution; backward: its input gradient
    Product products;  // backward: its weight gradient
    Norm inner, outer;
};

// Pooling windows along one axis: window o covers positions first[o] + t * step, low[o] <= t < high[o] <= taps, all of
// them within `size`. An average weighs them by scale[o].
struct Windows {
    int64_t size, count;
    int32_t step, taps;
    const int32_t *first, *low, *high;
    const float* scale;
};

struct Pool {  // over a batch-last activation; the maximum where `chosen` is given, otherwise the weighted sum
    int64_t batch, channels;
    Element element;  // of input and output, and of their gradients
    Windows y, x;
    const void* input;
    void* output;
    uint8_t* chosen;  // number of the tap (ty * x.taps + tx) that each maximum came from
    const void* grad;
    void* grad_input;
    int threads;
};

// The maximum over windows of a norm's activated result, which is not stored. Of the norm x, its statistics and the
// activation count; backward, the pool's gradient and choice come in, and the norm's gradients go out.
struct NormPool {
    Norm norm;
    Pool pool;
};

struct Transpose {  // to[b][j][i] = from[b][i][j], i < rows, j < cols; strides in elements
    Element element;
    const void* from;
    void* to;
    int64_t batch_outer, batch_inner, rows, cols;
    int64_t from_outer, from_inner, from_row;  // from column stride 1
    int64_t to_outer, to_inner, to_col;        // to row stride 1
    int threads;
};

struct Dropout {  // y = x * scale where an element's random number is at least least_kept, otherwise x * 0
    Element element;
    int64_t size;
    const void* x;
    void* y;
    uint64_t seed;
    uint32_t least_kept;
    float scale;
    int threads;
};

struct PatternShape {
    int64_t out_channels, in_per_group, kernel_h, kernel_w, groups;
    int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
};

// An activation of which only some values are kept: bits [block][channel][row][column], a byte for eight samples, and
// the values in that order. A convolution's block is eight samples of a batch; where neighbouring positions are alike
// (a 1 x 1 convolution, a linear layer), samples run on over columns and blocks. The columns of a row are in the order
// of their residue modulo the convolution's step, so that those which the same taps read follow one another.
struct Compact {
    int64_t blocks, channels, height, width;
    int64_t lanes;                      // samples in all
    int64_t block_lanes, column_lanes;  // samples from one block, and from one column, to the next
    int64_t column_step;
    const uint8_t* bits;
    const int64_t* start;  // of each (block, channel) in values, and their end
    const float* values;
};

// The weight gradient of a convolution whose input is compact.
struct CompactGradient {
    PatternShape shape;
    Compact activation;
    int64_t output_h, output_w;
    View grad;           // x: from one column to the next
    float* weight_grad;  // dense, (out_channels, in_per_group, kernel_h, kernel_w)
    int threads;
};

// The entries of a dense weight whose magnitude is at least a threshold and not 0, or that are NaN.
struct RowsAbove {
    const float* weight;
    int64_t rows, cols;
    float threshold;
    const uint8_t*
        taps;  // of column k the number is k % tap_count; entries are only of those that are not 0; null: all
    int64_t tap_count;
    int threads;
};

// What one instruction set offers. A function returns null, or a static text saying what is wrong
// with the pattern it was given; nothing has been written then.
struct Kernels {
    const char* name;
    int lanes;
    const char* (*gather_product)(const Product&);
    const char* (*sampled_product)(const Product&);
    void (*norm_forward)(const Norm&);
    void (*norm_backward)(const Norm&);
    const char* (*norm_depthwise_forward)(const NormDepthwise&);
    const char* (*norm_depthwise_backward)(const NormDepthwise&);
    void (*pool_forward)(const Pool&);
    void (*pool_backward)(const Pool&);
    void (*norm_pool_forward)(const NormPool&);
    void (*norm_pool_backward)(const NormPool&);
    void (*transpose)(const Transpose&);
    void (*dropout)(const Dropout&);
    // Bits of the magnitudes above a threshold and how many each (block, channel) has; then their values; and back.
    void (*compact_bits)(const Compact&, const View& x, float threshold, uint8_t* bits, int64_t* counts, int threads);
    void (*compact_values)(const Compact&, const View& x, float* values, int threads);
    void (*compact_expand)(const Compact&, const View& x, int threads);
    int64_t (*compact_gradient)(const CompactGradient&);              // how many multiply-adds it took
    int64_t (*count_rows_above)(const RowsAbove&, int32_t* row_ptr);  // how many there are in all
    void (*fill_rows_above)(const RowsAbove&, const int32_t* row_ptr, int32_t* col, float* values);
    double (*fma_peak)(double seconds);                      // GF/s of one thread: FMA from registers
    double (*load_fma_peak)(int64_t bytes, double seconds);  // one vector load per FMA over a buffer of `bytes`
};

const Kernels* kernels_portable();
#if defined(SPARSE_FT_X86)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_jit();  // the same, with products by generated code
#endif

// ---- selection.cpp ---------------------------------------------------------------------------
float nth_magnitude(const float* x, int64_t count, int64_t n, int threads);  // the n-th largest, from 0
// 1 for the `keep` largest magnitudes; of equal ones the first.
void mask_largest(const float* x, int64_t count, int64_t keep, uint8_t* mask, int threads);

// ---- pattern.cpp -----------------------------------------------------------------------------
int64_t count_nonzero(const float* weight, int64_t numel, int threads);
int64_t count_true(const uint8_t* mask, int64_t numel, int threads);
// Fills row_ptr (out + 1) and col (nnz) from a dense weight or mask, and values where `values` is not null.
void build_rows(const float* weight, const uint8_t* mask, int64_t rows, int64_t cols, int32_t* row_ptr, int32_t* col,
                float* values, int threads);
// Transposed rows: (stride phase, input channel); entry = output-channel-in-group * taps + tap.
void build_transpose(const PatternShape&, const int32_t* row_ptr, const int32_t* col, int32_t* t_row_ptr,
                     int32_t* t_col, int32_t* perm, int threads = 1);
// A number that two index arrays share only if they are equal, but for chance in 2^64.
uint64_t fingerprint(const int32_t* values, int64_t count);
// Null, or what is wrong: range, order, count.
const char* validate_rows(const int32_t* row_ptr, int64_t rows, const int32_t* col, int64_t nnz, int64_t cols);

}  // namespace sparse_ft
