// A norm, a residual and an activation on a product's results, which wait in a stage to be stored.
#pragma once
#include "activation.h"
#include "api.h"
#include "each_vector.h"
#include "element.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

struct AsComputed {
    void finish(int64_t, float*, int64_t, int64_t) const {}
    void fetch(int64_t, int64_t) const {}
};

template <class T, class Act, bool kResidual>
struct Finished {
    const ResultNorm& norm;
    const T* residuals() const { return static_cast<const T*>(norm.residual); }
    // What finish() will read there.
    void fetch(int64_t at, int64_t count) const {
        if constexpr (kResidual)
            for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) prefetch(residuals() + at + i);
    }
    // `count` results of a row in place; `at`: where the first of them goes, in elements from the destination's begin.
    void finish(int64_t row, float* results, int64_t at, int64_t count) const {
        // In the steps of a norm that is a pass of its own and reads what was stored, and so to its last bit.
        const vec mean = splat(norm.mean[row]), scale = splat(norm.scale[row]), offset = splat(norm.offset[row]);
        const T* residual = kResidual ? residuals() + at : nullptr;
        each_vector(count, [&](int64_t i, int n) {
            vec v = (rounded<T>(load(results + i, n)) - mean) * scale + offset;
            if (kResidual) v = v + load(residual + i, n);
            store(results + i, Act::value(v), n);
        });
    }
};

// Calls body with what finishes the product's results, which are stored as T.
template <class T, class Body>
void with_result(const Product& q, const Body& body) {
    if (q.result == nullptr) return body(AsComputed{});
    with_activation(q.result->activation, [&](auto act) {
        using Act = decltype(act);
        if (q.result->residual)
            body(Finished<T, Act, true>{*q.result});
        else
            body(Finished<T, Act, false>{*q.result});
    });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
