// Dense weight gradient from a compact activation: only the values that were kept are multiplied.
//     for every kept value v at (channel i, position q, sample n):  dW[:, i, tap] += v * G[:, q - tap, n]  for every
//     tap
// The output gradient's tile lies with its channels innermost, zeros around it, in the first-level cache; a kept value
// is then one broadcast and, for each tap, one multiply-add with a memory operand, whose sums over the tile stay in
// registers. What was kept is decoded once, into (value, place) entries by tile and channel, for all output channels.
#include <algorithm>
#include <cstring>
#include <omp.h>
#include <vector>

#include "kernels.h"
#include "panel.h"
#include "transpose.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

struct Entry {
    float value;
    int32_t place;  // floats from the tile's origin
};

struct Tap {                // of a phase
    int32_t number, shift;  // kernel position, later of its sums; floats back from an entry's place
};

// Lists of entries of a tile, one for each input channel and phase.
struct Lists {
    const Entry* entries;
    const int64_t* first;  // of a phase in every channel
    int64_t step;          // from one channel's to the next in `first`
    int64_t channels;
};

// sums[channel][tap][V vectors] += over the channel's entries, for T taps. U entries at a time, so that short chains
// of sums do not wait for one another.
template <int T, int V, int U>
void add_entries(const Lists& lists, const float* tile, const Tap* taps, float* sums, int64_t channel_stride) {
    constexpr int kWidth = V * kLanes;
    const float* from[T];
    int64_t to[T];
    for (int t = 0; t < T; ++t) {
        from[t] = tile - taps[t].shift;
        to[t] = int64_t(taps[t].number) * kWidth;
    }
    const int64_t* first = lists.first;
    for (int64_t c = 0; c < lists.channels; ++c, first += lists.step, sums += channel_stride) {
        const Entry *entry = lists.entries + first[0], *const end = lists.entries + first[1];
        if (entry == end) continue;
        vec acc[U][T][V];
        for (int t = 0; t < T; ++t)
            for (int v = 0; v < V; ++v) {
                acc[0][t][v] = load(sums + to[t] + v * kLanes);
                for (int u = 1; u < U; ++u) acc[u][t][v] = vec{};
            }
        for (; end - entry >= U; entry += U)
            for (int u = 0; u < U; ++u) {
                const vec value = splat(entry[u].value);
                const int64_t place = entry[u].place;
                for (int t = 0; t < T; ++t)
                    for (int v = 0; v < V; ++v) acc[u][t][v] += value * load(from[t] + place + v * kLanes);
            }
        if (U > 1)
            for (; entry < end; ++entry) {
                const vec value = splat(entry->value);
                for (int t = 0; t < T; ++t)
                    for (int v = 0; v < V; ++v) acc[0][t][v] += value * load(from[t] + entry->place + v * kLanes);
            }
        for (int t = 0; t < T; ++t)
            for (int v = 0; v < V; ++v) {
                vec total = acc[0][t][v];
                for (int u = 1; u < U; ++u) total += acc[u][t][v];
                store(sums + to[t] + v * kLanes, total);
            }
    }
}

using AddEntries = decltype(&add_entries<1, 1, 1>);
constexpr int kMostTaps = 9;  // whose sums are in registers together

template <int V>
AddEntries add_entries_for(int64_t taps) {
    constexpr int kOne = V >= 4 ? 1 : 4 / V, kTwo = V >= 2 ? 1 : 2;
    constexpr AddEntries few[] = {nullptr, add_entries<1, V, kOne>, add_entries<2, V, kTwo>};
    if (taps < 3) return few[taps];
    if constexpr (V <= 2) {
        constexpr AddEntries some[] = {add_entries<3, V, 1>, add_entries<4, V, 1>};
        if (taps < 5) return some[taps - 3];
    }
    if constexpr (V == 1) {
        constexpr AddEntries many[] = {add_entries<5, V, 1>, add_entries<6, V, 1>, add_entries<7, V, 1>,
                                       add_entries<8, V, 1>, add_entries<9, V, 1>};
        return many[taps - 5];
    }
    return nullptr;
}

AddEntries add_entries_for(int64_t taps, int64_t vectors) {
    return vectors == 1   ? add_entries_for<1>(taps)
           : vectors == 2 ? add_entries_for<2>(taps)
                          : add_entries_for<4>(taps);
}

// One axis. An input coordinate q is place * stride + phase - padding; tap k of its phase reads output place - hop.
struct GradientAxis {
    int64_t size, output, stride, padding, dilation, taps;
    int64_t first, places, reach;  // places of all inputs; the largest hop
    GradientAxis(int64_t size_, int64_t output_, int64_t stride_, int64_t padding_, int64_t dilation_, int64_t taps_)
        : size(size_), output(output_), stride(stride_), padding(padding_), dilation(dilation_), taps(taps_) {
        first = padding / stride;
        places = (size - 1 + padding) / stride - first + 1;
        reach = (taps - 1) * dilation / stride;
    }
    int64_t input(int64_t place, int64_t phase) const { return place * stride + phase - padding; }
    bool in_phase(int64_t tap, int64_t phase) const {
        return (tap * dilation - phase) % stride == 0 && hop(tap, phase) >= 0;
    }
    int64_t hop(int64_t tap, int64_t phase) const { return (tap * dilation - phase) / stride; }
    // Whether a tap ever reads within the output, not zeros around it only.
    bool is_useful(int64_t tap, int64_t phase) const {
        if (!in_phase(tap, phase)) return false;
        for (int64_t q = (phase - padding % stride + stride) % stride; q < size; q += stride) {
            const int64_t o = (q + padding - phase) / stride - hop(tap, phase);
            if (o >= 0 && o < output) return true;
        }
        return false;
    }
};

class CompactGradientSum {
  public:
    explicit CompactGradientSum(const CompactGradient& gradient)
        : q(gradient),
          a(gradient.activation),
          y(a.height, q.output_h, q.shape.stride_y, q.shape.padding_y, q.shape.dilation_y, q.shape.kernel_h),
          x(a.width, q.output_w, q.shape.stride_x, q.shape.padding_x, q.shape.dilation_x, q.shape.kernel_w),
          group_rows(q.shape.out_channels / q.shape.groups),
          all_taps(q.shape.kernel_h * q.shape.kernel_w) {
        find_phases();
        vectors = most_taps > 4 ? 1 : most_taps > 2 ? 2 : 4;
        while (vectors > 1 && (vectors / 2) * kLanes >= group_rows) vectors /= 2;
        width = vectors * kLanes;
        row_blocks = (group_rows + width - 1) / width;
        choose_tile();
        choose_threads();
    }

    int64_t run() {
        thread_local Scratch shared_sums;
        float* sums = shared_sums.floats(size_t(block_teams * sums_size()));
#pragma omp parallel num_threads(q.threads)
        {
#pragma omp for schedule(static)
            for (int64_t part = 0; part < block_teams * row_teams; ++part)
                sum_part(part / row_teams, part % row_teams, sums);
#pragma omp for schedule(static)
            for (int64_t block = 0; block < all_row_blocks(); ++block) finish(block, sums);
        }
        return multiply_adds;
    }

  private:
    struct Phase {
        int64_t y, x;
        std::vector<Tap> taps;
    };
    struct Place {  // of a tile in a few blocks: first block, first place of each axis, and how many
        int64_t block, blocks, y, x, rows, cols;
    };

    const CompactGradient& q;
    const Compact& a;
    const GradientAxis y, x;
    const int64_t group_rows, all_taps;
    std::vector<int64_t> useful;  // kernel positions that have sums; the others' gradients are 0
    int64_t taps;                 // as many
    std::vector<Phase> phases;
    int64_t most_taps = 0;
    int64_t multiply_adds = 0;
    int64_t vectors, width;                          // of output channels together
    int64_t row_blocks;                              // of a group's output channels
    int64_t tile_rows, tile_cols;                    // places of a tile
    int64_t panel_cols;                              // with the reach of the taps
    int64_t block_teams, row_teams;                  // how threads share the work
    static constexpr int64_t kTileBytes = 64 << 10;  // of the gradient
    static constexpr int64_t kEntryBytes = 1 << 20;  // of entries that are decoded together
    static constexpr int64_t kPackedBlocks = 4;      // of samples, which share lines of the gradient
    static constexpr int64_t kDecodeBlocks = 8;      // row blocks for which decoding is a small part of the work

    int64_t all_row_blocks() const { return q.shape.groups * row_blocks; }
    int64_t tile_size() const { return (tile_rows + y.reach) * panel_cols * 8 * width; }
    int64_t sums_size() const { return all_row_blocks() * q.shape.in_per_group * taps * width; }

    void find_phases() {
        for (int64_t py = 0; py < y.stride; ++py)
            for (int64_t px = 0; px < x.stride; ++px) {
                Phase phase{py, px, {}};
                for (int64_t ky = 0; ky < y.taps; ++ky)
                    for (int64_t kx = 0; kx < x.taps; ++kx)
                        if (y.is_useful(ky, py) && x.is_useful(kx, px)) {
                            phase.taps.push_back({int32_t(ky * x.taps + kx), 0});
                            useful.push_back(ky * x.taps + kx);
                        }
                if (phase.taps.empty()) continue;
                most_taps = std::max(most_taps, int64_t(phase.taps.size()));
                phases.push_back(phase);
            }
        std::sort(useful.begin(), useful.end());  // every tap is of one phase
        taps = int64_t(useful.size());
    }

    // The tile that packs the least for what it computes.
    void choose_tile() {
        const int64_t fit = kTileBytes / (8 * width * 4);
        double least = 0;
        for (int64_t rows = 1; rows <= y.places; ++rows) {
            const int64_t cols = std::clamp<int64_t>(fit / (rows + y.reach) - x.reach, 1, x.places);
            if (rows > 1 && (rows + y.reach) * (cols + x.reach) > fit) break;
            // Evened out over the plane.
            const int64_t down = (y.places + rows - 1) / rows, across = (x.places + cols - 1) / cols;
            const int64_t r = (y.places + down - 1) / down, c = (x.places + across - 1) / across;
            const double cost = double(down * across) * double((r + y.reach) * (c + x.reach) + 4);
            if (least > 0 && cost >= least) continue;
            least = cost;
            tile_rows = r;
            tile_cols = c;
        }
        panel_cols = tile_cols + x.reach;
        for (Phase& phase : phases)
            for (Tap& tap : phase.taps) {
                const int64_t hops =
                    y.hop(tap.number / x.taps, phase.y) * panel_cols + x.hop(tap.number % x.taps, phase.x);
                tap.shift = int32_t(hops * 8 * width);
                tap.number = int32_t(std::lower_bound(useful.begin(), useful.end(), tap.number) - useful.begin());
            }
    }

    // Threads that share the blocks of samples have sums of their own, which are added up at the end; those that share
    // the output channels all decode the same entries.
    void choose_threads() {
        row_teams = std::clamp<int64_t>(all_row_blocks() / kDecodeBlocks, 1, q.threads);
        block_teams = std::clamp<int64_t>(q.threads / row_teams, 1, a.blocks);
        row_teams = std::clamp<int64_t>(q.threads / block_teams, 1, all_row_blocks());
    }

    void sum_part(int64_t block_team, int64_t row_team, float* all_sums) {
        thread_local Scratch entry_scratch, tile_scratch;
        float* sums = all_sums + block_team * sums_size();
        const int64_t row_first = all_row_blocks() * row_team / row_teams;
        const int64_t row_end = all_row_blocks() * (row_team + 1) / row_teams;
        const int64_t row_size = q.shape.in_per_group * taps * width;
        std::fill(sums + row_first * row_size, sums + row_end * row_size, 0.0f);
        const int64_t first = a.blocks * block_team / block_teams, end = a.blocks * (block_team + 1) / block_teams;
        float* tiles = tile_scratch.floats(size_t(kPackedBlocks * tile_size()));
        for (int64_t from = first; from < end;) {
            int64_t to = std::min(from + kPackedBlocks, end);
            while (to < end &&
                   (a.start[(to + 1) * a.channels] - a.start[from * a.channels]) * int64_t(sizeof(Entry)) <=
                       kEntryBytes)
                ++to;
            const int64_t kept = a.start[to * a.channels] - a.start[from * a.channels];
            Entry* entries = reinterpret_cast<Entry*>(entry_scratch.floats(size_t(2 * kept) + 2));
            const Decoded decoded = decode(from, to, entries);
            if (row_team == 0) count(decoded);
            for (int64_t row = row_first; row < row_end; ++row) {
                const int64_t group = row / row_blocks, offset = row % row_blocks * width;
                const int64_t channels = std::min(width, group_rows - offset);
                size_t list = 0;
                for (const Place& place : decoded.places) {
                    pack(place, group * group_rows + offset, channels, tiles);
                    for (int64_t block = 0; block < place.blocks; ++block)
                        add_tile(decoded, list++, entries, group, tiles + block * tile_size(), sums + row * row_size);
                }
            }
            from = to;
        }
    }

    struct Decoded {
        std::vector<Place> places;
        std::vector<int64_t> first;  // of the entries of (place, block, channel, phase)
    };

    Decoded decode(int64_t from, int64_t to, Entry* entries) const {
        Decoded decoded;
        std::vector<int64_t> row_start(size_t((to - from) * a.channels * a.height));  // values before each row
        int64_t count = 0;
        for (int64_t plane = from * a.channels, row = 0; plane < to * a.channels; ++plane)
            for (int64_t i = 0, at = a.start[plane]; i < a.height; ++i) {
                row_start[size_t(row++)] = at;
                at += count_bits(a.bits + (plane * a.height + i) * a.width, a.width);
            }
        decoded.first.push_back(0);
        for (int64_t block = from; block < to; block += kPackedBlocks)
            for (int64_t ty = 0; ty < y.places; ty += tile_rows)
                for (int64_t tx = 0; tx < x.places; tx += tile_cols) {
                    const Place place{
                        block,        std::min(kPackedBlocks, to - block), y.first + ty,
                        x.first + tx, std::min(tile_rows, y.places - ty),  std::min(tile_cols, x.places - tx)};
                    decoded.places.push_back(place);
                    for (int64_t plane = block * a.channels; plane < (block + place.blocks) * a.channels; ++plane)
                        for (const Phase& phase : phases) {
                            count =
                                decode_rows(place, plane, phase,
                                            row_start.data() + (plane - from * a.channels) * a.height, entries, count);
                            decoded.first.push_back(count);
                        }
                }
        return decoded;
    }

    void count(const Decoded& decoded) {
        int64_t total = 0;
        for (size_t i = 0; i + 1 < decoded.first.size(); ++i)
            total += (decoded.first[i + 1] - decoded.first[i]) * int64_t(phases[i % phases.size()].taps.size());
#pragma omp atomic
        multiply_adds += total * group_rows;
    }

    static int64_t count_bits(const uint8_t* bits, int64_t bytes) {
        int64_t count = 0, i = 0;
        for (; i + 8 <= bytes; i += 8) count += __builtin_popcountll(word_at(bits + i, 8));
        return i < bytes ? count + __builtin_popcountll(word_at(bits + i, bytes - i)) : count;
    }
    static uint64_t word_at(const uint8_t* bits, int64_t bytes) {
        uint64_t word = 0;
        std::memcpy(&word, bits, size_t(bytes));
        return word;
    }

    // Appends the entries of a channel and phase in a tile; returns their new number.
    int64_t decode_rows(const Place& place, int64_t plane, const Phase& phase, const int64_t* row_start,
                        Entry* entries, int64_t count) const {
        Entry* out = entries + count;
        for (int64_t r = 0; r < place.rows; ++r) {
            const int64_t row = y.input(place.y + r, phase.y);
            if (row < 0 || row >= a.height) continue;
            const uint8_t* bits = a.bits + (plane * a.height + row) * a.width;
            const float* values = a.values + row_start[row];
            const int64_t first = x.input(place.x, phase.x), last = x.input(place.x + place.cols - 1, phase.x);
            const int64_t from = first >= 0 ? first : first + (-first + x.stride - 1) / x.stride * x.stride;
            const int64_t end = std::min(last + 1, a.width);
            if (from >= end) continue;
            // The row's columns lie by their residue modulo the stride, so that those of a phase follow one another.
            const int64_t residue = from % x.stride;
            int64_t before = 0;
            for (int64_t i = 0; i < residue; ++i) before += (a.width - i + x.stride - 1) / x.stride;
            before += from / x.stride;
            values += count_bits(bits, before);
            int32_t place_of = int32_t(((r + y.reach) * panel_cols + (from - first) / x.stride + x.reach) * 8 * width);
            const int64_t columns = (end - from + x.stride - 1) / x.stride;
            for (int64_t i = 0; i < columns; i += 8, place_of += int32_t(64 * width))
                for (uint64_t word = word_at(bits + before + i, std::min<int64_t>(8, columns - i)); word;
                     word &= word - 1)
                    *out++ = {*values++, place_of + int32_t(__builtin_ctzll(word)) * int32_t(width)};
        }
        return out - entries;
    }

    // The output gradient of `channels` channels around a tile, as [block][row][column][sample][channel].
    void pack(const Place& place, int64_t channel, int64_t channels, float* tiles) const {
        const View& g = q.grad;
        for (int64_t r = 0; r < place.rows + y.reach; ++r)
            for (int64_t c = 0; c < place.cols + x.reach; ++c) {
                const int64_t row = place.y + r - y.reach, col = place.x + c - x.reach;
                float* to = tiles + (r * panel_cols + c) * 8 * width;
                const float* from = static_cast<const float*>(g.data) + place.block * a.block_lanes + channel * g.c +
                                    row * g.y + col * g.x;
                const bool inside = row >= 0 && row < q.output_h && col >= 0 && col < q.output_w;
                const int64_t left = inside ? a.lanes - place.block * a.block_lanes - col * a.column_lanes : 0;
                if (channels == width && left - (place.blocks - 1) * a.block_lanes >= 8) {
                    // Eight channels at a time: their lines of all blocks, which may share a cache set.
                    for (int64_t k = 0; k < width; k += 8)
                        for (int64_t block = 0; block < place.blocks; ++block)
                            transpose_eight(from + k * g.c + block * a.block_lanes, g.c, to + block * tile_size() + k,
                                            std::min<int64_t>(8, width - k));
                    continue;
                }
                for (int64_t block = 0; block < place.blocks; ++block, to += tile_size(), from += a.block_lanes) {
                    std::memset(to, 0, size_t(8 * width) * sizeof(float));
                    transpose(from, g.c, to, width, channels, std::clamp<int64_t>(left - block * a.block_lanes, 0, 8));
                }
            }
    }

    // Eight samples of `channels` channels, at most eight, to [sample][channel].
    void transpose_eight(const float* from, int64_t from_stride, float* to, int64_t channels) const {
        if (channels < 8) return transpose(from, from_stride, to, width, channels, 8);
        vec8 block[8];
        for (int k = 0; k < 8; ++k) block[k] = *reinterpret_cast<const vec8_u*>(from + k * from_stride);
        transpose8(block);
        for (int k = 0; k < 8; ++k) *reinterpret_cast<vec8_u*>(to + k * width) = block[k];
    }

    void add_tile(const Decoded& decoded, size_t list, const Entry* entries, int64_t group, const float* tile,
                  float* sums) const {
        const int64_t channels = q.shape.in_per_group, step = int64_t(phases.size());
        const int64_t* first = decoded.first.data() + (int64_t(list) * a.channels + group * channels) * step;
        for (const Phase& phase : phases) {
            const Lists lists{entries, first++, step, channels};
            const int64_t count = int64_t(phase.taps.size());
            for (int64_t t = 0; t < count; t += kMostTaps)
                add_entries_for(std::min<int64_t>(kMostTaps, count - t), vectors)(lists, tile, phase.taps.data() + t,
                                                                                  sums, taps * width);
        }
    }

    // The sums of a block of output channels, in the weight's own order.
    void finish(int64_t block, float* sums) const {
        const int64_t columns = q.shape.in_per_group * taps, size = columns * width;
        float* own = sums + block * size;
        for (int64_t team = 1; team < block_teams; ++team) {
            const float* other = own + team * sums_size();
            for (int64_t i = 0; i < size; i += kLanes) store(own + i, load(own + i) + load(other + i));
        }
        const int64_t group = block / row_blocks, offset = block % row_blocks * width;
        const int64_t rows = std::min(width, group_rows - offset), row_size = q.shape.in_per_group * all_taps;
        float* to = q.weight_grad + (group * group_rows + offset) * row_size;
        if (taps == all_taps) return transpose(own, width, to, columns, columns, rows);
        thread_local Scratch scratch;
        float* packed = scratch.floats(size_t(rows * columns) + 1);
        transpose(own, width, packed, columns, columns, rows);
        for (int64_t row = 0; row < rows; ++row, to += row_size) {
            std::memset(to, 0, size_t(row_size) * sizeof(float));
            for (int64_t i = 0; i < q.shape.in_per_group; ++i)
                for (int64_t tap : useful) to[i * all_taps + tap] = *packed++;
        }
    }
};

}  // namespace

int64_t compact_gradient(const CompactGradient& gradient) { return CompactGradientSum(gradient).run(); }

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
