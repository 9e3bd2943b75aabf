// Logits to ids: temperature, top_k, top_p and a uniform number per row, see kernels.sample; rows are split over
// threads.
//
// Probabilities are float64, as in the oracle, but neither divided by their sum nor sorted as a whole. For top_p,
// bisection finds two bounds: values above the upper one are kept, values up to the lower one are not, and only the few
// between them are sorted. The draw looks for its block of 256 ids first.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "op.h"
#include "threads.h"

struct Above {
  double sum;
  long count;
};

#define BODY "sample.h"
#include "every_isa.h"

// What top_p keeps of exponentials e (n,): values above `least`, and those of the ascending `ids`.
struct Kept {
  double least = -1.0;
  std::vector<long> ids;
};

static Kept keep_top_p(const double* e, long n, double sum, double top_p, int which) {
  constexpr long FEW = 64;
  // A sum's rounding depends on its order, but by less than 1e-9.
  const double target = top_p * sum, below = target - 1e-9 * sum, beyond = target + 1e-9 * sum;
  double lower = top_p < 0.9999 ? 0.999 * (1.0 - top_p) / n * sum : 1e-30, upper = 2.0;  // no value is above 1
  Above of_lower = PICK(which, above)(e, 0, n, lower), of_upper{0.0, 0};
  if (of_lower.sum < beyond) lower = -1.0, of_lower = {sum, n};
  while (lower > 0 && of_lower.count - of_upper.count > FEW && upper > lower * (1 + 1e-12)) {
    const double middle = std::sqrt(lower * upper);
    const Above found = PICK(which, above)(e, 0, n, middle);
    if (found.sum < below) upper = middle, of_upper = found;
    else if (found.sum >= beyond) lower = middle, of_lower = found;
    else break;
  }
  Kept kept{upper, {}};
  std::vector<long> edge;
  PICK(which, between)(e, n, lower, upper, edge);
  std::stable_sort(edge.begin(), edge.end(), [&](long a, long b) { return e[a] > e[b]; });
  double total = of_upper.sum;
  for (long i : edge) {
    if (total >= target) break;  // keeps the one that crosses top_p
    kept.ids.push_back(i), total += e[i];
  }
  std::sort(kept.ids.begin(), kept.ids.end());
  return kept;
}

// The first id of those kept at which the running sum exceeds its share `uniform` of the whole.
static long draw(const double* e, long n, const Kept& kept, double uniform, int which) {
  constexpr long BLOCK = 256;
  const long blocks = (n + BLOCK - 1) / BLOCK;
  static thread_local std::vector<double> sums;
  sums.resize(blocks);
  for (long b = 0; b < blocks; b++)
    sums[b] = PICK(which, above)(e, b * BLOCK, std::min(n, (b + 1) * BLOCK), kept.least).sum;
  for (long i : kept.ids) sums[i / BLOCK] += e[i];
  double whole = 0, before = 0;
  for (double sum : sums) whole += sum;
  long b = 0, last = -1;
  while (b + 1 < blocks && uniform >= (before + sums[b]) / whole) before += sums[b++];
  for (;; b++) {  // rounding may put the end of the sum into a later block, or nowhere
    for (long i = b * BLOCK; i < std::min(n, (b + 1) * BLOCK); i++)
      if (e[i] > kept.least || std::binary_search(kept.ids.begin(), kept.ids.end(), i)) {
        before += e[i], last = i;
        if (uniform < before / whole) return i;
      }
    if (b + 1 >= blocks) break;
  }
  for (long i = n - 1; last < 0 && i >= 0; i--)
    if (e[i] > kept.least || std::binary_search(kept.ids.begin(), kept.ids.end(), i)) last = i;
  return last;
}

static long one_row(const float* x, long V, double temperature, long top_k, double top_p, double uniform, int which) {
  const long best = PICK(which, largest)(x, V);
  if (best < 0 || temperature == 0) return best;
  const double most = x[best];
  std::vector<float> candidates;
  std::vector<long> ids;  // of the candidates, ascending; empty: all
  if (0 < top_k && top_k < V) {
    const float least = PICK(which, lower_bound_of_kth)(x, V, top_k);
    for (long i = 0; i < V; i++)
      if (x[i] >= least) candidates.push_back(x[i]);
    std::nth_element(candidates.begin(), candidates.begin() + (top_k - 1), candidates.end(), std::greater<float>());
    const float kth = candidates[top_k - 1];
    candidates.clear();
    for (long i = 0; i < V; i++)
      if (x[i] >= kth) candidates.push_back(x[i]), ids.push_back(i);
    x = candidates.data(), V = candidates.size();
  }
  static thread_local std::vector<double> e;
  e.resize(V);
  const double sum = PICK(which, exponentials)(x, V, most, temperature, e.data());
  const long at = draw(e.data(), V, top_p < 1.0 ? keep_top_p(e.data(), V, sum, top_p, which) : Kept{}, uniform, which);
  return ids.empty() ? at : ids[at];
}

// how: (3, S) float64: temperature, top_p, uniform.
std::vector<paddle::Tensor> Sample(const paddle::Tensor& logits, const paddle::Tensor& top_k, const paddle::Tensor& how,
                                   int instructions) {
  const long S = logits.shape()[0], V = logits.shape()[1];
  auto ids = paddle::empty({S}, paddle::DataType::INT64, logits.place());
  const int which = instructions < 0 ? level() : std::min(instructions, level());
  const double* h = how.data<double>();
  const auto row = [&](long s) {
    ids.data<int64_t>()[s] =
        one_row(logits.data<float>() + s * V, V, h[s], top_k.data<int64_t>()[s], h[S + s], h[2 * S + s], which);
  };
  if (S * V < (1 << 15))
    for (long s = 0; s < S; s++) row(s);
  else parallel(S, row);
  return {ids};
}

static std::vector<std::vector<int64_t>> SampleShape(const std::vector<int64_t>& logits,
                                                     const std::vector<int64_t>& top_k,
                                                     const std::vector<int64_t>& how) {
  return {{logits[0]}};
}
static std::vector<paddle::DataType> SampleType(paddle::DataType logits, paddle::DataType top_k, paddle::DataType how) {
  return {paddle::DataType::INT64};
}

PD_BUILD_OP(cpu_sample)
    .Inputs({"logits", "top_k", "how"})
    .Outputs({"ids"})
    .Attrs({"instructions: int"})
    .SetKernelFn(PD_KERNEL(Sample))
    .SetInferShapeFn(PD_INFER_SHAPE(SampleShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(SampleType));
