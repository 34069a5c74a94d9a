// Max pooling of an activated batch norm, channel by channel: what is normalised waits in the caches for the windows,
// and what comes back from them for the norm's gradient. Forward reads x and writes the maxima; backward reads x and
// the gradient of these and writes that of x. Every step is that of the pass by itself, and so are the results.
#include <omp.h>

#include "kernels.h"
#include "norm_steps.h"
#include "pool_rows.h"
#include "strip.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

// Which rows the windows read, in whatever order these come.
struct RowsOf {
    std::vector<int64_t> low, high;  // by window; `low`: no later window reads a row before it
    int64_t most = 1;                // rows at a time
    explicit RowsOf(const Windows& w) : low(size_t(w.count)), high(size_t(w.count)) {
        int64_t least = w.size;
        for (int64_t o = w.count - 1; o >= 0; --o) {
            const int64_t step = w.step;
            const bool is_empty = w.low[o] >= w.high[o];
            least = is_empty ? least : std::min(least, w.first[o] + w.low[o] * step);
            low[size_t(o)] = least;
            high[size_t(o)] = is_empty ? 0 : w.first[o] + (w.high[o] - 1) * step + 1;
            most = std::max(most, high[size_t(o)] - least);
        }
    }
};

template <class T>
void forward(const NormPool& block) {
    const Pool& q = block.pool;
    const int64_t length = q.x.size * q.batch, results = q.x.count * q.batch;
    const RowsOf rows(q.y);
#pragma omp parallel num_threads(q.threads)
    {
        thread_local Scratch scratch;
        const std::unique_ptr<NormSteps<T>> norm = steps_of<T>(block.norm);
        Strip<T> strip(scratch, q.y.size, length, rows.most);
#pragma omp for schedule(dynamic, 1)
        for (int64_t c = 0; c < q.channels; ++c) {
            norm->begin(c, nullptr);
            strip.begin();
            for (int64_t o = 0; o < q.y.count; ++o) {
                const T* from = strip.rows(rows.low[size_t(o)], rows.high[size_t(o)],
                                           [&](int64_t r, T* made) { norm->values(r * length, length, made); });
                const int64_t to = (c * q.y.count + o) * results;
                pool_row<T, true>(q, o, from, static_cast<T*>(q.output) + to, q.chosen + to);
            }
        }
    }
}

template <class T>
void backward(const NormPool& block) {
    const Pool& q = block.pool;
    const int64_t length = q.x.size * q.batch, size = block.norm.size, results = q.y.count * q.x.count * q.batch;
    const WindowsOfRows rows(q.y);
    const bool bypass = q.channels * size * int64_t(sizeof(T)) > kBypassBytes;
#pragma omp parallel num_threads(q.threads)
    {
        thread_local Scratch sum_scratch, gradient_scratch;
        const std::unique_ptr<NormSteps<T>> norm = steps_of<T>(block.norm);
        float* const sums = sum_scratch.floats(size_t(length));
        T* const gradient = gradient_scratch.of<T>(size_t(size));  // of the activated norm, of a channel
#pragma omp for schedule(dynamic, 1)
        for (int64_t c = 0; c < q.channels; ++c) {
            norm->begin(c, gradient);
            int64_t summed = 0;
            for (int64_t y = 0; y < q.y.size; ++y) {
                pool_gradient_row<T, true>(q, rows, y, static_cast<const T*>(q.grad) + c * results,
                                           q.chosen + c * results, sums);
                write_run(gradient + y * length, sums, length, false);
                const int64_t end = y + 1 == q.y.size ? size : (y + 1) * length / kChunk * kChunk;
                if (end > summed) norm->add(summed, end);
                summed = std::max(summed, end);
            }
            norm->finish();
            T* to = channel_of<T>(block.norm.grad_x, block.norm, c);
            norm->slopes(0, size, to, bypass && aligned_for_vectors(to));
        }
        if (bypass) finish_stores_around();
    }
}

}  // namespace

void norm_pool_forward(const NormPool& block) {
    with_element(block.pool.element, [&](auto element) { forward<decltype(element)>(block); });
}

void norm_pool_backward(const NormPool& block) {
    with_element(block.pool.element, [&](auto element) { backward<decltype(element)>(block); });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
