// What Python calls, on torch's stable ABI, and the operators that are a single pass. Python
// (native/*.py) hands over contiguous CPU tensors of agreeing shapes and dtypes; labels are checked
// by those that compute with them, because they become addresses.

#include "operators.hpp"

#include <cstdlib>

#include "tensors.hpp"

namespace iada {

void parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, function, context));
}

namespace {

// What each thread keeps for scratch, taken and given back from its end. A small batch takes twenty
// buffers, and an allocator's work for them as long as its products.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kKept = 64;  // each its own allocation, whose bounds are watched
#else
constexpr int64_t kKept = 1 << 18;
#endif
struct Kept {
  alignas(64) char memory[kKept];
  int64_t taken;
};
thread_local Kept kept;

}  // namespace

void* take_scratch(int64_t bytes) {
  Kept& own = kept;
  if (bytes <= kKept - own.taken) {
    own.taken += bytes;
    return own.memory + own.taken - bytes;
  }
  void* memory = std::aligned_alloc(64, static_cast<size_t>(bytes));
  STD_TORCH_CHECK(memory != nullptr, "native: expected ", bytes, " bytes of memory for scratch, got "
                  "none; free some, take a smaller batch, or pass backend='torch'");
  return memory;
}

void give_back_scratch(void* memory, int64_t bytes) {
  Kept& own = kept;
  if (memory >= own.memory && memory < own.memory + kKept) {
    own.taken -= bytes;
  } else {
    std::free(memory);
  }
}

namespace {

template <class T>
void update_of(const Tensor& covariance, const Tensor& mean, const Tensor& count,
               const Tensor& features, const Tensor& labels) {
  const int64_t C = mean.size(0), A = mean.size(1);
  const Grouping grouping =
      group_rows(pointer<int64_t>(labels), features.size(0), C, std::nullopt);
  run(CovarianceUpdate<T>{C, A, grouping.all(), row_type(features), features.const_data_ptr(),
                          covariance.dim() == 3, target<T>(covariance), target<T>(mean),
                          target<int64_t>(count)});
}

}  // namespace

void covariance_update(const Tensor& covariance, const Tensor& mean, const Tensor& count,
                       const Tensor& features, const Tensor& labels) {
  const ScalarType type = mean.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) &&
                      covariance.scalar_type() == type && count.scalar_type() == ScalarType::Long,
                  "native: expected statistics in float32 or float64 and counts in int64");
  if (type == ScalarType::Double) {
    update_of<double>(covariance, mean, count, features, labels);
  } else {
    update_of<float>(covariance, mean, count, features, labels);
  }
}

namespace {

bool is_float(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  const ScalarType type = tensor.scalar_type();
  if (!tensor.is_cpu() || tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (tensor.size(d) != std::data(sizes)[d]) return false;
  }
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

bool is_float(const std::optional<Tensor>& tensor, std::initializer_list<int64_t> sizes) {
  return !tensor.has_value() || is_float(*tensor, sizes);
}

bool are_finite(const Tensor& tensor) {
  bool finite = tensor.is_contiguous();
  if (finite) run(AllFinite{row_type(tensor), tensor.const_data_ptr(), tensor.numel(), &finite});
  return finite;
}

// Whether log π is not π itself, as far as can be told here: contiguous, in float32 or float64.
bool is_log(const Tensor& log_prior) {
  const ScalarType type = log_prior.scalar_type();
  if (!log_prior.is_contiguous()) return false;
  const auto told = [C = log_prior.size(0)](const auto* values) {
    double sum = 0, least = 0;
    for (int64_t c = 0; c < C; ++c) {
      sum += double(values[c]);
      least = values[c] < least ? double(values[c]) : least;
    }
    return C < 2 || least < 0 || !(sum > 0.999 && sum < 1.001);
  };
  if (type == ScalarType::Float) return told(pointer<float>(log_prior));
  return type == ScalarType::Double && told(pointer<double>(log_prior));
}

}  // namespace

bool arguments_fit(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& labels, const std::optional<Tensor>& covariance,
                   const std::optional<Tensor>& epsilon, const std::optional<Tensor>& log_prior,
                   int64_t ignore_index, bool streams) {
  if (features.dim() != 2 || weight.dim() != 2 || labels.dim() != 1) return false;
  const int64_t N = features.size(0), A = features.size(1), C = weight.size(0);
  if (C == 0 || !is_float(features, {N, A}) || !is_float(weight, {C, A}) || !is_float(bias, {C}) ||
      !is_float(epsilon, {N}) || !is_float(log_prior, {C})) {
    return false;
  }
  if (covariance.has_value()) {
    const ScalarType type = covariance->scalar_type();
    if (!is_float(*covariance, {C, A}) && !is_float(*covariance, {C, A, A})) return false;
    if (type != ScalarType::Float && type != ScalarType::Double) return false;
    // Finite numbers of double precision may overflow in statistics of single precision.
    if (streams && type == ScalarType::Float && features.scalar_type() == ScalarType::Double) {
      return false;
    }
  }
  if (!labels.is_cpu() || labels.scalar_type() != ScalarType::Long || labels.size(0) != N ||
      !labels.is_contiguous()) {
    return false;
  }
  const int64_t* y = pointer<int64_t>(labels);
  bool fit = true;
  for (int64_t i = 0; i < N; ++i) fit &= (y[i] >= 0 && y[i] < C) || y[i] == ignore_index;
  if (epsilon.has_value()) fit = fit && are_finite(*epsilon);
  if (log_prior.has_value()) fit = fit && is_log(*log_prior);
  return fit && !(streams && covariance.has_value() && !are_finite(features));
}

}  // namespace iada

STABLE_TORCH_LIBRARY(iada_native, library) {
  library.def(
      "loss_forward(Tensor features, Tensor weight, Tensor? bias, Tensor labels, Tensor? covariance,"
      " Tensor? epsilon, Tensor? log_prior, Tensor? row_scale, float alpha, float beta,"
      " int ignore_index, int reduction, int needs, bool rounded) -> (Tensor, Tensor, Tensor)");
  library.def(
      "loss_forward_update(Tensor features, Tensor weight, Tensor? bias, Tensor labels,"
      " Tensor(a!) covariance, Tensor(b!) mean, Tensor(c!) count, Tensor? epsilon,"
      " Tensor? log_prior, float alpha, float beta, int ignore_index, int reduction, int needs, bool rounded)"
      " -> (Tensor, Tensor, Tensor)");
  library.def(
      "loss_backward(Tensor grad_loss, Tensor features, Tensor weight, Tensor labels,"
      " Tensor residual, Tensor partial, int covariance_dim, float alpha, float beta,"
      " int ignore_index, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "covariance_update(Tensor(a!) covariance, Tensor(b!) mean, Tensor(c!) count, Tensor features,"
      " Tensor labels) -> ()");
  library.def(
      "hypergradient(Tensor features, Tensor weight, Tensor? bias, Tensor labels, Tensor? covariance,"
      " Tensor? epsilon, Tensor? log_prior, Tensor? features_tangent, Tensor weight_tangent,"
      " Tensor? bias_tangent, float alpha, float beta, int ignore_index, int reduction,"
      " bool needs_covariance) -> (Tensor, Tensor, Tensor)");
  library.def(
      "covariance_step(Tensor(a!) covariance, Tensor weight, Tensor weight_tangent, Tensor labels,"
      " Tensor residual, Tensor curvature, int ignore_index, float scale) -> ()");
  library.def(
      "characteristics(Tensor features, Tensor logits, Tensor labels, Tensor weight,"
      " int neighbours) -> Tensor");
  library.def(
      "arguments_fit(Tensor features, Tensor weight, Tensor? bias, Tensor labels,"
      " Tensor? covariance, Tensor? epsilon, Tensor? log_prior, int ignore_index, bool streams)"
      " -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(iada_native, CPU, library) {
  library.impl("loss_forward", TORCH_BOX(&iada::loss_forward));
  library.impl("loss_forward_update", TORCH_BOX(&iada::loss_forward_update));
  library.impl("loss_backward", TORCH_BOX(&iada::loss_backward));
  library.impl("covariance_update", TORCH_BOX(&iada::covariance_update));
  library.impl("hypergradient", TORCH_BOX(&iada::hypergradient));
  library.impl("covariance_step", TORCH_BOX(&iada::covariance_step));
  library.impl("characteristics", TORCH_BOX(&iada::characteristics));
  library.impl("arguments_fit", TORCH_BOX(&iada::arguments_fit));
}

extern "C" __attribute__((visibility("default"))) const char* iada_instruction_set() {
  return iada::instruction_set_name();
}
