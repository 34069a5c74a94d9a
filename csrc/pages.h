// Huge pages.
//
// A channel lies pages away from the next, and a pass touches more small pages than a processor keeps translations of
// addresses for. So the system is asked for huge ones, where it has them and SPARSE_FT_HUGE_PAGES=0 does not say no.
#pragma once
#include <cstddef>

namespace sparse_ft {

// For memory that malloc gave just now: for all that the heap has grown by if it lies there, else for its own pages.
// Callers take turns.
void ask_for_huge_pages(void* memory, size_t size);

// For the heap as it is, whose small pages the system joins in time, and for the `bytes` it grows by at once, which
// begin with huge ones and take no memory until they are used.
void ask_for_huge_heap(size_t bytes);

}  // namespace sparse_ft
