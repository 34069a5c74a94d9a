// The Python edge: addresses and sizes in, errors out (layers: products.cpp, norms.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <stdexcept>
#include <vector>

#include "api.h"
#include "block.h"
#include "convolution.h"
#include "dispatch.h"
#include "edge.h"
#include "pages.h"
#include "positions.h"
#include "programs.h"
#include "tensor.h"

namespace py = pybind11;
using namespace sparse_ft;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

View view(Address data, const Four& stride) { return {at<void>(data), stride[0], stride[1], stride[2], stride[3]}; }

// Works on the bytes of a file without the interpreter's lock; what is wrong with them becomes a ValueError.
template <class Decoder>
void decode(const Decoder& decoder) {
    const char* problem;
    {
        py::gil_scoped_release release;
        problem = decoder();
    }
    if (problem != nullptr) throw std::invalid_argument(problem);
}

// A compact activation as Python holds it: sizes (blocks, channels, height, width); samples (all, of a block, of a
// column) and the step of its columns.
Compact compact(const Four& size, const Four& lanes, Address bits, Address start, Address values) {
    return {size[0],
            size[1],
            size[2],
            size[3],
            lanes[0],
            lanes[1],
            lanes[2],
            lanes[3],
            at<const uint8_t>(bits),
            at<const int64_t>(start),
            at<const float>(values)};
}

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
    return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of sparse_ft; see csrc/api.h. Layers take tensors, the rest raw addresses and sizes.";
    find_exchange();

    py::class_<Convolution>(m, "Convolution")
        .def(py::init([](Four weight, Two stride, Four padding, Two dilation, int64_t groups) {
                 const Two begin{padding[0], padding[1]}, end{padding[2], padding[3]};
                 const Convolution c{weight, stride, begin, dilation, groups, end};
                 check(c);
                 return c;
             }),
             py::arg("weight"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"));

    py::class_<Programs>(m, "Programs", "Generated kernels of one pattern; they die with it.").def(py::init<>());

    m.def("block", [](int element, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
        return new_tensor(element_of(element), shape, strides).object;
    });
    m.def("keep_blocks", &keep_blocks);
    m.def("release_blocks", &release_blocks);
    m.def("ask_for_huge_heap", &ask_for_huge_heap);
    m.def("threads", &threads_for);
    m.def("untransformed", &untransformed);
    m.def("unwatched", &unwatched);
    m.def("versions_of", &versions_of);
    m.def("state_of", &state_of);

    bind_products(m);
    bind_norms(m);

    m.def("count_nonzero", [](Address weight, int64_t numel, int threads) {
        py::gil_scoped_release release;
        return count_nonzero(at<const float>(weight), numel, threads);
    });
    m.def("count_true", [](Address mask, int64_t numel, int threads) {
        py::gil_scoped_release release;
        return count_true(at<const uint8_t>(mask), numel, threads);
    });
    m.def("fingerprint", [](Address values, int64_t count) {
        py::gil_scoped_release release;
        return fingerprint(at<const int32_t>(values), count);
    });
    m.def("build_rows", [](Address weight, Address mask, int64_t rows, int64_t cols, Address row_ptr, Address col,
                           Address values, int threads) {
        py::gil_scoped_release release;
        build_rows(at<const float>(weight), at<const uint8_t>(mask), rows, cols, at<int32_t>(row_ptr),
                   at<int32_t>(col), at<float>(values), threads);
    });
    m.def("build_transpose", [](const Convolution& c, Address row_ptr, Address col, int64_t nnz, Address t_row_ptr,
                                Address t_col, Address perm) {
        const PatternShape shape = pattern_shape(c);
        const char* problem;
        {
            py::gil_scoped_release release;
            problem = validate_rows(at<const int32_t>(row_ptr), c.weight[0], at<const int32_t>(col), nnz,
                                    c.weight[1] * c.weight[2] * c.weight[3]);
            if (problem == nullptr)
                build_transpose(shape, at<const int32_t>(row_ptr), at<const int32_t>(col), at<int32_t>(t_row_ptr),
                                at<int32_t>(t_col), at<int32_t>(perm));
        }
        raise(problem);
    });

    m.def("decode_gaps", [](Address code, int64_t size, int64_t count, int64_t numel, Address positions) {
        decode([&] { return decode_gaps(at<const uint8_t>(code), size, count, numel, at<int32_t>(positions)); });
    });
    m.def("decode_bitmap", [](Address bitmap, int64_t numel, int64_t count, Address positions) {
        decode([&] { return decode_bitmap(at<const uint8_t>(bitmap), numel, count, at<int32_t>(positions)); });
    });
    // Of each weight: address and size of its code, whether that is of gaps; address, number and size of its values;
    // address and number of the elements that they go to. Gives back how many values are zero, and what is wrong.
    m.def("unpack",
          [](const std::vector<std::tuple<Address, int64_t, bool, Address, int64_t, int64_t, Address, int64_t>>& given,
             int threads) {
              std::vector<StoredWeight> weights;
              for (const auto& [code, code_size, is_gaps, values, count, item_size, dense, numel] : given)
                  weights.push_back({at<const uint8_t>(code), code_size, is_gaps, at<const void>(values), count,
                                     item_size, at<void>(dense), numel, 0, nullptr});
              {
                  py::gil_scoped_release release;
                  unpack(weights.data(), int64_t(weights.size()), threads);
              }
              std::vector<std::pair<int64_t, std::optional<std::string>>> results;
              for (const StoredWeight& weight : weights) {
                  results.emplace_back(weight.zeros, std::nullopt);
                  if (weight.problem != nullptr) results.back().second = weight.problem;
              }
              return results;
          });

    py::class_<PoolAxis>(m, "PoolAxis")
        .def(py::init([](int64_t size, std::vector<int32_t> first, int32_t taps, int32_t step) {
            return std::make_unique<PoolAxis>(size, std::move(first), taps, step, std::vector<float>());
        }))
        .def(py::init(
            [](int64_t size, std::vector<int32_t> first, const std::vector<int32_t>& end, std::vector<float> scale) {
                return std::make_unique<PoolAxis>(size, std::move(first), end, std::move(scale));
            }));
    m.def("pool_forward", [](int element, const PoolAxis& y, const PoolAxis& x, int64_t batch, int64_t channels,
                             Address input, Address output, Address chosen, int threads) {
        const Pool q{batch,
                     channels,
                     element_of(element),
                     y.windows,
                     x.windows,
                     at<const void>(input),
                     at<void>(output),
                     at<uint8_t>(chosen),
                     nullptr,
                     nullptr,
                     threads};
        py::gil_scoped_release release;
        active_kernels().pool_forward(q);
    });
    m.def("pool_backward", [](int element, const PoolAxis& y, const PoolAxis& x, int64_t batch, int64_t channels,
                              Address grad, Address chosen, Address grad_input, int threads) {
        const Pool q{batch,
                     channels,
                     element_of(element),
                     y.windows,
                     x.windows,
                     nullptr,
                     nullptr,
                     at<uint8_t>(chosen),
                     at<const void>(grad),
                     at<void>(grad_input),
                     threads};
        py::gil_scoped_release release;
        active_kernels().pool_backward(q);
    });
    m.def("transpose", [](int element, Address from, Address to, Two batch, Two size,
                          std::array<int64_t, 3> from_stride, std::array<int64_t, 3> to_stride, int threads) {
        const Transpose q{element_of(element),
                          at<const void>(from),
                          at<void>(to),
                          batch[0],
                          batch[1],
                          size[0],
                          size[1],
                          from_stride[0],
                          from_stride[1],
                          from_stride[2],
                          to_stride[0],
                          to_stride[1],
                          to_stride[2],
                          threads};
        py::gil_scoped_release release;
        active_kernels().transpose(q);
    });

    m.def("dropout", [](int element, Address x, Address y, int64_t size, int64_t seed, uint32_t least_kept,
                        float scale, int threads) {
        const Dropout q{
            element_of(element), size, at<const void>(x), at<void>(y), uint64_t(seed), least_kept, scale, threads};
        py::gil_scoped_release release;
        active_kernels().dropout(q);
    });

    m.def("nth_magnitude", [](Address x, int64_t count, int64_t n, int threads) {
        py::gil_scoped_release release;
        return nth_magnitude(at<const float>(x), count, n, threads);
    });
    m.def("mask_largest", [](Address x, int64_t count, int64_t keep, Address mask, int threads) {
        py::gil_scoped_release release;
        mask_largest(at<const float>(x), count, keep, at<uint8_t>(mask), threads);
    });
    m.def("compact_bits", [](const Four& size, const Four& lanes, Address x, const Four& stride, float threshold,
                             Address bits, Address counts, int threads) {
        const Compact a = compact(size, lanes, 0, 0, 0);
        py::gil_scoped_release release;
        active_kernels().compact_bits(a, view(x, stride), threshold, at<uint8_t>(bits), at<int64_t>(counts), threads);
    });
    m.def("compact_values", [](const Four& size, const Four& lanes, Address bits, Address start, Address x,
                               const Four& stride, Address values, int threads) {
        const Compact a = compact(size, lanes, bits, start, 0);
        py::gil_scoped_release release;
        active_kernels().compact_values(a, view(x, stride), at<float>(values), threads);
    });
    m.def("compact_expand", [](const Four& size, const Four& lanes, Address bits, Address start, Address values,
                               Address x, const Four& stride, int threads) {
        const Compact a = compact(size, lanes, bits, start, values);
        py::gil_scoped_release release;
        active_kernels().compact_expand(a, view(x, stride), threads);
    });
    m.def("compact_gradient",
          [](const Convolution& c, const Four& size, const Four& lanes, Address bits, Address start, Address values,
             Two out_size, Address grad, const Four& grad_stride, Address weight_grad, int threads) {
              const CompactGradient q{pattern_shape(c),
                                      compact(size, lanes, bits, start, values),
                                      out_size[0],
                                      out_size[1],
                                      view(grad, grad_stride),
                                      at<float>(weight_grad),
                                      threads};
              py::gil_scoped_release release;
              return active_kernels().compact_gradient(q);
          });

    m.def("count_rows_above", [](Address weight, int64_t rows, int64_t cols, float threshold, Address taps,
                                 int64_t tap_count, Address row_ptr, int threads) {
        const RowsAbove q{at<const float>(weight), rows, cols, threshold, at<const uint8_t>(taps), tap_count, threads};
        py::gil_scoped_release release;
        return active_kernels().count_rows_above(q, at<int32_t>(row_ptr));
    });
    m.def("build_rows_above",
          [](const Convolution& c, Address weight, float threshold, Address taps, Address row_ptr, Address col,
             Address values, Address t_row_ptr, Address t_col, Address perm, int threads) {
              const PatternShape shape = pattern_shape(c);
              const int64_t tap_count = c.weight[2] * c.weight[3];
              const RowsAbove q{at<const float>(weight),
                                c.weight[0],
                                c.weight[1] * tap_count,
                                threshold,
                                at<const uint8_t>(taps),
                                tap_count,
                                threads};
              py::gil_scoped_release release;
              active_kernels().fill_rows_above(q, at<int32_t>(row_ptr), at<int32_t>(col), at<float>(values));
              build_transpose(shape, at<const int32_t>(row_ptr), at<const int32_t>(col), at<int32_t>(t_row_ptr),
                              at<int32_t>(t_col), at<int32_t>(perm), threads);
          });

    m.def("available_isas", &available, "Instruction sets that this processor can run, best first.");
    m.def("active_isa", [] { return std::string(active_kernels().name); });
    m.def("activate_isa", [](const std::string& name) { return activate_kernels(name.c_str()); });
    m.def("lanes", [] { return active_kernels().lanes; });
    m.def(
        "fma_peak", [](double seconds) { return active_kernels().fma_peak(seconds); },
        "GF/s of one thread, fused multiply-adds from registers.");
    m.def(
        "load_fma_peak", [](int64_t bytes, double seconds) { return active_kernels().load_fma_peak(bytes, seconds); },
        "GF/s of one thread, one vector load per fused multiply-add over a buffer of so many bytes.");
}
