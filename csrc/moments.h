// Mean and variance of a product's results, row by row, taken while they wait in a stage to be stored: the norm that
// follows need not read them for it.
#pragma once
#include "api.h"
#include "each_vector.h"
#include "element.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

struct PartMoments {
    double mean, squares;  // of some of a row's results; the sum of squared distances from that mean
};

// Of up to kRows rows of one tile, whose results come run by run.
template <int kRows>
class TileMoments {
  public:
    void begin() { begun = 0; }

    // `values`: as they are computed; what counts is what is left of them once they are stored as T.
    template <class T>
    void add(int row, const float* values, int64_t count) {
        if (!(begun >> row & 1)) {
            // A shift near the mean keeps the difference of the sums exact. One value would not do: it may be an
            // outlier.
            const int n = int(count < kLanes ? count : kLanes);
            shift[row] = sum(rounded<T>(load(values, n))) / float(n);
            sums[row] = squares[row] = vec{};
            begun |= 1u << row;
        }
        const vec s = splat(shift[row]);
        vec a[4] = {sums[row]}, b[4] = {squares[row]};
        int64_t i = 0;
        for (; i + 4 * kLanes <= count; i += 4 * kLanes)
            for (int k = 0; k < 4; ++k) {
                const vec d = rounded<T>(load(values + i + k * kLanes)) - s;
                a[k] += d;
                b[k] += d * d;
            }
        each_vector(count - i, [&](int64_t at, int n) {
            const vec d = keep_lanes(rounded<T>(load(values + i + at, n)) - s, n);
            a[1] += d;
            b[1] += d * d;
        });
        sums[row] = (a[0] + a[1]) + (a[2] + a[3]);
        squares[row] = (b[0] + b[1]) + (b[2] + b[3]);
    }

    PartMoments of(int row, int64_t count) const {
        const double a = sum(sums[row]), b = sum(squares[row]);
        return {shift[row] + a / double(count), b - a * a / double(count)};
    }

  private:
    uint32_t begun = 0;  // bit by row
    float shift[kRows];
    vec sums[kRows], squares[kRows];
    static_assert(kRows <= 32, "a bit for every row");
};

// Joins parts of a row, in an order that is always the same (Chan, Golub and LeVeque, 1983).
class JoinedMoments {
  public:
    void add(const PartMoments& part, int64_t values) {
        const double more = double(values), all = count + more, apart = part.mean - mean;
        mean += apart * more / all;
        squares += part.squares + apart * apart * count * more / all;
        count = all;
    }
    float average() const { return float(mean); }
    float variance() const { return variance_of(squares / count); }

  private:
    double count = 0, mean = 0, squares = 0;
};

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
