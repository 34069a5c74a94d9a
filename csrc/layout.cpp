// Strided batched transposes: NCHW or channels-last <-> batch-last.
#include <algorithm>
#include <cstring>
#include <omp.h>

#include "bypass.h"
#include "kernels.h"
#include "panel.h"
#include "transpose.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

constexpr int64_t kTile = 64;              // rows and columns of a tile, at most, where there are many matrices
constexpr int64_t kStageBytes = 48 << 10;  // tiles of neighbouring matrices that are transposed together
constexpr int64_t kFarBytes = 8192;
constexpr int64_t kPad = 16;  // between staged runs, which would fall into few cache sets otherwise

// In a large tensor, what lies far apart (samples, channels) is read and written in long runs, by way of a stage:
// piece by piece, neither the processor's prefetching nor its cache sets are up to so many streams.
template <class T>
class Transposition {
  public:
    explicit Transposition(const Transpose& transpose)
        : q(transpose),
          rows(tile_size(q.rows, q.cols)),
          cols(tile_size(q.cols, q.rows)),
          together(std::clamp<int64_t>(kStage / (rows * cols), 1, q.batch_inner)),
          row_tiles((q.rows + rows - 1) / rows),
          col_tiles((q.cols + cols - 1) / cols),
          blocks((q.batch_inner + together - 1) / together),
          large(q.batch_outer * q.batch_inner * q.rows * q.cols * int64_t(sizeof(T)) > kBypassBytes),
          read_staged(large && q.from_row > kFar),
          write_staged(large && q.to_col > kFar) {}

    void run() {
        const int64_t items = q.batch_outer * blocks * row_tiles * col_tiles;
#pragma omp parallel num_threads(q.threads)
        {
            thread_local Scratch read_scratch, write_scratch;
            T* read = read_scratch.of<T>(size_t(rows * (cols * together + kPad)));
            T* written = write_scratch.of<T>(size_t(cols * (rows * together + kPad)));
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < items; ++i) tile(i, read, written);
            if (write_staged) finish_stores_around();
        }
    }

  private:
    static constexpr int64_t kStage = kStageBytes / sizeof(T), kFar = kFarBytes / sizeof(T);
    const Transpose& q;
    const int64_t rows, cols, together, row_tiles, col_tiles, blocks;
    const bool large, read_staged, write_staged;

    int64_t tile_size(int64_t size, int64_t other) const {
        const int64_t most = q.batch_inner > 1 ? kTile : std::max(kTile, kStage / std::min(other, kTile));
        return std::min(size, most);
    }

    void tile(int64_t item, T* read, T* written) const {
        const int64_t row = item % row_tiles * rows, col = item / row_tiles % col_tiles * cols;
        const int64_t block = item / row_tiles / col_tiles % blocks, outer = item / row_tiles / col_tiles / blocks;
        const int64_t first = block * together, count = std::min(together, q.batch_inner - first);
        const int64_t r = std::min(rows, q.rows - row), c = std::min(cols, q.cols - col);
        const T* from =
            static_cast<const T*>(q.from) + outer * q.from_outer + first * q.from_inner + row * q.from_row + col;
        T* to = static_cast<T*>(q.to) + outer * q.to_outer + first * q.to_inner + col * q.to_col + row;
        const int64_t read_row = count * c + kPad, written_col = count * r + kPad;
        if (read_staged)
            each_run(r, count, c, q.from_inner, [&](int64_t i, int64_t b, int64_t length) {
                std::memcpy(read + i * read_row + b * c, from + i * q.from_row + b * q.from_inner,
                            size_t(length) * sizeof(T));
            });
        for (int64_t b = 0; b < count; ++b)
            transpose(read_staged ? read + b * c : from + b * q.from_inner, read_staged ? read_row : q.from_row,
                      write_staged ? written + b * r : to + b * q.to_inner, write_staged ? written_col : q.to_col, r,
                      c);
        if (write_staged)
            each_run(c, count, r, q.to_inner, [&](int64_t j, int64_t b, int64_t length) {
                write_run(to + j * q.to_col + b * q.to_inner, written + j * written_col + b * r, length, true);
            });
    }

    // Pieces of `length` elements of `count` matrices, for each of `lines`; pieces that follow one another are one.
    template <class Body>
    static void each_run(int64_t lines, int64_t count, int64_t length, int64_t inner, Body body) {
        const int64_t pieces = inner == length ? 1 : count, run = inner == length ? count * length : length;
        for (int64_t i = 0; i < lines; ++i)
            for (int64_t b = 0; b < pieces; ++b) body(i, b, run);
    }
};

}  // namespace

void transpose_batches(const Transpose& q) {
    if (q.batch_outer * q.batch_inner * q.rows * q.cols == 0) return;
    with_element(q.element, [&](auto element) { Transposition<decltype(element)>(q).run(); });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
