// Cross-entropy of softmax(h W) for kernels/cpu.py, which computes the products: one pass over a block of columns of
// the logits; copies of blocks of W, and writes of blocks of its gradient, which stay in the cache between products.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "op.h"
#include "threads.h"

// Statistics of a row after some columns: largest logit, sum of exp(logit - max), the label's logit, and the factor of
// the sum when the last columns raised the maximum.
struct Row {
  float max, sum, target, factor;
};

#define BODY "loss.h"
#include "every_isa.h"

using Tensor = paddle::Tensor;
constexpr long ROWS = 8;  // per task
static long tasks(long n) { return (n + ROWS - 1) / ROWS; }
template <class F>
static void by_rows(long rows, F f) {
  parallel(tasks(rows), [&](long t) {
    for (long i = t * ROWS; i < std::min(rows, (t + 1) * ROWS); i++) f(i);
  });
}

// logits (N, n), columns `first` and on of the vocabulary; labels (N,); state (N, 4), a Row each; best (N,): column of
// the largest logit. The softcap is applied first unless it is 0.
std::vector<Tensor> See(Tensor& logits, const Tensor& labels, Tensor& state, Tensor& best, int64_t first, bool begin,
                        bool write, float softcap, int instructions) {
  const long N = logits.shape()[0], n = logits.shape()[1], which = level(instructions);
  float* X = logits.data<float>();
  Row* S = (Row*)state.data<float>();
  const int64_t* L = labels.data<int64_t>();
  int64_t* B = best.data<int64_t>();
  const auto row = softcap ? PICK(which, update_row<true>) : PICK(which, update_row<false>);
  by_rows(N, [&](long i) {
    if (begin) S[i] = {-INFINITY, 0.0f, 0.0f, 1.0f}, B[i] = first;
    row(X + i * n, n, first, L[i], write, softcap, S + i, B + i);
  });
  return {};
}

// logits (N, n) -> (softmax - onehot) * scale * slope of the softcap, in place, given the logsumexp of whole rows.
std::vector<Tensor> SoftmaxLessOnehot(Tensor& logits, const Tensor& labels, const Tensor& lse, const Tensor& scale,
                                      int64_t first, float softcap, int instructions) {
  const long N = logits.shape()[0], n = logits.shape()[1], which = level(instructions);
  float* X = logits.data<float>();
  const float *E = lse.data<float>(), *C = scale.data<float>();
  const int64_t* L = labels.data<int64_t>();
  const auto row = softcap ? PICK(which, gradient<true>) : PICK(which, gradient<false>);
  by_rows(N, [&](long i) { row(X + i * n, n, E[i], L[i] - first, C[i], softcap); });
  return {};
}

// total (N, D) = total * factor in state + more
std::vector<Tensor> ScaledAdd(Tensor& total, const Tensor& more, const Tensor& state, int instructions) {
  const long N = total.shape()[0], D = total.shape()[1], which = level(instructions);
  float* T = total.data<float>();
  const float* M = more.data<float>();
  const Row* S = (const Row*)state.data<float>();
  by_rows(N, [&](long i) { PICK(which, scaled_add)(T + i * D, M + i * D, S[i].factor, D); });
  return {};
}

// A block of a float32 or bfloat16 matrix as a float32 matrix.
std::vector<Tensor> Block(const Tensor& whole, int64_t row, int64_t rows, int64_t column, int64_t columns,
                          int instructions) {
  const long stride = whole.shape()[1], which = level(instructions);
  const bool is_short = whole.dtype() == paddle::DataType::BFLOAT16;
  const void* from = whole.data();
  Tensor out = paddle::empty({rows, columns}, paddle::DataType::FLOAT32, whole.place());
  float* to = out.data<float>();
  by_rows(rows,
          [&](long i) { PICK(which, copy)(from, is_short, (row + i) * stride + column, columns, to + i * columns); });
  return {out};
}

// Writes a float32 block into a matrix, or adds it.
std::vector<Tensor> PutBlock(Tensor& whole, const Tensor& block, int64_t row, int64_t column, bool add,
                             int instructions) {
  const long stride = whole.shape()[1], rows = block.shape()[0], columns = block.shape()[1],
             which = level(instructions);
  float* to = whole.data<float>();
  const float* from = block.data<float>();
  by_rows(rows, [&](long i) {
    float* at = to + (row + i) * stride + column;
    if (add) PICK(which, scaled_add)(at, from + i * columns, 1.0f, columns);
    else std::copy_n(from + i * columns, columns, at);
  });
  return {};
}

// rows (N, D): where a label is in a block of W that starts at `first`, its column (or row, if W is (V, D)).
std::vector<Tensor> LabelRows(Tensor& rows, const Tensor& block, const Tensor& labels, int64_t first, bool transposed) {
  const long N = rows.shape()[0], D = rows.shape()[1], n = block.shape()[!transposed];
  float* R = rows.data<float>();
  const float* W = block.data<float>();
  const int64_t* L = labels.data<int64_t>();
  by_rows(N, [&](long i) {
    const long at = L[i] - first;
    if (at < 0 || at >= n) return;
    if (transposed) std::copy_n(W + at * D, D, R + i * D);
    else
      for (long d = 0; d < D; d++) R[i * D + d] = W[d * n + at];
  });
  return {};
}

// No shape and dtype inference: these run only on a dynamic graph.
PD_BUILD_OP(cpu_logits_seen)
    .Inputs({"logits", "labels", "state", "best"})
    .Outputs({"logits_out", "state_out", "best_out"})
    .Attrs({"first: int64_t", "begin: bool", "write: bool", "softcap: float", "instructions: int"})
    .SetInplaceMap({{"logits", "logits_out"}, {"state", "state_out"}, {"best", "best_out"}})
    .SetKernelFn(PD_KERNEL(See));
PD_BUILD_OP(cpu_softmax_less_onehot)
    .Inputs({"logits", "labels", "lse", "scale"})
    .Outputs({"logits_out"})
    .Attrs({"first: int64_t", "softcap: float", "instructions: int"})
    .SetInplaceMap({{"logits", "logits_out"}})
    .SetKernelFn(PD_KERNEL(SoftmaxLessOnehot));
PD_BUILD_OP(cpu_scaled_add)
    .Inputs({"total", "more", "state"})
    .Outputs({"total_out"})
    .Attrs({"instructions: int"})
    .SetInplaceMap({{"total", "total_out"}})
    .SetKernelFn(PD_KERNEL(ScaledAdd));
PD_BUILD_OP(cpu_block)
    .Inputs({"whole"})
    .Outputs({"block"})
    .Attrs({"row: int64_t", "rows: int64_t", "column: int64_t", "columns: int64_t", "instructions: int"})
    .SetKernelFn(PD_KERNEL(Block));
PD_BUILD_OP(cpu_put_block)
    .Inputs({"whole", "block"})
    .Outputs({"whole_out"})
    .Attrs({"row: int64_t", "column: int64_t", "add: bool", "instructions: int"})
    .SetInplaceMap({{"whole", "whole_out"}})
    .SetKernelFn(PD_KERNEL(PutBlock));
PD_BUILD_OP(cpu_label_rows)
    .Inputs({"rows", "block", "labels"})
    .Outputs({"rows_out"})
    .Attrs({"first: int64_t", "transposed: bool"})
    .SetInplaceMap({{"rows", "rows_out"}})
    .SetKernelFn(PD_KERNEL(LabelRows));
