// What generated code fetches into the second-level cache while it computes: a list of runs of lines, of which it
// takes one after another. A run's lines follow one another in memory, which answers twice as fast so as line by line
// from channel to channel.
#pragma once
#include <cstdint>
#include <vector>

namespace sparse_ft {
namespace SPARSE_FT_ISA {

constexpr int64_t kLineBytes = 64;

class FetchList {
  public:
    // `lines`: of a run.
    void begin(int64_t lines) {
        run = lines * kLineBytes;
        runs.clear();
        taken = 0;
    }
    // `bytes` from `from` on.
    void add(const void* from, int64_t bytes) {
        for (int64_t at = 0; at < bytes; at += run) runs.push_back(static_cast<const char*>(from) + at);
    }
    // What code that takes up to `count` runs finds at the end: a place that is in the caches anyway.
    void end(size_t count, const void* cached) {
        if (runs.size() < count) runs.resize(count, static_cast<const char*>(cached));
    }
    // The next runs, for code that takes `count` of them.
    const char* const* take(int64_t count) {
        const char* const* from = runs.data() + taken;
        taken += size_t(count);
        return from;
    }

  private:
    std::vector<const char*> runs;
    int64_t run = kLineBytes;
    size_t taken = 0;
};

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
