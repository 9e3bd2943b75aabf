// The experts of a sparse MLP (Shazeer et al., arXiv 1701.06538): which of them a token goes to, and their products.
#pragma once
#include <vector>

#include "panels.h"

// As kernels/fused.py fills it, in this order; model.py's MoEConfig describes the fields.
struct Routing {
  int64_t experts, top_k, groups, best_groups, group_top, sigmoid, normalize;
  double scale;
  const float* correction;  // (experts), added to the scores that select; or null
};

struct Experts {
  struct Expert {
    Panels up, down;  // up: up, or gate and up in turn
  };
  std::vector<Expert> experts;  // empty: the MLP is not sparse
  std::vector<float> correction;
  Routing routing{};
};

struct ExpertRoom {
  Room weights, chosen, x, inner, y;
  InputRoom inputs;
};

// y (n, D) = sum over the experts of each row of x (n, D), weighted by the router's logits (n, experts).
// inner: SinkKind and Activation of their first product.
void run_experts(const Experts& e, const float* logits, const float* x, long n, long D, Sink inner, float* y,
                 ExpertRoom& room, int which);
