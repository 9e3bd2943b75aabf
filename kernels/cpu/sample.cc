// Logits to ids: temperature, top_k, top_p and a uniform number per row, see kernels.sample; and what is reported of
// them, see kernels.log_probabilities. Rows are split over threads.
//
// Probabilities of sampling are float64, as in the oracle, but neither divided by their sum nor sorted as a whole. For
// top_p, bisection finds two bounds: values above the upper one are kept, values up to the lower one are not, and only
// the few between them are sorted. The draw looks for its block of 256 ids first.
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
struct Mass {
  double sum, dot;
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
    PICK(which, at_least)(x, V, least, ids);
    for (long i : ids) candidates.push_back(x[i]);
    std::nth_element(candidates.begin(), candidates.begin() + (top_k - 1), candidates.end(), std::greater<float>());
    const float kth = candidates[top_k - 1];
    candidates.clear();
    ids.erase(std::remove_if(ids.begin(), ids.end(), [&](long i) { return x[i] < kth; }), ids.end());
    for (long i : ids) candidates.push_back(x[i]);
    x = candidates.data(), V = candidates.size();
  }
  static thread_local std::vector<double> e;
  e.resize(V);
  const double sum = PICK(which, exponentials)(x, V, most, temperature, e.data());
  const long at = draw(e.data(), V, top_p < 1.0 ? keep_top_p(e.data(), V, sum, top_p, which) : Kept{}, uniform, which);
  return ids.empty() ? at : ids[at];
}

// Rows [0, S), on all threads if there is enough work.
template <class Row>
static void for_rows(long S, long V, const Row& row) {
  if (S * V < (1 << 15))
    for (long s = 0; s < S; s++) row(s);
  else parallel(S, row);
}

// how: (3, S) float64: temperature, top_p, uniform.
std::vector<paddle::Tensor> Sample(const paddle::Tensor& logits, const paddle::Tensor& top_k, const paddle::Tensor& how,
                                   int instructions) {
  const long S = logits.shape()[0], V = logits.shape()[1];
  auto ids = paddle::empty({S}, paddle::DataType::INT64, logits.place());
  const int which = instructions < 0 ? level() : std::min(instructions, level());
  const double* h = how.data<double>();
  for_rows(S, V, [&](long s) {
    ids.data<int64_t>()[s] =
        one_row(logits.data<float>() + s * V, V, h[s], top_k.data<int64_t>()[s], h[S + s], h[2 * S + s], which);
  });
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

// The count largest of x (V), the largest first, the first of equals.
static std::vector<long> likeliest(const float* x, long V, long count, int which) {
  std::vector<long> ids;
  if (count == 0) return ids;
  PICK(which, at_least)(x, V, PICK(which, lower_bound_of_kth)(x, V, count), ids);
  std::partial_sort(ids.begin(), ids.begin() + count, ids.end(),
                    [&](long a, long b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
  ids.resize(count);
  return ids;
}

// temperature: (S,) float64. numbers: (S, 2 + count) float64: the log-probability of the row's id, the entropy, and the
// log-probabilities of the `count` likeliest.
std::vector<paddle::Tensor> LogProbabilities(const paddle::Tensor& logits, const paddle::Tensor& ids,
                                             const paddle::Tensor& temperature, int count, int instructions) {
  const long S = logits.shape()[0], V = logits.shape()[1], columns = 2 + count;
  PD_CHECK(count <= V, "there are fewer than ", count, " logits");
  auto numbers = paddle::empty({S, columns}, paddle::DataType::FLOAT64, logits.place());
  auto best = paddle::empty({S, count}, paddle::DataType::INT64, logits.place());
  const int which = level(instructions);
  for_rows(S, V, [&](long s) {
    const float* x = logits.data<float>() + s * V;
    const double T = temperature.data<double>()[s];
    double* to = numbers.data<double>() + s * columns;
    const long first = PICK(which, largest)(x, V);
    if (first < 0) {  // not finite
      std::fill_n(to, columns, NAN);
      std::fill_n(best.data<int64_t>() + s * count, count, 0);
      return;
    }
    const double most = x[first];
    const Mass all = PICK(which, mass)(x, V, x[first], (float)T);
    const auto log_probability = [&](long i) { return (x[i] - most) / T - std::log(all.sum); };
    to[0] = log_probability(ids.data<int64_t>()[s]), to[1] = std::log(all.sum) - all.dot / all.sum;
    long at = 0;
    for (long i : likeliest(x, V, count, which)) {
      best.data<int64_t>()[s * count + at] = i;
      to[2 + at++] = log_probability(i);
    }
  });
  return {numbers, best};
}

static std::vector<std::vector<int64_t>> LogProbabilitiesShape(const std::vector<int64_t>& logits,
                                                               const std::vector<int64_t>& ids,
                                                               const std::vector<int64_t>& temperature,
                                                               const int& count, const int& instructions) {
  return {{logits[0], 2 + count}, {logits[0], count}};
}
static std::vector<paddle::DataType> LogProbabilitiesType(paddle::DataType logits, paddle::DataType ids,
                                                          paddle::DataType temperature) {
  return {paddle::DataType::FLOAT64, paddle::DataType::INT64};
}

PD_BUILD_OP(cpu_log_probabilities)
    .Inputs({"logits", "ids", "temperature"})
    .Outputs({"numbers", "best"})
    .Attrs({"count: int", "instructions: int"})
    .SetKernelFn(PD_KERNEL(LogProbabilities))
    .SetInferShapeFn(PD_INFER_SHAPE(LogProbabilitiesShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(LogProbabilitiesType));
