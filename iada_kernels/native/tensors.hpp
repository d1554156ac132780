// From torch's tensors to pointers, and from labels to rows grouped by class: what every operator
// begins with. Included by files that are compiled once, for any processor.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.hpp"
#include "passes.hpp"

namespace iada {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[3] = {1, 1, 1};
  const int64_t dim = static_cast<int64_t>(sizes.size());
  for (int64_t d = dim - 2; d >= 0; --d) strides[d] = strides[d + 1] * std::data(sizes)[d + 1];
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, std::data(sizes), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? pointer<T>(*tensor) : nullptr;
}
template <class T>
T* target(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline RowType row_type(const Tensor& features) {
  switch (features.scalar_type()) {
    case ScalarType::Half: return RowType::half;
    case ScalarType::BFloat16: return RowType::bfloat16;
    case ScalarType::Double: return RowType::float64;
    default: return RowType::float32;
  }
}

// Rows grouped by class, by counting; rows to be left out are not among them.
struct Grouping {
  std::vector<int64_t> classes, order, begins, slot;
  int64_t rows() const { return static_cast<int64_t>(order.size()); }
  ClassRows all() const {
    return {static_cast<int64_t>(classes.size()), classes.data(), order.data(), begins.data()};
  }
};

// `ignore`: labels equal to it are left out and others must be in [0, C); without it, every label
// outside [0, C) is left out.
inline Grouping group_rows(const int64_t* labels, int64_t count, int64_t num_classes,
                    std::optional<int64_t> ignore) {
  Grouping g;
  std::vector<int64_t> place(num_classes, 0);
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t y = labels[i];
    if (ignore.has_value() && y == *ignore) continue;
    if (y < 0 || y >= num_classes) {
      STD_TORCH_CHECK(!ignore.has_value(), "labels: expected class indices in [0, ", num_classes,
                      ") or ignore_index=", ignore.value_or(0), ", got ", y, " at row ", i);
      continue;
    }
    ++place[y];
    ++rows;
  }
  g.slot.assign(num_classes, 0);
  g.begins.push_back(0);
  for (int64_t c = 0; c < num_classes; ++c) {
    if (place[c] == 0) continue;
    g.slot[c] = static_cast<int64_t>(g.classes.size());
    g.classes.push_back(c);
    const int64_t begin = g.begins.back();
    g.begins.push_back(begin + place[c]);
    place[c] = begin;
  }
  g.order.resize(rows);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t y = labels[i];
    if (y < 0 || y >= num_classes || (ignore.has_value() && y == *ignore)) continue;
    g.order[place[y]++] = i;
  }
  return g;
}

// What `Head` and `TangentHead` have in common, from the arguments of either operator.
template <class T, class Call>
HeadInputs<T> head_inputs(const Call& call, int64_t count, const int64_t* rows, const T* table,
                          const int64_t* slot, double divisor) {
  return {call.weight.size(0), call.weight.size(1), count, rows, row_type(call.features),
          call.features.const_data_ptr(), pointer<T>(call.weight), pointer<T>(call.bias),
          pointer<int64_t>(call.labels), pointer<T>(call.epsilon), pointer<T>(call.log_prior),
          table, slot, static_cast<T>(call.beta), static_cast<T>(1.0 / divisor)};
}

}  // namespace
}  // namespace iada
