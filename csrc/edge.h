// What the files of the Python edge share.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sparse_ft {

inline void raise(const char* problem) {
    if (problem != nullptr) throw std::invalid_argument(std::string("malformed sparse pattern: ") + problem);
}

// Runs one kernel without the interpreter's lock; a malformed pattern becomes a ValueError.
template <class Task>
void run(const char* (*kernel)(const Task&), const Task& task) {
    const char* problem;
    {
        pybind11::gil_scoped_release release;
        problem = kernel(task);
    }
    raise(problem);
}

template <class Task>
void run(void (*kernel)(const Task&), const Task& task) {
    pybind11::gil_scoped_release release;
    kernel(task);
}

// `most`, or fewer where there is little to do: a parallel region costs some microseconds, more on a busy machine, so
// that a thread is worth having for 400,000 of a product's operations. To read or write a value takes as long as a
// dozen of them.
inline int threads_for(int64_t operations, int64_t values, int most) {
    constexpr int64_t kOperationsPerThread = 400'000, kOfValue = 12;
    return int(std::clamp<int64_t>((operations + kOfValue * values) / kOperationsPerThread, 1, most));
}

void bind_products(pybind11::module_& m);  // products.cpp
void bind_norms(pybind11::module_& m);     // norms.cpp

}  // namespace sparse_ft
