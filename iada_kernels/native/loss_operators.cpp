// The loss, its gradients and the streaming update that may precede it: the passes in their order.

#include "operators.hpp"
#include "tensors.hpp"

namespace iada {
namespace {

// Elements of the products P that are kept between the two halves of one call; more classes than
// fit are taken in groups.
constexpr int64_t kKeptProducts = int64_t(1) << 22;

// Bytes of Σ that are updated and then read by the class pass before the next ones are: they are
// still in a cache then, however large Σ is. The next class comes from memory meanwhile.
constexpr int64_t kFreshBytes = int64_t(1) << 21;
constexpr int64_t kPieceColumns = 128;  // columns of Σ that are one piece of the class pass

struct LossCall {
  const Tensor &features, &weight, &labels;
  const std::optional<Tensor>&bias, &covariance, &epsilon, &log_prior, &row_scale;
  const Tensor *mean, *count;  // null, or what the batch is streamed into beside the covariance
  double alpha, beta;
  int64_t ignore_index, reduction, needs;
  bool rounded;
};

// Σ of the classes `rows`, updated where that is asked for, and their rows of the table.
template <class T>
void fresh_table(const LossCall& call, const ClassRows& rows, bool full, T* table, T* product) {
  const int64_t C = call.weight.size(0), A = call.weight.size(1), size = rows.present;
  const int64_t bytes = A * (full ? A : 1) * static_cast<int64_t>(sizeof(T));
  const int64_t step = larger(1, smaller(size, kFreshBytes / larger(1, bytes)));
  const auto part_of = [&](int64_t first) {
    const ClassRows part{smaller(step, size - first), rows.classes + first, rows.order,
                         rows.begins + first};
    if (call.mean != nullptr) {
      run(CovarianceUpdate<T>{C, A, part, row_type(call.features), call.features.const_data_ptr(),
                              full, target<T>(*call.covariance), target<T>(*call.mean),
                              target<int64_t>(*call.count)});
    }
    const T* sigma = pointer<T>(call.covariance);
    const bool one = full && step == 1 && first + 1 < size;
    run(ClassPass<T>{C, A, part.present, part.classes, pointer<T>(call.weight), sigma, full,
                     static_cast<T>(call.alpha), table + first * table_row(C),
                     product == nullptr ? nullptr : product + first * C * A, nullptr, nullptr,
                     one ? sigma + rows.classes[first + 1] * A * A : nullptr, call.rounded});
  };
  // Threads share the parts where these are more than the pieces of one; else those pieces. Within
  // a part nothing differs. Scratch of the update and of the class pass is then each thread's.
  const int64_t parts = (size + step - 1) / step;
  if (parts > larger(1, A / kPieceColumns)) {
    const double work = double(size) * C * A * (full ? A : 1);
    parallel_pieces<Buffer<T>>(parts, work, 0, [&](int64_t k, T*) { part_of(k * step); });
  } else {
    for (int64_t k = 0; k < parts; ++k) part_of(k * step);
  }
}

template <class T>
LossResult loss_of(const LossCall& call) {
  const int64_t N = call.features.size(0), A = call.features.size(1), C = call.weight.size(0);
  const ScalarType type = call.weight.scalar_type();
  const int64_t* labels = pointer<int64_t>(call.labels);
  const Grouping grouping = group_rows(labels, N, C, call.ignore_index);
  const int64_t counted = grouping.rows(), present = static_cast<int64_t>(grouping.classes.size());
  const bool needs_weight = call.needs & kWeight, needs_bias = call.needs & (kBias | kPrior);

  const bool per_row = call.reduction == kNone;
  Tensor loss = per_row ? empty({N}, type) : empty({}, type);
  Tensor residual = call.needs ? empty({N, C}, type) : empty({0}, type);
  // ∂L/∂W, ∂L/∂b and ∂L/∂ε, one after the other, each only where it was asked for.
  const int64_t weight_size = needs_weight ? C * A : 0, bias_size = needs_bias ? C : 0;
  const bool needs_epsilon = (call.needs & kEpsilon) && call.epsilon.has_value();
  Tensor partial = empty({weight_size + bias_size + (needs_epsilon ? N : 0)}, type);
  T* grads = target<T>(partial);
  for (int64_t k = 0, end = partial.numel(); k < end; ++k) grads[k] = 0;
  if (counted < N) {  // rows left out
    if (call.needs) torch::stable::zero_(residual);
    if (per_row) torch::stable::zero_(loss);
  }

  const bool full = call.covariance.has_value() && call.covariance->dim() == 3;
  const bool keeps_product = full && needs_weight;
  int64_t group = present;
  if (keeps_product) group = larger(1, smaller(present, kKeptProducts / larger(1, C * A)));
  const int64_t row = table_row(C);
  Buffer<T> table(call.covariance.has_value() ? group * row : 0);
  Buffer<T> product(keeps_product ? group * C * A : 0);
  Buffer<T> grad_table(call.covariance.has_value() && needs_weight ? group * row : 0);

  double loss_sum = 0;
  const double divisor = call.reduction == kMean ? static_cast<double>(larger(1, counted)) : 1.0;
  std::vector<int64_t> slot(grouping.slot);
  for (int64_t first = 0; first < present; first += group) {
    const int64_t size = smaller(group, present - first);
    const int64_t* classes = grouping.classes.data() + first;
    for (int64_t u = 0; u < size; ++u) slot[classes[u]] = u;
    const ClassRows rows{size, classes, grouping.order.data(), grouping.begins.data() + first};
    if (call.covariance.has_value()) fresh_table(call, rows, full, table.data, product.data);
    const int64_t begin = grouping.begins[first], count = grouping.begins[first + size] - begin;
    Head<T> head{};
    // All rows in their own order where no row is left out: features are then read in sequence.
    static_cast<HeadInputs<T>&>(head) =
        head_inputs<T>(call, count, count == N ? nullptr : grouping.order.data() + begin,
                       table.data, slot.data(), divisor);
    head.row_scale = pointer<T>(call.row_scale);
    head.loss_sum = &loss_sum;
    head.losses = per_row ? target<T>(loss) : nullptr;
    head.residual = call.needs ? target<T>(residual) : nullptr;
    head.grad_weight = needs_weight ? grads : nullptr;
    head.grad_bias = needs_bias ? grads + weight_size : nullptr;
    head.grad_epsilon = needs_epsilon ? grads + weight_size + bias_size : nullptr;
    run(head);
    if (call.covariance.has_value() && needs_weight) {
      run(ClassSums<T>{C, rows, pointer<T>(residual), T(1), grad_table.data});
      run(TableBackward<T>{C, A, size, classes, pointer<T>(call.weight),
                           full ? nullptr : pointer<T>(call.covariance), product.data,
                           grad_table.data, static_cast<T>(call.alpha), grads});
    }
  }
  if (!per_row) *target<T>(loss) = static_cast<T>(loss_sum / divisor);
  return {loss, residual, partial};
}

}  // namespace

LossResult loss_forward(const Tensor& features, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& labels,
                        const std::optional<Tensor>& covariance,
                        const std::optional<Tensor>& epsilon,
                        const std::optional<Tensor>& log_prior,
                        const std::optional<Tensor>& row_scale, double alpha, double beta,
                        int64_t ignore_index, int64_t reduction, int64_t needs, bool rounded) {
  const LossCall call{features,  weight,  labels,  bias,  covariance, epsilon,      log_prior,
                      row_scale, nullptr, nullptr, alpha, beta,       ignore_index, reduction,
                      needs,     rounded};
  return weight.scalar_type() == ScalarType::Double ? loss_of<double>(call) : loss_of<float>(call);
}

LossResult loss_forward_update(const Tensor& features, const Tensor& weight,
                               const std::optional<Tensor>& bias, const Tensor& labels,
                               const Tensor& covariance, const Tensor& mean, const Tensor& count,
                               const std::optional<Tensor>& epsilon,
                               const std::optional<Tensor>& log_prior, double alpha, double beta,
                               int64_t ignore_index, int64_t reduction, int64_t needs, bool rounded) {
  const std::optional<Tensor> sigma(covariance), none;
  const LossCall call{features, weight, labels, bias,  sigma, epsilon,      log_prior,
                      none,     &mean,  &count, alpha, beta,  ignore_index, reduction,
                      needs,    rounded};
  return weight.scalar_type() == ScalarType::Double ? loss_of<double>(call) : loss_of<float>(call);
}

namespace {

template <class T>
void scaled_copy(const T* from, int64_t count, T scale, const Tensor& to) {
  T* out = target<T>(to);
  for (int64_t i = 0; i < count; ++i) out[i] = scale * from[i];
}

template <class T>
Gradients gradients_of(double upstream, const Tensor& features, const Tensor& weight,
                       const Tensor& labels, const Tensor& residual, const Tensor& partial,
                       int64_t covariance_dim, double alpha, double beta, int64_t ignore_index,
                       int64_t needs) {
  const int64_t N = features.size(0), A = features.size(1), C = weight.size(0);
  const ScalarType type = weight.scalar_type();
  const T scale = static_cast<T>(upstream);
  const auto none = [type] { return empty({0}, type); };  // outputs of an operator may not alias
  const bool full = covariance_dim == 3;
  Tensor features_grad = needs & kFeatures ? empty({N, A}, features.scalar_type()) : none();
  Tensor weight_grad = needs & kWeight ? empty({C, A}, type) : none();
  Tensor bias_grad = needs & kBias ? empty({C}, type) : none();
  Tensor epsilon_grad = needs & kEpsilon ? empty({N}, type) : none();
  Tensor prior_grad = needs & kPrior ? empty({C}, type) : none();
  Tensor covariance_grad = none();
  if (needs & kFeatures) {
    run(GradFeatures<T>{C, A, N, row_type(features), pointer<T>(residual), pointer<T>(weight), scale,
                        features_grad.mutable_data_ptr()});
  }
  const T* from = pointer<T>(partial);
  if (needs & kWeight) scaled_copy(from, C * A, scale, weight_grad);
  from += needs & kWeight ? C * A : 0;
  if (needs & kBias) scaled_copy(from, C, scale, bias_grad);
  if (needs & kPrior) scaled_copy(from, C, static_cast<T>(upstream * beta), prior_grad);
  from += needs & (kBias | kPrior) ? C : 0;
  if (needs & kEpsilon) scaled_copy(from, N, scale, epsilon_grad);
  if (needs & kCovariance) {
    covariance_grad = full ? empty({C, A, A}, type) : empty({C, A}, type);
    const Grouping grouping = group_rows(pointer<int64_t>(labels), N, C, ignore_index);
    if (static_cast<int64_t>(grouping.classes.size()) < C) torch::stable::zero_(covariance_grad);
    const ClassRows rows = grouping.all();
    Buffer<T> table(rows.present * table_row(C));
    run(ClassSums<T>{C, rows, pointer<T>(residual), scale, table.data});
    run(GradCovariance<T>{C, A, rows.present, rows.classes, pointer<T>(weight), table.data,
                          static_cast<T>(alpha), full, target<T>(covariance_grad)});
  }
  return {features_grad, weight_grad, bias_grad, covariance_grad, epsilon_grad, prior_grad};
}

}  // namespace

Gradients loss_backward(const Tensor& grad_loss, const Tensor& features, const Tensor& weight,
                        const Tensor& labels, const Tensor& residual, const Tensor& partial,
                        int64_t covariance_dim, double alpha, double beta, int64_t ignore_index,
                        int64_t needs) {
  if (weight.scalar_type() == ScalarType::Double) {
    return gradients_of<double>(*pointer<double>(grad_loss), features, weight, labels, residual,
                                partial, covariance_dim, alpha, beta, ignore_index, needs);
  }
  return gradients_of<float>(*pointer<float>(grad_loss), features, weight, labels, residual,
                             partial, covariance_dim, alpha, beta, ignore_index, needs);
}

}  // namespace iada
