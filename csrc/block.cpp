#include "block.h"

#include <cstdlib>
#include <memory>

namespace sparse_ft {
namespace {

constexpr uintptr_t kAlignment = 64;

struct Block {
    DLManagedTensorVersioned managed;
    std::vector<int64_t> shape, strides;
    void* memory;
};

void free_block(DLManagedTensorVersioned* managed) {
    Block* block = static_cast<Block*>(managed->context);
    std::free(block->memory);
    delete block;
}

}  // namespace

DLManagedTensorVersioned* make_block(Element element, const std::vector<int64_t>& shape,
                                     const std::vector<int64_t>& strides) {
    uint64_t bytes = uint64_t(element_bytes(element));
    for (int64_t size : shape)
        if (size < 0 || __builtin_mul_overflow(bytes, uint64_t(size), &bytes)) return nullptr;
    if (bytes > SIZE_MAX - kAlignment) return nullptr;
    std::unique_ptr<Block> block(new Block{{}, shape, strides, std::malloc(size_t(bytes) + kAlignment)});
    if (block->memory == nullptr) return nullptr;
    const uintptr_t start = (reinterpret_cast<uintptr_t>(block->memory) + kAlignment - 1) / kAlignment * kAlignment;
    constexpr int32_t kCpu = 1;
    constexpr uint8_t kFloat = 2, kBfloat = 4;
    block->managed = {{1, 0},
                      block.get(),
                      free_block,
                      0,
                      {reinterpret_cast<void*>(start),
                       {kCpu, 0},
                       int32_t(block->shape.size()),
                       {element == Element::kFloat ? kFloat : kBfloat, uint8_t(8 * element_bytes(element)), 1},
                       block->shape.data(),
                       block->strides.data(),
                       0}};
    return &block.release()->managed;
}

}  // namespace sparse_ft
