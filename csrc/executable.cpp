#include "executable.h"

#include <cstring>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace sparse_ft {

#if defined(__unix__) || defined(__APPLE__)

Executable::Executable(const uint8_t* code, size_t size) : bytes_((size + 4095) / 4096 * 4096) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return;
    std::memcpy(memory, code, size);
    if (mprotect(memory, bytes_, PROT_READ | PROT_EXEC) != 0) {
        munmap(memory, bytes_);
        return;
    }
    memory_ = memory;
}

Executable::~Executable() {
    if (memory_ != nullptr) munmap(memory_, bytes_);
}

#else

Executable::Executable(const uint8_t*, size_t) {}
Executable::~Executable() {}

#endif

bool can_execute_generated_code() {
    static const bool can = [] {
        const uint8_t nothing[] = {0xC3};  // ret
        return Executable(nothing, sizeof nothing).valid();
    }();
    return can;
}

}  // namespace sparse_ft
