// A sparse layer at the Python edge: its activations and its weight as torch's tensors, and how the products take
// them.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <optional>

#include "convolution.h"
#include "edge.h"
#include "tensor.h"

namespace sparse_ft {

// A layer's activation as the products take it.
struct Place {
    Four size{}, stride{};
    Two positions() const { return {size[2], size[3]}; }
};

// A 1 x 1 convolution without stride or padding is one position with N*H*W samples.
inline bool is_flat(const Convolution& c) {
    constexpr Two zero{0, 0}, one{1, 1};
    return c.weight[2] == 1 && c.weight[3] == 1 && c.stride == one && c.padding == zero && c.end_padding == zero;
}

inline Place batch_last(const int64_t* sizes, bool flat) {
    const int64_t n = sizes[0], c = sizes[1], h = sizes[2], w = sizes[3];
    if (flat) return {{n * h * w, c, 1, 1}, {1, h * w * n, 0, 0}};
    return {{n, c, h, w}, {1, h * w * n, w * n, n}};
}

inline Place token_major(int64_t tokens, int64_t features) { return {{tokens, features, 1, 1}, {features, 1, 0, 0}}; }

inline View view(void* data, const Place& place) {
    const Four& s = place.stride;
    return {data, s[0], s[1], s[2], s[3]};
}

inline int64_t count(const Place& place) { return place.size[0] * place.size[1] * place.size[2] * place.size[3]; }

// (N, O, OH, OW), or nothing where the sizes do not fit.
inline std::optional<Four> output_sizes(const Convolution& c, const int64_t* sizes) {
    if (sizes[1] != c.weight[1] * c.groups) return std::nullopt;
    Four out{sizes[0], c.weight[0]};
    for (size_t i = 0; i < 2; ++i) {
        const int64_t room =
            sizes[2 + i] + c.padding[i] + c.end_padding[i] - c.dilation[i] * (c.weight[2 + i] - 1) - 1;
        if (room < 0) return std::nullopt;
        out[2 + i] = room / c.stride[i] + 1;
    }
    return out;
}

// Values, bias and index tensors, in the order of SparsePattern's.
class Weight {
  public:
    Weight(const Convolution& c, pybind11::handle pattern, pybind11::handle values, pybind11::handle bias) {
        const auto tensors = pybind11::reinterpret_borrow<pybind11::sequence>(pattern);
        if (tensors.size() != index.size()) return;
        for (size_t i = 0; i < index.size(); ++i) index[i] = Tensor(tensors[i]);
        nnz = index[1].count();
        const int64_t columns = c.stride[0] * c.stride[1] * c.weight[1] * c.groups;
        fits = index[0].is_indices(c.weight[0] + 1) && index[1].is_indices(nnz) && index[2].is_indices(columns + 1) &&
               index[3].is_indices(nnz) && index[4].is_indices(nnz);
        const Tensor v(values), b(bias);
        fits = fits && (!v.given() || v.is_floats(nnz)) && (!b.given() || b.is_floats(c.weight[0]));
        valued = v.given();
        this->values = v.data<const float>();
        this->bias = b.data<const float>();
    }
    const int32_t* row_ptr() const { return index[0].data<const int32_t>(); }
    const int32_t* col() const { return index[1].data<const int32_t>(); }
    const int32_t* t_row_ptr() const { return index[2].data<const int32_t>(); }
    const int32_t* t_col() const { return index[3].data<const int32_t>(); }
    const int32_t* perm() const { return index[4].data<const int32_t>(); }

    bool fits = false, valued = false;
    int64_t nnz = 0;
    const float *values = nullptr, *bias = nullptr;

  private:
    std::array<Tensor, 5> index;
};

inline int threads_of(const Weight& weight, const Place& x, const Place& y, int most) {
    return threads_for(2 * weight.nnz * (y.size[0] * y.size[2] * y.size[3]), count(x) + count(y), most);
}

inline bool is_image(const Tensor& x) { return x.is_activation() && x.is_batch_last(); }
inline bool is_image_of(const Tensor& x, Element element, const int64_t* sizes) {
    return is_image(x) && x.element() == element && std::equal(sizes, sizes + 4, x.sizes());
}

}  // namespace sparse_ft
