/* Causal attention of whole sequences and its gradients, for training: the work of one thread.
 *
 * A task is the query heads of one sequence that share a key-value head. Scores exist for one block
 * of queries at a time (Dao et al. 2022), which the gradients compute again from the logarithm of
 * the softmax's sum; all sums are float32. Every product has the form out = a b with rows of b as
 * vectors and numbers of a broadcast, so keys and values are also packed transposed. Above the
 * diagonal, before the window and before a query's document nothing is computed, up to a tile.
 *
 * Shapes: t tokens, h query heads, k key-value heads, c head_dim; block of SIDE tokens. */

#pragma once

#include <stdlib.h>

#include "cpu_kernels.h"

enum {
  SIDE = 64, /* tokens of a block of queries and of a panel of keys */
  TILE_ROWS = 6,
#ifdef __AVX512F__
  TILE_VECTORS = 4, /* 6 x 4 sums, and a row of 4, fill the registers */
#else
  TILE_VECTORS = 1,
#endif
};

/* What a call of attention computes on; gradients are NULL in the forward pass. Arrays are
 * [b, t, heads, c], segments [b, t], lse [b, h, t]. */
typedef struct {
  int64_t tokens, heads, keys, width, window;
  float scale;
  const char *q, *k, *v, *dy;
  const int32_t *segments;
  char *y, *dq, *dk, *dv;
  float *lse;
} Flash;

/* --- products --------------------------------------------------------------------------------- */

/* s + x w; of pairs of bfloat16, the sum of both products. */
INLINE floats add_product(int pairs, floats s, float x, floats w) {
#ifdef __AVX512BF16__
  if (pairs)
    return (floats)_mm512_dpbf16_ps((__m512)s, (__m512bh)_mm512_set1_ps(x), (__m512bh)(__m512)w);
#endif
  return s + x * w;
}

/* out [m, vectors] = or += a [m, depth] b [depth, vectors]; number (r, d) of a is at
 * r row + d step. With `pairs`, what a and b have of 32 bits is a pair of bfloat16, which are
 * neighbours along the depth. */
INLINE void tile(int pairs, int m, int vectors, int64_t depth, const float *a, int64_t row,
                 int64_t step, const float *b, int64_t stride, float *out, int64_t apart, int add) {
  floats s[TILE_ROWS][TILE_VECTORS];
  for (int r = 0; r < m; r++)
    for (int i = 0; i < vectors; i++)
      s[r][i] = add ? *(const floats *)(out + r * apart + i * LANES) : (floats){0};
  for (int64_t d = 0; d < depth; d++) {
    floats w[TILE_VECTORS];
    for (int i = 0; i < vectors; i++) w[i] = *(const floats *)(b + d * stride + i * LANES);
    for (int r = 0; r < m; r++) {
      const float x = a[r * row + d * step];
      for (int i = 0; i < vectors; i++) s[r][i] = add_product(pairs, s[r][i], x, w[i]);
    }
  }
  for (int r = 0; r < m; r++)
    for (int i = 0; i < vectors; i++) *(floats *)(out + r * apart + i * LANES) = s[r][i];
}

#define TILE(m, vectors) \
  case (m) * 8 + (vectors):       \
    tile(pairs, m, vectors, depth, a, row, step, b, stride, out, apart, add); \
    break;

INLINE void any_tile(int pairs, int64_t m, int64_t vectors, int64_t depth, const float *a,
                     int64_t row, int64_t step, const float *b, int64_t stride, float *out,
                     int64_t apart, int add) {
  switch (m * 8 + vectors) {
    TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1)
#ifdef __AVX512F__
    TILE(1, 2) TILE(2, 2) TILE(3, 2) TILE(4, 2) TILE(5, 2) TILE(6, 2)
    TILE(1, 3) TILE(2, 3) TILE(3, 3) TILE(4, 3) TILE(5, 3) TILE(6, 3)
    TILE(1, 4) TILE(2, 4) TILE(3, 4) TILE(4, 4) TILE(5, 4) TILE(6, 4)
#endif
  }
}

/* Which part of a product on the diagonal is not zero. */
typedef enum {
  WHOLE,
  COLUMNS_TO_ROW, /* row r of the result up to column r */
  DEPTH_TO_ROW,   /* row r of a up to number r, counted from the end of the depth */
  DEPTH_FROM_ROW, /* row r of a from number r on */
} Triangle;

/* out [m, n] = or += a [m, depth] b [depth, n], n a multiple of LANES; with `pairs` as in `tile`,
 * depth in pairs. */
INLINE void multiply_any(int pairs, Triangle part, int64_t m, int64_t n, int64_t depth,
                         const float *a, int64_t row, int64_t step, const float *b, int64_t stride,
                         float *out, int64_t apart, int add) {
  const int64_t each = pairs ? 2 : 1;
  for (int64_t r = 0; r < m; r += TILE_ROWS) {
    const int64_t rows = MIN(TILE_ROWS, m - r), end = r + rows;
    const int64_t columns = part == COLUMNS_TO_ROW ? MIN(n, (end + LANES - 1) / LANES * LANES) : n;
    const int64_t first = part == DEPTH_FROM_ROW ? r / each : 0;
    const int64_t last =
        part == DEPTH_TO_ROW ? (depth * each - m + end + each - 1) / each : depth;
    for (int64_t j = 0; j < columns; j += TILE_VECTORS * LANES)
      any_tile(pairs, rows, MIN(TILE_VECTORS, (columns - j) / LANES), last - first,
               a + r * row + first * step, row, step, b + first * stride + j, stride,
               out + r * apart + j, apart, add);
  }
}

static void multiply(Triangle part, int64_t m, int64_t n, int64_t depth, const float *a, int64_t row,
                     int64_t step, const float *b, int64_t stride, float *out, int64_t apart,
                     int add) {
  multiply_any(0, part, m, n, depth, a, row, step, b, stride, out, apart, add);
}

/* --- packing ---------------------------------------------------------------------------------- */

/* Rows of `width` numbers, `apart` bytes from each other, as float32 in the order of `load`. */
INLINE void pack_rows(int wide, const char *from, int64_t apart, int64_t rows, int64_t width,
                      float factor, float *to) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < width; j += PAIR) {
      floats a, b;
      load(wide, from + i * apart + j * (wide ? 4 : 2), &a, &b);
      *(floats *)(to + i * width + j) = a * factor;
      *(floats *)(to + i * width + j + LANES) = b * factor;
    }
}

/* Rows as panels of SIDE of them, transposed; missing rows of the last are zero. */
static void pack_panels(const float *rows, int64_t apart, int64_t count, int64_t width, float *to) {
  for (int64_t first = 0; first < count; first += SIDE, to += SIDE * width) {
    const int64_t here = MIN(SIDE, count - first);
    if (here < SIDE) memset(to, 0, SIDE * width * sizeof(float));
    for (int64_t j = 0; j < width; j++)
      for (int64_t i = 0; i < here; i++) to[j * SIDE + i] = rows[(first + i) * apart + j];
  }
}

/* The inverse of `pack_rows`. */
INLINE void unpack_rows(int wide, const float *from, int64_t rows, int64_t width, float factor,
                        char *to, int64_t apart) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < width; j += PAIR)
      save(wide, *(const floats *)(from + i * width + j) * factor,
           *(const floats *)(from + i * width + j + LANES) * factor,
           to + i * apart + j * (wide ? 4 : 2));
}

/* --- a block of queries ----------------------------------------------------------------------- */

/* Queries `first` to `end` see keys from `from`, a multiple of SIDE; `low` is the first key of each
 * query. Their scores are [SIDE, apart], from key `from` on. */
typedef struct {
  int64_t first, end, from, apart;
  int64_t low[SIDE];
} Block;

/* The next block of queries; `start` is the first token of the document of the query before. */
static Block next_block(const Flash *of, const int32_t *segments, int64_t first, int64_t *start) {
  Block block = {.first = first, .end = MIN(first + SIDE, of->tokens)};
  for (int64_t t = first; t < block.end; t++) {
    if (t && segments[t] != segments[t - 1]) *start = t;
    const int64_t window = t + 1 - of->window;
    block.low[t - first] = *start > window ? *start : window;
  }
  block.from = block.low[0] / SIDE * SIDE;
  block.apart = first + SIDE - block.from + LANES; /* rows a power of two apart share cache lines */
  return block;
}

/* Scores, or other products, of packed rows of a block with panels of keys. */
static void by_panels(const Flash *of, const Block *block, const float *rows, const float *panels,
                      float *out) {
  const int64_t count = block->end - block->first;
  for (int64_t key = block->from; key < block->end; key += SIDE)
    multiply(key < block->first ? WHOLE : COLUMNS_TO_ROW, count, SIDE, of->width, rows, of->width, 1,
             panels + key * of->width, SIDE, out + key - block->from, block->apart, 0);
}

/* The vectors of a row of scores that a query sees, and its numbers within them. */
typedef struct {
  int64_t first, last, end; /* multiples of LANES: first and last seen, end of the panels */
  int64_t low, high;
} Seen;

static Seen seen_by(const Block *block, int64_t r) {
  const int64_t low = block->low[r] - block->from, high = block->first + r - block->from;
  return (Seen){low / LANES * LANES, high / LANES * LANES, block->first + SIDE - block->from, low,
                high};
}

/* Sets numbers of a vector of scores that the query does not see. */
INLINE floats masked(floats v, int64_t at, const Seen *seen, float hidden) {
  typedef int32_t ints __attribute__((vector_size(64), may_alias));
  const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const ints place = lanes + (int32_t)at;
  const ints out = (place < (int32_t)seen->low) | (place > (int32_t)seen->high);
  return (floats)(((ints)v & ~out) | ((ints)((floats){0} + hidden) & out));
}

/* Zeros around what a query sees, as far as products read. */
static void clear_around(float *row, const Seen *seen) {
  memset(row, 0, seen->first * sizeof(float));
  memset(row + seen->last + LANES, 0, (seen->end - seen->last - LANES) * sizeof(float));
}

/* Softmax of a row of scores in place; returns the logarithm of the sum. */
static float softmax(float *row, const Seen *seen) {
  floats most = (floats){0} - INFINITY, total = {0};
  for (int64_t j = seen->first; j <= seen->last; j += LANES) {
    const floats v = masked(*(const floats *)(row + j), j, seen, -INFINITY);
    *(floats *)(row + j) = v;
    most = larger(v, most);
  }
  const float top = largest(most);
  for (int64_t j = seen->first; j <= seen->last; j += LANES) {
    const floats e = exp_of(*(const floats *)(row + j) - top);
    *(floats *)(row + j) = e;
    total += e;
  }
  const float sum = sum_of(total), share = 1 / sum;
  for (int64_t j = seen->first; j <= seen->last; j += LANES) *(floats *)(row + j) *= share;
  clear_around(row, seen);
  return top + logf(sum);
}

/* --- tasks ------------------------------------------------------------------------------------ */

static int64_t round_up(int64_t tokens) { return (tokens + SIDE - 1) / SIDE * SIDE; }

/* Where a task's rows are: of one sequence, and the query heads of one key-value head. Bytes apart
 * are the rows of queries and of keys; `kv` is the place of its first key. */
typedef struct {
  int64_t first_head, heads, row, key_row, kv, sequence;
  const int32_t *segments;
} Place;

static Place place_of(const Flash *of, int64_t task, int64_t size) {
  const int64_t sequence = task / of->keys, key = task % of->keys, group = of->heads / of->keys;
  const int64_t head = of->width * size, key_row = of->keys * head;
  return (Place){
      .first_head = key * group,
      .heads = group,
      .row = of->heads * head,
      .key_row = key_row,
      .kv = sequence * of->tokens * key_row + key * head,
      .sequence = sequence,
      .segments = of->segments + sequence * of->tokens,
  };
}

/* The bytes before a token's query of a head. */
static int64_t query_at(const Flash *of, const Place *in, int64_t token, int64_t head,
                        int64_t size) {
  return (in->sequence * of->tokens + token) * in->row + head * of->width * size;
}

/* The logarithms of the softmax's sums of a head. */
static float *lse_of(const Flash *of, const Place *in, int64_t head) {
  return of->lse + (in->sequence * of->heads + head) * of->tokens;
}

/* Floats of scratch memory that a task needs. */
static int64_t flash_scratch(const Flash *of) {
  const int64_t whole = round_up(of->tokens), all = whole * of->width;
  const int64_t strip = SIDE * (whole + LANES), block = SIDE * of->width;
  return of->dy ? 6 * all + 4 * strip + 3 * block : 3 * all + 2 * strip + 2 * block;
}

/* Attention of one sequence and key-value head. */
INLINE void flash_forward(int wide, const Flash *of, int64_t task, float *scratch) {
  const int64_t size = wide ? 4 : 2, c = of->width, t = of->tokens, whole = round_up(t);
  const Place in = place_of(of, task, size);
  float *values = scratch, *keys_T = values + whole * c, *strip = keys_T + whole * c;
  float *queries = strip + SIDE * (whole + LANES), *out = queries + SIDE * c, *packed = out + SIDE * c;
  pack_rows(wide, of->k + in.kv, in.key_row, t, c, 1, packed);
  pack_panels(packed, c, t, c, keys_T);
  pack_rows(wide, of->v + in.kv, in.key_row, t, c, 1, values);
  int64_t start = 0;
  for (int64_t first = 0; first < t; first += SIDE) {
    const Block block = next_block(of, in.segments, first, &start);
    const int64_t count = block.end - first, depth = block.end - block.from;
    for (int64_t h = in.first_head; h < in.first_head + in.heads; h++) {
      const int64_t at = query_at(of, &in, first, h, size);
      pack_rows(wide, of->q + at, in.row, count, c, of->scale, queries);
      by_panels(of, &block, queries, keys_T, strip);
      for (int64_t r = 0; r < count; r++) {
        const Seen seen = seen_by(&block, r);
        lse_of(of, &in, h)[first + r] = softmax(strip + r * block.apart, &seen);
      }
      multiply(DEPTH_TO_ROW, count, c, depth, strip, block.apart, 1, values + block.from * c, c, out,
               c, 0);
      unpack_rows(wide, out, count, c, 1, of->y + at, in.row);
    }
  }
}

/* Probabilities from scores, of which the vector at j is given, and the logarithm of their sum; and the
 * gradient of the scores: p (dp - sum of p dp). */
INLINE void softmax_gradient_at(int64_t j, const Seen *seen, floats scores, float lse, float mean,
                                floats *p, floats *dp) {
  typedef int32_t ints __attribute__((vector_size(64), may_alias));
  const floats v = scores - lse;
  const ints above = v > 0; /* by rounding */
  *p = masked(exp_of((floats)((ints)v & ~above)), j, seen, 0);
  *dp = *p * masked(*dp - mean, j, seen, 0);
}

static void softmax_gradient(float *p, float *dp, const Seen *seen, float lse, float mean) {
  for (int64_t j = seen->first; j <= seen->last; j += LANES)
    softmax_gradient_at(j, seen, *(const floats *)(p + j), lse, mean, (floats *)(p + j),
                        (floats *)(dp + j));
  clear_around(p, seen);
  clear_around(dp, seen);
}

/* The gradients of one sequence and key-value head. */
INLINE void flash_backward(int wide, const Flash *of, int64_t task, float *scratch) {
  const int64_t size = wide ? 4 : 2, c = of->width, t = of->tokens, whole = round_up(t);
  const int64_t all = whole * c;
  const Place in = place_of(of, task, size);
  float *keys = scratch, *keys_T = keys + all, *values_T = keys_T + all, *dk = values_T + all;
  float *dv = dk + all, *p = dv + all, *dp = p + SIDE * (whole + LANES);
  float *queries = dp + SIDE * (whole + LANES), *dy = queries + SIDE * c, *y = dy + SIDE * c;
  float *values = y + SIDE * c;
  pack_rows(wide, of->k + in.kv, in.key_row, t, c, 1, keys);
  pack_panels(keys, c, t, c, keys_T);
  pack_rows(wide, of->v + in.kv, in.key_row, t, c, 1, values);
  pack_panels(values, c, t, c, values_T);
  memset(dk, 0, 2 * all * sizeof(float)); /* and dv */
  int64_t start = 0;
  for (int64_t first = 0; first < t; first += SIDE) {
    const Block block = next_block(of, in.segments, first, &start);
    const int64_t count = block.end - first, depth = block.end - block.from;
    for (int64_t h = in.first_head; h < in.first_head + in.heads; h++) {
      const int64_t at = query_at(of, &in, first, h, size);
      pack_rows(wide, of->q + at, in.row, count, c, of->scale, queries);
      pack_rows(wide, of->dy + at, in.row, count, c, 1, dy);
      pack_rows(wide, of->y + at, in.row, count, c, 1, y);
      by_panels(of, &block, queries, keys_T, p);
      by_panels(of, &block, dy, values_T, dp);
      for (int64_t r = 0; r < count; r++) {
        const Seen seen = seen_by(&block, r);
        floats mean = {0};
        for (int64_t j = r * c; j < (r + 1) * c; j += LANES)
          mean += *(const floats *)(y + j) * *(const floats *)(dy + j);
        softmax_gradient(p + r * block.apart, dp + r * block.apart, &seen,
                         lse_of(of, &in, h)[first + r], sum_of(mean));
      }
      for (int64_t from = block.from; from < block.end; from += SIDE) {
        const Triangle part = from < first ? WHOLE : DEPTH_FROM_ROW;
        const int64_t here = MIN(SIDE, t - from), to = from * c, strip = from - block.from;
        multiply(part, here, c, count, p + strip, 1, block.apart, dy, c, dv + to, c, 1);
        multiply(part, here, c, count, dp + strip, 1, block.apart, queries, c, dk + to, c, 1);
      }
      multiply(DEPTH_TO_ROW, count, c, depth, dp, block.apart, 1, keys + block.from * c, c, y, c, 0);
      unpack_rows(wide, y, count, c, of->scale, of->dq + at, in.row);
    }
  }
  unpack_rows(wide, dk, t, c, 1, of->dk + in.kv, in.key_row);
  unpack_rows(wide, dv, t, c, 1, of->dv + in.kv, in.key_row);
}
