// The CUDA launchers on the emulated device, for Python tests: one function a launcher, a dict of what its struct
// holds.
//
// Tensors come as tuples of an address and strides: (data, batch_stride, token_stride) for rows, (data, heads,
// batch_stride, token_stride, head_stride) for heads, (data, stride, 0) for samples, an address or None for contiguous
// ones. What is missing is absent.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cuda/kernels.h"

namespace py = pybind11;
using namespace twostep;

namespace {

struct Call {
  py::dict fields;

  bool has(const char* name) const { return fields.contains(name) && !fields[name].is_none(); }
  template <class V>
  V get(const char* name, V absent) const {
    return has(name) ? fields[name].cast<V>() : absent;
  }
  int64_t number(const char* name) const { return fields[name].cast<int64_t>(); }
  double eps() const { return get<double>("eps", 1e-5); }
  Dtype dtype(const char* name) const { return Dtype(number(name)); }
  void* pointer(const char* name) const { return reinterpret_cast<void*>(get<uintptr_t>(name, 0)); }

  template <class Pointer = const void*>
  RowsOf<Pointer> rows(const char* name) const {
    if (!has(name)) return {};
    const auto [data, batch, token] = fields[name].cast<std::tuple<uintptr_t, int64_t, int64_t>>();
    return {reinterpret_cast<Pointer>(data), batch, token};
  }
  ConstHeads heads(const char* name) const {
    const auto [data, heads, batch, token, head] =
        fields[name].cast<std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>>();
    return {reinterpret_cast<const void*>(data), heads, batch, token, head};
  }
  ConstSamples samples(const char* name) const {
    const auto [data, stride, none] = rows(name);
    return {data, stride};
  }
  Partials partials() const { return {pointer("partials"), get<int64_t>("splits", 1)}; }

  template <class Problem>
  Problem shaped() const {
    Problem p{};
    p.dtype = dtype("dtype");
    p.batch = number("batch");
    p.length = number("length");
    p.width = number("width");
    return p;
  }
};

int norm_modulate_forward(const Call& c) {
  auto p = c.shaped<NormModulateForward>();
  p.param_dtype = c.dtype("param_dtype");
  p.norm = Norm(c.number("norm"));
  p.eps = c.eps();
  p.x = c.rows("x");
  p.weight = c.pointer("weight");
  p.scale = c.rows("scale");
  p.shift = c.rows("shift");
  p.y = c.pointer("y");
  p.mean = c.pointer("mean");
  p.rstd = c.pointer("rstd");
  return cuda::norm_modulate_forward(p, nullptr);
}

int norm_modulate_backward(const Call& c) {
  auto p = c.shaped<NormModulateBackward>();
  p.param_dtype = c.dtype("param_dtype");
  p.norm = Norm(c.number("norm"));
  p.scale_per_token = c.get("scale_per_token", false);
  p.dy = c.rows("dy");
  p.x = c.rows("x");
  p.weight = c.pointer("weight");
  p.scale = c.rows("scale");
  p.mean = c.pointer("mean");
  p.rstd = c.pointer("rstd");
  p.dx = c.pointer("dx");
  p.dweight = c.pointer("dweight");
  p.dscale = c.pointer("dscale");
  p.dshift = c.pointer("dshift");
  p.partials = c.partials();
  return cuda::norm_modulate_backward(p, nullptr);
}

int gated_residual_forward(const Call& c) {
  auto p = c.shaped<GatedResidualForward>();
  p.param_dtype = c.dtype("param_dtype");
  p.norm = Norm(c.number("norm"));
  p.gate_act = GateAct(c.number("gate_act"));
  p.eps = c.eps();
  p.x = c.rows("x");
  p.z = c.rows("z");
  p.gate = c.rows("gate");
  p.weight = c.pointer("weight");
  p.out = c.pointer("out");
  p.rstd = c.pointer("rstd");
  return cuda::gated_residual_forward(p, nullptr);
}

int gated_residual_backward(const Call& c) {
  auto p = c.shaped<GatedResidualBackward>();
  p.param_dtype = c.dtype("param_dtype");
  p.norm = Norm(c.number("norm"));
  p.gate_act = GateAct(c.number("gate_act"));
  p.gate_per_token = c.get("gate_per_token", false);
  p.dout = c.rows("dout");
  p.z = c.rows("z");
  p.gate = c.rows("gate");
  p.weight = c.pointer("weight");
  p.rstd = c.pointer("rstd");
  p.dz = c.pointer("dz");
  p.dgate = c.pointer("dgate");
  p.dweight = c.pointer("dweight");
  p.partials = c.partials();
  return cuda::gated_residual_backward(p, nullptr);
}

int gated_residual_norm_modulate_forward(const Call& c) {
  auto p = c.shaped<GatedResidualNormModulateForward>();
  p.param_dtype = c.dtype("param_dtype");
  p.post_norm = Norm(c.number("post_norm"));
  p.norm = Norm(c.number("norm"));
  p.gate_act = GateAct(c.number("gate_act"));
  p.eps = c.eps();
  p.x = c.rows("x");
  p.z = c.rows("z");
  p.gate = c.rows("gate");
  p.post_weight = c.pointer("post_weight");
  p.pre_weight = c.pointer("pre_weight");
  p.scale = c.rows("scale");
  p.shift = c.rows("shift");
  p.out = c.pointer("out");
  p.h = c.pointer("h");
  p.post_rstd = c.pointer("post_rstd");
  p.mean = c.pointer("mean");
  p.rstd = c.pointer("rstd");
  return cuda::gated_residual_norm_modulate_forward(p, nullptr);
}

int gated_residual_norm_modulate_backward(const Call& c) {
  auto p = c.shaped<GatedResidualNormModulateBackward>();
  p.param_dtype = c.dtype("param_dtype");
  p.post_norm = Norm(c.number("post_norm"));
  p.norm = Norm(c.number("norm"));
  p.gate_act = GateAct(c.number("gate_act"));
  p.gate_per_token = c.get("gate_per_token", false);
  p.scale_per_token = c.get("scale_per_token", false);
  p.dout = c.rows("dout");
  p.dh = c.rows("dh");
  p.out = c.rows("out");
  p.z = c.rows("z");
  p.gate = c.rows("gate");
  p.post_weight = c.pointer("post_weight");
  p.pre_weight = c.pointer("pre_weight");
  p.scale = c.rows("scale");
  p.post_rstd = c.pointer("post_rstd");
  p.mean = c.pointer("mean");
  p.rstd = c.pointer("rstd");
  p.dx = c.pointer("dx");
  p.dz = c.pointer("dz");
  p.dgate = c.pointer("dgate");
  p.dpost_weight = c.pointer("dpost_weight");
  p.dpre_weight = c.pointer("dpre_weight");
  p.dscale = c.pointer("dscale");
  p.dshift = c.pointer("dshift");
  p.partials = c.partials();
  return cuda::gated_residual_norm_modulate_backward(p, nullptr);
}

int qk_norm_rope_forward(const Call& c) {
  auto p = c.shaped<QkNormRopeForward>();
  p.param_dtype = c.dtype("param_dtype");
  p.eps = c.eps();
  p.q = c.heads("q");
  p.k = c.heads("k");
  p.q_weight = c.pointer("q_weight");
  p.k_weight = c.pointer("k_weight");
  p.freqs = c.rows("freqs");
  p.q_out = c.pointer("q_out");
  p.k_out = c.pointer("k_out");
  return cuda::qk_norm_rope_forward(p, nullptr);
}

int qk_norm_rope_backward(const Call& c) {
  auto p = c.shaped<QkNormRopeBackward>();
  p.param_dtype = c.dtype("param_dtype");
  p.eps = c.eps();
  p.dq_out = c.heads("dq_out");
  p.dk_out = c.heads("dk_out");
  p.q = c.heads("q");
  p.k = c.heads("k");
  p.q_weight = c.pointer("q_weight");
  p.k_weight = c.pointer("k_weight");
  p.freqs = c.rows("freqs");
  p.dq = c.pointer("dq");
  p.dk = c.pointer("dk");
  p.dq_weight = c.pointer("dq_weight");
  p.dk_weight = c.pointer("dk_weight");
  p.partials = c.partials();
  return cuda::qk_norm_rope_backward(p, nullptr);
}

int rope(const Call& c) {
  auto p = c.shaped<Rope>();
  p.inverse = c.get("inverse", false);
  p.x = c.heads("x");
  p.freqs = c.rows("freqs");
  p.y = c.pointer("y");
  return cuda::rope(p, nullptr);
}

int swiglu_forward(const Call& c) {
  auto p = c.shaped<SwigluForward>();
  p.gate = c.rows("gate");
  p.up = c.rows("up");
  p.y = c.pointer("y");
  return cuda::swiglu_forward(p, nullptr);
}

int swiglu_backward(const Call& c) {
  auto p = c.shaped<SwigluBackward>();
  p.dy = c.rows("dy");
  p.gate = c.rows("gate");
  p.up = c.rows("up");
  p.dgate = c.rows<void*>("dgate");
  p.dup = c.rows<void*>("dup");
  return cuda::swiglu_backward(p, nullptr);
}

template <class Problem>
Problem of_samples(const Call& c) {
  Problem p{};
  p.dtype = c.dtype("dtype");
  p.batch = c.number("batch");
  p.size = c.number("size");
  return p;
}

int euler_step_forward(const Call& c) {
  auto p = of_samples<EulerStepForward>(c);
  p.velocity_dtype = c.dtype("velocity_dtype");
  p.delta = c.get("delta", 0.);
  p.deltas = c.pointer("deltas");
  p.x = c.samples("x");
  p.v = c.samples("v");
  p.y = c.pointer("y");
  return cuda::euler_step_forward(p, nullptr);
}

int euler_step_backward(const Call& c) {
  auto p = of_samples<EulerStepBackward>(c);
  p.velocity_dtype = c.dtype("velocity_dtype");
  p.delta = c.get("delta", 0.);
  p.deltas = c.pointer("deltas");
  p.dy = c.samples("dy");
  p.dv = c.pointer("dv");
  return cuda::euler_step_backward(p, nullptr);
}

int two_step_split_forward(const Call& c) {
  auto p = of_samples<TwoStepSplitForward>(c);
  p.velocity_dtype = c.dtype("velocity_dtype");
  p.step = c.get("step", 0.);
  p.noise = c.samples("noise");
  p.v = c.samples("v");
  p.z = c.pointer("z_out");
  p.x_a = c.pointer("x_a");
  return cuda::two_step_split_forward(p, nullptr);
}

int two_step_split_backward(const Call& c) {
  auto p = of_samples<TwoStepSplitBackward>(c);
  p.velocity_dtype = c.dtype("velocity_dtype");
  p.coefficient = c.get("coefficient", 0.);
  p.factors = c.pointer("factors");
  p.factor_stride = c.get<int64_t>("factor_stride", 0);
  p.inherited = c.samples("inherited");
  p.own = c.samples("own");
  p.dv = c.pointer("dv");
  return cuda::two_step_split_backward(p, nullptr);
}

int gradient_norms(const Call& c) {
  auto p = of_samples<GradientNorms>(c);
  p.g = c.samples("g");
  p.partials = c.pointer("partials");
  p.norms = c.pointer("norms");
  p.total = c.pointer("total");
  return cuda::gradient_norms(p, nullptr);
}

int dmd_direction(const Call& c) {
  auto p = of_samples<DmdDirection>(c);
  p.prediction_dtype = c.dtype("prediction_dtype");
  p.eps = c.eps();
  p.x = c.samples("x");
  p.real = c.samples("real");
  p.fake = c.samples("fake");
  p.partials = c.pointer("partials");
  p.scales = c.pointer("scales");
  p.direction = c.pointer("direction");
  return cuda::dmd_direction(p, nullptr);
}

template <int (*Launcher)(const Call&)>
int call(py::dict fields) {
  return Launcher(Call{std::move(fields)});
}

// What the emulation must catch, beyond what the ops do wrong when mutated: a fiber for each kind of fault.
void provoke(const std::string& fault) {
  simt::run(1, simt::Dim3(64), 256, [&] {
    const unsigned lane = simt::position().thread.x;
    auto* words = reinterpret_cast<float*>(simt::shared_memory());
    if (fault == "divergent barrier") {
      lane < 32 ? simt::barrier(__FILE__, 1) : simt::barrier(__FILE__, 2);
    } else if (fault == "missed barrier") {
      if (lane != 7) simt::barrier(__FILE__, 1);
    } else if (fault == "ended lane") {
      if (lane != 3) simt::shuffle_xor(0xffffffffu, lane, 1);
    } else if (fault == "lanes that do not come") {
      lane == 3 ? simt::barrier(__FILE__, 1) : void(simt::shuffle_xor(0xffffffffu, lane, 1));
    } else if (fault == "divergent shuffle") {
      simt::shuffle_xor(0xffffffffu, lane, lane < 16 ? 1 : 2);
    } else if (fault == "mask without caller") {
      simt::shuffle_xor(0x0000ffffu, lane, 1);
    } else if (fault == "unwritten shared") {
      simt::shared_read(words + lane, 4);
    } else if (fault == "shared out of bounds") {
      simt::shared_write(words + 64 + lane, 4);
    } else if (fault == "misaligned shared") {
      simt::shared_write(words + 1, 16);
    } else if (fault == "shared race") {
      simt::shared_write(words, 4);
    } else if (fault == "none") {
      simt::shared_write(words + lane, 4);
      simt::barrier(__FILE__, 1);
      simt::shared_read(words + (lane ^ 1), 4);
      simt::shuffle_xor(lane < 32 ? 0xffffffffu : (lane & 16 ? 0xffff0000u : 0x0000ffffu), lane, 1);
    } else {
      throw py::value_error("no such fault: " + fault);
    }
  });
}

}  // namespace

PYBIND11_MODULE(twostep_simt, m) {
  m.doc() = "twostep's CUDA launchers on an emulated device";
  m.def("norm_modulate_forward", &call<norm_modulate_forward>);
  m.def("norm_modulate_backward", &call<norm_modulate_backward>);
  m.def("gated_residual_forward", &call<gated_residual_forward>);
  m.def("gated_residual_backward", &call<gated_residual_backward>);
  m.def("gated_residual_norm_modulate_forward", &call<gated_residual_norm_modulate_forward>);
  m.def("gated_residual_norm_modulate_backward", &call<gated_residual_norm_modulate_backward>);
  m.def("qk_norm_rope_forward", &call<qk_norm_rope_forward>);
  m.def("qk_norm_rope_backward", &call<qk_norm_rope_backward>);
  m.def("rope", &call<rope>);
  m.def("swiglu_forward", &call<swiglu_forward>);
  m.def("swiglu_backward", &call<swiglu_backward>);
  m.def("euler_step_forward", &call<euler_step_forward>);
  m.def("euler_step_backward", &call<euler_step_backward>);
  m.def("two_step_split_forward", &call<two_step_split_forward>);
  m.def("two_step_split_backward", &call<two_step_split_backward>);
  m.def("gradient_norms", &call<gradient_norms>);
  m.def("dmd_direction", &call<dmd_direction>);
  m.def("splits", &cuda::splits, py::arg("batch"), py::arg("length"), py::arg("width"));
  m.def("provoke", &provoke);

  m.def("register_range", [](uintptr_t data, size_t bytes, bool writable) {
    simt::register_range(reinterpret_cast<const void*>(data), bytes, writable);
  });
  m.def("clear_ranges", &simt::clear_ranges);
  m.def(
      "configure",
      [](int multiprocessors, const std::string& order, uint64_t seed, int per_block, int per_multiprocessor) {
        simt::Settings& settings = simt::settings();
        settings.multiprocessors = multiprocessors;
        settings.order = order == "forward"   ? simt::Order::forward
                         : order == "reverse" ? simt::Order::reverse
                                              : simt::Order::shuffled;
        settings.seed = seed;
        settings.shared_per_block = per_block;
        settings.shared_per_multiprocessor = per_multiprocessor;
      },
      py::arg("multiprocessors") = 4, py::arg("order") = "forward", py::arg("seed") = 0,
      py::arg("shared_per_block") = 232448, py::arg("shared_per_multiprocessor") = 233472);
  m.def("counts", [] {
    const simt::Counts& c = simt::counts();
    return py::dict(py::arg("launches") = c.launches, py::arg("blocks") = c.blocks, py::arg("threads") = c.threads,
                    py::arg("barriers") = c.barriers, py::arg("vector_reads") = c.vector_reads,
                    py::arg("vector_writes") = c.vector_writes);
  });
}
