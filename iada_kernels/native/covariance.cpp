// The streaming class covariance: population convention, all history weighted equally.
//
// For a class with m rows in the batch, w = m/(n+m), batch mean μ′ and centred rows X,
//
//     Σ ← (1−w) Σ + (w/m) XᵀX + w(1−w)(μ−μ′)(μ−μ′)ᵀ ;   μ ← μ + w(μ′−μ) ;   n ← n+m
//
// features (N, A), Σ (C, A, A) or its diagonal (C, A), μ (C, A), n (C). Absent classes are not
// touched. Rows are centred on their batch mean, summed in double, before any product. Of the
// product the blocks on and above the diagonal are computed, the others are their mirror image;
// with few rows both halves are computed, by the same operations in the same order.
//
// Scratch: centred rows of at most kCentred numbers (or 256 rows, where that is more), in panels of
// one tile's width; mean and shift of the classes present; a block of Σ for each thread.

#include "passes.hpp"
#include "product.hpp"
#include "threads.hpp"

namespace iada {
namespace {

constexpr int64_t kColumns = 128;         // columns of a piece of the means
constexpr int64_t kBlock = 64;            // rows and columns of a block of Σ
constexpr int64_t kFewRows = 16;          // rows of a class up to which Σ is written along its rows
constexpr int64_t kCentred = int64_t(1) << 20;

template <class T>
struct Factors {
  T keep, batch, between;  // 1 − w, w/m, w(1 − w)
};

template <class T>
Factors<T> factors(int64_t before, int64_t rows) {
  const double w = double(rows) / double(before + rows);
  return {static_cast<T>(1 - w), static_cast<T>(w / double(rows)), static_cast<T>(w * (1 - w))};
}

// Batch means, shifts, running means and, for the diagonal form, variances; a piece is a class
// and a range of columns.
template <class T>
void means(const CovarianceUpdate<T>& p, T* batch_mean, T* shift) {
  const int64_t A = p.width, pieces = (A + kColumns - 1) / kColumns;
  const double work = double(p.rows.begins[p.rows.present] - p.rows.begins[0]) * A * 2;
  parallel_pieces<Buffer<double>>(p.rows.present * pieces, work, 2 * kColumns,
                                  [&](int64_t piece, double* own) {
    const int64_t u = piece / pieces, start = piece % pieces * kColumns;
    const int64_t size = smaller(kColumns, A - start), c = p.rows.classes[u];
    const int64_t first = p.rows.begins[u], last = p.rows.begins[u + 1], m = last - first;
    double* row = own + kColumns;
    double middle[kColumns];
    // The second look takes out what rounding left of the mean in the first.
    for (int64_t i = 0; i < size; ++i) middle[i] = 0;
    for (int look = 0; look < 2; ++look) {
      for (int64_t i = 0; i < size; ++i) own[i] = 0;
      for (int64_t k = first; k < last; ++k) {
        read_row(p.type, p.features, p.rows.order[k] * A + start, size, row);
        for (int64_t i = 0; i < size; ++i) own[i] += row[i] - middle[i];
      }
      for (int64_t i = 0; i < size; ++i) middle[i] += own[i] / double(m);
      if (sizeof(T) < sizeof(double)) break;  // double has digits to spare for float
    }
    const Factors<T> f = factors<T>(p.count[c], m);
    const double w = double(m) / double(p.count[c] + m);
    T* mean = p.mean + c * A + start;
    T* own_shift = shift + u * A + start;
    for (int64_t i = 0; i < size; ++i) {
      batch_mean[u * A + start + i] = static_cast<T>(middle[i]);
      own_shift[i] = static_cast<T>(middle[i] - double(mean[i]));
      mean[i] = static_cast<T>(double(mean[i]) + w * (middle[i] - double(mean[i])));
    }
    if (p.full) return;
    for (int64_t i = 0; i < size; ++i) own[i] = 0;
    for (int64_t k = first; k < last; ++k) {
      read_row(p.type, p.features, p.rows.order[k] * A + start, size, row);
      for (int64_t i = 0; i < size; ++i) own[i] += (row[i] - middle[i]) * (row[i] - middle[i]);
    }
    T* variance = p.covariance + c * A + start;
    for (int64_t i = 0; i < size; ++i) {
      variance[i] = f.keep * variance[i] + f.batch * static_cast<T>(own[i]) +
                    f.between * own_shift[i] * own_shift[i];
    }
  });
}

// Rows of one class, begin … end of `order`, and where they lie among the centred rows.
struct Segment {
  int64_t u, begin, end, at;
};

// Σ[i + a, k + b] for a < rows, b < columns from XᵀX (block), in place.
template <class T>
inline void combine(T* sigma, int64_t A, int64_t i, int64_t k, int64_t rows, int64_t columns,
                    T* block, int64_t block_row, const T* shift, const Factors<T>& f, bool first) {
  for (int64_t a = 0; a < rows; ++a) {
    const T* row = sigma + (i + a) * A + k;
    T* made = block + a * block_row;
    const T own = shift[i + a];
    if (first) {
      for (int64_t b = 0; b < columns; ++b) {
        made[b] = f.keep * row[b] + (f.batch * made[b] + f.between * (own * shift[k + b]));
      }
    } else {
      for (int64_t b = 0; b < columns; ++b) made[b] = row[b] + f.batch * made[b];
    }
  }
}

template <class T>
inline void write_block(T* sigma, int64_t A, int64_t i, int64_t k, int64_t rows, int64_t columns,
                        const T* block, int64_t block_row) {
  for (int64_t a = 0; a < rows; ++a) {
    std::memcpy(sigma + (i + a) * A + k, block + a * block_row, columns * sizeof(T));
  }
}

// Σ[i + a, k + b] ← block[b, a] for a < rows, b < columns.
template <class T>
inline void write_transposed(T* sigma, int64_t A, int64_t i, int64_t k, int64_t rows,
                             int64_t columns, const T* block, int64_t block_row) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t a = 0; a < rows; a += lanes) {
    for (int64_t b = 0; b < columns; b += lanes) {
      T* to = sigma + (i + a) * A + k + b;
      const T* from = block + b * block_row + a;
      if (a + lanes <= rows && b + lanes <= columns) {
        Vector<T> square[lanes];
        for (int64_t l = 0; l < lanes; ++l) square[l] = load(from + l * block_row);
        transpose<T, lanes / 2>(square);
        for (int64_t l = 0; l < lanes; ++l) store(to + l * A, square[l]);
        continue;
      }
      for (int64_t x = 0; x < smaller(lanes, rows - a); ++x) {
        for (int64_t y = 0; y < smaller(lanes, columns - b); ++y) {
          to[x * A + y] = from[y * block_row + x];
        }
      }
    }
  }
}

constexpr int64_t kStrip = 4;  // divides kTileColumns of every instruction set

// Rows [a, a + rows) of Σ in one sweep, up to kStrip of them so that sums do not wait for each other.
template <class T>
void update_strip(T* sigma, int64_t A, int64_t a, int64_t rows, int64_t rows_of_all, int64_t at,
                  int64_t depth, const T* centred, const T* shift, T keep, T batch, T between) {
  constexpr int64_t n = kTileColumns<T>, lanes = kLanes<T>;
  const T* own = centred + (a / n * rows_of_all + at) * n + a % n;
  for (int64_t k = 0; k < A; k += n) {
    const T* x = centred + (k / n * rows_of_all + at) * n;
    Vector<T> sums[kStrip][2] = {};
    for (int64_t r = 0; r < depth; ++r) {
      const Vector<T> x0 = load(x + r * n), x1 = load(x + r * n + lanes);
#pragma GCC unroll 4
      for (int m = 0; m < kStrip; ++m) {
        const Vector<T> left = splat(own[r * n + m]);
        sums[m][0] += left * x0;
        sums[m][1] += left * x1;
      }
    }
    const int64_t columns = smaller(n, A - k);
    const bool whole = columns == n;
    T held[n], shifts[n];
    if (!whole) {
      for (int64_t b = 0; b < n; ++b) shifts[b] = b < columns ? shift[k + b] : T(0);
    }
    const T* other = whole ? shift + k : shifts;
#pragma GCC unroll 4
    for (int m = 0; m < kStrip; ++m) {  // unrolled, so that sums stay in registers
      if (m == rows) break;
      const Vector<T> own_shift = splat(shift[a + m]);
      T* row = sigma + (a + m) * A + k;
      T* to = whole ? row : held;
      for (int64_t b = 0; !whole && b < n; ++b) held[b] = b < columns ? row[b] : T(0);
      store(to, keep * load(to) + (batch * sums[m][0] + between * (own_shift * load(other))));
      store(to + lanes, keep * load(to + lanes) +
                            (batch * sums[m][1] + between * (own_shift * load(other + lanes))));
      if (!whole) std::memcpy(row, held, columns * sizeof(T));
    }
  }
}

// Few rows: passing over Σ is what costs, so each of its rows is read and written in one sweep.
// Element (a, b) and element (b, a) come from the same operations, and so are equal.
template <class T>
void update_rows(T* sigma, int64_t A, int64_t begin, int64_t end, int64_t rows_of_all, int64_t at,
                 int64_t depth, const T* centred, const T* shift, const Factors<T>& f, bool first) {
  const T keep = first ? f.keep : T(1), between = first ? f.between : T(0);
  for (int64_t a = begin; a < end; a += kStrip) {
    update_strip(sigma, A, a, smaller(kStrip, end - a), rows_of_all, at, depth, centred, shift, keep,
                 f.batch, between);
  }
}

// Many rows: blocks of kBlock columns on and above the diagonal, and their mirror images.
template <class T>
void update_blocks(T* sigma, int64_t A, int64_t i, int64_t rows_of_all, int64_t at, int64_t depth,
                   const T* centred, const T* shift, const Factors<T>& f, bool first, T* block) {
  constexpr int64_t n = kTileColumns<T>, tiles = kBlock / n;
  const int64_t panels = padded<T>(A) / n;
  const int64_t rows = smaller(kBlock, A - i * kBlock);
  for (int64_t k = i; k * kBlock < A; ++k) {
    const int64_t columns = smaller(kBlock, A - k * kBlock);
    for (int64_t a = 0; a < smaller(tiles, panels - i * tiles); ++a) {
      const T* left = centred + ((i * tiles + a) * rows_of_all + at) * n;
      for (int64_t b = i == k ? a : 0; b < smaller(tiles, panels - k * tiles); ++b) {
        product<T>(n, n, depth, left, 1, n, centred + ((k * tiles + b) * rows_of_all + at) * n, n,
                   block + a * n * kBlock + b * n, kBlock, false);
      }
    }
    if (i == k) {
      for (int64_t a = 0; a < rows; ++a) {
        for (int64_t b = 0; b < a; ++b) block[a * kBlock + b] = block[b * kBlock + a];
      }
    }
    combine(sigma, A, i * kBlock, k * kBlock, rows, columns, block, kBlock, shift, f, first);
    write_block(sigma, A, i * kBlock, k * kBlock, rows, columns, block, kBlock);
    if (i == k) continue;
    write_transposed(sigma, A, k * kBlock, i * kBlock, columns, rows, block, kBlock);
  }
}

template <class T>
void rank_update(const CovarianceUpdate<T>& p, const Segment* segments, int64_t count, int64_t rows,
                 const T* batch_mean, const T* shift, T* centred) {
  constexpr int64_t n = kTileColumns<T>;
  const int64_t A = p.width, panels = padded<T>(A) / n;
  parallel_pieces<Buffer<T>>(rows, double(rows) * A, panels * n, [&](int64_t r, T* row) {
    int64_t s = 0;
    while (s + 1 < count && segments[s + 1].at <= r) ++s;
    const Segment& segment = segments[s];
    const T* middle = batch_mean + segment.u * A;
    read_row(p.type, p.features, p.rows.order[segment.begin + r - segment.at] * A, A, row);
    for (int64_t a = 0; a < A; ++a) row[a] -= middle[a];
    for (int64_t a = A; a < panels * n; ++a) row[a] = 0;
    for (int64_t i = 0; i < panels; ++i) {
      std::memcpy(centred + (i * rows + r) * n, row + i * n, n * sizeof(T));
    }
  });
  // A piece is a segment and two rows of blocks, a long and a short one: all cost the same.
  const int64_t lines = (A + kBlock - 1) / kBlock, pairs = (lines + 1) / 2;
  const double work = double(rows) * A * A / 2 + double(count) * A * A;
  parallel_pieces<Buffer<T>>(pairs * count, work, kBlock * kBlock, [&](int64_t piece, T* block) {
    const Segment& segment = segments[piece % count];
    const int64_t c = p.rows.classes[segment.u], depth = segment.end - segment.begin;
    const int64_t all = p.rows.begins[segment.u + 1] - p.rows.begins[segment.u];
    const Factors<T> f = factors<T>(p.count[c], all);
    const bool first = segment.begin == p.rows.begins[segment.u];
    T* sigma = p.covariance + c * A * A;
    const T* own_shift = shift + segment.u * A;
    for (int side = 0; side < 2; ++side) {
      const int64_t pair = piece / count, i = side == 0 ? pair : lines - 1 - pair;
      if (side == 1 && i == pair) break;
      if (all > kFewRows) {
        update_blocks(sigma, A, i, rows, segment.at, depth, centred, own_shift, f, first, block);
        continue;
      }
      update_rows(sigma, A, i * kBlock, smaller((i + 1) * kBlock, A), rows, segment.at, depth,
                  centred, own_shift, f, first);
    }
  });
}

template <class T>
void update(const CovarianceUpdate<T>& p) {
  const int64_t A = p.width, U = p.rows.present;
  if (U == 0) return;
  const int64_t total = p.rows.begins[U];
  Buffer<T> batch_mean(U * A), shift(U * A);
  means(p, batch_mean.data, shift.data);
  if (p.full) {
    int64_t begin = p.rows.begins[0], u = 0;
    const int64_t limit = smaller(total - begin, larger(256, kCentred / larger(A, 1)));
    Buffer<T> centred(limit * padded<T>(A));
    Buffer<Segment> segments(U);
    while (begin < total) {
      int64_t count = 0, rows = 0;
      while (begin < total && rows < limit) {
        while (p.rows.begins[u + 1] <= begin) ++u;
        const int64_t end = smaller(p.rows.begins[u + 1], begin + limit - rows);
        segments.data[count++] = {u, begin, end, rows};
        rows += end - begin;
        begin = end;
      }
      rank_update(p, segments.data, count, rows, batch_mean.data, shift.data, centred.data);
    }
  }
  for (int64_t u = 0; u < U; ++u) {
    p.count[p.rows.classes[u]] += p.rows.begins[u + 1] - p.rows.begins[u];
  }
}

}  // namespace

namespace IADA_SET {
void covariance_update(const CovarianceUpdate<float>& p) { update(p); }
void covariance_update(const CovarianceUpdate<double>& p) { update(p); }
}  // namespace IADA_SET

}  // namespace iada
