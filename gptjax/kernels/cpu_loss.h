/* The cross-entropy of a token and its gradient with respect to the logits, for training: the work of
 * one thread. A row of logits is read from memory once, and again from the cache.
 *
 * Names of sizes: c tokens of a chunk, v vocabulary, of which the first `valid` are predicted. */

#pragma once

#include "cpu_kernels.h"

/* What a call computes on. Arrays are [c, v] and [c]. */
typedef struct {
  int64_t vocab, valid;
  float z_loss;
  const float *logits, *weights;
  const int32_t *targets;
  char *gradients;
  float *lse, *target_logits;
} Loss;

/* The vector of logits at j; what is not predicted is -inf. */
INLINE floats logits_at(const Loss *of, const float *row, int64_t j) {
  if (j + LANES <= of->valid) return *(const floats *)(row + j);
  floats v = (floats){0} - INFINITY;
  for (int64_t i = j; i < of->valid; i++) v[i - j] = row[i];
  return v;
}

/* Writes a vector of the gradients at j. */
INLINE void put_gradients(int wide, const Loss *of, char *row, int64_t j, floats v) {
  const halves narrow = narrowed(v);
  if (j + LANES > of->vocab)
    memcpy(row + j * (wide ? 4 : 2), wide ? (const void *)&v : &narrow,
           (of->vocab - j) * (wide ? 4 : 2));
  else if (wide)
    *(floats *)(row + j * 4) = v;
  else
    *(halves *)(row + j * 2) = narrow;
}

/* One token. Its gradient is weight (1 + 2 z_loss lse) softmax, less weight at the target. `exps` has
 * space for a row of vectors. */
INLINE void token_loss(int wide, const Loss *of, int64_t token, float *exps) {
  const float *row = of->logits + token * of->vocab;
  const int64_t target = of->targets[token];
  const int predicted = 0 <= target && target < of->valid;
  floats most = (floats){0} - INFINITY, total = {0};
  for (int64_t j = 0; j < of->valid; j += LANES) most = larger(logits_at(of, row, j), most);
  const float top = largest(most), weight = of->weights[token];
  for (int64_t j = 0; j < of->vocab; j += LANES) {
    const floats e = exp_of(logits_at(of, row, j) - top);
    *(floats *)(exps + j) = e;
    total += e;
  }
  const float sum = sum_of(total), lse = top + logf(sum);
  of->lse[token] = lse;
  of->target_logits[token] = predicted ? row[target] : 0;
  const float scale = weight * (1 + 2 * of->z_loss * lse) / sum;
  char *to = of->gradients + token * of->vocab * (wide ? 4 : 2); /* may be the logits' memory */
  for (int64_t j = 0; j < of->vocab; j += LANES)
    put_gradients(wide, of, to, j, *(const floats *)(exps + j) * scale);
  if (predicted) put(wide, to, target, exps[target] * scale - weight);
}
