// What the meta step asks for: the hypergradient, the step of Σ along it, and the characteristics.

#include "operators.hpp"
#include "tensors.hpp"

namespace iada {
namespace {

struct TangentCall {
  const Tensor &features, &weight, &labels, &weight_tangent;
  const std::optional<Tensor>&bias, &covariance, &epsilon, &log_prior, &features_tangent,
      &bias_tangent;
  double alpha, beta;
  int64_t ignore_index, reduction;
  bool needs_covariance;
};

template <class T>
HypergradientResult hypergradient_of(const TangentCall& call) {
  const int64_t N = call.features.size(0), A = call.features.size(1), C = call.weight.size(0);
  const ScalarType type = call.weight.scalar_type();
  const Grouping grouping =
      group_rows(pointer<int64_t>(call.labels), N, C, call.ignore_index);
  const ClassRows rows = grouping.all();
  const bool sums = call.needs_covariance && call.covariance.has_value();
  Tensor grad_epsilon = empty({call.epsilon.has_value() ? N : 0}, type);
  Tensor residual = sums ? empty({N, C}, type) : empty({0}, type);
  Tensor curvature = sums ? empty({N, C}, type) : empty({0}, type);
  if (grouping.rows() < N) {  // rows left out
    for (Tensor* tensor : {&grad_epsilon, &residual, &curvature}) torch::stable::zero_(*tensor);
  }
  const int64_t size = call.covariance.has_value() ? rows.present * table_row(C) : 0;
  Buffer<T> table(size), tangent(size);
  if (call.covariance.has_value()) {
    run(ClassPass<T>{C, A, rows.present, rows.classes, pointer<T>(call.weight),
                     pointer<T>(call.covariance), call.covariance->dim() == 3,
                     static_cast<T>(call.alpha), table.data, nullptr,
                     pointer<T>(call.weight_tangent), tangent.data, nullptr, false});
  }
  const int64_t count = grouping.rows();
  const double divisor = call.reduction == kMean ? double(larger(1, count)) : 1.0;
  TangentHead<T> head{};
  static_cast<HeadInputs<T>&>(head) = head_inputs<T>(
      call, count, count == N ? nullptr : rows.order,
      call.covariance.has_value() ? table.data : nullptr, grouping.slot.data(), divisor);
  head.features_tangent = pointer<T>(call.features_tangent);
  head.weight_tangent = pointer<T>(call.weight_tangent);
  head.bias_tangent = pointer<T>(call.bias_tangent);
  head.tangent = tangent.data;
  head.grad_epsilon = call.epsilon.has_value() ? target<T>(grad_epsilon) : nullptr;
  head.residual = sums ? target<T>(residual) : nullptr;
  head.curvature = sums ? target<T>(curvature) : nullptr;
  run(head);
  return {grad_epsilon, residual, curvature};
}

template <class T>
void step_of(const Tensor& covariance, const Tensor& weight, const Tensor& weight_tangent,
             const Tensor& labels, const Tensor& residual, const Tensor& curvature,
             int64_t ignore_index, double scale) {
  const int64_t C = weight.size(0), A = weight.size(1), row = table_row(C);
  const Grouping grouping =
      group_rows(pointer<int64_t>(labels), labels.size(0), C, ignore_index);
  const ClassRows rows = grouping.all();
  Buffer<T> sums(2 * rows.present * row);
  T* curvature_sums = sums.data + rows.present * row;
  run(ClassSums<T>{C, rows, pointer<T>(residual), T(1), sums.data});
  run(ClassSums<T>{C, rows, pointer<T>(curvature), T(1), curvature_sums});
  run(CovarianceStep<T>{C, A, rows.present, rows.classes, pointer<T>(weight),
                        pointer<T>(weight_tangent), sums.data, curvature_sums,
                        static_cast<T>(scale), covariance.dim() == 3, target<T>(covariance)});
}

template <class T>
Tensor characteristics_of(const Tensor& features, const Tensor& logits, const Tensor& labels,
                          const Tensor& weight, int64_t neighbours) {
  const int64_t N = features.size(0), A = features.size(1), C = weight.size(0);
  const int64_t* y = pointer<int64_t>(labels);
  STD_TORCH_CHECK(group_rows(y, N, C, std::nullopt).rows() == N,
                  "labels: expected class indices in [0, ", C, ")");
  Tensor result = empty({N, 8}, weight.scalar_type());
  run(Characteristics<T>{N, C, A, larger(0, smaller(neighbours, N - 1)), row_type(features),
                         row_type(logits), features.const_data_ptr(), logits.const_data_ptr(), y,
                         pointer<T>(weight), target<T>(result)});
  return result;
}

}  // namespace

HypergradientResult hypergradient(
    const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const std::optional<Tensor>& covariance,
    const std::optional<Tensor>& epsilon, const std::optional<Tensor>& log_prior,
    const std::optional<Tensor>& features_tangent, const Tensor& weight_tangent,
    const std::optional<Tensor>& bias_tangent, double alpha, double beta, int64_t ignore_index,
    int64_t reduction, bool needs_covariance) {
  const TangentCall call{features,     weight,           labels,
                         weight_tangent, bias,           covariance,
                         epsilon,      log_prior,        features_tangent,
                         bias_tangent, alpha,            beta,
                         ignore_index, reduction,        needs_covariance};
  return weight.scalar_type() == ScalarType::Double ? hypergradient_of<double>(call)
                                                    : hypergradient_of<float>(call);
}

void covariance_step(const Tensor& covariance, const Tensor& weight, const Tensor& weight_tangent,
                     const Tensor& labels, const Tensor& residual, const Tensor& curvature,
                     int64_t ignore_index, double scale) {
  const auto step =
      weight.scalar_type() == ScalarType::Double ? step_of<double> : step_of<float>;
  step(covariance, weight, weight_tangent, labels, residual, curvature, ignore_index, scale);
}

Tensor characteristics(const Tensor& features, const Tensor& logits, const Tensor& labels,
                       const Tensor& weight, int64_t neighbours) {
  STD_TORCH_CHECK(neighbours <= kMaxNeighbours, "neighbours: expected at most ", kMaxNeighbours,
                  ", got ", neighbours);
  return weight.scalar_type() == ScalarType::Double
             ? characteristics_of<double>(features, logits, labels, weight, neighbours)
             : characteristics_of<float>(features, logits, labels, weight, neighbours);
}

}  // namespace iada
