// The kernels as operators of PyTorch, torch.ops.gan_cpu or gan_cuda: checks, memory, stream. Derivatives: ops.py.
//
// The headers are those of PyTorch's stable ABI (as of TORCH_TARGET_VERSION, 2.11): they compile in seconds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

#include <torch/headeronly/util/shim_utils.h>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Double: return Dtype::float64;
    default: STD_TORCH_CHECK(false, "expected a tensor of float32, float16, bfloat16 or float64");
  }
}

ScalarType real_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor new_real(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, real_of(like));
}

// t, after a check that it is contiguous, of the type the kernel computes in, and has so many elements
const void* real(const Tensor& t, const Tensor& like, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == real_of(like) && t.numel() == count &&
                  t.device() == like.device(), name, ": expected ", count,
                  " contiguous numbers of the type and on the device the kernel computes in");
  return t.data_ptr();
}

const void* same(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == like.scalar_type() && t.numel() == like.numel() &&
                  t.device() == like.device(), name, ": expected a contiguous tensor like the first");
  return t.data_ptr();
}

// Runs a kernel where tensor t lives.
template <class Arguments>
void run(int (*kernel)(const Arguments&, Dtype, Where), const Arguments& arguments, const Tensor& t) {
  Where where{};
#ifdef USE_CUDA
  torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &where.stream));
#else
  where.parallel = [](int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
  };
#endif
  const int error = kernel(arguments, dtype_of(t), where);
  STD_TORCH_CHECK(error == 0, "a kernel of csrc/ failed with CUDA error ", error);
}

Penalty penalty_of(const Tensor& u) {
  STD_TORCH_CHECK(u.dim() >= 1 && u.is_contiguous(), "u: expected a contiguous tensor [N, ...]");
  Penalty p{};
  p.rows = u.size(0);
  p.columns = p.rows ? u.numel() / p.rows : 0;
  p.u = u.data_ptr();
  return p;
}

// u, v [N, ...] with u . v = norm^2 -> penalty [], norms [N].
std::tuple<Tensor, Tensor> run_penalty(const Tensor& u, const Tensor& v) {
  Penalty p = penalty_of(u);
  Tensor result = new_real(u, {}), norms = new_real(u, {p.rows});
  Tensor partial = new_real(u, {p.rows * pieces(p.rows, p.columns)});
  p.v = same(v, u, "v");
  p.penalty = result.data_ptr();
  p.norms = norms.data_ptr();
  p.partial = partial.data_ptr();
  run(penalty_forward, p, u);
  return {result, norms};
}

// u [N, ...], norms [N], d_penalty [], d_norms [N] or none -> the derivative by v, like u: u times a number per row.
Tensor run_penalty_backward(const Tensor& u, const Tensor& norms, const Tensor& d_penalty,
                            const OptionalTensor& d_norms) {
  Penalty p = penalty_of(u);
  Tensor d_v = torch::stable::empty_like(u);
  p.norms = const_cast<void*>(real(norms, u, p.rows, "norms"));
  p.d_penalty = real(d_penalty, u, 1, "d_penalty");
  p.d_norms = d_norms ? real(*d_norms, u, p.rows, "d_norms") : nullptr;
  p.d_v = d_v.data_ptr();
  run(penalty_backward, p, u);
  return d_v;
}

Adain adain_of(const Tensor& x, const Tensor& scale, const Tensor& bias, const OptionalTensor& noise,
               const OptionalTensor& strength, double slope) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), "x: expected a contiguous tensor [N, C, H, W]");
  Adain a{};
  a.channels = x.size(1);
  a.instances = x.size(0) * a.channels;
  a.pixels = x.size(2) * x.size(3);
  STD_TORCH_CHECK(a.pixels > 0 || a.instances == 0, "x: expected pixels");
  a.x = x.data_ptr();
  a.scale = real(scale, x, a.instances, "scale");
  a.bias = real(bias, x, a.instances, "bias");
  STD_TORCH_CHECK(noise.has_value() == strength.has_value(), "noise and strength: expected both or none");
  if (noise) {
    const bool planes = noise->dim() == 4 && noise->size(1) == 1 && noise->size(2) == x.size(2) &&
                        noise->size(3) == x.size(3) && (noise->size(0) == 1 || noise->size(0) == x.size(0));
    const bool dense = noise->numel() == 0 || ((noise->size(3) == 1 || noise->stride(3) == 1) &&
                                               (noise->size(2) == 1 || noise->stride(2) == noise->size(3)));
    STD_TORCH_CHECK(planes && dense && noise->scalar_type() == x.scalar_type() && noise->device() == x.device(),
                    "noise: expected [N or 1, 1, H, W] like x, each image contiguous");
    a.noise = noise->data_ptr();
    a.noise_stride = noise->size(0) == 1 ? 0 : noise->stride(0);
    a.strength_stride = strength->numel() == 1 ? 0 : 1;
    a.strength = real(*strength, x, a.strength_stride ? a.channels : 1, "strength");
  }
  a.slope = slope;
  return a;
}

// x [N, C, H, W], scale, bias [N, C], noise [N or 1, 1, H, W], strength [1] or [C] -> y like x, mean, 1/sigma [N, C].
std::tuple<Tensor, Tensor, Tensor> run_adain(
    const Tensor& x, const Tensor& scale, const Tensor& bias, const OptionalTensor& noise,
    const OptionalTensor& strength, double slope, double eps) {
  Adain a = adain_of(x, scale, bias, noise, strength, slope);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = new_real(x, {x.size(0), x.size(1)}), rstd = new_real(x, {x.size(0), x.size(1)});
  a.eps = eps;
  a.y = y.data_ptr();
  a.mean = mean.data_ptr();
  a.rstd = rstd.data_ptr();
  run(adain_forward, a, x);
  return {y, mean, rstd};
}

// -> d_x like x; d_scale, d_bias and, with noise, d_strength, each [N, C].
std::tuple<Tensor, Tensor, Tensor, Tensor> run_adain_backward(
    const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& bias, const OptionalTensor& noise,
    const OptionalTensor& strength, const Tensor& mean, const Tensor& rstd, double slope) {
  Adain a = adain_of(x, scale, bias, noise, strength, slope);
  Tensor dx = torch::stable::empty_like(x), d_scale = new_real(x, {x.size(0), x.size(1)});
  Tensor d_bias = new_real(x, {x.size(0), x.size(1)}), d_strength = new_real(x, {noise ? x.size(0) : 0, x.size(1)});
  a.dy = same(dy, x, "dy");
  a.mean = const_cast<void*>(real(mean, x, a.instances, "mean"));
  a.rstd = const_cast<void*>(real(rstd, x, a.instances, "rstd"));
  a.dx = dx.data_ptr();
  a.d_scale = d_scale.data_ptr();
  a.d_bias = d_bias.data_ptr();
  a.d_strength = noise ? d_strength.data_ptr() : nullptr;
  run(adain_backward, a, x);
  return {dx, d_scale, d_bias, d_strength};
}

}  // namespace

// A namespace per library, as each defines its operators and both may be loaded.
#ifdef USE_CUDA
#define NAMESPACE gan_cuda
#define BACKEND CUDA
#else
#define NAMESPACE gan_cpu
#define BACKEND CPU
#endif

STABLE_TORCH_LIBRARY(NAMESPACE, m) {
  m.def("penalty(Tensor u, Tensor v) -> (Tensor, Tensor)");
  m.def("penalty_backward(Tensor u, Tensor norms, Tensor d_penalty, Tensor? d_norms) -> Tensor");
  m.def("adain(Tensor x, Tensor scale, Tensor bias, Tensor? noise, Tensor? strength, "
        "float slope, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("adain_backward(Tensor dy, Tensor x, Tensor scale, Tensor bias, Tensor? noise, Tensor? strength, "
        "Tensor mean, Tensor rstd, float slope) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(NAMESPACE, BACKEND, m) {
  m.impl("penalty", TORCH_BOX(&run_penalty));
  m.impl("penalty_backward", TORCH_BOX(&run_penalty_backward));
  m.impl("adain", TORCH_BOX(&run_adain));
  m.impl("adain_backward", TORCH_BOX(&run_adain_backward));
}
