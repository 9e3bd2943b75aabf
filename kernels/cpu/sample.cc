// Logits to ids: temperature, top_k, top_p and a uniform number per row, see kernels.sample; and what is reported of
// them, see kernels.log_probabilities. Rows are split over threads.
//
// Probabilities of sampling are float64, as in the oracle, but neither divided by their sum nor sorted as a whole. For
// top_p, a search in float32 finds two bounds, which float64 then confirms: values above the upper one are kept, values
// up to the lower one are not, and only the few between them are sorted. The draw looks for its block of 256 ids first.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "op.h"
#include "threads.h"

constexpr long RUN = 64, BLOCK = 256;  // logits of which the largest, and of which the sum is kept
struct Mass {
  double sum, dot;
};

#define BODY "sample.h"
#include "every_isa.h"

// Index of the first largest logit, and the largest of each run; -1 if a logit is NaN or the largest is infinite.
static long largest(const float* x, long V, std::vector<float>& runs, int which) {
  const bool numbers = PICK(which, maxima)(x, V, runs);
  const auto run = std::max_element(runs.begin(), runs.end());
  return numbers && std::isfinite(*run) ? std::find(x + (run - runs.begin()) * RUN, x + V, *run) - x : -1;
}

// Indices of at least the k largest logits, ascending, found by the largest of each run.
static std::vector<long> at_least(const float* x, long V, long k, const std::vector<float>& runs) {
  float least = -INFINITY;
  if ((long)runs.size() >= 2 * k) {
    auto of = runs;
    std::nth_element(of.begin(), of.begin() + (k - 1), of.end(), std::greater<float>());
    least = of[k - 1];
  }
  std::vector<long> ids;
  for (long i = 0; i < V; i += RUN)
    for (long j = i; runs[i / RUN] >= least && j < std::min(V, i + RUN); j++)
      if (x[j] >= least) ids.push_back(j);
  return ids;
}

// Exponentials of a row, see exponentials(), and ids of those near the edge of top_p.
struct Row {
  std::vector<double> e, sums;
  std::vector<float> rounded;
  std::vector<long> edge;
};

// What top_p keeps: values above `least`, and those equal to it up to the id `last`.
struct Kept {
  double least = 0;
  long last = -1;
};

// Leaves the sums of what is kept in row.sums.
static Kept keep_top_p(Row& row, long n, double sum, double top_p, int which) {
  constexpr long FEW = 64;
  const long blocks = row.sums.size();
  const double target = top_p * sum;
  double lower = top_p < 0.9999 ? 0.999 * (1.0 - top_p) / n * sum : 1e-30, upper = 2.0;  // no value is above 1
  double of_lower = sum, of_upper = 0;
  while (of_lower - of_upper > FEW * lower && upper > lower * (1 + 1e-6)) {
    double share = 0.5;
    if (upper < 1.5 * lower) {  // interpolate, and go a little beyond, to move the other bound as well
      const double few = FEW / 4 * lower;
      share = (of_lower - target + (2 * target < of_lower + of_upper ? -few : few)) / (of_lower - of_upper);
    }
    const double middle = lower * std::pow(upper / lower, share);
    const double found = PICK(which, above)(row.rounded.data(), blocks, middle);
    if (found < target) upper = middle, of_upper = found;
    else lower = middle, of_lower = found;
  }
  double total, whole;
  for (double wider = 1 + 1e-5;; wider *= wider) {  // more than float32's rounding, and more again if need be
    lower /= wider, upper *= wider;
    row.edge.clear();
    PICK(which, split)(row.e.data(), blocks, lower, upper, row.sums.data(), row.edge);
    total = whole = std::accumulate(row.sums.begin(), row.sums.end(), 0.0);
    for (long i : row.edge) whole += row.e[i];
    if (total <= target && (whole >= target || lower == 0)) break;
  }
  std::sort(row.edge.begin(), row.edge.end(),
            [&](long a, long b) { return row.e[a] > row.e[b] || (row.e[a] == row.e[b] && a < b); });
  Kept kept{upper};
  for (long i : row.edge) {
    if (total >= target) break;  // keeps the one that crosses top_p
    kept = {row.e[i], i};
    row.sums[i / BLOCK] += row.e[i], total += row.e[i];
  }
  return kept;
}

// The first id of those kept at which the running sum exceeds its share `uniform` of the whole.
static long draw(const Row& row, long n, const Kept& kept, double uniform) {
  const auto is_kept = [&](long i) { return row.e[i] > kept.least || (row.e[i] == kept.least && i <= kept.last); };
  const long blocks = row.sums.size();
  const double whole = std::accumulate(row.sums.begin(), row.sums.end(), 0.0);
  double before = 0;
  long b = 0, last = -1;
  while (b + 1 < blocks && uniform >= (before + row.sums[b]) / whole) before += row.sums[b++];
  for (long i = b * BLOCK; i < n; i++)  // rounding may put the end of the sum into a later block, or nowhere
    if (is_kept(i)) {
      before += row.e[i], last = i;
      if (uniform < before / whole) return i;
    }
  for (long i = n - 1; last < 0; i--)
    if (is_kept(i)) last = i;
  return last;
}

static long one_row(const float* x, long V, double temperature, long top_k, double top_p, double uniform, int which) {
  static thread_local std::vector<float> runs;
  static thread_local Row row;
  const long best = largest(x, V, runs, which);
  if (best < 0 || temperature == 0) return best;
  const double most = x[best];
  std::vector<float> candidates;
  std::vector<long> ids;  // of the candidates, ascending; empty: all
  if (0 < top_k && top_k < V) {
    ids = at_least(x, V, top_k, runs);
    for (long i : ids) candidates.push_back(x[i]);
    std::nth_element(candidates.begin(), candidates.begin() + (top_k - 1), candidates.end(), std::greater<float>());
    const float kth = candidates[top_k - 1];
    candidates.clear();
    ids.erase(std::remove_if(ids.begin(), ids.end(), [&](long i) { return x[i] < kth; }), ids.end());
    for (long i : ids) candidates.push_back(x[i]);
    x = candidates.data(), V = candidates.size();
  }
  const long blocks = (V + BLOCK - 1) / BLOCK;
  row.e.resize(blocks * BLOCK), row.rounded.resize(blocks * BLOCK), row.sums.resize(blocks);
  const double sum =
      PICK(which, exponentials)(x, V, most, temperature, row.e.data(), row.rounded.data(), row.sums.data());
  const long at = draw(row, V, top_p < 1.0 ? keep_top_p(row, V, sum, top_p, which) : Kept{}, uniform);
  return ids.empty() ? at : ids[at];
}

// Rows [0, S), on all threads if there is enough work.
template <class Row>
static void for_rows(long S, long V, const Row& row) {
  if (S * V < (1 << 15))
    for (long s = 0; s < S; s++) row(s);
  else parallel(S, row);
}

// Changes logits x of ids that were said, as kernels.sample says; on its end they are what they were.
class Penalized {
 public:
  Penalized(float* x, const int64_t* said, long n, float repetition, double presence, double frequency)
      : x_(x), said_(said), old_(n) {
    for (long i = 0; i < n; i++) {
      float& y = x[said[2 * i]];
      const double count = said[2 * i + 1];
      old_[i] = y;
      y = (y > 0 ? y / repetition : y * repetition) - (float)(presence * (count > 0) + frequency * count);
    }
  }
  ~Penalized() {
    for (size_t i = 0; i < old_.size(); i++) x_[said_[2 * i]] = old_[i];
  }

 private:
  float* x_;
  const int64_t* said_;
  std::vector<float> old_;
};

// how: (6, S) float64: temperature, top_p, uniform, and three penalties; said: (N, 2) int64, those of row s end before
// ends[s].
std::vector<paddle::Tensor> Sample(const paddle::Tensor& logits, const paddle::Tensor& top_k, const paddle::Tensor& how,
                                   const paddle::Tensor& said, const paddle::Tensor& ends, int instructions) {
  const long S = logits.shape()[0], V = logits.shape()[1];
  auto ids = paddle::empty({S}, paddle::DataType::INT64, logits.place());
  const int which = instructions < 0 ? level() : std::min(instructions, level());
  const double* h = how.data<double>();
  const int64_t* end = ends.data<int64_t>();
  for_rows(S, V, [&](long s) {
    float* x = const_cast<float*>(logits.data<float>()) + s * V;
    const long begin = s ? end[s - 1] : 0;
    const Penalized changed(x, said.data<int64_t>() + 2 * begin, end[s] - begin, h[3 * S + s], h[4 * S + s],
                            h[5 * S + s]);
    ids.data<int64_t>()[s] = one_row(x, V, h[s], top_k.data<int64_t>()[s], h[S + s], h[2 * S + s], which);
  });
  return {ids};
}

static std::vector<std::vector<int64_t>> SampleShape(const std::vector<int64_t>& logits,
                                                     const std::vector<int64_t>& top_k,
                                                     const std::vector<int64_t>& how,
                                                     const std::vector<int64_t>& said,
                                                     const std::vector<int64_t>& ends) {
  return {{logits[0]}};
}
static std::vector<paddle::DataType> SampleType(paddle::DataType logits, paddle::DataType top_k, paddle::DataType how,
                                                paddle::DataType said, paddle::DataType ends) {
  return {paddle::DataType::INT64};
}

PD_BUILD_OP(cpu_sample)
    .Inputs({"logits", "top_k", "how", "said", "ends"})
    .Outputs({"ids"})
    .Attrs({"instructions: int"})
    .SetKernelFn(PD_KERNEL(Sample))
    .SetInferShapeFn(PD_INFER_SHAPE(SampleShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(SampleType));

// The count largest of x (V), the largest first, the first of equals.
static std::vector<long> likeliest(const float* x, long V, long count, const std::vector<float>& runs) {
  if (count == 0) return {};
  auto ids = at_least(x, V, count, runs);
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
    static thread_local std::vector<float> runs;
    const long first = largest(x, V, runs, which);
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
    for (long i : likeliest(x, V, count, runs)) {
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
