// The operators on samples, [batch, ...]: the state, and what the network gave, in the state's dtype or in 16 bits
// beside a float32 state. The kernels see [batch, size]; tensors of other ranks come here as they are, since a view
// made in Python costs as much as one of these calls.
#include "bindings/operators.h"

#include <algorithm>

namespace twostep::bindings {
namespace {

void check_network_type(const Call& call, ScalarType type, const char* what) {
  const bool narrow = type == ScalarType::BFloat16 || type == ScalarType::Half;
  STD_TORCH_CHECK(type == call.type || (call.type == ScalarType::Float && narrow), call.name, ": ", what, " has dtype ",
                  torch::headeronly::toString(type), ", expected the first tensor's, or 16 bits where that is float32");
}

Tensor samples_tensor(const Call& call, const Tensor& t, const char* what, bool network = false) {
  call.same_device(t, what);
  if (network) {
    check_network_type(call, t.scalar_type(), what);
  } else {
    call.same_type(t, what);
  }
  const auto sizes = t.sizes(), expected = call.x.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), call.name, ": ", what,
                  " must have the first tensor's shape, [batch, ...]");
  if (t.dim() == 2) return call.dense(t);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
ConstSamples view_samples(const Call& call, const Tensor& t) {
  return {t.const_data_ptr(), t.dim() == 2 ? t.stride(0) : call.width};
}

// One number a sample, or one for all of them where `shared` allows it.
void check_numbers(const Call& call, const OptionalTensor& t, const char* what, bool shared) {
  if (!t) return;
  call.same_device(*t, what);
  STD_TORCH_CHECK(t->dim() == 1 && (t->size(0) == call.batch || (shared && t->size(0) == 1)) && t->is_contiguous() &&
                      t->scalar_type() == call.accumulation(),
                  call.name, ": ", what, " must be [batch], contiguous, of the accumulation dtype");
}

Tensor euler_step(Tensor x, Tensor v, OptionalTensor deltas, double delta) {
  const Call call("euler_step", x);
  const Tensor state = samples_tensor(call, x, "x"), velocity = samples_tensor(call, v, "v", true);
  check_numbers(call, deltas, "deltas", false);
  Tensor y = call.empty_samples(call.type);
  EulerStepForward p{call.dtype(), dtype_of(v.scalar_type()), call.batch, call.width, delta, data(deltas)};
  p.x = view_samples(call, state), p.v = view_samples(call, velocity), p.y = out(y);
  TWOSTEP_RUN(call, euler_step_forward, p);
  return y;
}

Tensor euler_step_backward(Tensor dy, OptionalTensor deltas, double delta, ScalarType velocity) {
  const Call call("euler_step_backward", dy);
  check_network_type(call, velocity, "v");
  const Tensor grad = samples_tensor(call, dy, "dy");
  check_numbers(call, deltas, "deltas", false);
  Tensor dv = call.empty_samples(velocity);
  EulerStepBackward p{call.dtype(), dtype_of(velocity), call.batch, call.width, delta, data(deltas)};
  p.dy = view_samples(call, grad), p.dv = out(dv);
  TWOSTEP_RUN(call, euler_step_backward, p);
  return dv;
}

std::tuple<Tensor, Tensor> two_step_split(Tensor noise, Tensor v, double mid) {
  const Call call("two_step_split", noise);
  const Tensor from = samples_tensor(call, noise, "noise"), velocity = samples_tensor(call, v, "v", true);
  Tensor z = call.empty_samples(call.type), x_a = call.empty_samples(call.type);
  TwoStepSplitForward p{call.dtype(), dtype_of(v.scalar_type()), call.batch, call.width, mid - 1};
  p.noise = view_samples(call, from), p.v = view_samples(call, velocity), p.z = out(z), p.x_a = out(x_a);
  TWOSTEP_RUN(call, two_step_split_forward, p);
  return {z, x_a};
}

Tensor two_step_split_backward(OptionalTensor inherited, OptionalTensor own, OptionalTensor factors, double mid,
                               double weight, ScalarType velocity) {
  STD_TORCH_CHECK(inherited || own, "two_step_split_backward: neither inherited nor own is given");
  const Call call("two_step_split_backward", inherited ? *inherited : *own);
  check_network_type(call, velocity, "v");
  check_numbers(call, factors, "factors", true);
  if (inherited) inherited = samples_tensor(call, *inherited, "inherited");
  if (own) own = samples_tensor(call, *own, "own");
  Tensor dv = call.empty_samples(velocity);
  TwoStepSplitBackward p{call.dtype(), dtype_of(velocity), call.batch, call.width, weight * (mid - 1), data(factors)};
  p.factor_stride = factors && factors->size(0) > 1 ? 1 : 0;
  if (inherited) p.inherited = view_samples(call, *inherited);
  if (own) p.own = view_samples(call, *own);
  p.dv = out(dv);
  // Which gradients there are is told by their addresses, and an empty tensor has none.
  if (call.batch > 0 && call.width > 0) TWOSTEP_RUN(call, two_step_split_backward, p);
  return dv;
}

Tensor piece_sums(const Call& call) {
  return call.empty({call.batch, (call.width + sample_piece - 1) / sample_piece}, call.accumulation());
}

std::tuple<Tensor, Tensor> gradient_norms(Tensor g) {
  const Call call("gradient_norms", g);
  const Tensor samples = samples_tensor(call, g, "g"), partials = piece_sums(call);
  Tensor norms = call.empty({call.batch}, call.accumulation()), total = call.empty({}, call.accumulation());
  GradientNorms p{call.dtype(),  call.batch, call.width, view_samples(call, samples),
                  out(partials), out(norms), out(total)};
  TWOSTEP_RUN(call, gradient_norms, p);
  return {norms, total};
}

Tensor dmd_direction(Tensor x, Tensor real, Tensor fake, double eps) {
  const Call call("dmd_direction", x);
  const Tensor state = samples_tensor(call, x, "x"), real_samples = samples_tensor(call, real, "real", true);
  const Tensor fake_samples = samples_tensor(call, fake, "fake", true), partials = piece_sums(call);
  STD_TORCH_CHECK(real.scalar_type() == fake.scalar_type(), call.name, ": real and fake must share one dtype");
  const Tensor scales = call.empty({call.batch}, call.accumulation());
  Tensor direction = call.empty_samples(call.accumulation());
  DmdDirection p{call.dtype(), dtype_of(real.scalar_type()), call.batch, call.width, eps};
  p.x = view_samples(call, state), p.real = view_samples(call, real_samples), p.fake = view_samples(call, fake_samples);
  p.partials = out(partials), p.scales = out(scales), p.direction = out(direction);
  TWOSTEP_RUN(call, dmd_direction, p);
  return direction;
}

}  // namespace

void define_steps(Library& m) {
  m.def("euler_step(Tensor x, Tensor v, Tensor? deltas, float delta) -> Tensor");
  m.def("euler_step_backward(Tensor dy, Tensor? deltas, float delta, ScalarType velocity) -> Tensor");
  m.def("two_step_split(Tensor noise, Tensor v, float mid) -> (Tensor z, Tensor x_a)");
  m.def(
      "two_step_split_backward(Tensor? inherited, Tensor? own, Tensor? factors, float mid, float weight, "
      "ScalarType velocity) -> Tensor");
  m.def("gradient_norms(Tensor g) -> (Tensor norms, Tensor total)");
  m.def("dmd_direction(Tensor x, Tensor real, Tensor fake, float eps) -> Tensor");
}

void implement_steps(Library& m) {
  m.impl("euler_step", TORCH_BOX(&euler_step));
  m.impl("euler_step_backward", TORCH_BOX(&euler_step_backward));
  m.impl("two_step_split", TORCH_BOX(&two_step_split));
  m.impl("two_step_split_backward", TORCH_BOX(&two_step_split_backward));
  m.impl("gradient_norms", TORCH_BOX(&gradient_norms));
  m.impl("dmd_direction", TORCH_BOX(&dmd_direction));
}

}  // namespace twostep::bindings
