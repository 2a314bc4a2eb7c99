/* Attention as in cpu_flash.h, for processors that multiply pairs of bfloat16 (AVX512-BF16), at twice
 * the rate of float32. Probabilities and the gradients of scores are rounded to bfloat16 for their
 * products, as on GPUs (Dao et al. 2022); all sums are float32. The left operand of a product is read
 * where it lies, the right one is packed as pairs along the depth. */

#pragma once

#include "cpu_flash.h"

#ifdef __AVX512BF16__

enum { HALF = sizeof(uint16_t) };

static void multiply_pairs(Triangle part, int64_t m, int64_t n, int64_t depth, const void *a,
                           int64_t row, int64_t step, const float *b, int64_t stride, float *out,
                           int64_t apart, int add) {
  multiply_any(1, part, m, n, depth, a, row, step, b, stride, out, apart, add);
}

/* Numbers of two rows as pairs. */
INLINE words pairs_of(halves low, halves high) {
  return __builtin_convertvector(low, words) | __builtin_convertvector(high, words) << 16;
}

/* Rows of bfloat16, `apart` bytes from each other, as pairs of rows: [rows / 2, width]. After an odd
 * number of rows comes a row of zeros. */
static void pack_pairs(const char *from, int64_t apart, int64_t rows, int64_t width, float *to) {
  for (int64_t i = 0; i < rows; i += 2, from += 2 * apart)
    for (int64_t j = 0; j < width * HALF; j += sizeof(halves), to += LANES) {
      const halves next = i + 1 < rows ? *(const halves *)(from + apart + j) : (halves){0};
      *(words *)to = pairs_of(*(const halves *)(from + j), next);
    }
}

/* Rows times a factor, or times one for each row, as bfloat16. */
static void narrow_rows(const float *from, int64_t rows, int64_t width, float factor,
                        const float *factors, char *to, int64_t apart) {
  for (int64_t i = 0; i < rows; i++, from += width)
    for (int64_t j = 0; j < width; j += LANES)
      *(halves *)(to + i * apart + j * HALF) =
          narrowed(*(const floats *)(from + j) * (factors ? factors[i] : factor));
}

/* The product of two rows of bfloat16. */
static float dot(const char *a, const char *b, int64_t width) {
  floats sum = {0};
  for (int64_t j = 0; j < width * HALF; j += 64)
    sum = (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_ps(a + j),
                                   (__m512bh)_mm512_loadu_ps(b + j));
  return sum_of(sum);
}

/* Products of a block's rows, `apart` bytes from each other, with panels of keys or values. */
static void pairs_by_panels(const Flash *of, const Block *block, const char *rows, int64_t apart,
                            const float *panels, float *out) {
  const int64_t count = block->end - block->first, depth = of->width / 2;
  for (int64_t key = block->from; key < block->end; key += SIDE)
    multiply_pairs(key < block->first ? WHOLE : COLUMNS_TO_ROW, count, SIDE, depth, rows, apart / 4,
                   1, panels + key * depth, SIDE, out + key - block->from, block->apart, 0);
}

/* Writes the exponentials of a row of scores times a factor, less the largest, as bfloat16, and zeros
 * where the query does not see; `most` is the largest. Returns their sum. */
static float exponentials(const float *row, float factor, const Seen *seen, uint16_t *to,
                          float *most) {
  floats large = (floats){0} - INFINITY, total = {0};
  for (int64_t j = seen->first; j <= seen->last; j += LANES) {
    const floats v = masked(*(const floats *)(row + j) * factor, j, seen, -INFINITY);
    large = larger(v, large);
  }
  *most = largest(large);
  memset(to, 0, seen->end * HALF);
  for (int64_t j = seen->first; j <= seen->last; j += LANES) {
    const floats v = masked(*(const floats *)(row + j) * factor, j, seen, -INFINITY);
    const floats e = exp_of(v - *most);
    *(halves *)(to + j) = narrowed(e);
    total += e;
  }
  return sum_of(total);
}

/* `flash_forward` of bfloat16. */
static void flash_forward_bf16(const Flash *of, int64_t task, float *scratch) {
  const int64_t c = of->width, t = of->tokens, whole = round_up(t);
  const Place in = place_of(of, task, HALF);
  float *values = scratch, *keys_T = values + whole * c / 2, *strip = keys_T + whole * c / 2;
  float *p = strip + SIDE * (whole + LANES), *out = p + SIDE * (whole + LANES) / 2;
  float shares[SIDE];
  pack_panels((const float *)(of->k + in.kv), in.key_row / 4, t, c / 2, keys_T);
  pack_pairs(of->v + in.kv, in.key_row, t, c, values);
  int64_t start = 0;
  for (int64_t first = 0; first < t; first += SIDE) {
    const Block block = next_block(of, in.segments, first, &start);
    const int64_t count = block.end - first, depth = (block.end - block.from + 1) / 2;
    const int64_t row = block.apart / 2;
    for (int64_t h = in.first_head; h < in.first_head + in.heads; h++) {
      const int64_t at = query_at(of, &in, first, h, HALF);
      pairs_by_panels(of, &block, of->q + at, in.row, keys_T, strip);
      for (int64_t r = 0; r < count; r++) {
        const Seen seen = seen_by(&block, r);
        uint16_t *to = (uint16_t *)(p + r * row);
        float most, sum = exponentials(strip + r * block.apart, of->scale, &seen, to, &most);
        lse_of(of, &in, h)[first + r] = most + logf(sum);
        shares[r] = 1 / sum;
      }
      multiply_pairs(DEPTH_TO_ROW, count, c, depth, p, row, 1, values + block.from / 2 * c, c, out, c,
                     0);
      narrow_rows(out, count, c, 1, shares, of->y + at, in.row);
    }
  }
}

/* Where the gradients of a block's scores are written: rows as they are, and as pairs of rows. */
typedef struct {
  float *p_pairs, *dp_pairs, *dp_rows;
} Narrowed;

/* Softmax and its gradient of rows r and r + 1 of a block, of which the second may not be there. */
static void gradient_of_rows(const Block *block, int64_t r, const float *p, const float *dp,
                             const float *lse, const float *means, float factor, Narrowed to) {
  const int both = block->first + r + 1 < block->end;
  const int64_t apart = block->apart;
  const Seen seen = seen_by(block, r), next = both ? seen_by(block, r + 1) : seen;
  uint16_t *row = (uint16_t *)(to.dp_rows + r * apart / 2);
  memset(to.p_pairs + r / 2 * apart, 0, seen.end * sizeof(float));
  memset(to.dp_pairs + r / 2 * apart, 0, seen.end * sizeof(float));
  memset(row, 0, seen.end * HALF);
  memset(row + apart, 0, seen.end * HALF);
  for (int64_t j = seen.first; j <= next.last; j += LANES) {
    halves narrow_p[2] = {0}, narrow_dp[2] = {0};
    for (int i = 0; i <= both; i++) {
      const int64_t at = (r + i) * apart + j;
      floats one = *(const floats *)(p + at) * factor, gradient = *(const floats *)(dp + at);
      softmax_gradient_at(j, i ? &next : &seen, one, lse[r + i], means[r + i], &one, &gradient);
      narrow_p[i] = narrowed(one);
      narrow_dp[i] = narrowed(gradient);
      *(halves *)(row + i * apart + j) = narrow_dp[i];
    }
    *(words *)(to.p_pairs + r / 2 * apart + j) = pairs_of(narrow_p[0], narrow_p[1]);
    *(words *)(to.dp_pairs + r / 2 * apart + j) = pairs_of(narrow_dp[0], narrow_dp[1]);
  }
}

/* `flash_backward` of bfloat16. */
static void flash_backward_bf16(const Flash *of, int64_t task, float *scratch) {
  const int64_t c = of->width, t = of->tokens, whole = round_up(t), all = whole * c;
  const int64_t strip = SIDE * (whole + LANES);
  const Place in = place_of(of, task, HALF);
  float *keys = scratch, *keys_T = keys + all / 2, *values_T = keys_T + all / 2;
  float *dk = values_T + all / 2, *dv = dk + all, *p = dv + all, *dp = p + strip;
  float *p_pairs = dp + strip, *dp_pairs = p_pairs + strip / 2, *dp_rows = dp_pairs + strip / 2;
  float *queries = dp_rows + strip / 2, *dy = queries + SIDE * c / 2, *dq = dy + SIDE * c / 2;
  float means[SIDE];
  pack_pairs(of->k + in.kv, in.key_row, t, c, keys);
  pack_panels((const float *)(of->k + in.kv), in.key_row / 4, t, c / 2, keys_T);
  pack_panels((const float *)(of->v + in.kv), in.key_row / 4, t, c / 2, values_T);
  memset(dk, 0, 2 * all * sizeof(float)); /* and dv */
  int64_t start = 0;
  for (int64_t first = 0; first < t; first += SIDE) {
    const Block block = next_block(of, in.segments, first, &start);
    const int64_t count = block.end - first, depth = (block.end - block.from + 1) / 2;
    const int64_t apart = block.apart, row = apart / 2, pairs = (count + 1) / 2;
    for (int64_t h = in.first_head; h < in.first_head + in.heads; h++) {
      const int64_t at = query_at(of, &in, first, h, HALF);
      pack_pairs(of->q + at, in.row, count, c, queries);
      pack_pairs(of->dy + at, in.row, count, c, dy);
      pairs_by_panels(of, &block, of->q + at, in.row, keys_T, p);
      pairs_by_panels(of, &block, of->dy + at, in.row, values_T, dp);
      for (int64_t r = 0; r < count; r++)
        means[r] = dot(of->y + at + r * in.row, of->dy + at + r * in.row, c);
      for (int64_t r = 0; r < count; r += 2)
        gradient_of_rows(&block, r, p, dp, lse_of(of, &in, h) + first, means, of->scale,
                         (Narrowed){p_pairs, dp_pairs, dp_rows});
      for (int64_t from = block.from; from < block.end; from += SIDE) {
        const Triangle part = from < first ? WHOLE : DEPTH_FROM_ROW;
        const int64_t here = MIN(SIDE, t - from), to = from * c, key = from - block.from;
        multiply_pairs(part, here, c, pairs, p_pairs + key, 1, apart, dy, c, dv + to, c, 1);
        multiply_pairs(part, here, c, pairs, dp_pairs + key, 1, apart, queries, c, dk + to, c, 1);
      }
      multiply_pairs(DEPTH_TO_ROW, count, c, depth, dp_rows, row, 1, keys + block.from / 2 * c, c, dq,
                     c, 0);
      narrow_rows(dq, count, c, of->scale, NULL, of->dq + at, in.row);
    }
  }
  narrow_rows(dk, t, c, of->scale, NULL, of->dk + in.kv, in.key_row);
  narrow_rows(dv, t, c, 1, NULL, of->dv + in.kv, in.key_row);
}

#endif
