// torch's tensors at the Python edge, without torch's headers: read and made by DLPack's C exchange interface
// (https://dmlc.github.io/dlpack/latest/c_api.html, version 1.3; torch 2.10 and later). Reading one takes 20 ns;
// asking Python for address, sizes, strides, type and device 0.8 us, which for all of a layer's was more than a small
// one's arithmetic.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "api.h"

namespace sparse_ft {

// To be called before all else; ImportError where torch has no such interface.
void find_exchange();

// Whether no mode, transform or tracer gives torch's functions another meaning.
bool untransformed();

// Whether a call with `args` means to torch what it says: as above, the profiler is off, and those of them that are
// tensors are torch.Tensor or torch.nn.Parameter, and of no other type derived from it. Asked from Python this takes
// seven calls, for every operator.
bool unwatched(const pybind11::args& args);

// How often tensors (or None) have been written to, to see whether they are again; of one that counts no versions
// always the same.
pybind11::bytes versions_of(const pybind11::args& tensors);

// Whether a tensor counts how often it is written to, as none that was made in inference mode does.
bool counts_versions(pybind11::handle tensor);

// Versions and addresses of tensors, to see whether they were written to; None where one counts no versions.
pybind11::object state_of(const pybind11::sequence& tensors);

// A tensor's memory as its owner describes it. It is not kept alive by this: for the length of a call.
class Tensor {
  public:
    Tensor() = default;  // none given
    // Python's None is none given. What has no memory on the CPU (another device, a wrapper) is unreadable.
    explicit Tensor(pybind11::handle object);

    bool given() const { return given_; }
    bool readable() const { return data_ != nullptr || (given_ && count_ == 0); }
    int dimensions() const { return dimensions_; }
    int64_t size(int dimension) const { return sizes_[dimension]; }
    const int64_t* sizes() const { return sizes_; }
    int64_t count() const { return count_; }
    template <class T>
    T* data() const {
        return static_cast<T*>(data_);
    }

    bool is_activation() const {
        return readable() && (code_ == kFloat ? bits_ == 32 : code_ == kBfloat && bits_ == 16);
    }
    Element element() const { return code_ == kFloat ? Element::kFloat : Element::kBfloat16; }  // of an activation
    bool is_contiguous() const;
    bool is_batch_last() const;  // (N, C, H, W) with strides (1, H*W*N, W*N, N); of sizes of one any
    // A contiguous one of `count` float32 or int32.
    bool is_floats(int64_t count) const { return is_row(kFloat, count); }
    bool is_indices(int64_t count) const { return is_row(kInt, count); }
    bool is_bytes() const { return readable() && code_ == kUnsigned && bits_ == 8; }
    bool is_count() const { return readable() && code_ == kInt && bits_ == 64 && count_ == 1; }  // one int64

  private:
    enum : uint8_t { kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4 };  // as DLPack numbers them
    bool is_row(uint8_t code, int64_t count) const {
        return readable() && code_ == code && bits_ == 32 && count_ == count && is_contiguous();
    }
    void* data_ = nullptr;
    bool given_ = false;
    uint8_t code_ = 0, bits_ = 0;
    int dimensions_ = 0;
    int64_t count_ = 0;
    const int64_t *sizes_ = nullptr, *strides_ = nullptr;
};

// A new torch tensor of uninitialised memory (see block.h), and the address of that.
struct NewTensor {
    pybind11::object object;
    void* data;
};
NewTensor new_tensor(Element element, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides);
NewTensor new_batch_last(Element element, const int64_t* sizes);
NewTensor new_contiguous(Element element, const std::vector<int64_t>& sizes);
NewTensor new_floats(int64_t count);

}  // namespace sparse_ft
