// Packing a tile's panel: rows of positions of every channel, or their transposes.
#include "activation.h"
#include "panel.h"
#include "transpose.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

// What becomes of a channel's values as they are packed: a norm and an activation.
template <class T, class Act>
struct Normalised {  // to the last bit what the norm itself would have stored
    vec mean, scale, offset;
    Normalised(const SourceNorm& norm, int64_t channel)
        : mean(splat(norm.mean[channel])), scale(splat(norm.scale[channel])), offset(splat(norm.offset[channel])) {}
    vec one(vec v) const { return rounded<T>(Act::value((v - mean) * scale + offset)); }
    void spread(const T* from, int64_t step, float* to, int64_t count) const {
        gather(from, step, to, count);
        each_vector(count, [&](int64_t i, int n) { store(to + i, one(load(to + i, n)), n); });
    }
    void run(const T* from, float* to, int64_t count) const {
        each_vector(count, [&](int64_t i, int n) { store(to + i, one(load(from + i, n)), n); });
    }
};

// One row of positions of one column phase, packed from every channel alike.
template <class T>
class RowCopy {
  public:
    RowCopy(const Tiling& t, const Tile& tile, const View& s, int64_t source_w, int64_t phase)
        : lanes(tile.lanes), padded(t.lanes), step(t.x.step * s.x) {
        // Only the columns that the clipped tile reaches are packed.
        const int64_t x = t.x.source(tile.x, phase, 0), hop = t.x.step;
        count = tile.cols + t.x.reach;
        // Entries i with 0 <= x + i * hop < source_w.
        low = std::clamp<int64_t>(x >= 0 ? 0 : (-x + hop - 1) / hop, 0, count);
        high = std::clamp<int64_t>(x >= source_w ? 0 : (source_w - 1 - x) / hop + 1, low, count);
        first = (x + low * hop) * s.x;
        joined = lanes == padded && (step == lanes || high - low == 1);
        if (joined) run = (high - low) * lanes;
    }

    // `row`: of a channel, at the tile's first sample.
    template <class Change>
    void copy(const T* row, float* to, const Change& change) const {
        clear(to, low * padded);
        const T* from = row + first;
        float* at = to + low * padded;
        if (joined) {
            change.run(from, at, run);
        } else if (lanes == padded && lanes % kLanes == 0) {  // too short for calls
            for (int64_t i = low; i < high; ++i, from += step, at += padded)
                for (int64_t lane = 0; lane < lanes; lane += kLanes) store(at + lane, change.one(load(from + lane)));
        } else if (padded == 1) {
            change.spread(from, step, at, high - low);
        } else if (padded < kLanes) {
            for (int64_t i = low; i < high; ++i, from += step, at += padded) {
                store(at, change.one(load(from, int(lanes))), int(lanes));
                for (int64_t lane = lanes; lane < padded; ++lane) at[lane] = 0.0f;
            }
        } else {
            for (int64_t i = low; i < high; ++i, from += step, at += padded) {
                change.run(from, at, lanes);
                clear(at + lanes, padded - lanes);
            }
        }
        clear(to + high * padded, (count - high) * padded);
    }

    void clear_all(float* to) const { clear(to, count * padded); }
    int64_t ahead() const { return rows_ahead((high - low) * lanes * int64_t(sizeof(T))); }
    void fetch(const T* row) const {  // the lines that copy() will read
        constexpr int64_t kLine = 64 / sizeof(T);
        const bool one = joined || step < kLine;  // several pieces to a line
        const int64_t pieces = one ? 1 : high - low, length = joined ? run : one ? (high - low) * step : lanes;
        for (int64_t i = 0; i < pieces; ++i)
            for (int64_t k = 0; k < length; k += kLine) prefetch(row + first + i * step + k);
    }

  private:
    int64_t lanes, padded, step;  // samples there, samples packed; from one entry to the next
    int64_t count, low, high;     // entries, of which [low, high) are inside the source
    int64_t first, run = 0;       // where entry `low` is; all entries, if they are joined
    bool joined;                  // whether the entries follow one another as they are packed
    static void clear(float* to, int64_t floats) {
        if (floats > kLanes)
            std::memset(to, 0, size_t(floats) * sizeof(float));
        else if (floats > 0)
            store(to, vec{}, int(floats));
    }
};

// The same as below for few samples: a channel's rows are short and share lines, so that channels come one by one.
template <class T, class ChangeOf>
void pack_small(const Tiling& t, const Tile& tile, const Product& q, int64_t channel, int64_t count, float* panel,
                ChangeOf change_of) {
    const Geometry& g = q.geometry;
    const View& s = q.source;
    std::vector<RowCopy<T>> phases;
    for (int64_t px = 0; px < t.x.phase_count(); ++px) phases.emplace_back(t, tile, s, g.source_w, px);
    for (int64_t c = 0; c < count; ++c, panel += t.channel_stride) {
        const auto change = change_of(channel + c);
        const T* from = static_cast<const T*>(s.data) + (channel + c) * s.c + tile.n;
        for (int64_t py = 0; py < t.y.phase_count(); ++py)
            for (int64_t r = 0; r < tile.rows + t.y.reach; ++r) {
                const int64_t y = t.y.source(tile.y, py, r);
                float* to = panel + (py * t.panel_rows + r) * t.row_stride;
                for (size_t px = 0; px < phases.size(); ++px, to += t.panel_cols * t.lanes)
                    if (y >= 0 && y < g.source_h)
                        phases[px].copy(from + y * s.y, to, change);
                    else
                        phases[px].clear_all(to);
            }
    }
}

// Packs channels [channel, channel + count) of the source into the panel; change_of(channel) says what they become.
template <class T, class ChangeOf>
void pack_changed(const Tiling& t, const Tile& tile, const Product& q, int64_t channel, int64_t count, float* panel,
                  ChangeOf change_of) {
    const Geometry& g = q.geometry;
    const View& s = q.source;
    if (s.n == 1 && tile.lanes < kLanes) return pack_small<T>(t, tile, q, channel, count, panel, change_of);
    const T* data = static_cast<const T*>(s.data);
    for (int64_t py = 0; py < t.y.phase_count(); ++py) {
        for (int64_t r = 0; r < tile.rows + t.y.reach; ++r) {
            const int64_t y = t.y.source(tile.y, py, r);
            const bool inside = y >= 0 && y < g.source_h;
            for (int64_t px = 0; px < t.x.phase_count(); ++px) {
                float* to = panel + (py * t.panel_rows + r) * t.row_stride + px * t.panel_cols * t.lanes;
                const int64_t entries = tile.cols + t.x.reach;
                if (!inside) {
                    for (int64_t c = 0; c < count; ++c)
                        std::memset(to + c * t.channel_stride, 0, size_t(entries * t.lanes) * sizeof(float));
                } else if (s.n == 1) {
                    const RowCopy<T> row(t, tile, s, g.source_w, px);
                    const T* from = data + channel * s.c + y * s.y + tile.n;
                    const int64_t ahead = row.ahead();
                    for (int64_t c = 0; c < count; ++c) {
                        if (c + ahead < count) row.fetch(from + (c + ahead) * s.c);
                        row.copy(from + c * s.c, to + c * t.channel_stride, change_of(channel + c));
                    }
                } else {
                    for (int64_t i = 0; i < entries; ++i) {
                        const int64_t x = t.x.source(tile.x, px, i);
                        float* cell = to + i * t.lanes;
                        if (x >= 0 && x < g.source_w) {
                            transpose(data + channel + y * s.y + x * s.x + tile.n * s.n, s.n, cell, t.channel_stride,
                                      tile.lanes, count);
                            if (tile.lanes < t.lanes)
                                for (int64_t c = 0; c < count; ++c)
                                    std::memset(cell + c * t.channel_stride + tile.lanes, 0,
                                                size_t(t.lanes - tile.lanes) * sizeof(float));
                        } else {
                            for (int64_t c = 0; c < count; ++c)
                                std::memset(cell + c * t.channel_stride, 0, size_t(t.lanes) * sizeof(float));
                        }
                    }
                }
            }
        }
    }
}

}  // namespace

void pack_panel(const Tiling& t, const Tile& tile, const Product& q, int64_t channel, int64_t count, float* panel) {
    with_element(q.element, [&](auto element) {
        using T = decltype(element);
        if (q.norm == nullptr)
            return pack_changed<T>(t, tile, q, channel, count, panel, [](int64_t) { return AsTheyAre(); });
        with_activation(q.norm->activation, [&](auto act) {
            pack_changed<T>(t, tile, q, channel, count, panel,
                            [&](int64_t c) { return Normalised<T, decltype(act)>(*q.norm, c); });
        });
    });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
