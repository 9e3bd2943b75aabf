// The kernels as Paddle operators: read shapes and dtypes from tensors, allocate outputs, pass the stream. Formulas
// and limits are in the headers; kernels/gpu.py is the only caller and checks what users could get wrong.
#include "cross_entropy.cuh"
// op_meta_info.h, not all of paddle/extension.h, whose Python part needs libraries of the CUDA toolkit.
#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/ext/tensor_compat.h"
#include "paged_attention.cuh"
#include "quant.cuh"
#include "rms_norm.cuh"

#ifdef __CUDACC__
#define STREAM(x) (x).stream()
#else
#define STREAM(x) nullptr
#endif

using Tensor = paddle::Tensor;
using Optional = paddle::optional<paddle::Tensor>;
using Shape = std::vector<int64_t>;
using Type = paddle::DataType;

static int type_of(const Tensor& x) {
  const Type type = x.dtype();
  PD_CHECK(type == Type::FLOAT32 || type == Type::BFLOAT16 || type == Type::FLOAT16,
           "float32, bfloat16 or float16 is needed");
  return type == Type::FLOAT32 ? FLOAT32 : type == Type::BFLOAT16 ? BFLOAT16 : FLOAT16;
}
static void check(int error, const char* what) { PD_CHECK(error == 0, what, ": CUDA error ", error); }
static Tensor make(const Shape& shape, Type type, const Tensor& beside) {
  return paddle::empty(shape, type, beside.place());
}
static Tensor floats(const Shape& shape, const Tensor& beside) { return make(shape, Type::FLOAT32, beside); }
template <typename T>
static const T* maybe(const Optional& x) {
  return x ? x->data<T>() : nullptr;
}

// ---------------------------------------------------------------------------------------------- cross-entropy

std::vector<Tensor> CrossEntropy(const Tensor& logits, const Tensor& labels, float softcap) {
  const int64_t rows = logits.shape()[0];
  Tensor lse = floats({rows}, logits), target = floats({rows}, logits), best = make({rows}, Type::INT64, logits);
  check(launch_cross_entropy(logits.data(), labels.data<int64_t>(), rows, logits.shape()[1], softcap, lse.data<float>(),
                             target.data<float>(), best.data<int64_t>(), type_of(logits), STREAM(logits)),
        "cross-entropy");
  return {lse, target, best};
}
void SoftmaxGradient(Tensor& logits, const Tensor& labels, const Tensor& lse, const Tensor& d_losses, float softcap) {
  check(launch_softmax_gradient(logits.data(), labels.data<int64_t>(), lse.data<float>(), d_losses.data<float>(),
                                logits.shape()[0], logits.shape()[1], softcap, type_of(logits), STREAM(logits)),
        "softmax's gradient");
}
static std::vector<Shape> CrossEntropyShape(const Shape& logits, const Shape& labels) {
  return {{logits[0]}, {logits[0]}, {logits[0]}};
}
static std::vector<Type> CrossEntropyType(Type logits, Type labels) {
  return {Type::FLOAT32, Type::FLOAT32, Type::INT64};
}
static std::vector<Shape> GradientShape(const Shape& logits, const Shape& labels, const Shape& lse,
                                        const Shape& d_losses) {
  return {logits};
}
static std::vector<Type> GradientType(Type logits, Type labels, Type lse, Type d_losses) { return {logits}; }

PD_BUILD_OP(gpu_cross_entropy)
    .Inputs({"logits", "labels"})
    .Outputs({"lse", "target", "best"})
    .Attrs({"softcap: float"})
    .SetKernelFn(PD_KERNEL(CrossEntropy))
    .SetInferShapeFn(PD_INFER_SHAPE(CrossEntropyShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(CrossEntropyType));
PD_BUILD_OP(gpu_softmax_backward)  // Paddle treats an operator with _grad in its name as a gradient operator
    .Inputs({"logits", "labels", "lse", "d_losses"})
    .Outputs({"d_logits"})
    .Attrs({"softcap: float"})
    .SetInplaceMap({{"logits", "d_logits"}})
    .SetKernelFn(PD_KERNEL(SoftmaxGradient))
    .SetInferShapeFn(PD_INFER_SHAPE(GradientShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(GradientType));

// ------------------------------------------------------------------------------------- rms_norm with residual

std::vector<Tensor> RmsNormResidual(const Tensor& x, const Tensor& residual, const Tensor& w, float epsilon) {
  const int64_t D = w.shape()[0], rows = x.numel() / D;
  Tensor h = make(x.shape(), x.dtype(), x), y = make(x.shape(), x.dtype(), x), r = floats({rows}, x);
  check(launch_rms_norm(x.data(), residual.data(), w.data(), rows, D, epsilon, h.data(), y.data(), r.data<float>(),
                        type_of(x), STREAM(x)),
        "rms_norm");
  return {y, h, r};
}
std::vector<Tensor> RmsNormResidualBackward(const Tensor& h, const Tensor& w, const Tensor& r, const Tensor& dy,
                                            const Tensor& dh) {
  const int64_t D = w.shape()[0], rows = h.numel() / D;
  Tensor dx = make(h.shape(), h.dtype(), h), dw = make({D}, h.dtype(), h), parts = floats({rms_norm_parts(rows), D}, h);
  check(launch_rms_norm_backward(h.data(), w.data(), r.data<float>(), dy.data(), dh.data(), rows, D, dx.data(),
                                 dw.data(), parts.data<float>(), type_of(h), STREAM(h)),
        "rms_norm backward");
  return {dx, dw};
}
static std::vector<Shape> NormShape(const Shape& x, const Shape& residual, const Shape& w) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.size(); i++) rows *= x[i];
  return {x, x, {rows}};
}
static std::vector<Type> NormType(Type x, Type residual, Type w) { return {x, x, Type::FLOAT32}; }
static std::vector<Shape> NormBackwardShape(const Shape& h, const Shape& w, const Shape& r, const Shape& dy,
                                            const Shape& dh) {
  return {h, w};
}
static std::vector<Type> NormBackwardType(Type h, Type w, Type r, Type dy, Type dh) { return {h, h}; }

PD_BUILD_OP(gpu_rms_norm_residual)
    .Inputs({"x", "residual", "w"})
    .Outputs({"y", "h", "r"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(RmsNormResidual))
    .SetInferShapeFn(PD_INFER_SHAPE(NormShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(NormType));
PD_BUILD_OP(gpu_rms_norm_residual_backward)
    .Inputs({"h", "w", "r", "dy", "dh"})
    .Outputs({"dx", "dw"})
    .SetKernelFn(PD_KERNEL(RmsNormResidualBackward))
    .SetInferShapeFn(PD_INFER_SHAPE(NormBackwardShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(NormBackwardType));

// ------------------------------------------------------------------------------------------- paged attention

std::vector<Tensor> PagedDecode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& tables,
                                const Tensor& contexts, const Optional& k_scales, const Optional& v_scales,
                                const Optional& slopes, float scale, int longest, int window, float softcap) {
  const Shape shape = q.shape(), pool = k_cache.shape();  // (S, H, Dh), (blocks, block_size, K, Dh)
  const int S = shape[0], H = shape[1], Dh = shape[2], K = pool[2], splits = paged_attention_splits(S, H, K, longest);
  Tensor out = make(shape, q.dtype(), q), partial = floats({splits > 1 ? (int64_t)S * H * splits * (Dh + 2) : 1}, q);
  check(launch_paged_attention(q.data(), k_cache.data(), v_cache.data(), maybe<float>(k_scales), maybe<float>(v_scales),
                               tables.data<int>(), contexts.data<int>(), S, H, K, Dh, pool[1], tables.shape()[1],
                               longest, splits, scale, maybe<float>(slopes), window, softcap, out.data(),
                               partial.data<float>(), type_of(q), STREAM(q)),
        "paged attention");
  return {out};
}
static std::vector<Shape> DecodeShape(const Shape& q, const Shape& k, const Shape& v, const Shape& tables,
                                      const Shape& contexts, const paddle::optional<Shape>& ks,
                                      const paddle::optional<Shape>& vs, const paddle::optional<Shape>& slopes) {
  return {q};
}
static std::vector<Type> DecodeType(Type q, Type k, Type v, Type tables, Type contexts,
                                    const paddle::optional<Type>& ks, const paddle::optional<Type>& vs,
                                    const paddle::optional<Type>& slopes) {
  return {q};
}

PD_BUILD_OP(gpu_paged_decode)
    .Inputs({"q", "k_cache", "v_cache", "tables", "contexts", paddle::Optional("k_scales"),
             paddle::Optional("v_scales"), paddle::Optional("slopes")})
    .Outputs({"out"})
    .Attrs({"scale: float", "longest: int", "window: int", "softcap: float"})
    .SetKernelFn(PD_KERNEL(PagedDecode))
    .SetInferShapeFn(PD_INFER_SHAPE(DecodeShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(DecodeType));

// ------------------------------------------------------------------------------------------ quantized linears

std::vector<Tensor> QuantLinear(const Tensor& x, const Tensor& codes, const Tensor& scales, const Optional& zeros,
                                const Optional& bias, int bits, int group) {
  const int64_t rows = x.shape()[0], in = x.shape()[1], out = codes.shape()[1];
  Tensor y = make({rows, out}, x.dtype(), x), partial = floats({quant_linear_parts(in, bits), rows, out}, x);
  check(launch_quant_linear(x.data(), codes.data<int>(), scales.data<float>(), maybe<int>(zeros),
                            bias ? bias->data() : nullptr, rows, in, out, bits, group, y.data(), partial.data<float>(),
                            type_of(x), STREAM(x)),
        "quant_linear");
  return {y};
}
// like: any tensor with the dtype of the result
std::vector<Tensor> Dequantize(const Tensor& like, const Tensor& codes, const Tensor& scales, const Optional& zeros,
                               int bits, int group) {
  const int64_t in = codes.shape()[0] * (32 / bits), out = codes.shape()[1];
  Tensor weights = make({in, out}, like.dtype(), codes);
  check(launch_dequantize(codes.data<int>(), scales.data<float>(), maybe<int>(zeros), in, out, bits, group,
                          weights.data(), type_of(like), STREAM(codes)),
        "dequantize");
  return {weights};
}
static std::vector<Shape> QuantShape(const Shape& x, const Shape& codes, const Shape& scales,
                                     const paddle::optional<Shape>& zeros, const paddle::optional<Shape>& bias) {
  return {{x[0], codes[1]}};
}
static std::vector<Type> QuantType(Type x, Type codes, Type scales, const paddle::optional<Type>& zeros,
                                   const paddle::optional<Type>& bias) {
  return {x};
}
static std::vector<Shape> DequantizeShape(const Shape& like, const Shape& codes, const Shape& scales,
                                          const paddle::optional<Shape>& zeros, const int& bits, const int& group) {
  return {{codes[0] * (32 / bits), codes[1]}};
}
static std::vector<Type> DequantizeType(Type like, Type codes, Type scales, const paddle::optional<Type>& zeros) {
  return {like};
}

PD_BUILD_OP(gpu_quant_linear)
    .Inputs({"x", "codes", "scales", paddle::Optional("zeros"), paddle::Optional("bias")})
    .Outputs({"y"})
    .Attrs({"bits: int", "group: int"})
    .SetKernelFn(PD_KERNEL(QuantLinear))
    .SetInferShapeFn(PD_INFER_SHAPE(QuantShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(QuantType));
PD_BUILD_OP(gpu_dequantize)
    .Inputs({"like", "codes", "scales", paddle::Optional("zeros")})
    .Outputs({"weights"})
    .Attrs({"bits: int", "group: int"})
    .SetKernelFn(PD_KERNEL(Dequantize))
    .SetInferShapeFn(PD_INFER_SHAPE(DequantizeShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(DequantizeType));
