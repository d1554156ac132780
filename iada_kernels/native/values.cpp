// Whether all elements are finite, which is checked of every batch and so has to be fast.

#include "passes.hpp"
#include "threads.hpp"

namespace iada {
namespace {

constexpr int64_t kPiece = 1 << 16;  // elements of a piece of work
constexpr int64_t kRow = 256;        // elements read at a time

template <class T>
bool finite(RowType type, const void* numbers, int64_t begin, int64_t end) {
  T row[kRow], total[kLanes<T>] = {};
  for (int64_t at = begin; at < end; at += kRow) {
    const int64_t size = smaller(kRow, end - at);
    read_row(type, numbers, at, size, row);
    for (int64_t i = size; i < kRow; ++i) row[i] = 0;
    Vector<T> sum = load(total);
    // x − x is 0, but NaN for what is not finite; and NaN stays.
    for (int64_t i = 0; i < kRow; i += kLanes<T>) sum += load(row + i) - load(row + i);
    store(total, sum);
  }
  T left = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) left += total[i];
  return left == 0;
}

}  // namespace

namespace IADA_SET {
void all_finite(const AllFinite& p) {
  const int64_t pieces = (p.count + kPiece - 1) / kPiece;
  Buffer<bool> finite_pieces(pieces);
  parallel_pieces<Buffer<bool>>(pieces, double(p.count) / 4, 0, [&](int64_t piece, bool*) {
    const int64_t begin = piece * kPiece, end = smaller(begin + kPiece, p.count);
    finite_pieces.data[piece] = p.type == RowType::float64
                                    ? finite<double>(p.type, p.numbers, begin, end)
                                    : finite<float>(p.type, p.numbers, begin, end);
  });
  for (int64_t piece = 0; piece < pieces; ++piece) *p.all &= finite_pieces.data[piece];
}
}  // namespace IADA_SET

}  // namespace iada
