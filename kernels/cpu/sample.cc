// Logits to ids: temperature, top_k, top_p and a uniform number per row, see kernels.sample; rows are split over
// threads.
//
// Probabilities are float64, as in the oracle. For top_p, those that can be kept are summed in buckets of similar
// values; only the bucket in which top_p is reached is sorted: values before it are kept, values after it are not.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "op.h"
#include "threads.h"

#define BODY "sample.h"
#include "every_isa.h"

static long one_row(const float* x, long V, double temperature, long top_k, double top_p, double uniform, int which) {
  const long best = PICK(which, largest)(x, V);
  if (best < 0 || temperature == 0) return best;
  const double most = x[best];
  std::vector<float> kept;
  std::vector<long> ids;  // of the kept candidates, ascending; empty: all
  if (0 < top_k && top_k < V) {
    const float least = PICK(which, lower_bound_of_kth)(x, V, top_k);
    for (long i = 0; i < V; i++)
      if (x[i] >= least) kept.push_back(x[i]);
    std::nth_element(kept.begin(), kept.begin() + (top_k - 1), kept.end(), std::greater<float>());
    const float kth = kept[top_k - 1];
    kept.clear();
    for (long i = 0; i < V; i++)
      if (x[i] >= kth) kept.push_back(x[i]), ids.push_back(i);
    x = kept.data(), V = kept.size();
  }
  static thread_local std::vector<double> p;
  p.resize(V);
  const double sum = PICK(which, exponentials)(x, V, most, temperature, p.data());
  PICK(which, normalize)(p.data(), V, sum);
  if (top_p < 1.0) {
    constexpr long BUCKETS = 2048;
    constexpr double STEP = 64;  // buckets per factor of e
    std::vector<long> of_p;  // candidates, ascending: the values below add up to less than 1 - top_p
    PICK(which, at_least)(p.data(), V, top_p < 0.9999 ? 0.999 * (1.0 - top_p) / V : 0.0, of_p);
    std::vector<uint16_t> bucket(of_p.size());
    double mass[BUCKETS] = {}, total = 0;
    for (size_t j = 0; j < of_p.size(); j++) {
      const double below = (most - x[of_p[j]]) / temperature * STEP;
      bucket[j] = below < BUCKETS - 1 ? (uint16_t)below : BUCKETS - 1;
      mass[bucket[j]] += p[of_p[j]];
    }
    // A sum's rounding depends on its order, but by less than 1e-9.
    long first = 0, last;
    while (first < BUCKETS - 1 && total + mass[first] < top_p - 1e-9) total += mass[first++];
    double reached = total;
    for (last = first; last < BUCKETS - 1 && (reached += mass[last]) < top_p + 1e-9;) last++;
    std::vector<std::pair<double, long>> edge;
    std::vector<long> order;
    for (size_t j = 0; j < of_p.size(); j++)
      if (bucket[j] < first) order.push_back(of_p[j]);
      else if (bucket[j] <= last) edge.push_back({-p[of_p[j]], of_p[j]});
    std::sort(edge.begin(), edge.end());
    const size_t certain = order.size();
    for (const auto& [negative, i] : edge) {
      if (total >= top_p) break;  // keeps the one that crosses top_p
      order.push_back(i), total -= negative;
    }
    std::sort(order.begin() + certain, order.end());
    std::inplace_merge(order.begin(), order.begin() + certain, order.end());
    for (size_t i = 0; i < order.size(); i++) {  // order ascends, so no value is overwritten before it is read
      p[i] = p[order[i]];
      if (!ids.empty()) order[i] = ids[order[i]];
    }
    p.resize(order.size()), ids = std::move(order);
  }
  std::partial_sum(p.begin(), p.end(), p.begin());
  const double whole = p.back();
  const auto above = [&](double u, double value) { return u < value / whole; };
  const size_t at = std::min<size_t>(std::upper_bound(p.begin(), p.end(), uniform, above) - p.begin(), p.size() - 1);
  return ids.empty() ? (long)at : ids[at];
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
