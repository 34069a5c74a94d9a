// Memory that holds generated machine code: written first, then executable and never writable again.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparse_ft {

class Executable {
  public:
    // A copy of `size` bytes of code. Where the system refuses executable memory, `valid()` is false.
    Executable(const uint8_t* code, size_t size);
    ~Executable();
    Executable(const Executable&) = delete;
    Executable& operator=(const Executable&) = delete;

    bool valid() const { return memory_ != nullptr; }
    template <class Function>
    Function entry(int64_t offset) const {
        return reinterpret_cast<Function>(static_cast<uint8_t*>(memory_) + offset);
    }

  private:
    void* memory_ = nullptr;
    size_t bytes_ = 0;
};

// Whether this process may run code that it wrote (some hardened systems forbid it).
bool can_execute_generated_code();

}  // namespace sparse_ft
