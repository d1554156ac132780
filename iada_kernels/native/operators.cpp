// What Python calls, on torch's stable ABI, and the operators that are a single pass. Python
// (native/*.py) hands over contiguous CPU tensors of agreeing shapes and dtypes; labels are checked
// by those that compute with them, because they become addresses.

#include "operators.hpp"

#include "tensors.hpp"

namespace iada {

void parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, function, context));
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
  if (mean.scalar_type() == ScalarType::Double) {
    update_of<double>(covariance, mean, count, features, labels);
  } else {
    update_of<float>(covariance, mean, count, features, labels);
  }
}

bool values_fit(const Tensor& labels, int64_t num_classes, int64_t ignore_index,
                const std::optional<Tensor>& epsilon, const std::optional<Tensor>& features) {
  const int64_t* y = pointer<int64_t>(labels);
  bool fit = true;
  for (int64_t i = 0, count = labels.numel(); i < count; ++i) {
    fit &= (y[i] >= 0 && y[i] < num_classes) || y[i] == ignore_index;
  }
  for (const std::optional<Tensor>* numbers : {&epsilon, &features}) {
    if (!numbers->has_value()) continue;
    run(AllFinite{row_type(**numbers), (*numbers)->const_data_ptr(), (*numbers)->numel(), &fit});
  }
  return fit;
}

}  // namespace iada

STABLE_TORCH_LIBRARY(iada_native, library) {
  library.def(
      "loss_forward(Tensor features, Tensor weight, Tensor? bias, Tensor labels, Tensor? covariance,"
      " Tensor? epsilon, Tensor? log_prior, Tensor? row_scale, float alpha, float beta,"
      " int ignore_index, int reduction, int needs) -> (Tensor, Tensor, Tensor)");
  library.def(
      "loss_forward_update(Tensor features, Tensor weight, Tensor? bias, Tensor labels,"
      " Tensor(a!) covariance, Tensor(b!) mean, Tensor(c!) count, Tensor? epsilon,"
      " Tensor? log_prior, float alpha, float beta, int ignore_index, int reduction, int needs)"
      " -> (Tensor, Tensor, Tensor)");
  library.def(
      "loss_backward(Tensor grad_loss, Tensor features, Tensor weight, Tensor labels,"
      " Tensor residual, Tensor partial, int covariance_dim, float alpha, float beta,"
      " int ignore_index, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "covariance_update(Tensor(a!) covariance, Tensor(b!) mean, Tensor(c!) count, Tensor features,"
      " Tensor labels) -> ()");
  library.def(
      "values_fit(Tensor labels, int num_classes, int ignore_index, Tensor? epsilon,"
      " Tensor? features) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(iada_native, CPU, library) {
  library.impl("loss_forward", TORCH_BOX(&iada::loss_forward));
  library.impl("loss_forward_update", TORCH_BOX(&iada::loss_forward_update));
  library.impl("loss_backward", TORCH_BOX(&iada::loss_backward));
  library.impl("covariance_update", TORCH_BOX(&iada::covariance_update));
  library.impl("values_fit", TORCH_BOX(&iada::values_fit));
}

extern "C" __attribute__((visibility("default"))) const char* iada_instruction_set() {
  return iada::instruction_set_name();
}
