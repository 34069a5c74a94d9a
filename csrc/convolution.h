// A convolution and a pooling axis as their callers describe them: checked, and turned into products and windows.
//
// All that a caller's numbers can be wrong in is found here or by the kernels as they read the pattern. What is left
// to the caller is that addresses point to as much memory as sizes and strides say.
#pragma once
#include <array>
#include <stdexcept>
#include <vector>

#include "api.h"

namespace sparse_ft {

using Four = std::array<int64_t, 4>;
using Two = std::array<int64_t, 2>;

// A convolution's description as its callers hold it; a linear layer is a 1 x 1 convolution of one position.
struct Convolution {
    Four weight;                    // (out_channels, in_channels / groups, kernel_h, kernel_w)
    Two stride, padding, dilation;  // padding: rows above, columns left
    int64_t groups;
    Two end_padding{};  // rows below, columns right: only the output's size depends on them
    int64_t out_per_group() const { return weight[0] / groups; }
};

inline void require(bool condition, const char* text) {
    if (!condition) throw std::invalid_argument(text);
}

inline void check(const Convolution& c) {
    for (int64_t size : c.weight) require(size >= 0 && size <= INT32_MAX, "a weight dimension is out of range");
    require(c.groups >= 1 && c.groups <= INT32_MAX && c.weight[0] % c.groups == 0,
            "out_channels is not divisible by groups");
    require(c.weight[2] >= 1 && c.weight[3] >= 1 && c.weight[2] * c.weight[3] <= kMaxTaps,
            "kernel size is out of range");
    require(c.weight[1] * c.weight[2] * c.weight[3] <= INT32_MAX,
            "a row of the weight is too long for 32-bit indices");
    for (int i = 0; i < 2; ++i)
        require(c.stride[i] >= 1 && c.stride[i] <= 64 && c.dilation[i] >= 1 && c.dilation[i] <= (1 << 20) &&
                    c.dilation[i] * c.weight[size_t(2 + i)] <= (1 << 20) && c.padding[i] >= 0 &&
                    c.padding[i] <= (1 << 20) && c.end_padding[i] >= 0 && c.end_padding[i] <= (1 << 20),
                "stride, padding, dilation or dilation times kernel size is out of range");
    require(c.stride[0] * c.stride[1] * c.weight[1] <= INT32_MAX / c.groups,
            "stride times in_channels is too large for 32-bit indices");
}

inline std::vector<int32_t> forward_taps(const Convolution& c, int axis) {
    std::vector<int32_t> taps(static_cast<size_t>(c.weight[size_t(2 + axis)]));
    for (size_t k = 0; k < taps.size(); ++k)
        taps[k] = int32_t(int64_t(k) * c.dilation[size_t(axis)] - c.padding[size_t(axis)]);
    return taps;
}

// Offsets into the output gradient for destinations of one stride phase.
inline std::vector<int32_t> gradient_taps(const Convolution& c, int axis, int64_t phase) {
    std::vector<int32_t> taps(static_cast<size_t>(c.weight[size_t(2 + axis)]));
    const int64_t stride = c.stride[size_t(axis)];
    for (size_t k = 0; k < taps.size(); ++k) {
        const int64_t distance = phase + c.padding[size_t(axis)] - int64_t(k) * c.dilation[size_t(axis)];
        taps[k] = distance % stride == 0 ? int32_t(distance / stride) : kNoTap;
    }
    return taps;
}

// The forward direction of a convolution: the plane and taps that forward and weight gradient share.
struct ForwardProduct {
    std::vector<int32_t> tap_y, tap_x;
    Plane plane;
    Product product{};

    ForwardProduct(const Convolution& c, const Four& size, View x, Two out_size, const int32_t* row_ptr,
                   const int32_t* col, int64_t nnz, Programs* programs, int threads)
        : tap_y(forward_taps(c, 0)),
          tap_x(forward_taps(c, 1)),
          plane{row_ptr, out_size[0], out_size[1], 0, 0, tap_y.data(), tap_x.data()} {
        product.geometry = {size[0], c.groups, c.out_per_group(), c.weight[1], c.weight[2], c.weight[3],
                            size[2], size[3],  c.stride[0],       c.stride[1], 1,           1};
        product.plane_count = 1;
        product.planes = &plane;
        product.nnz = nnz;
        product.col = col;
        product.source = x;
        product.programs = programs;
        product.threads = threads;
    }
    ForwardProduct(const ForwardProduct&) = delete;  // the product points into it
};

// The input gradient of a convolution: a plane for each phase of the stride.
struct InputGradProduct {
    std::vector<std::vector<int32_t>> taps_y, taps_x;
    std::vector<Plane> planes;
    Product product{};

    InputGradProduct(const Convolution& c, const Four& size, View grad, Two out_size, View grad_x,
                     const int32_t* t_row_ptr, const int32_t* t_col, const int32_t* perm, const float* values,
                     int64_t nnz, Programs* programs, int threads) {
        const int64_t channels = c.weight[1] * c.groups;
        for (int64_t i = 0; i < c.stride[0]; ++i) taps_y.push_back(gradient_taps(c, 0, i));
        for (int64_t i = 0; i < c.stride[1]; ++i) taps_x.push_back(gradient_taps(c, 1, i));
        for (int64_t i = 0; i < c.stride[0]; ++i)
            for (int64_t k = 0; k < c.stride[1]; ++k)
                planes.push_back({t_row_ptr + (i * c.stride[1] + k) * channels,
                                  size[2] > i ? (size[2] - i + c.stride[0] - 1) / c.stride[0] : 0,
                                  size[3] > k ? (size[3] - k + c.stride[1] - 1) / c.stride[1] : 0, i, k,
                                  taps_y[size_t(i)].data(), taps_x[size_t(k)].data()});
        product.geometry = {size[0],     c.groups,    c.weight[1], c.out_per_group(),
                            c.weight[2], c.weight[3], out_size[0], out_size[1],
                            1,           1,           c.stride[0], c.stride[1]};
        product.plane_count = int64_t(planes.size());
        product.planes = planes.data();
        product.nnz = nnz;
        product.col = t_col;
        product.perm = perm;
        product.values = values;
        product.source = grad;
        product.dest = grad_x;
        product.programs = programs;
        product.threads = threads;
    }
    InputGradProduct(const InputGradProduct&) = delete;  // the product points into it
};

inline PatternShape pattern_shape(const Convolution& c) {
    check(c);
    return {c.weight[0], c.weight[1],  c.weight[2],  c.weight[3],   c.groups,     c.stride[0],
            c.stride[1], c.padding[0], c.padding[1], c.dilation[0], c.dilation[1]};
}

// Pooling windows along one axis, as callers hold them.
struct PoolAxis {
    std::vector<int32_t> first, low, high;
    std::vector<float> scale;
    Windows windows;

    // Windows of `taps` positions at a distance of `step`, clipped to the axis.
    PoolAxis(int64_t size, std::vector<int32_t> starts, int32_t taps, int32_t step, std::vector<float> scales)
        : first(std::move(starts)), scale(std::move(scales)) {
        require(size >= 0 && size <= INT32_MAX && taps >= 1 && taps <= (1 << 20) && step >= 1 && step <= (1 << 20),
                "a pooling window is out of range");
        for (int64_t start : first) {
            int64_t begin = 0, end = 0;
            while (begin < taps && start + begin * step < 0) ++begin;
            for (end = begin; end < taps && start + end * step < size;) ++end;
            low.push_back(int32_t(begin));
            high.push_back(int32_t(end));
        }
        windows = {size, int64_t(first.size()), step, taps, first.data(), low.data(), high.data(), scale.data()};
    }
    // Windows that each end where `ends` says.
    PoolAxis(int64_t size, std::vector<int32_t> starts, const std::vector<int32_t>& ends, std::vector<float> scales)
        : first(std::move(starts)), scale(std::move(scales)) {
        require(first.size() == ends.size() && first.size() == scale.size(), "pooling windows of different counts");
        for (size_t i = 0; i < first.size(); ++i) {
            require(first[i] >= 0 && first[i] <= ends[i] && ends[i] <= size, "a pooling window is out of range");
            low.push_back(0);
            high.push_back(ends[i] - first[i]);
        }
        windows = {size, int64_t(first.size()), 1, 1, first.data(), low.data(), high.data(), scale.data()};
    }
    PoolAxis(const PoolAxis&) = delete;  // the windows point into it
};

inline Element element_of(int code) {
    require(code >= 0 && code <= int(Element::kBfloat16), "no such type of elements");
    return Element(code);
}

inline bool is_activation(int code) { return code >= 0 && code <= int(Activation::kGeluTanh); }
inline Activation activation_of(int code) {
    require(is_activation(code), "no such activation");
    return Activation(code);
}

}  // namespace sparse_ft
