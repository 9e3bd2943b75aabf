// Routing and grouped products of a sparse MLP; see experts.h. Tokens are sorted by expert, and each expert that has
// any multiplies its own rows.
#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "threads.h"

namespace {
// The k highest scores, best first; scores of what is taken become -inf.
void take_best(float* scores, long n, long k, int64_t* best) {
  for (long i = 0; i < k; i++) {
    best[i] = std::max_element(scores, scores + n) - scores;
    scores[best[i]] = -INFINITY;
  }
}

// Scores outside the best groups become -inf; a group's score is the sum of its group_top best (arXiv 2405.04434).
void keep_best_groups(const Routing& r, float* scores) {
  const long size = r.experts / r.groups;
  std::vector<float> of_group(r.groups, 0.0f), copy(size);
  std::vector<int64_t> best(std::max(r.group_top, r.best_groups));
  for (long g = 0; g < r.groups; g++) {
    std::copy(scores + g * size, scores + (g + 1) * size, copy.begin());
    take_best(copy.data(), size, r.group_top, best.data());
    for (long i = 0; i < r.group_top; i++) of_group[g] += scores[g * size + best[i]];
  }
  take_best(of_group.data(), r.groups, r.best_groups, best.data());
  for (long g = 0; g < r.groups; g++)
    if (std::find(best.begin(), best.begin() + r.best_groups, g) == best.begin() + r.best_groups)
      std::fill_n(scores + g * size, size, -INFINITY);
}

// Logits of one token -> its experts, and their weights.
void route(const Experts& e, const float* logits, int64_t* chosen, float* weights) {
  const Routing& r = e.routing;
  std::vector<float> scores(logits, logits + r.experts), choice;
  if (r.sigmoid)
    for (float& x : scores) x = 1.0f / (1.0f + std::exp(-x));
  else {
    const float most = *std::max_element(scores.begin(), scores.end());
    float sum = 0.0f;
    for (float& x : scores) sum += x = std::exp(x - most);
    for (float& x : scores) x /= sum;
  }
  choice = scores;
  for (size_t i = 0; i < e.correction.size(); i++) choice[i] += e.correction[i];
  if (r.groups > 1) keep_best_groups(r, choice.data());
  take_best(choice.data(), r.experts, r.top_k, chosen);
  float sum = r.normalize ? 1e-20f : 0.0f;
  for (long i = 0; i < r.top_k; i++) sum += scores[chosen[i]];
  for (long i = 0; i < r.top_k; i++)
    weights[i] = scores[chosen[i]] / (r.normalize ? sum : 1.0f) * (float)r.scale;
}

void product(const Panels& w, const float* x, long n, InputRoom& room, const Sink& sink, int which) {
  multiply_panels(w, prepare(w, x, n, room, which), sink, which);
}
}  // namespace

void run_experts(const Experts& e, const float* logits, const float* x, long n, long D, Sink inner, float* y,
                 ExpertRoom& room, int which) {
  const long E = e.routing.experts, k = e.routing.top_k, rows = n * k;
  float* weights = room.weights.get<float>(rows);
  int64_t* chosen = room.chosen.get<int64_t>(2 * rows);
  int64_t* place = chosen + rows;  // of the i-th choice, among all rows sorted by expert
  for (long i = 0; i < n; i++) route(e, logits + i * E, chosen + i * k, weights + i * k);
  std::vector<long> first(E + 1, 0), next;
  for (long i = 0; i < rows; i++) first[chosen[i] + 1]++;
  for (long i = 0; i < E; i++) first[i + 1] += first[i];
  next = first;
  float *sorted = room.x.get<float>(rows * D), *of_experts = room.y.get<float>(rows * D);
  for (long i = 0; i < rows; i++) {
    place[i] = next[chosen[i]]++;
    std::memcpy(sorted + place[i] * D, x + i / k * D, D * sizeof(float));
  }
  for (long i = 0; i < E; i++) {
    const long from = first[i], count = first[i + 1] - from;
    if (count == 0) continue;
    inner.width = e.experts[i].down.in, inner.y = room.inner.get<float>(count * inner.width);
    product(e.experts[i].up, sorted + from * D, count, room.inputs, inner, which);
    product(e.experts[i].down, inner.y, count, room.inputs, {STORE, of_experts + from * D, D}, which);
  }
  const auto combine = [&](long i) {
    std::fill_n(y + i * D, D, 0.0f);
    for (long j = i * k; j < (i + 1) * k; j++)
      for (long d = 0; d < D; d++) y[i * D + d] += weights[j] * of_experts[place[j] * D + d];
  };
  if (n <= 8)
    for (long i = 0; i < n; i++) combine(i);
  else parallel(n, combine);
}
