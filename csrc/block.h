// Memory for results.
//
// torch allocates with posix_memalign. There glibc (before 2.38 at least) asks for the size and a little more, so that
// a freed block never fits a request of its own size: the heap of a training step grows to about twice what is in use.
// Blocks from malloc, aligned here, are found again.
//
// Large ones that are freed are kept for the next results of about their size: an allocator hands them back to the
// system (glibc from 32 MB on, whatever it has learned), and then every page of the next one costs a fault. With those
// in use they take at most half more than ever was in use at once, counted in whole blocks: without that half, blocks
// of one size would be given back for those of another in every pass.
//
// Large ones ask for huge pages (pages.h).
#pragma once
#include <cstdint>
#include <vector>

#include "api.h"

namespace sparse_ft {

// What DLPack (https://dmlc.github.io/dlpack/latest/c_api.html), version 1, hands over: a tensor, and with who frees
// it.
struct DLTensor {
    void* data;
    struct {
        int32_t type, id;
    } device;
    int32_t dimensions;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};
struct DLManagedTensorVersioned {
    struct {
        uint32_t major, minor;
    } version;
    void* context;
    void (*deleter)(DLManagedTensorVersioned*);
    uint64_t flags;
    DLTensor tensor;
};

// An uninitialised tensor on CPU; sizes and strides in elements must be of a dense one. Null: no memory.
DLManagedTensorVersioned* make_block(Element element, const std::vector<int64_t>& shape,
                                     const std::vector<int64_t>& strides);

bool keep_blocks(bool keep);  // whether large blocks are kept, as they are from the start; whether they were
int64_t release_blocks();     // gives the kept ones back; how many bytes that were

}  // namespace sparse_ft
