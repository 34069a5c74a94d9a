// One instruction set's kernels as a table. Their files are built once per set with that set's flags, and
// everything in them has a namespace of its own, so no two sets share an inline function.
#include "kernels.h"

#include "simd.h"

#define SPARSE_FT_JOIN_(a, b) a##b
#define SPARSE_FT_JOIN(a, b) SPARSE_FT_JOIN_(a, b)
#define SPARSE_FT_TEXT_(a) #a
#define SPARSE_FT_TEXT(a) SPARSE_FT_TEXT_(a)

namespace sparse_ft {

const Kernels* SPARSE_FT_JOIN(kernels_, SPARSE_FT_ISA)() {
    using namespace SPARSE_FT_ISA;
    static const Kernels table{SPARSE_FT_TEXT(SPARSE_FT_ISA),
                               kLanes,
                               gather_product,
                               sampled_product,
                               norm_forward,
                               norm_backward,
                               norm_depthwise_forward,
                               norm_depthwise_backward,
                               pool_forward,
                               pool_backward,
                               norm_pool_forward,
                               norm_pool_backward,
                               transpose_batches,
                               dropout,
                               compact_bits,
                               compact_values,
                               compact_expand,
                               compact_gradient,
                               count_rows_above,
                               fill_rows_above,
                               fma_peak,
                               load_fma_peak};
    return &table;
}

#if defined(__AVX512F__)
const Kernels* kernels_avx512_jit() {
    static const Kernels table = [] {
        Kernels kernels = *kernels_avx512();
        kernels.name = "avx512-jit";
        kernels.gather_product = avx512::generated_gather_product;
        kernels.sampled_product = avx512::generated_sampled_product;
        return kernels;
    }();
    return &table;
}
#endif

}  // namespace sparse_ft
