// A batch norm step by step, for passes over a channel that do more than the norm. Every step is that of norm.cpp, and
// so are the results, to the last bit.
#pragma once
#include <memory>
#include <optional>

#include "norm_channel.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

// One norm's steps, whatever its activation. Elements count from the channel's beginning.
template <class T>
struct NormSteps {
    virtual ~NormSteps() = default;
    virtual void begin(int64_t c, const T* grad) = 0;                    // grad: of the norm's result, of this channel
    virtual void values(int64_t first, int64_t count, T* to) const = 0;  // activation(norm(x))
    virtual void add(int64_t first, int64_t end) = 0;                    // the way back: see ChannelGradient
    virtual void finish() = 0;
    virtual void slopes(int64_t first, int64_t count, T* to, bool around) const = 0;  // around: the caches
};

template <class T, class Act>
class StepsOf : public NormSteps<T> {
  public:
    explicit StepsOf(const Norm& norm) : q(norm) {}
    void begin(int64_t c, const T* grad) override { number = c, gradient.emplace(q, c, grad); }
    void values(int64_t first, int64_t count, T* to) const override {
        const Channel<T> channel(q, number);
        each_vector(count, [&](int64_t i, int n) {
            prefetch(channel.x + first + i + kAhead);
            store(to + i, Act::value(channel.template before_activation<false>(first + i, n)), n);
        });
    }
    void add(int64_t first, int64_t end) override { gradient->add(first, end, nullptr); }
    void finish() override { gradient->finish(); }
    void slopes(int64_t first, int64_t count, T* to, bool around) const override {
        const auto write = [&](auto slope) {
            write_channel(count, around, [=, of = gradient->of_element()](int64_t i, int n, auto put) {
                const vec centred = load(of.x + first + i, n) - of.mean;
                const vec g = of.before(first + i, n, centred);
                // A norm by itself keeps g in between where it is dear to compute twice, as it is stored.
                put(to + i, slope(of, Act::kCostly ? rounded<T>(g) : g, centred), n);
            });
        };
        if (q.training)
            write([](const auto& of, vec g, vec centred) { return of.slope_in_training(g, centred); });
        else
            write([](const auto& of, vec g, vec) { return of.slope_as_given(g); });
    }

  private:
    const Norm& q;
    int64_t number = 0;
    std::optional<ChannelGradient<T, Act, Slope::kFromX>> gradient;
};

template <class T>
std::unique_ptr<NormSteps<T>> steps_of(const Norm& q) {
    std::unique_ptr<NormSteps<T>> steps;
    with_activation(q.activation, [&](auto act) { steps = std::make_unique<StepsOf<T, decltype(act)>>(q); });
    return steps;
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
