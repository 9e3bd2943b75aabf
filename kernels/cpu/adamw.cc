// AdamW: one pass over parameter, gradient and both moments; and the sum of squares for clipping.
//
// Parameter and gradient are each float32 or bfloat16; moments are float32. The constants include bias corrections: p
// = p * keep - rate * m1 / (sqrt(m2) * correction + epsilon), rate = lr / (1 - beta1^t), correction = (1 -
// beta2^t)^(-1/2).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "op.h"
#include "threads.h"

struct Constants {
  float grad_scale, beta1, rest1, beta2, rest2, keep, rate, correction, epsilon;
};

#define BODY "adamw.h"
#include "every_isa.h"

using Tensor = paddle::Tensor;
constexpr long VALUES = 1 << 14;  // of one task

static bool is_short(const Tensor& x) { return x.dtype() == paddle::DataType::BFLOAT16; }

std::vector<Tensor> AdamW(Tensor& p, const Tensor& g, Tensor& moment1, Tensor& moment2,
                          const std::vector<float>& constants, int instructions) {
  const long n = p.numel(), which = level(instructions);
  const auto& k = constants;
  PD_CHECK(k.size() == 9 && g.numel() == n && moment1.numel() == n && moment2.numel() == n, "sizes differ");
  const Constants c{k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8]};
  const bool short_p = is_short(p), short_g = is_short(g);
  void* P = p.data();
  const void* G = g.data();
  float *M1 = moment1.data<float>(), *M2 = moment2.data<float>();
  parallel((n + VALUES - 1) / VALUES, [&](long t) {
    PICK(which, adamw)(P, short_p, G, short_g, M1, M2, t * VALUES, std::min(VALUES, n - t * VALUES), c);
  });
  return {};
}

std::vector<Tensor> SquaredNorm(const Tensor& x, int instructions) {
  const long n = x.numel(), parts = (n + VALUES - 1) / VALUES, which = level(instructions);
  std::vector<double> sums(parts);  // added up in their order
  parallel(parts, [&](long t) {
    sums[t] = PICK(which, squares)(x.data(), is_short(x), t * VALUES, std::min(VALUES, n - t * VALUES));
  });
  Tensor out = paddle::empty({}, paddle::DataType::FLOAT64, x.place());
  double sum = 0.0;
  for (double s : sums) sum += s;
  *out.data<double>() = sum;
  return {out};
}

// No shape and dtype inference: these run only on a dynamic graph.
PD_BUILD_OP(cpu_adamw)
    .Inputs({"p", "g", "moment1", "moment2"})
    .Outputs({"p_out", "moment1_out", "moment2_out"})
    .Attrs({"constants: std::vector<float>", "instructions: int"})
    .SetInplaceMap({{"p", "p_out"}, {"moment1", "moment1_out"}, {"moment2", "moment2_out"}})
    .SetKernelFn(PD_KERNEL(AdamW));
PD_BUILD_OP(cpu_squared_norm)
    .Inputs({"x"})
    .Outputs({"sum"})
    .Attrs({"instructions: int"})
    .SetKernelFn(PD_KERNEL(SquaredNorm));
