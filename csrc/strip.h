// Rows of a channel that are made as they are needed, and wait in the caches for who reads several of them.
#pragma once
#include <algorithm>
#include <cstring>

#include "panel.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

constexpr int64_t kStripBytes = 128 << 10;  // of the rows that wait for a convolution: two strips fit a small cache

template <class T>
class Strip {
  public:
    // `length`: elements of a row; `reach`: how many rows are needed at a time.
    Strip(Scratch& scratch, int64_t height, int64_t length, int64_t reach) : pitch_(std::max<int64_t>(length, 1)) {
        capacity_ = std::clamp<int64_t>(kStripBytes / int64_t(sizeof(T)) / pitch_, std::min(reach, height), height);
        rows_ = scratch.of<T>(size_t(capacity_ * pitch_));
    }
    void begin() { first_ = end_ = 0; }
    // Rows [low, high): where row 0 would be if all were there. Rows before `low` are not asked for again.
    template <class Make>
    const T* rows(int64_t low, int64_t high, Make make) {
        if (high > first_ + capacity_) {
            const int64_t kept = std::max<int64_t>(end_ - low, 0);
            std::memmove(rows_, rows_ + (end_ - kept - first_) * pitch_, size_t(kept * pitch_) * sizeof(T));
            first_ = low;
            end_ = low + kept;
        }
        for (; end_ < high; ++end_) make(end_, rows_ + (end_ - first_) * pitch_);
        return rows_ - first_ * pitch_;
    }

  private:
    int64_t pitch_, capacity_, first_ = 0, end_ = 0;  // rows [first_, end_) are there
    T* rows_;
};

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
