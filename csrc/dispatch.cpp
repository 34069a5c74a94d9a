#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "executable.h"

namespace sparse_ft {
namespace {

std::atomic<const Kernels*> active{nullptr};

}  // namespace

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found;
#if defined(SPARSE_FT_X86)
    __builtin_cpu_init();  // also checks that the operating system saves the wide registers
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if (can_execute_generated_code()) found.push_back(kernels_avx512_jit());
        found.push_back(kernels_avx512());
    }
    if (avx2) found.push_back(kernels_avx2());
#endif
    found.push_back(kernels_portable());
    return found;
}

const Kernels& active_kernels() {
    const Kernels* kernels = active.load();
    if (kernels == nullptr) active = kernels = available_kernels().front();
    return *kernels;
}

bool activate_kernels(const char* name) {
    for (const Kernels* kernels : available_kernels())
        if (std::strcmp(kernels->name, name) == 0) {
            active = kernels;
            return true;
        }
    return false;
}

}  // namespace sparse_ft
