// The functions of one instruction set, each in a file of its own name or subject; see Kernels in api.h.
#pragma once
#include "api.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

const char* gather_product(const Product&);
const char* sampled_product(const Product&);
bool full_sampled_product(const Product&);  // false, and nothing done, where it has no place
bool is_depthwise(const Product&);          // and so for run_depthwise(), which computes either product
const char* run_depthwise(const Product&);
#if defined(__AVX512F__)
const char* generated_gather_product(const Product&);
const char* generated_sampled_product(const Product&);
#endif
void norm_forward(const Norm&);
void norm_backward(const Norm&);
const char* norm_depthwise_forward(const NormDepthwise&);
const char* norm_depthwise_backward(const NormDepthwise&);
void pool_forward(const Pool&);
void pool_backward(const Pool&);
void norm_pool_forward(const NormPool&);
void norm_pool_backward(const NormPool&);
void transpose_batches(const Transpose&);
void dropout(const Dropout&);
void compact_bits(const Compact&, const View& x, float threshold, uint8_t* bits, int64_t* counts, int threads);
void compact_values(const Compact&, const View& x, float* values, int threads);
void compact_expand(const Compact&, const View& x, int threads);
int64_t compact_gradient(const CompactGradient&);
int64_t count_rows_above(const RowsAbove&, int32_t* row_ptr);
void fill_rows_above(const RowsAbove&, const int32_t* row_ptr, int32_t* col, float* values);
double fma_peak(double seconds);
double load_fma_peak(int64_t bytes, double seconds);

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
