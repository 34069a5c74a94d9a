#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "pages.h"

namespace sparse_ft {
namespace {

constexpr uintptr_t kAlignment = 64;
constexpr size_t kLarge = 1 << 20;  // a smaller block is the allocator's business

// The large blocks of this process: those in use are counted, those that are not are kept.
class LargeBlocks {
  public:
    // Memory of at least `size` bytes, which becomes what it really has.
    void* take(size_t* size) {
        const std::lock_guard<std::mutex> lock(mutex);
        // The best fit, and of equal ones the last that was freed: the caches know it best.
        size_t best = kept.size();
        for (size_t i = 0; i < kept.size(); ++i)
            if (kept[i].size >= *size && kept[i].size / 2 <= *size &&
                (best == kept.size() || kept[i].size <= kept[best].size))
                best = i;
        void* memory;
        if (best < kept.size()) {
            *size = kept[best].size;
            memory = kept[best].memory;
            kept_bytes -= *size;
            kept.erase(kept.begin() + int64_t(best));
        } else {
            const size_t most = std::max(most_in_use, in_use + *size);
            while (!kept.empty() && in_use + kept_bytes + *size > most + most / 2) release_oldest();
            memory = std::malloc(*size);
            if (memory == nullptr) {
                release_all();
                memory = std::malloc(*size);
            }
            if (memory == nullptr) return nullptr;
            ask_for_huge_pages(memory, *size);
        }
        in_use += *size;
        most_in_use = std::max(most_in_use, in_use);
        return memory;
    }
    void give_back(void* memory, size_t size) {
        const std::lock_guard<std::mutex> lock(mutex);
        in_use -= size;
        if (!keeping) return std::free(memory);
        try {
            kept.push_back({memory, size});
            kept_bytes += size;
        } catch (const std::bad_alloc&) {  // of the list; a tensor's end must not fail
            std::free(memory);
        }
    }
    bool keep(bool wanted) {
        const std::lock_guard<std::mutex> lock(mutex);
        const bool before = std::exchange(keeping, wanted);
        if (!keeping) release_all();
        return before;
    }
    size_t release() {
        const std::lock_guard<std::mutex> lock(mutex);
        const size_t bytes = kept_bytes;
        release_all();
        most_in_use = in_use;  // what a larger model needed before is no measure any more
        return bytes;
    }

  private:
    struct Memory {
        void* memory;
        size_t size;
    };
    std::mutex mutex;
    std::vector<Memory> kept;  // in the order in which they were freed
    size_t in_use = 0, kept_bytes = 0, most_in_use = 0;
#if defined(__SANITIZE_ADDRESS__)
    bool keeping = false;  // so that the sanitizer sees who uses a block that was freed
#else
    bool keeping = true;
#endif

    void release_oldest() {
        std::free(kept.front().memory);
        kept_bytes -= kept.front().size;
        kept.erase(kept.begin());
    }
    void release_all() {
        while (!kept.empty()) release_oldest();
    }
};

// Never destroyed: tensors may be freed after everything else is.
LargeBlocks& large_blocks() {
    static LargeBlocks* const blocks = new LargeBlocks;
    return *blocks;
}

struct Block {
    DLManagedTensorVersioned managed;
    std::vector<int64_t> shape, strides;
    void* memory;
    size_t size;
};

void free_block(DLManagedTensorVersioned* managed) {
    Block* block = static_cast<Block*>(managed->context);
    if (block->size >= kLarge)
        large_blocks().give_back(block->memory, block->size);
    else
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
    size_t size = size_t(bytes) + kAlignment;
    std::unique_ptr<Block> block(new Block{{}, shape, strides, nullptr, 0});
    block->memory = size >= kLarge ? large_blocks().take(&size) : std::malloc(size);
    block->size = size;
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

bool keep_blocks(bool keep) { return large_blocks().keep(keep); }
int64_t release_blocks() { return int64_t(large_blocks().release()); }

}  // namespace sparse_ft
