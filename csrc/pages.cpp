#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace sparse_ft {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

bool wanted() {
    static const char* const wish = std::getenv("SPARSE_FT_HUGE_PAGES");
    return wish == nullptr || std::strcmp(wish, "0") != 0;
}

void ask(uintptr_t start, uintptr_t end) {
    static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    start = start / page * page;
    madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
}

}  // namespace

void ask_for_huge_pages(void* memory, size_t size) {
    if (!wanted()) return;
    static uintptr_t asked = 0;  // up to where in the heap
    const uintptr_t heap_end = reinterpret_cast<uintptr_t>(sbrk(0));
    uintptr_t start = reinterpret_cast<uintptr_t>(memory), end = start + size;
    if (start < heap_end) {  // which lies below whatever is mapped
        if (heap_end == asked) return;
        if (heap_end > asked) start = std::max(start, asked);
        end = asked = heap_end;
    }
    ask(start, end);
}

void ask_for_huge_heap(size_t bytes) {
    if (!wanted()) return;
    void* volatile const grown = std::malloc(bytes);  // volatile: no compiler leaves it and its end out
    const auto close = [](FILE* file) { std::fclose(file); };
    const std::unique_ptr<FILE, decltype(close)> maps(std::fopen("/proc/self/maps", "r"), close);
    char line[512];
    while (maps && std::fgets(line, sizeof line, maps.get()) != nullptr) {
        uintptr_t start, end;
        if (std::strstr(line, "[heap]") != nullptr && std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR, &start, &end) == 2)
            ask(start, end);
    }
    std::free(grown);
}
#else
void ask_for_huge_pages(void*, size_t) {}
void ask_for_huge_heap(size_t) {}
#endif

}  // namespace sparse_ft
