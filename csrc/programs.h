// Generated kernels of one pattern. A pattern's owner keeps a `Programs` beside it; the products look their
// program up there and make it at first use. It dies with the pattern.
#pragma once
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace sparse_ft {

struct Program {
    virtual ~Program() = default;
};

class Programs {
  public:
    using Key = std::vector<int64_t>;  // product and tiling: all that offsets in the code depend on

    // The program of `key`, or what `make` returns; a null is returned and not kept.
    template <class Kind, class Make>
    std::shared_ptr<const Kind> find_or_make(const Key& key, Make make) {
        const std::lock_guard<std::mutex> guard(lock_);
        for (auto i = kept_.begin(); i != kept_.end(); ++i)
            if (i->first == key) {
                kept_.splice(kept_.begin(), kept_, i);
                return std::static_pointer_cast<const Kind>(i->second);
            }
        std::shared_ptr<const Kind> made = make();
        if (made != nullptr) {
            kept_.emplace_front(key, made);
            if (kept_.size() > kLimit) kept_.pop_back();
        }
        return made;
    }

  private:
    // Three products, up to four stride phases for one of them, two batch sizes (the last batch is often smaller).
    static constexpr size_t kLimit = 12;
    std::mutex lock_;
    std::list<std::pair<Key, std::shared_ptr<const Program>>> kept_;  // latest use first
};

}  // namespace sparse_ft
