// Both products of a rectangle of taps in one channel: a source vector is loaded once for all the positions of a block
// that read it, so that a 3x3 window costs about half a load a multiply-add and runs at the speed of memory.
#pragma once
#include <type_traits>

#include "element.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

// A nonzero at the positions that it reaches.
struct Tap {
    int64_t offset;  // from the position's own place in the source
    float weight;
    int32_t index;  // among the channel's nonzeros
};

// Positions of one row that a window's taps all reach. Distances in elements.
template <class T>
struct WindowRow {
    const T* source;                    // of the first position's first tap
    int64_t source_row, source_column;  // from one tap to the next
    T* to;                              // sums: of the first position
    const T* grad;                      // products: of the first position
    int64_t step;                       // of these, from one position to the next
    int64_t positions, lanes;           // lanes: a multiple of kLanes
};

// H x W taps, positions S apart in the source; V positions at a time with L vectors of lanes each. All loops are
// unrolled, and memory is read in its own order.
template <class T, int H, int W, int S, int V, int L>
struct WindowBlock {
    static constexpr int kColumns = W + (V - 1) * S;
    static constexpr int kLine = sizeof(vec) == kLanes * sizeof(T) ? 1 : 2;  // vectors that a fetch brings
    static constexpr int64_t kAhead = 4096 / sizeof(T);                      // what comes while memory answers

    SPARSE_FT_INLINE static void sums(const WindowRow<T>& r, const T* x, const Tap* taps, float bias, T* to,
                                      bool around) {
        vec total[V * L];
        fetch_source(r, x);
#pragma GCC unroll 8
        for (int i = 0; i < V * L; ++i) total[i] = splat(bias);
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h, x += r.source_row)
#pragma GCC unroll 24
            for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 2
                for (int l = 0; l < L; ++l) {
                    const vec value = in_register(load(x + c * r.source_column + l * kLanes));
#pragma GCC unroll 8
                    for (int v = 0; v < V; ++v)
                        if (c >= v * S && c < v * S + W)
                            total[v * L + l] += splat(taps[h * W + c - v * S].weight) * value;
                }
#pragma GCC unroll 8
        for (int i = 0; i < V * L; ++i) {
            T* place = to + i / L * r.step + i % L * kLanes;
            around ? store_around(place, total[i]) : store(place, total[i]);
        }
    }

    SPARSE_FT_INLINE static void products(const WindowRow<T>& r, const T* x, const T* grad, vec* total) {
        vec g[V * L];
        fetch_source(r, x);
#pragma GCC unroll 8
        for (int i = 0; i < V * L; ++i) {
            const T* place = grad + i / L * r.step + i % L * kLanes;
            if (i % L % kLine == 0) prefetch(place + kAhead);
            g[i] = in_register(load(place));
        }
        // Column by column, so that no two products in a row wait for the same sum.
#pragma GCC unroll 24
        for (int c = 0; c < kColumns; ++c, x += r.source_column)
#pragma GCC unroll 8
            for (int h = 0; h < H; ++h)
#pragma GCC unroll 2
                for (int l = 0; l < L; ++l) {
                    const vec value = in_register(load(x + h * r.source_row + l * kLanes));
#pragma GCC unroll 8
                    for (int v = 0; v < V; ++v)
                        if (c >= v * S && c < v * S + W) total[h * W + c - v * S] += g[v * L + l] * value;
                }
    }

    // A row of positions reads S rows that the row before it did not.
    SPARSE_FT_INLINE static void fetch_source(const WindowRow<T>& r, const T* x) {
#pragma GCC unroll 2
        for (int h = H > S ? H - S : 0; h < H; ++h)
#pragma GCC unroll 16
            for (int i = 0; i < V * S * L; ++i)
                if (i % L % kLine == 0)
                    prefetch(x + h * r.source_row + i / L * r.source_column + i % L * kLanes + kAhead);
    }
};

template <class T, int H, int W, int S>
struct Window {
    static constexpr int kVectors = kLanes == 16 && H * W <= 9 ? 8 : 4;  // of a block: as many as leave registers

    static void sums(const WindowRow<T>& r, const Tap* taps, float bias, bool around) {
        each_block(r, [&](auto block, int64_t from, int64_t to) __attribute__((always_inline)) {
            decltype(block)::sums(r, r.source + from, taps, bias, r.to + to, around);
        });
    }
    // Added to `sums`, a vector for each of the channel's nonzeros.
    static void products(const WindowRow<T>& r, const Tap* taps, float* sums) {
        vec total[H * W];
#pragma GCC unroll 25
        for (int k = 0; k < H * W; ++k) total[k] = load(sums + taps[k].index * kLanes);
        each_block(r, [&](auto block, int64_t from, int64_t grad) __attribute__((always_inline)) {
            decltype(block)::products(r, r.source + from, r.grad + grad, total);
        });
#pragma GCC unroll 25
        for (int k = 0; k < H * W; ++k) store(sums + taps[k].index * kLanes, total[k]);
    }

  private:
    template <class Body>
    SPARSE_FT_INLINE static void each_block(const WindowRow<T>& r, Body body) {
        if (r.lanes % (2 * kLanes) == 0)
            blocks_of<2>(r, body);
        else
            blocks_of<1>(r, body);
    }
    template <int L, class Body>
    SPARSE_FT_INLINE static void blocks_of(const WindowRow<T>& r, Body body) {
        // Code for every remainder takes a good part of the build: bfloat16 makes do with the half.
        constexpr bool kEvery = std::is_same_v<T, float>;
        constexpr int kBlock = kEvery || kVectors / L < 4 ? kVectors / L : 4;
        int64_t i = 0;
        for (; i + kBlock <= r.positions; i += kBlock) block_of<kBlock, L>(r, i, body);
        if constexpr (kEvery && kBlock > 4)
            if (i + 4 <= r.positions) block_of<4, L>(r, i, body), i += 4;
        if constexpr (kEvery && kBlock > 2)
            if (i + 2 <= r.positions) block_of<2, L>(r, i, body), i += 2;
        for (; i < r.positions; ++i) block_of<1, L>(r, i, body);
    }
    template <int V, int L, class Body>
    SPARSE_FT_INLINE static void block_of(const WindowRow<T>& r, int64_t i, Body body) {
        for (int64_t lane = 0; lane < r.lanes; lane += L * kLanes)
            body(WindowBlock<T, H, W, S, V, L>{}, i * S * r.source_column + lane, i * r.step + lane);
    }
};

template <class T>
struct WindowKernels {
    void (*sums)(const WindowRow<T>&, const Tap*, float bias, bool around);
    void (*products)(const WindowRow<T>&, const Tap*, float* sums);
};

template <class T, int H, int W, int S>
constexpr WindowKernels<T> window_kernels() {
    return {Window<T, H, W, S>::sums, Window<T, H, W, S>::products};
}

// Those of a rectangle, or null where there are none. Parts of a 3x3 window occur at borders and in the input
// gradients of strides.
template <class T>
inline const WindowKernels<T>* find_window(int64_t height, int64_t width, int64_t step) {
    if constexpr (kLanes == 4) {  // the portable set makes do without: they are a good part of a build
        return nullptr;
    } else {
        static constexpr WindowKernels<T> whole[3][3] = {
            {window_kernels<T, 1, 1, 1>(), window_kernels<T, 1, 2, 1>(), window_kernels<T, 1, 3, 1>()},
            {window_kernels<T, 2, 1, 1>(), window_kernels<T, 2, 2, 1>(), window_kernels<T, 2, 3, 1>()},
            {window_kernels<T, 3, 1, 1>(), window_kernels<T, 3, 2, 1>(), window_kernels<T, 3, 3, 1>()},
        };
        static constexpr WindowKernels<T> strided[2][2] = {
            {window_kernels<T, 2, 2, 2>(), window_kernels<T, 2, 3, 2>()},
            {window_kernels<T, 3, 2, 2>(), window_kernels<T, 3, 3, 2>()}};
        static constexpr WindowKernels<T> five[2] = {window_kernels<T, 5, 5, 1>(), window_kernels<T, 5, 5, 2>()};
        if (height == 5 && width == 5 && step <= 2) return &five[step - 1];
        if (height > 3 || width > 3) return nullptr;
        if (step == 1) return &whole[height - 1][width - 1];
        return step == 2 && height > 1 && width > 1 ? &strided[height - 2][width - 2] : nullptr;
    }
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
