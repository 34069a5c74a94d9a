// The n-th largest magnitude. The bits of a magnitude, as an integer, are in the order of its value.
#include "api.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <omp.h>
#include <vector>

namespace sparse_ft {
namespace {

uint32_t magnitude_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}
float magnitude_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Counts by digit of the bits, highest first: 11, 10 and 10 of them.
constexpr int kShifts[] = {20, 10, 0};
constexpr int kDigits = 1 << 11;

float nth_by_counting(const float* x, int64_t count, int64_t n, int threads) {
    uint32_t prefix = 0, prefix_mask = 0;
    for (int shift : kShifts) {
        const uint32_t digit_mask = shift == 20 ? 0x7ffu : 0x3ffu;
        std::vector<int64_t> total(kDigits, 0);
#pragma omp parallel num_threads(threads)
        {
            std::vector<int64_t> own(kDigits, 0);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < count; ++i) {
                const uint32_t bits = magnitude_bits(x[i]);
                own[bits >> shift & digit_mask] += (bits & prefix_mask) == prefix;
            }
#pragma omp critical
            for (size_t i = 0; i < total.size(); ++i) total[i] += own[i];
        }
        uint32_t digit = digit_mask;
        for (; digit > 0 && n >= total[digit]; --digit) n -= total[digit];
        prefix |= digit << shift;
        prefix_mask |= digit_mask << shift;
    }
    return magnitude_of(prefix);
}

// A sample says between which two magnitudes the n-th surely lies; one pass collects those. False if it does not.
bool nth_by_sample(const float* x, int64_t count, int64_t n, int threads, float* found) {
    constexpr int64_t kSample = 4096;
    if (count < 16 * kSample) return false;
    std::vector<uint32_t> sample;
    for (int64_t i = 0; i < kSample; ++i)  // an uneven stride, which no layout repeats
        sample.push_back(magnitude_bits(x[(i * (count / kSample) + i * 7919 % (count / kSample)) % count]));
    std::sort(sample.begin(), sample.end(), std::greater<>());
    const double rank = double(n) / double(count) * kSample;
    const auto margin = int64_t(4 * std::sqrt(rank * (1 - rank / kSample)) + 8);
    const int64_t first = int64_t(rank) - margin, last = int64_t(rank) + margin;
    const uint32_t high = first >= 0 ? sample[size_t(first)] : 0x7fffffffu;
    const uint32_t low = last < kSample ? sample[size_t(last)] : 0;
    if (low == 0) return false;  // zeros are many, and equal

    std::vector<uint32_t> between;
    int64_t above = 0;
#pragma omp parallel num_threads(threads) reduction(+ : above)
    {
        const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
        const std::unique_ptr<uint32_t[]> own(new uint32_t[size_t(end - begin) + 1]);  // mostly never touched
        int64_t size = 0;
        for (int64_t i = begin; i < end; ++i) {
            const uint32_t bits = magnitude_bits(x[i]);
            above += bits > high;
            own[size_t(size)] = bits;
            size += bits - low <= high - low;
        }
#pragma omp critical
        between.insert(between.end(), own.get(), own.get() + size);
    }
    if (n < above || n >= above + int64_t(between.size())) return false;
    std::nth_element(between.begin(), between.begin() + (n - above), between.end(), std::greater<>());
    *found = magnitude_of(between[size_t(n - above)]);
    return true;
}

}  // namespace

float nth_magnitude(const float* x, int64_t count, int64_t n, int threads) {
    float found;
    return nth_by_sample(x, count, n, threads, &found) ? found : nth_by_counting(x, count, n, threads);
}

void mask_largest(const float* x, int64_t count, int64_t keep, uint8_t* mask, int threads) {
    if (keep <= 0 || keep >= count) {
        std::fill(mask, mask + count, uint8_t(keep > 0));
        return;
    }
    const float threshold = nth_magnitude(x, count, keep - 1, threads);
    const uint32_t least = magnitude_bits(threshold);
    int64_t above = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : above)
    for (int64_t i = 0; i < count; ++i) {
        mask[i] = magnitude_bits(x[i]) > least;
        above += mask[i];
    }
    for (int64_t i = 0; above < keep; ++i)
        if (magnitude_bits(x[i]) == least) {
            mask[i] = 1;
            ++above;
        }
}

}  // namespace sparse_ft
