// The Python edge: addresses and sizes in, errors out. Everything else in csrc/ knows no Python.
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
#include "positions.h"
#include "programs.h"

namespace py = pybind11;
using namespace sparse_ft;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

View view(Address data, const Four& stride) { return {at<void>(data), stride[0], stride[1], stride[2], stride[3]}; }

void raise(const char* problem) {
    if (problem != nullptr) throw std::invalid_argument(std::string("malformed sparse pattern: ") + problem);
}

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

// Runs one kernel without the interpreter's lock; a malformed pattern becomes a ValueError.
template <class Task>
void run(const char* (*kernel)(const Task&), const Task& task) {
    const char* problem;
    {
        py::gil_scoped_release release;
        problem = kernel(task);
    }
    raise(problem);
}

// A norm of a product's source as Python holds it: mean, 1 / standard deviation, weight and bias (which may be null),
// and the activation.
using NormArguments = std::optional<std::tuple<Address, Address, Address, Address, int>>;

class Entrance {
  public:
    Entrance(const NormArguments& arguments, int64_t channels) {
        if (!arguments) return;
        const auto& [mean, rstd, weight, bias, activation] = *arguments;
        scale.assign(at<const float>(rstd), at<const float>(rstd) + channels);
        if (weight)
            for (int64_t c = 0; c < channels; ++c) scale[size_t(c)] *= at<const float>(weight)[c];
        offset.assign(size_t(channels), 0.0f);
        if (bias) std::copy_n(at<const float>(bias), channels, offset.begin());
        norm = {at<const float>(mean), scale.data(), offset.data(), activation_of(activation)};
        given = true;
    }
    Entrance(const Entrance&) = delete;  // the norm points into it
    const SourceNorm* get() const { return given ? &norm : nullptr; }

  private:
    std::vector<float> scale, offset;
    SourceNorm norm{};
    bool given = false;
};

// A norm of a product's results: mean, variance, weight, bias, eps, residual, and the activation. Any address may be
// null; without a variance there is no norm.
using ResultArguments = std::optional<std::tuple<Address, Address, Address, Address, float, Address, int>>;

class Exit {
  public:
    Exit(const ResultArguments& arguments, int64_t rows) {
        if (!arguments) return;
        const auto& [mean, variance, weight, bias, eps, residual, activation] = *arguments;
        scale.assign(size_t(rows), 1.0f);
        for (int64_t r = 0; variance && r < rows; ++r) {
            const float rstd = reciprocal_deviation(at<const float>(variance)[r], eps);
            scale[size_t(r)] = rstd * (weight ? at<const float>(weight)[r] : 1.0f);
        }
        if (!mean || !bias) zeros.assign(size_t(rows), 0.0f);
        norm = {mean ? at<const float>(mean) : zeros.data(), scale.data(), bias ? at<const float>(bias) : zeros.data(),
                at<const void>(residual), activation_of(activation)};
        given = true;
    }
    Exit(const Exit&) = delete;  // the norm points into it
    const ResultNorm* get() const { return given ? &norm : nullptr; }

  private:
    std::vector<float> scale, zeros;
    ResultNorm norm{};
    bool given = false;
};

// Whether it wrote the mean and the variance of its results, where these addresses are not null.
bool forward(const Convolution& c, int element, const Four& size, Address x, const Four& x_stride, Two out_size,
             Address y, const Four& y_stride, Address row_ptr, Address col, Address values, Address bias, int64_t nnz,
             Programs* programs, int threads, const NormArguments& norm, const ResultArguments& result, Address mean,
             Address variance) {
    check(c);
    const Entrance entrance(norm, size[1]);
    const Exit exit(result, c.weight[0]);
    ForwardProduct f(c, size, view(x, x_stride), out_size, at<const int32_t>(row_ptr), at<const int32_t>(col), nnz,
                     programs, threads);
    f.product.element = element_of(element);
    f.product.norm = entrance.get();
    f.product.result = exit.get();
    f.product.values = at<const float>(values);
    f.product.bias = at<const float>(bias);
    f.product.dest = view(y, y_stride);
    Moments moments{at<float>(mean), at<float>(variance)};
    if (mean) f.product.moments = &moments;
    run(active_kernels().gather_product, f.product);
    return moments.measured;
}

void input_grad(const Convolution& c, int element, const Four& size, Address grad, const Four& grad_stride,
                Two out_size, Address grad_x, const Four& grad_x_stride, Address t_row_ptr, Address t_col,
                Address perm, Address values, int64_t nnz, Programs* programs, int threads) {
    check(c);
    InputGradProduct g(c, size, view(grad, grad_stride), out_size, view(grad_x, grad_x_stride),
                       at<const int32_t>(t_row_ptr), at<const int32_t>(t_col), at<const int32_t>(perm),
                       at<const float>(values), nnz, programs, threads);
    g.product.element = element_of(element);
    run(active_kernels().gather_product, g.product);
}

void weight_grad(const Convolution& c, int element, const Four& size, Address x, const Four& x_stride, Two out_size,
                 Address grad, const Four& grad_stride, Address row_ptr, Address col, Address value_grad,
                 Address row_sums, int64_t nnz, Programs* programs, int threads, const NormArguments& norm) {
    check(c);
    const Entrance entrance(norm, size[1]);
    ForwardProduct f(c, size, view(x, x_stride), out_size, at<const int32_t>(row_ptr), at<const int32_t>(col), nnz,
                     programs, threads);
    f.product.element = element_of(element);
    f.product.norm = entrance.get();
    f.product.grad = view(grad, grad_stride);
    f.product.value_grad = at<float>(value_grad);
    f.product.row_sums = at<float>(row_sums);
    run(active_kernels().sampled_product, f.product);
}

Norm norm_of(int element, Address x, int64_t channels, int64_t size, int activation, Address weight, Address bias,
             Address mean, Address rstd) {
    Norm q{};
    q.element = element_of(element);
    q.activation = activation_of(activation);
    q.x = at<const void>(x);
    q.channels = channels;
    q.size = size;
    q.weight = at<const float>(weight);
    q.bias = at<const float>(bias);
    q.mean = at<float>(mean);
    q.rstd = at<float>(rstd);
    return q;
}

// A norm beside a depthwise convolution: mean, 1 / standard deviation, weight, bias, activation; whether the
// statistics are x's own; and where the gradients of weight and bias go.
using BesideArguments = std::tuple<Address, Address, Address, Address, int, bool, Address, Address>;

Norm beside(const BesideArguments& arguments, int element, Address x, int64_t channels, int64_t size) {
    const auto& [mean, rstd, weight, bias, activation, training, grad_weight, grad_bias] = arguments;
    Norm q = norm_of(element, x, channels, size, activation, weight, bias, mean, rstd);
    q.training = training;
    q.grad_weight = at<float>(grad_weight);
    q.grad_bias = at<float>(grad_bias);
    return q;
}

void check_depthwise(const Convolution& c, const Four& size, const Four& x_stride, const Four& y_stride, Two out) {
    check(c);
    const auto batch_last = [&](const Four& stride, int64_t height, int64_t width) {
        return stride[0] == 1 && stride[1] == height * width * size[0] &&
               (height == 1 || stride[2] == width * size[0]) && (width == 1 || stride[3] == size[0]);
    };
    require(c.groups == c.weight[0] && c.weight[1] == 1, "the convolution is not depthwise");
    require(batch_last(x_stride, size[2], size[3]) && batch_last(y_stride, out[0], out[1]),
            "the activations are not batch-last");
}

void norm_depthwise_forward(const Convolution& c, int element, const Four& size, Address x, const Four& x_stride,
                            Two out_size, Address y, const Four& y_stride, Address row_ptr, Address col,
                            Address values, Address bias, int64_t nnz, int threads, const BesideArguments& inner,
                            Address mean, Address variance) {
    check_depthwise(c, size, x_stride, y_stride, out_size);
    ForwardProduct f(c, size, view(x, x_stride), out_size, at<const int32_t>(row_ptr), at<const int32_t>(col), nnz,
                     nullptr, threads);
    f.product.element = element_of(element);
    f.product.values = at<const float>(values);
    f.product.bias = at<const float>(bias);
    f.product.dest = view(y, y_stride);
    NormDepthwise block{f.product, {}, beside(inner, element, x, size[1], size[0] * size[2] * size[3]), {}};
    block.outer.channels = size[1];
    block.outer.size = size[0] * out_size[0] * out_size[1];
    block.outer.mean = at<float>(mean);
    block.outer.variance = at<float>(variance);
    run(active_kernels().norm_depthwise_forward, block);
}

void norm_depthwise_backward(const Convolution& c, int element, const Four& size, Address x, const Four& x_stride,
                             Two out_size, Address grad, Address y, const Four& y_stride, Address row_ptr, Address col,
                             Address t_row_ptr, Address t_col, Address perm, Address values, int64_t nnz, int threads,
                             const BesideArguments& inner, const BesideArguments& outer, Address grad_x,
                             Address value_grad) {
    check_depthwise(c, size, x_stride, y_stride, out_size);
    ForwardProduct f(c, size, view(x, x_stride), out_size, at<const int32_t>(row_ptr), at<const int32_t>(col), nnz,
                     nullptr, threads);
    InputGradProduct g(c, size, view(0, y_stride), out_size, view(grad_x, x_stride), at<const int32_t>(t_row_ptr),
                       at<const int32_t>(t_col), at<const int32_t>(perm), at<const float>(values), nnz, nullptr,
                       threads);
    f.product.element = g.product.element = element_of(element);
    f.product.value_grad = at<float>(value_grad);
    NormDepthwise block{g.product, f.product, beside(inner, element, x, size[1], size[0] * size[2] * size[3]),
                        beside(outer, element, y, size[1], size[0] * out_size[0] * out_size[1])};
    block.outer.grad = at<const void>(grad);
    run(active_kernels().norm_depthwise_backward, block);
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
    m.doc() = "Native kernels of sparse_ft: raw addresses and sizes; see csrc/api.h.";

    py::class_<Convolution>(m, "Convolution")
        .def(py::init([](Four weight, Two stride, Two padding, Two dilation, int64_t groups) {
                 Convolution c{weight, stride, padding, dilation, groups};
                 check(c);
                 return c;
             }),
             py::arg("weight"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"));

    py::class_<Programs>(m, "Programs", "Generated kernels of one pattern; they die with it.").def(py::init<>());

    m.def("block", [](int element, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
        DLManagedTensor* block = make_block(element_of(element), shape, strides);
        if (block == nullptr) throw std::bad_alloc();
        // Whoever takes the tensor out renames the capsule; until then it owns the block.
        return py::capsule(block, "dltensor", [](PyObject* capsule) {
            if (!PyCapsule_IsValid(capsule, "dltensor")) return;
            auto* unused = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
            unused->deleter(unused);
        });
    });

    m.def("forward", &forward);
    m.def("input_grad", &input_grad);
    m.def("weight_grad", &weight_grad);
    m.def("norm_depthwise_forward", &norm_depthwise_forward);
    m.def("norm_depthwise_backward", &norm_depthwise_backward);

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

    m.def("norm_forward", [](int element, Address x, Address residual, int64_t channels, int64_t size, int activation,
                             Address weight, Address bias, float eps, bool measure, Address mean, Address variance,
                             Address rstd, Address y, int threads) {
        Norm q = norm_of(element, x, channels, size, activation, weight, bias, mean, rstd);
        q.residual = at<const void>(residual);
        q.eps = eps;
        q.measure = measure;
        q.variance = at<float>(variance);
        q.y = at<void>(y);
        q.threads = threads;
        py::gil_scoped_release release;
        active_kernels().norm_forward(q);
    });
    m.def("norm_backward",
          [](int element, Address grad, Address x, Address residual, Address output, int64_t channels, int64_t size,
             int activation, Address weight, Address bias, Address mean, Address rstd, bool training, Address grad_x,
             Address grad_residual, Address grad_weight, Address grad_bias, int threads) {
              Norm q = norm_of(element, x, channels, size, activation, weight, bias, mean, rstd);
              q.grad = at<const void>(grad);
              q.residual = at<const void>(residual);
              q.output = at<const void>(output);
              q.training = training;
              q.grad_x = at<void>(grad_x);
              q.grad_residual = at<void>(grad_residual);
              q.grad_weight = at<float>(grad_weight);
              q.grad_bias = at<float>(grad_bias);
              q.threads = threads;
              py::gil_scoped_release release;
              active_kernels().norm_backward(q);
          });
    m.def("reciprocal_deviation", [](Address variance, int64_t count, float eps, Address rstd) {
        for (int64_t c = 0; c < count; ++c)
            at<float>(rstd)[c] = reciprocal_deviation(at<const float>(variance)[c], eps);
    });
    m.def("update_running", [](Address running, Address measured, int64_t count, float momentum, float correction) {
        for (int64_t c = 0; c < count; ++c) {  // as torch.lerp: exact at both ends
            float& value = at<float>(running)[c];
            const float goal = at<const float>(measured)[c] * correction, way = goal - value;
            value = momentum < 0.5f ? value + momentum * way : goal - way * (1 - momentum);
        }
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
