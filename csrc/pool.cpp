// Pooling in batch-last layout: lanes are samples. Forward takes the maximum or the weighted sum over each window;
// backward fills the input's gradient row by row, each from the windows that reach it, while it is in cache.
#include <omp.h>

#include "bypass.h"
#include "kernels.h"
#include "panel.h"
#include "pool_rows.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

template <class T, bool kMax>
void forward(const Pool& q) {
    const int64_t row = q.x.count * q.batch, channel = q.y.size * q.x.size * q.batch;
#pragma omp parallel for schedule(static) num_threads(q.threads)
    for (int64_t line = 0; line < q.channels * q.y.count; ++line)
        pool_row<T, kMax>(q, line % q.y.count, static_cast<const T*>(q.input) + line / q.y.count * channel,
                          static_cast<T*>(q.output) + line * row, q.chosen + line * row);
}

template <class T, bool kMax>
void backward(const Pool& q) {
    const int64_t row = q.x.size * q.batch, channel = q.y.count * q.x.count * q.batch;
    const WindowsOfRows rows(q.y);
    const bool bypass = q.channels * q.y.size * row * int64_t(sizeof(T)) > kBypassBytes;
#pragma omp parallel num_threads(q.threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t line = 0; line < q.channels * q.y.size; ++line) {
            const int64_t begin = line / q.y.size * channel;
            thread_local Scratch scratch;  // added up in float, and in cache
            float* sums = scratch.floats(size_t(row));
            pool_gradient_row<T, kMax>(q, rows, line % q.y.size, static_cast<const T*>(q.grad) + begin,
                                       q.chosen + begin, sums);
            write_run(static_cast<T*>(q.grad_input) + line * row, sums, row, bypass);
        }
        if (bypass) finish_stores_around();
    }
}

}  // namespace

void pool_forward(const Pool& q) {
    with_element(q.element, [&](auto element) {
        q.chosen ? forward<decltype(element), true>(q) : forward<decltype(element), false>(q);
    });
}

void pool_backward(const Pool& q) {
    with_element(q.element, [&](auto element) {
        q.chosen ? backward<decltype(element), true>(q) : backward<decltype(element), false>(q);
    });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
