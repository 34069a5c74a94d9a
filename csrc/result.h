// A norm, a residual and an activation on a product's results, which wait in a stage to be stored.
#pragma once
#include "activation.h"
#include "api.h"
#include "each_vector.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

struct AsComputed {
    void finish(int64_t, float*, int64_t, int64_t) const {}
    void fetch(int64_t, int64_t) const {}
};

template <class Act, bool kResidual>
struct Finished {
    const ResultNorm& norm;
    // What finish() will read there.
    void fetch(int64_t at, int64_t count) const {
        if constexpr (kResidual)
            for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(float))) prefetch(norm.residual + at + i);
    }
    // `count` results of a row in place; `at`: where the first of them goes, in floats from the destination's begin.
    void finish(int64_t row, float* results, int64_t at, int64_t count) const {
        // In the steps of a norm that is a pass of its own, and so to its last bit.
        const vec mean = splat(norm.mean[row]), scale = splat(norm.scale[row]), offset = splat(norm.offset[row]);
        const float* residual = kResidual ? norm.residual + at : nullptr;
        each_vector(count, [&](int64_t i, int n) {
            vec v = (load(results + i, n) - mean) * scale + offset;
            if (kResidual) v = v + load(residual + i, n);
            store(results + i, Act::value(v), n);
        });
    }
};

// Calls body with what finishes the product's results.
template <class Body>
void with_result(const Product& q, Body body) {
    if (q.result == nullptr) return body(AsComputed{});
    with_activation(q.result->activation, [&](auto act) {
        using Act = decltype(act);
        if (q.result->residual)
            body(Finished<Act, true>{*q.result});
        else
            body(Finished<Act, false>{*q.result});
    });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
