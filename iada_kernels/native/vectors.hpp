// Vectors of one register's width in the compilers' portable vector extension (gcc and clang,
// x86-64 and ARM64), exp, sign, and rows of any floating dtype read and written as float or double.
//
// IADA_VECTOR_BYTES is 16 (SSE2, NEON), 32 (AVX2) or 64 (AVX-512). Everything has internal
// linkage, see threads.hpp.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifndef IADA_VECTOR_BYTES
#define IADA_VECTOR_BYTES 16
#endif

namespace iada {

// The dtypes of features, numbered as torch numbers its scalar types.
enum class RowType : int32_t { half = 5, float32 = 6, float64 = 7, bfloat16 = 15 };

namespace {

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(IADA_VECTOR_BYTES)));
  typedef int32_t Integers __attribute__((vector_size(IADA_VECTOR_BYTES)));
  static constexpr int64_t count = IADA_VECTOR_BYTES / 4;
};
template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(IADA_VECTOR_BYTES)));
  typedef int64_t Integers __attribute__((vector_size(IADA_VECTOR_BYTES)));
  static constexpr int64_t count = IADA_VECTOR_BYTES / 8;
};
template <class T>
using Vector = typename Lanes<T>::Vector;
template <class T>
using Integers = typename Lanes<T>::Integers;
template <class T>
constexpr int64_t kLanes = Lanes<T>::count;
// Columns of one tile of a product; padded rows are multiples of it.
template <class T>
constexpr int64_t kTileColumns = 2 * Lanes<T>::count;

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

template <class T>
inline int64_t padded(int64_t size) {
  return (size + kTileColumns<T> - 1) / kTileColumns<T> * kTileColumns<T>;
}

// Columns that a pass over vectors touches.
template <class T>
inline int64_t whole_vectors(int64_t size) {
  return (size + Lanes<T>::count - 1) / Lanes<T>::count * Lanes<T>::count;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

template <class T>
inline Vector<T> load(const T* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
template <class T>
inline void store(T* to, Vector<T> v) {
  std::memcpy(to, &v, sizeof(v));
}
template <class T>
inline Vector<T> splat(T x) {
  return x - Vector<T>{};  // x − 0 is x for every x, which compilers fold; 0 + x is not, for −0
}
template <class T>
inline T sum(Vector<T> v) {
  T total = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}
template <class T>
inline Vector<T> choose(Integers<T> mask, Vector<T> yes, Vector<T> no) {
  return mask ? yes : no;
}
// Of the lanes S apart the larger ones, then of those half as far apart, …; NaN if there is one.
template <class T, int S, int... I>
inline T largest(Vector<T> v, std::integer_sequence<int, I...> lanes) {
  const Vector<T> other = __builtin_shufflevector(v, v, (I ^ S)...);
  v = choose<T>((v > other) | (v != v), v, other);
  if constexpr (S > 1) return largest<T, S / 2>(v, lanes);
  return v[0];
}
template <class T>
inline T largest(Vector<T> v) {
  constexpr int n = static_cast<int>(kLanes<T>);
  return largest<T, n / 2>(v, std::make_integer_sequence<int, n>());
}
template <class T>
inline Vector<T> sign(Vector<T> v) {
  const Vector<T> zero{};
  return __builtin_convertvector((v < zero) - (v > zero), Vector<T>);
}

// A square of one vector's width, transposed in place: rounds of exchanges between rows S apart.
template <class T, int S, int... I>
inline void exchange(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, I...>) {
  constexpr int n = static_cast<int>(kLanes<T>);
  const Vector<T> low = __builtin_shufflevector(a, b, ((I & S) != 0 ? n + I - S : I)...);
  b = __builtin_shufflevector(a, b, ((I & S) != 0 ? n + I : I + S)...);
  a = low;
}
template <class T, int S>
inline void transpose(Vector<T>* rows) {
  constexpr int n = static_cast<int>(kLanes<T>);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if ((i & S) == 0) exchange<T, S>(rows[i], rows[i + S], std::make_integer_sequence<int, n>());
  }
  if constexpr (S > 1) transpose<T, S / 2>(rows);
}

// exp, to about 1 ulp: x = n ln 2 + r, |r| ≤ ½ ln 2, a polynomial in r, and n into the exponent.
// Below the smallest normal number the result is 0 (exactly, for −∞ too); NaN stays NaN.
inline Vector<float> exponential(Vector<float> x) {
  typedef Vector<float> V;
  const V low = splat(-87.33654f), high = splat(88.72283f);
  V c = choose<float>(x < low, low, x);
  c = choose<float>(c > high, high, c);
  const V magic = splat(12582912.0f);  // 1.5·2²³: adding it rounds to an integer
  const V shifted = c * 1.44269504f + magic;
  const V n = shifted - magic;
  V r = c - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // n reaches 128, one more than an exponent holds: two factors.
  typedef Integers<float> I;
  const I k = (I)shifted - (I)magic;
  const I half = k >> 1;
  const V first = (V)((half + 127) << 23), second = (V)((k - half + 127) << 23);
  return choose<float>(x < low, V{}, p * first * second);
}

inline Vector<double> exponential(Vector<double> x) {
  typedef Vector<double> V;
  const V low = splat(-708.396418532264), high = splat(709.782712893384);
  V c = choose<double>(x < low, low, x);
  c = choose<double>(c > high, high, c);
  const V magic = splat(6755399441055744.0);  // 1.5·2⁵²
  const V shifted = c * 1.4426950408889634 + magic;
  const V n = shifted - magic;
  V r = c - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  V p = splat(1.6059043836821613e-10);  // 1/13!, then 1/12!, …
  p = p * r + 2.08767569878681e-9;
  p = p * r + 2.505210838544172e-8;
  p = p * r + 2.755731922398589e-7;
  p = p * r + 2.7557319223985893e-6;
  p = p * r + 2.48015873015873e-5;
  p = p * r + 1.984126984126984e-4;
  p = p * r + 1.388888888888889e-3;
  p = p * r + 8.333333333333333e-3;
  p = p * r + 4.1666666666666664e-2;
  p = p * r + 1.6666666666666666e-1;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  typedef Integers<double> I;
  const I k = (I)shifted - (I)magic;
  const I half = k >> 1;
  const V first = (V)((half + 1023) << 52), second = (V)((k - half + 1023) << 52);
  return choose<double>(x < low, V{}, p * first * second);
}

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float from_bfloat16(uint16_t b) { return bits_float(static_cast<uint32_t>(b) << 16); }
inline uint16_t to_bfloat16(float x) {
  const uint32_t u = float_bits(x);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Scaling by 2¹¹² moves the exponent's bias, and makes subnormal numbers normal.
  const float magnitude = bits_float(rest << 13) * bits_float(0x77800000);
  return bits_float(sign | float_bits(magnitude));
}
inline uint16_t to_half(float x) {
  const uint32_t u = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  const uint32_t rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (rest < 0x38800000) {  // subnormal: adding ½ lets the hardware round to multiples of 2⁻²⁴
    return sign | static_cast<uint16_t>(float_bits(bits_float(rest) + 0.5f) - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13);
}

// Elements [start, start + count) of an array of `type`, as T.
template <class T>
inline void read_row(RowType type, const void* from, int64_t start, int64_t count, T* to) {
  if (type == RowType::float32) {
    const float* p = static_cast<const float*>(from) + start;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(p[i]);
  } else if (type == RowType::float64) {
    const double* p = static_cast<const double*>(from) + start;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(p[i]);
  } else if (type == RowType::bfloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(from) + start;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from_bfloat16(p[i]));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(from) + start;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from_half(p[i]));
  }
}

template <class T>
inline void write_row(RowType type, void* to, int64_t start, int64_t count, const T* from) {
  if (type == RowType::float32) {
    float* p = static_cast<float*>(to) + start;
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<float>(from[i]);
  } else if (type == RowType::float64) {
    double* p = static_cast<double*>(to) + start;
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<double>(from[i]);
  } else if (type == RowType::bfloat16) {
    uint16_t* p = static_cast<uint16_t*>(to) + start;
    for (int64_t i = 0; i < count; ++i) p[i] = to_bfloat16(static_cast<float>(from[i]));
  } else {
    uint16_t* p = static_cast<uint16_t*>(to) + start;
    for (int64_t i = 0; i < count; ++i) p[i] = to_half(static_cast<float>(from[i]));
  }
}

}  // namespace
}  // namespace iada
