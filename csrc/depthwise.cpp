// Both products of depthwise convolutions in batch-last layout. They run at the speed of memory.
#include <atomic>
#include <omp.h>

#include "depthwise_frames.h"
#include "depthwise_rows.h"
#include "kernels.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

namespace {

template <class T>
class Depthwise {
  public:
    explicit Depthwise(const Product& product)
        : q(product),
          g(product.geometry),
          bypass(!q.value_grad && result_bytes(q) > kBypassBytes),
          rows(product, bypass),
          frames(product, bypass) {}

    const char* run() {
        // The planes' rows follow one another.
        if (const char* text =
                check_ends(q.planes[0].row_ptr[0], q.planes[q.plane_count - 1].row_ptr[g.groups], q.nnz))
            return text;
        std::atomic<const char*> problem{nullptr};
#pragma omp parallel num_threads(q.threads)
        {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < q.plane_count * g.groups; ++i)
                if (const char* text = rows.check(i / g.groups, i % g.groups)) problem = text;
            if (problem.load() == nullptr) {
                thread_local typename DepthwiseFrames<T>::Room room;
                if (frames.fit) frames.enter(&room);
                const int64_t together = frames.fit ? frames.together : 1;
#pragma omp for schedule(dynamic, 1)
                for (int64_t channel = 0; channel < g.groups; channel += together)
                    if (frames.fit)
                        frames.compute(channel, std::min(together, g.groups - channel), &room);
                    else
                        for (int64_t i = 0; i < q.plane_count; ++i) compute(i, channel);
                if (bypass) finish_stores_around();
            }
        }
        return problem;
    }

  private:
    const Product& q;
    const Geometry& g;
    const bool bypass;
    const DepthwiseRows<T> rows;
    const DepthwiseFrames<T> frames;

    void compute(int64_t plane, int64_t number) const {
        thread_local typename DepthwiseRows<T>::Channel channel;
        rows.begin(plane, number, &channel);
        const T* source = static_cast<const T*>(q.source.data) + number * q.source.c;
        if (q.value_grad) {
            const T* grad = static_cast<const T*>(q.grad.data) + number * q.grad.c;
            for (int64_t y = 0; y < q.planes[plane].height; ++y) rows.products(y, source, grad, &channel);
            rows.write_products(channel);
        } else {
            T* to = static_cast<T*>(q.dest.data) + number * q.dest.c;
            for (int64_t y = 0; y < q.planes[plane].height; ++y) rows.sums(y, source, to, &channel);
        }
    }
};

}  // namespace

bool is_depthwise(const Product& q) {
    const Geometry& g = q.geometry;
    return g.rows_per_group == 1 && g.channels_per_group == 1 && g.groups > 1 && q.source.n == 1 && !q.norm &&
           (q.value_grad ? q.grad.n : q.dest.n) == 1;
}

const char* run_depthwise(const Product& product) {
    return with_element(product.element, [&](auto element) { return Depthwise<decltype(element)>(product).run(); });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
