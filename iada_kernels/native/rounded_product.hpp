// Products of float32 operands rounded to bfloat16, with sums in float32: twice the multiply-adds of an
// instruction, where the processor has AVX512-BF16. An operand's relative error is 2⁻⁸ at most.
//
// Neighbours along K lie in one word, the first in its low half, with a zero after an odd K: A (M, K/2),
// B (K/2, kTileColumns), C (M, kTileColumns).

#pragma once

#include "product.hpp"

namespace iada {
namespace {

// Whether such products are compiled for operands T; `processor_rounds` says whether they run here.
template <class T>
constexpr bool kRounds = false;

inline int64_t pairs_of(int64_t depth) { return (depth + 1) / 2; }

}  // namespace
}  // namespace iada

#if IADA_VECTOR_BYTES == 64 && defined(__AVX512BW__) && \
    (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 11)

#include <immintrin.h>

#define IADA_ROUNDS __attribute__((target("avx512bf16")))

namespace iada {
namespace {

template <>
constexpr bool kRounds<float> = true;

inline bool processor_rounds() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
}

typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

IADA_ROUNDS inline Halves rounded(const float* from) {
  return (Halves)_mm512_cvtneps_pbh(load(from));
}

// A row of `count` floats, a multiple of 16.
IADA_ROUNDS inline void round_row(const float* from, int64_t count, uint32_t* to) {
  for (int64_t k = 0; k < count; k += 16) {
    const Halves halves = rounded(from + k);
    std::memcpy(to + k / 2, &halves, sizeof halves);
  }
}

// B from the columns of one tile of float32 rows, `stride` apart.
IADA_ROUNDS inline void round_panel(const float* from, int64_t stride, int64_t depth, uint32_t* to) {
  for (int64_t k = 0; k < depth; k += 2, to += kTileColumns<float>) {
    for (int64_t i = 0; i < kTileColumns<float>; i += 16) {
      const float* low = from + k * stride + i;
      Words pair = __builtin_convertvector(rounded(low), Words);
      if (k + 1 < depth) pair |= __builtin_convertvector(rounded(low + stride), Words) << 16;
      std::memcpy(to + i, &pair, sizeof pair);
    }
  }
}

IADA_ROUNDS inline __m512bh words(const uint32_t* from) {
  Words loaded;
  std::memcpy(&loaded, from, sizeof loaded);
  return (__m512bh)loaded;
}

template <int M>
IADA_ROUNDS inline void rounded_tile(int64_t pairs, const uint32_t* a, int64_t a_row,
                                     const uint32_t* b, float* c, bool add) {
  Vector<float> acc[M][2] = {};
  for (int64_t k = 0; k < pairs; ++k, b += kTileColumns<float>) {
    const __m512bh b0 = words(b), b1 = words(b + 16);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const __m512bh x = (__m512bh)(a[m * a_row + k] + Words{});
      acc[m][0] = _mm512_dpbf16_ps(acc[m][0], x, b0);
      acc[m][1] = _mm512_dpbf16_ps(acc[m][1], x, b1);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    float* row = c + m * kTileColumns<float>;
    store(row, add ? acc[m][0] + load(row) : acc[m][0]);
    store(row + 16, add ? acc[m][1] + load(row + 16) : acc[m][1]);
  }
}

// C = A B; what `fetch` asks for comes while tiles are multiplied.
inline void rounded_product(int64_t rows, int64_t depth, const uint32_t* a, int64_t a_row,
                            const uint32_t* b, float* c, Fetch<float> fetch) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, pairs = pairs_of(depth);
  for (int64_t k = 0; k < pairs; k += kDepth / 2) {
    const int64_t deep = smaller(kDepth / 2, pairs - k);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = rows * t / tiles, count = rows * (t + 1) / tiles - begin;
      const uint32_t *from = a + begin * a_row + k, *with = b + k * kTileColumns<float>;
      float* to = c + begin * kTileColumns<float>;
      switch (count) {
        case 1: rounded_tile<1>(deep, from, a_row, with, to, k > 0); break;
        case 2: rounded_tile<2>(deep, from, a_row, with, to, k > 0); break;
        case 3: rounded_tile<3>(deep, from, a_row, with, to, k > 0); break;
        case 4: rounded_tile<4>(deep, from, a_row, with, to, k > 0); break;
        case 5: rounded_tile<5>(deep, from, a_row, with, to, k > 0); break;
        default: rounded_tile<6>(deep, from, a_row, with, to, k > 0);
      }
      fetch();
    }
  }
}

}  // namespace
}  // namespace iada

#else

namespace iada {
namespace {
inline bool processor_rounds() { return false; }
}  // namespace
}  // namespace iada

#endif
