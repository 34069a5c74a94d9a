// What this core can do at best: the lines that benchmarks are drawn against.
#include <chrono>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class Body>  // best rate of repeated short runs within `seconds`
double best_rate(double seconds, double flops, Body body) {
    double best = 0;
    const double end = now() + seconds;
    do {
        const double start = now();
        body();
        const double rate = flops / (now() - start);
        if (rate > best) best = rate;
    } while (now() < end);
    return best / 1e9;
}

volatile float sink;

// Tells the compiler that the register was used: it may neither merge equal chains nor leave one out.
inline void keep(vec& v) {
#if defined(__x86_64__)
    asm volatile("" : "+v"(v));
#else
    asm volatile("" : "+w"(v));
#endif
}

}  // namespace

double fma_peak(double seconds) {
    constexpr int kChains = 10, kRounds = 20000;
    return best_rate(seconds, 2.0 * kChains * kRounds * kLanes, [] {
        const vec a = splat(1.0f + 1e-9f * sink), b = splat(0.5f + 1e-9f * sink);
        vec c0 = b, c1 = b, c2 = b, c3 = b, c4 = b, c5 = b, c6 = b, c7 = b, c8 = b, c9 = b;
        for (int i = 0; i < kRounds; ++i) {
            c0 = c0 * a + b, c1 = c1 * a + b, c2 = c2 * a + b, c3 = c3 * a + b, c4 = c4 * a + b;
            c5 = c5 * a + b, c6 = c6 * a + b, c7 = c7 * a + b, c8 = c8 * a + b, c9 = c9 * a + b;
            keep(c0), keep(c1), keep(c2), keep(c3), keep(c4), keep(c5), keep(c6), keep(c7), keep(c8), keep(c9);
        }
        sink = sum(((c0 + c1) + (c2 + c3)) + ((c4 + c5) + (c6 + c7)) + (c8 + c9)) * 0.0f;
    });
}

double load_fma_peak(int64_t bytes, double seconds) {
    constexpr int kChains = 8;
    const int64_t step = kChains * kLanes, count = bytes / 4 / step * step;
    std::vector<float> buffer(size_t(count) + 64, 0.5f);
    float* data = buffer.data() + (64 - reinterpret_cast<uintptr_t>(buffer.data()) % 64) / 4;
    const int64_t rounds = 1 + (8 << 20) / (bytes + 1);
    return best_rate(seconds, 2.0 * double(count) * double(rounds), [&] {
        vec acc[kChains] = {};
        const vec w = splat(1.0f + 1e-9f * sink);
        for (int64_t r = 0; r < rounds; ++r) {
            for (int64_t i = 0; i < count; i += step)
#pragma GCC unroll 8
                for (int k = 0; k < kChains; ++k) acc[k] += w * load(data + i + k * kLanes);
            asm volatile("" ::: "memory");
        }
        vec total = {};
        for (int k = 0; k < kChains; ++k) total += acc[k];
        sink = sum(total) * 0.0f;
    });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
