// The operators on rows, [batch, length, width], and on heads, [batch, length, heads, width].
#include "bindings/operators.h"

namespace twostep::bindings {
namespace {

ConstRows view_rows(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }
ConstHeads view_heads(const Tensor& t) {
  return {t.const_data_ptr(), t.size(2), t.stride(0), t.stride(1), t.stride(2)};
}

// The parameters of one call: they share a dtype, which is the activations' or float32.
struct Parameters {
  const Call& call;
  std::optional<ScalarType> type;

  explicit Parameters(const Call& c, std::optional<ScalarType> known = std::nullopt) : call(c), type(known) {
    STD_TORCH_CHECK(!known || *known == c.type || *known == c.accumulation(), c.name, ": param_dtype is ",
                    torch::headeronly::toString(*known), ", expected the activations' dtype or the accumulation dtype");
  }

  void agree(const Tensor& t, const char* what) {
    call.same_device(t, what);
    const ScalarType found = t.scalar_type();
    STD_TORCH_CHECK(found == call.type || found == call.accumulation(), call.name, ": ", what,
                    " must have the activations' dtype or float32");
    STD_TORCH_CHECK(!type || *type == found, call.name, ": the parameters must share one dtype, and ", what,
                    " differs");
    type = found;
  }
  OptionalTensor vector(const OptionalTensor& t, const char* what) {
    if (!t) return std::nullopt;
    agree(*t, what);
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == call.width, call.name, ": ", what, " must be [width]");
    return call.dense(*t);
  }
  // [batch, width] or [batch, 1, width]: per sample; [batch, length, width]: per token.
  OptionalTensor modulation(const OptionalTensor& t, const char* what) {
    if (!t) return std::nullopt;
    agree(*t, what);
    const int64_t rank = t->dim();
    STD_TORCH_CHECK((rank == 2 || rank == 3) && t->size(0) == call.batch && t->size(rank - 1) == call.width &&
                        (rank == 2 || t->size(1) == 1 || t->size(1) == call.length),
                    call.name, ": ", what, " must be [batch, width], [batch, 1, width] or [batch, length, width]");
    return call.dense(*t);
  }
  ScalarType scalar_type() const { return type.value_or(call.type); }
  Dtype dtype() const { return dtype_of(scalar_type()); }
};

bool per_token(const OptionalTensor& t) { return t && t->dim() == 3 && t->size(1) != 1; }
ConstRows view_modulation(const OptionalTensor& t) {
  if (!t) return {};
  return {t->const_data_ptr(), t->stride(0), per_token(t) ? t->stride(1) : 0};
}

#ifdef TWOSTEP_CUDA
int64_t splits_of(const Call& call, int64_t width) {
  return call.x.is_cuda() ? cuda::splits(call.batch, call.length, width) : cpu::splits(call.batch, call.length, width);
}
#else
int64_t splits_of(const Call& call, int64_t width) { return cpu::splits(call.batch, call.length, width); }
#endif

// Room for `sums` accumulators a sample and run; row_width is what one token moves, which decides the runs.
struct Workspace {
  std::optional<Tensor> tensor;
  Partials partials;
  Workspace(const Call& call, int64_t sums, int64_t row_width) {
    if (sums == 0) return;
    partials.splits = splits_of(call, row_width);
    // One run at the least, so that an empty batch has a place for its sums: the gradients are zeros, not absent.
    const int64_t runs = call.batch * partials.splits;
    tensor = call.empty({sums, runs > 0 ? runs : 1, call.width}, call.accumulation());
    partials.data = out(*tensor);
  }
};

std::tuple<Tensor, Tensor, Tensor> norm_modulate(Tensor x, OptionalTensor weight, OptionalTensor scale,
                                                 OptionalTensor shift, bool layer, double eps) {
  const Call call("norm_modulate", x, 3);
  Parameters parameters(call);
  const Tensor rows = call.rows_tensor(x, "x");
  weight = parameters.vector(weight, "weight");
  scale = parameters.modulation(scale, "scale");
  shift = parameters.modulation(shift, "shift");
  Tensor y = call.empty_rows(), mean = call.statistics(layer), rstd = call.statistics(true);
  NormModulateForward p{call.dtype(), parameters.dtype(), layer ? Norm::layer : Norm::rms, eps, call.batch,
                        call.length,  call.width};
  p.x = view_rows(rows), p.weight = data(weight);
  p.scale = view_modulation(scale), p.shift = view_modulation(shift);
  p.y = out(y), p.mean = layer ? out(mean) : nullptr, p.rstd = out(rstd);
  TWOSTEP_RUN(call, norm_modulate_forward, p);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_modulate_backward(Tensor dy, Tensor x, OptionalTensor weight,
                                                                  OptionalTensor scale, Tensor mean, Tensor rstd,
                                                                  bool layer, ScalarType param_dtype, bool need_weight,
                                                                  bool need_scale, bool need_shift) {
  const Call call("norm_modulate_backward", x, 3);
  Parameters parameters(call, param_dtype);
  const Tensor rows = call.rows_tensor(x, "x"), grad = call.rows_tensor(dy, "dy");
  weight = parameters.vector(weight, "weight");
  scale = parameters.modulation(scale, "scale");
  call.check_statistics(mean, layer, "mean");
  call.check_statistics(rstd, true, "rstd");
  need_weight = need_weight && weight, need_scale = need_scale && scale;
  Tensor dx = call.empty_rows();
  Tensor dweight = need_weight ? call.empty({call.width}, param_dtype) : call.none(param_dtype);
  Tensor dscale = need_scale ? call.empty_like(*scale) : call.none(param_dtype);
  Tensor dshift = need_shift ? call.empty({call.batch, call.width}, param_dtype) : call.none(param_dtype);
  NormModulateBackward p{call.dtype(), dtype_of(param_dtype), layer ? Norm::layer : Norm::rms,
                         call.batch,   call.length,           call.width};
  p.scale_per_token = per_token(scale);
  const Workspace workspace(call, need_weight || (need_scale && !p.scale_per_token) || need_shift ? 2 : 0, call.width);
  p.dy = view_rows(grad), p.x = view_rows(rows);
  p.weight = data(weight), p.scale = view_modulation(scale);
  p.mean = layer ? mean.const_data_ptr() : nullptr, p.rstd = rstd.const_data_ptr();
  p.dx = out(dx), p.dweight = out(dweight), p.dscale = out(dscale), p.dshift = out(dshift);
  p.partials = workspace.partials;
  TWOSTEP_RUN(call, norm_modulate_backward, p);
  return {dx, dweight, dscale, dshift};
}

std::tuple<Tensor, Tensor> gated_residual(Tensor x, Tensor z, OptionalTensor gate, OptionalTensor weight, bool rms,
                                          bool tanh, double eps) {
  const Call call("gated_residual", x, 3);
  Parameters parameters(call);
  const Tensor x_rows = call.rows_tensor(x, "x"), z_rows = call.rows_tensor(z, "z");
  gate = parameters.modulation(gate, "gate");
  weight = parameters.vector(weight, "weight");
  Tensor result = call.empty_rows(), rstd = call.statistics(rms);
  GatedResidualForward p{call.dtype(),
                         parameters.dtype(),
                         rms ? Norm::rms : Norm::none,
                         tanh ? GateAct::tanh : GateAct::none,
                         eps,
                         call.batch,
                         call.length,
                         call.width};
  p.x = view_rows(x_rows), p.z = view_rows(z_rows);
  p.gate = view_modulation(gate), p.weight = data(weight);
  p.out = out(result), p.rstd = rms ? out(rstd) : nullptr;
  TWOSTEP_RUN(call, gated_residual_forward, p);
  return {result, rstd};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(Tensor dout, Tensor z, OptionalTensor gate,
                                                           OptionalTensor weight, Tensor rstd, bool rms, bool tanh,
                                                           bool need_gate, bool need_weight) {
  const Call call("gated_residual_backward", z, 3);
  Parameters parameters(call);
  const Tensor z_rows = call.rows_tensor(z, "z"), grad = call.rows_tensor(dout, "dout");
  gate = parameters.modulation(gate, "gate");
  weight = parameters.vector(weight, "weight");
  call.check_statistics(rstd, rms, "rstd");
  const ScalarType param_dtype = parameters.scalar_type();
  need_gate = need_gate && gate, need_weight = need_weight && weight;
  Tensor dz = call.empty_rows();
  Tensor dgate = need_gate ? call.empty_like(*gate) : call.none(param_dtype);
  Tensor dweight = need_weight ? call.empty({call.width}, param_dtype) : call.none(param_dtype);
  GatedResidualBackward p{
      call.dtype(), parameters.dtype(), rms ? Norm::rms : Norm::none, tanh ? GateAct::tanh : GateAct::none, call.batch,
      call.length,  call.width};
  p.gate_per_token = per_token(gate);
  const Workspace workspace(call, need_weight || (need_gate && !p.gate_per_token) ? 1 : 0, call.width);
  p.dout = view_rows(grad), p.z = view_rows(z_rows);
  p.gate = view_modulation(gate), p.weight = data(weight);
  p.rstd = rms ? rstd.const_data_ptr() : nullptr;
  p.dz = out(dz), p.dgate = out(dgate), p.dweight = out(dweight);
  p.partials = workspace.partials;
  TWOSTEP_RUN(call, gated_residual_backward, p);
  return {dz, dgate, dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_norm_modulate(
    Tensor x, Tensor z, OptionalTensor gate, OptionalTensor post_weight, OptionalTensor pre_weight,
    OptionalTensor scale, OptionalTensor shift, bool post_rms, bool layer, bool tanh, double eps) {
  const Call call("gated_residual_norm_modulate", x, 3);
  Parameters parameters(call);
  const Tensor x_rows = call.rows_tensor(x, "x"), z_rows = call.rows_tensor(z, "z");
  gate = parameters.modulation(gate, "gate");
  post_weight = parameters.vector(post_weight, "post_weight");
  pre_weight = parameters.vector(pre_weight, "pre_weight");
  scale = parameters.modulation(scale, "scale");
  shift = parameters.modulation(shift, "shift");
  Tensor result = call.empty_rows(), h = call.empty_rows();
  Tensor post_rstd = call.statistics(post_rms), mean = call.statistics(layer), rstd = call.statistics(true);
  GatedResidualNormModulateForward p{call.dtype(),
                                     parameters.dtype(),
                                     post_rms ? Norm::rms : Norm::none,
                                     layer ? Norm::layer : Norm::rms,
                                     tanh ? GateAct::tanh : GateAct::none,
                                     eps,
                                     call.batch,
                                     call.length,
                                     call.width};
  p.x = view_rows(x_rows), p.z = view_rows(z_rows);
  p.gate = view_modulation(gate), p.scale = view_modulation(scale), p.shift = view_modulation(shift);
  p.post_weight = data(post_weight), p.pre_weight = data(pre_weight);
  p.out = out(result), p.h = out(h);
  p.post_rstd = post_rms ? out(post_rstd) : nullptr, p.mean = layer ? out(mean) : nullptr, p.rstd = out(rstd);
  TWOSTEP_RUN(call, gated_residual_norm_modulate_forward, p);
  return {result, h, post_rstd, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_norm_modulate_backward(
    OptionalTensor dout, Tensor dh, Tensor result, Tensor z, OptionalTensor gate, OptionalTensor post_weight,
    OptionalTensor pre_weight, OptionalTensor scale, Tensor post_rstd, Tensor mean, Tensor rstd, bool post_rms,
    bool layer, bool tanh, ScalarType param_dtype, bool need_gate, bool need_post_weight, bool need_pre_weight,
    bool need_scale, bool need_shift) {
  const Call call("gated_residual_norm_modulate_backward", z, 3);
  Parameters parameters(call, param_dtype);
  const Tensor z_rows = call.rows_tensor(z, "z"), out_rows = call.rows_tensor(result, "out");
  const Tensor dh_rows = call.rows_tensor(dh, "dh");
  if (dout) dout = call.rows_tensor(*dout, "dout");
  gate = parameters.modulation(gate, "gate");
  post_weight = parameters.vector(post_weight, "post_weight");
  pre_weight = parameters.vector(pre_weight, "pre_weight");
  scale = parameters.modulation(scale, "scale");
  call.check_statistics(post_rstd, post_rms, "post_rstd");
  call.check_statistics(mean, layer, "mean");
  call.check_statistics(rstd, true, "rstd");
  need_gate = need_gate && gate, need_scale = need_scale && scale;
  need_post_weight = need_post_weight && post_weight, need_pre_weight = need_pre_weight && pre_weight;

  GatedResidualNormModulateBackward p{call.dtype(),
                                      dtype_of(param_dtype),
                                      post_rms ? Norm::rms : Norm::none,
                                      layer ? Norm::layer : Norm::rms,
                                      tanh ? GateAct::tanh : GateAct::none,
                                      call.batch,
                                      call.length,
                                      call.width};
  p.gate_per_token = per_token(gate), p.scale_per_token = per_token(scale);
  const bool sums = need_post_weight || need_pre_weight || need_shift || (need_gate && !p.gate_per_token) ||
                    (need_scale && !p.scale_per_token);
  const Workspace workspace(call, sums ? 3 : 0, call.width);
  Tensor dx = call.empty_rows(), dz = call.empty_rows();
  Tensor dgate = need_gate ? call.empty_like(*gate) : call.none(param_dtype);
  Tensor dpost_weight = need_post_weight ? call.empty({call.width}, param_dtype) : call.none(param_dtype);
  Tensor dpre_weight = need_pre_weight ? call.empty({call.width}, param_dtype) : call.none(param_dtype);
  Tensor dscale = need_scale ? call.empty_like(*scale) : call.none(param_dtype);
  Tensor dshift = need_shift ? call.empty({call.batch, call.width}, param_dtype) : call.none(param_dtype);
  if (dout) p.dout = view_rows(*dout);
  p.dh = view_rows(dh_rows), p.out = view_rows(out_rows), p.z = view_rows(z_rows);
  p.gate = view_modulation(gate), p.scale = view_modulation(scale);
  p.post_weight = data(post_weight), p.pre_weight = data(pre_weight);
  p.post_rstd = post_rms ? post_rstd.const_data_ptr() : nullptr, p.mean = layer ? mean.const_data_ptr() : nullptr;
  p.rstd = rstd.const_data_ptr();
  p.dx = out(dx), p.dz = out(dz), p.dgate = out(dgate), p.dpost_weight = out(dpost_weight);
  p.dpre_weight = out(dpre_weight), p.dscale = out(dscale), p.dshift = out(dshift);
  p.partials = workspace.partials;
  TWOSTEP_RUN(call, gated_residual_norm_modulate_backward, p);
  return {dx, dz, dgate, dpost_weight, dpre_weight, dscale, dshift};
}

// Checks shared by the operators on heads: [batch, length, heads, width], width even, and the table of angles.
Tensor heads_tensor(const Call& call, const Tensor& t, const char* what) {
  call.same_type(t, what);
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == call.batch && t.size(1) == call.length && t.size(3) == call.width,
                  call.name, ": ", what, " must agree with the first tensor in batch, length and head width");
  STD_TORCH_CHECK(call.width % 2 == 0, call.name, ": the head width is ", call.width, ", expected an even number");
  return call.dense(t);
}

struct Table {
  Tensor tensor;
  ConstRows view;
  Table(const Call& call, const Tensor& freqs) : tensor(freqs) {
    call.same_device(freqs, "freqs");
    STD_TORCH_CHECK(freqs.dim() == 4 && (freqs.size(0) == call.batch || freqs.size(0) == 1) &&
                        freqs.size(1) == call.length && freqs.size(2) == call.width / 2 && freqs.size(3) == 2 &&
                        freqs.scalar_type() == call.accumulation(),
                    call.name, ": freqs must be [batch or 1, length, width / 2, 2] of float32 (float64 for float64)");
    if (freqs.stride(3) != 1 || (freqs.size(2) > 1 && freqs.stride(2) != 2)) tensor = torch::stable::contiguous(freqs);
    view = {tensor.const_data_ptr(), tensor.size(0) == 1 ? 0 : tensor.stride(0), tensor.stride(1)};
  }
};

std::tuple<Tensor, Tensor> qk_norm_rope(Tensor q, Tensor k, OptionalTensor q_weight, OptionalTensor k_weight,
                                        Tensor freqs, double eps) {
  const Call call("qk_norm_rope", q, 4);
  Parameters parameters(call);
  const Tensor q_heads = heads_tensor(call, q, "q"), k_heads = heads_tensor(call, k, "k");
  q_weight = parameters.vector(q_weight, "q_weight");
  k_weight = parameters.vector(k_weight, "k_weight");
  const Table table(call, freqs);
  Tensor q_out = call.empty({call.batch, call.length, q.size(2), call.width}, call.type);
  Tensor k_out = call.empty({call.batch, call.length, k.size(2), call.width}, call.type);
  QkNormRopeForward p{call.dtype(), parameters.dtype(), eps, call.batch, call.length, call.width};
  p.q = view_heads(q_heads), p.k = view_heads(k_heads);
  p.q_weight = data(q_weight), p.k_weight = data(k_weight), p.freqs = table.view;
  p.q_out = out(q_out), p.k_out = out(k_out);
  TWOSTEP_RUN(call, qk_norm_rope_forward, p);
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k,
                                                                 OptionalTensor q_weight, OptionalTensor k_weight,
                                                                 Tensor freqs, double eps, bool need_q_weight,
                                                                 bool need_k_weight) {
  const Call call("qk_norm_rope_backward", q, 4);
  Parameters parameters(call);
  const Tensor q_heads = heads_tensor(call, q, "q"), k_heads = heads_tensor(call, k, "k");
  const Tensor dq_heads = heads_tensor(call, dq_out, "dq_out"), dk_heads = heads_tensor(call, dk_out, "dk_out");
  STD_TORCH_CHECK(dq_out.size(2) == q.size(2) && dk_out.size(2) == k.size(2), call.name,
                  ": the incoming gradients must have as many heads as q and k");
  q_weight = parameters.vector(q_weight, "q_weight");
  k_weight = parameters.vector(k_weight, "k_weight");
  const Table table(call, freqs);
  const ScalarType param_dtype = parameters.scalar_type();
  need_q_weight = need_q_weight && q_weight, need_k_weight = need_k_weight && k_weight;
  const Workspace workspace(call, need_q_weight || need_k_weight ? 2 : 0, call.width * (q.size(2) + k.size(2)));
  Tensor dq = call.empty({call.batch, call.length, q.size(2), call.width}, call.type);
  Tensor dk = call.empty({call.batch, call.length, k.size(2), call.width}, call.type);
  Tensor dq_weight = need_q_weight ? call.empty({call.width}, param_dtype) : call.none(param_dtype);
  Tensor dk_weight = need_k_weight ? call.empty({call.width}, param_dtype) : call.none(param_dtype);
  QkNormRopeBackward p{call.dtype(), parameters.dtype(), eps, call.batch, call.length, call.width};
  p.dq_out = view_heads(dq_heads), p.dk_out = view_heads(dk_heads);
  p.q = view_heads(q_heads), p.k = view_heads(k_heads);
  p.q_weight = data(q_weight), p.k_weight = data(k_weight), p.freqs = table.view;
  p.dq = out(dq), p.dk = out(dk), p.dq_weight = out(dq_weight), p.dk_weight = out(dk_weight);
  p.partials = workspace.partials;
  TWOSTEP_RUN(call, qk_norm_rope_backward, p);
  return {dq, dk, dq_weight, dk_weight};
}

Tensor rope(Tensor x, Tensor freqs, bool inverse) {
  const Call call("rope", x, 4);
  const Tensor heads = heads_tensor(call, x, "x");
  const Table table(call, freqs);
  Tensor y = call.empty({call.batch, call.length, x.size(2), call.width}, call.type);
  Rope p{call.dtype(), inverse, call.batch, call.length, call.width, view_heads(heads), table.view, out(y)};
  TWOSTEP_RUN(call, rope, p);
  return y;
}

Tensor swiglu(Tensor gate, Tensor up) {
  const Call call("swiglu", gate, 3);
  const Tensor gate_rows = call.rows_tensor(gate, "gate"), up_rows = call.rows_tensor(up, "up");
  Tensor y = call.empty_rows();
  SwigluForward p{call.dtype(), call.batch, call.length, call.width, view_rows(gate_rows), view_rows(up_rows), out(y)};
  TWOSTEP_RUN(call, swiglu_forward, p);
  return y;
}

// The same, written over gate, which saves the memory of y. On the CPU alone: the CUDA kernel reads gate by a path that
// does not see writes.
void swiglu_over_gate(Tensor gate, Tensor up) {
  const Call call("swiglu_over_gate", gate, 3);
  const Tensor up_rows = call.rows_tensor(up, "up");
  STD_TORCH_CHECK(gate.is_contiguous(), call.name, ": gate must be contiguous");
  SwigluForward p{call.dtype(), call.batch, call.length, call.width, view_rows(gate), view_rows(up_rows), out(gate)};
  TWOSTEP_RUN(call, swiglu_forward, p);
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor dy, Tensor gate, Tensor up) {
  const Call call("swiglu_backward", gate, 3);
  const Tensor gate_rows = call.rows_tensor(gate, "gate"), up_rows = call.rows_tensor(up, "up");
  const Tensor grad = call.rows_tensor(dy, "dy");
  Tensor dgate = call.empty_rows(), dup = call.empty_rows();
  SwigluBackward p{call.dtype(), call.batch, call.length, call.width};
  p.dy = view_rows(grad), p.gate = view_rows(gate_rows), p.up = view_rows(up_rows);
  p.dgate = {out(dgate), call.length * call.width, call.width},
  p.dup = {out(dup), call.length * call.width, call.width};
  TWOSTEP_RUN(call, swiglu_backward, p);
  return {dgate, dup};
}

// The same for gate and up side by side in one tensor: their gradients are made side by side, and nobody joins them.
Tensor swiglu_halves_backward(Tensor dy, Tensor halves) {
  const Call call("swiglu_halves_backward", dy, 3);
  const Tensor grad = call.dense(dy);
  call.same_type(halves, "halves");
  STD_TORCH_CHECK(halves.dim() == 3 && halves.size(0) == call.batch && halves.size(1) == call.length &&
                      halves.size(2) == 2 * call.width,
                  call.name, ": halves must be [batch, length, 2 * width], with the first tensor's batch and length");
  const Tensor both = call.dense(halves);
  Tensor made = call.empty({call.batch, call.length, 2 * call.width}, call.type);
  const ConstRows gate = view_rows(both);
  const Rows dgate{out(made), 2 * call.length * call.width, 2 * call.width};
  const int64_t bytes = call.width * static_cast<int64_t>(made.element_size());
  SwigluBackward p{call.dtype(), call.batch, call.length, call.width, view_rows(grad), gate, gate, dgate, dgate};
  if (made.numel() == 0) return made;
  p.up.data = static_cast<const char*>(gate.data) + bytes;
  p.dup.data = static_cast<char*>(dgate.data) + bytes;
  TWOSTEP_RUN(call, swiglu_backward, p);
  return made;
}

}  // namespace

void define_blocks(Library& m) {
  m.def(
      "norm_modulate(Tensor x, Tensor? weight, Tensor? scale, Tensor? shift, bool layer, float eps) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "norm_modulate_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? scale, Tensor mean, Tensor rstd, "
      "bool layer, ScalarType param_dtype, bool need_weight, bool need_scale, bool need_shift) "
      "-> (Tensor dx, Tensor dweight, Tensor dscale, Tensor dshift)");
  m.def(
      "gated_residual(Tensor x, Tensor z, Tensor? gate, Tensor? weight, bool rms, bool tanh, float eps) "
      "-> (Tensor out, Tensor rstd)");
  m.def(
      "gated_residual_backward(Tensor dout, Tensor z, Tensor? gate, Tensor? weight, Tensor rstd, bool rms, bool tanh, "
      "bool need_gate, bool need_weight) -> (Tensor dz, Tensor dgate, Tensor dweight)");
  m.def(
      "gated_residual_norm_modulate(Tensor x, Tensor z, Tensor? gate, Tensor? post_weight, Tensor? pre_weight, "
      "Tensor? scale, Tensor? shift, bool post_rms, bool layer, bool tanh, float eps) "
      "-> (Tensor out, Tensor h, Tensor post_rstd, Tensor mean, Tensor rstd)");
  m.def(
      "gated_residual_norm_modulate_backward(Tensor? dout, Tensor dh, Tensor out, Tensor z, Tensor? gate, "
      "Tensor? post_weight, Tensor? pre_weight, Tensor? scale, Tensor post_rstd, Tensor mean, Tensor rstd, "
      "bool post_rms, bool layer, bool tanh, ScalarType param_dtype, bool need_gate, bool need_post_weight, "
      "bool need_pre_weight, bool need_scale, bool need_shift) -> (Tensor dx, Tensor dz, Tensor dgate, "
      "Tensor dpost_weight, Tensor dpre_weight, Tensor dscale, Tensor dshift)");
  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor freqs, float eps) "
      "-> (Tensor q_out, Tensor k_out)");
  m.def(
      "qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, "
      "Tensor freqs, float eps, bool need_q_weight, bool need_k_weight) "
      "-> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)");
  m.def("rope(Tensor x, Tensor freqs, bool inverse) -> Tensor");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_over_gate(Tensor(a!) gate, Tensor up) -> ()");
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)");
  m.def("swiglu_halves_backward(Tensor dy, Tensor halves) -> Tensor");
}

void implement_blocks(Library& m) {
  m.impl("norm_modulate", TORCH_BOX(&norm_modulate));
  m.impl("norm_modulate_backward", TORCH_BOX(&norm_modulate_backward));
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
  m.impl("gated_residual_norm_modulate", TORCH_BOX(&gated_residual_norm_modulate));
  m.impl("gated_residual_norm_modulate_backward", TORCH_BOX(&gated_residual_norm_modulate_backward));
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("swiglu_halves_backward", TORCH_BOX(&swiglu_halves_backward));
}

void implement_blocks_on_cpu(Library& m) { m.impl("swiglu_over_gate", TORCH_BOX(&swiglu_over_gate)); }

}  // namespace twostep::bindings
