/* The arithmetic of cpu.c: the work of one thread, in registers and caches. */

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

typedef float floats __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));

enum {
  LANES = 16,
  PAIR = 2 * LANES, /* columns loaded at a time */
  DEPTH = 8,        /* rows of a matrix summed in registers */
  TABLE_DEPTH = 4,  /* rows of a table with sums in registers at a time */
  AHEAD = 8192,     /* prefetch distance in bytes */
  PARTS = 4,        /* tasks that share a sum over k */
  MOST_ROWS = 8,    /* largest n */
  GROUP = 4,        /* query heads with sums in registers at a time */
  BLOCK = 256,      /* tokens of the cache processed at a time; a multiple of LANES */
};

/* --- numbers ------------------------------------------------------------------------------- */

INLINE float widen(uint16_t half) {
  const uint32_t word = (uint32_t)half << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

/* Rounds to bfloat16, ties to even, in the upper half of each word; NaN stays NaN. */
INLINE words rounded(words w) {
  const words nan = (words)((w & 0x7fffffffu) > 0x7f800000u);
  const words near = w + 0x7fffu + (w >> 16 & 1);
  return (nan & (w | 0x400000u)) | (~nan & near);
}

/* A vector of bfloat16, in order. */
INLINE halves narrowed(floats v) {
#ifdef __AVX512BF16__
  return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
  return __builtin_convertvector(rounded((words)v) >> 16, halves);
#endif
}

/* Loads PAIR numbers as two vectors: float32 in order, bfloat16 as even and odd numbers. */
INLINE void load(int wide, const char *from, floats *a, floats *b) {
  if (wide) {
    *a = *(const floats *)from;
    *b = *(const floats *)(from + sizeof *a);
  } else {
    const words both = *(const words *)from;
    *a = (floats)(both << 16);
    *b = (floats)(both & 0xffff0000u);
  }
}

/* The inverse of `load`. */
INLINE void save(int wide, floats a, floats b, char *to) {
  if (wide) {
    *(floats *)to = a;
    *(floats *)(to + sizeof a) = b;
  } else {
    *(words *)to = rounded((words)a) >> 16 | (rounded((words)b) & 0xffff0000u);
  }
}

/* The index at which `load` puts number i of a row. */
INLINE int64_t lane(int wide, int64_t i) {
  return wide ? i : i / PAIR * PAIR + i % 2 * LANES + i % PAIR / 2;
}

INLINE float number(int wide, const char *from, int64_t i) {
  return wide ? ((const float *)from)[i] : widen(((const uint16_t *)from)[i]);
}

INLINE float sum_of(floats v) {
  typedef float eight __attribute__((vector_size(32), aligned(2), may_alias));
  typedef float four __attribute__((vector_size(16), aligned(2), may_alias));
  const eight *halves = (const eight *)&v;
  const eight h = halves[0] + halves[1];
  const four *quarters = (const four *)&h;
  const four q = quarters[0] + quarters[1];
  return q[0] + q[1] + (q[2] + q[3]);
}

/* The larger of each pair of numbers. */
INLINE floats larger(floats a, floats b) {
  const words which = (words)(a > b);
  return (floats)(((words)a & which) | ((words)b & ~which));
}

/* The largest number. */
INLINE float largest(floats v) {
  float top = v[0];
  for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
  return top;
}

/* e^v for v <= 0, to 2 units in the last place, and 0 below -87: 2^n times a polynomial of the
 * remainder (Cody and Waite 1980). */
INLINE floats exp_of(floats v) {
  const floats magic = (floats){0} + 12582912.0f; /* 1.5 x 2^23: adding it rounds to an integer */
  const floats n = (v * 1.44269504f + magic) - magic;
  const floats r = v - n * 0.693359375f + n * 2.12194440e-4f;
  floats p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#ifdef __AVX512F__
  const __mmask16 large = _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  return (floats)_mm512_maskz_scalef_ps(large, (__m512)p, (__m512)n);
#else
  typedef int32_t ints __attribute__((vector_size(64), may_alias));
  const ints large = ~(v < -87.0f);
  const ints scale = (__builtin_convertvector((floats)((ints)n & large), ints) + 127) << 23;
  return (floats)((ints)(p * (floats)scale) & large);
#endif
}

INLINE void put(int wide, char *to, int64_t i, float value) {
  if (wide)
    ((float *)to)[i] = value;
  else
    ((uint16_t *)to)[i] = (uint16_t)(rounded((words)((floats){0} + value))[0] >> 16);
}

/* Prefetches `size` bytes. */
INLINE void fetch(const char *from, int64_t size) {
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* --- a part of `columns`: x [n, rows] times w [rows, columns], its rows `stride` apart ------- */

INLINE void add_rows(int wide, int n, int depth, const float *x, int64_t k, const char *w,
                     int64_t stride, int64_t columns, float *sums) {
  const int64_t size = wide ? 4 : 2, whole = columns / PAIR * PAIR;
  for (int64_t j = 0; j < whole; j += PAIR) {
    floats a[DEPTH], b[DEPTH];
    fetch(w + j * depth * size + AHEAD, PAIR * depth * size);
    for (int d = 0; d < depth; d++) load(wide, w + (d * stride + j) * size, a + d, b + d);
    for (int r = 0; r < n; r++) {
      float *to = sums + r * columns + j;
      floats s = *(floats *)to, t = *(floats *)(to + LANES);
      for (int d = 0; d < depth; d++) {
        s += x[r * k + d] * a[d];
        t += x[r * k + d] * b[d];
      }
      *(floats *)to = s;
      *(floats *)(to + LANES) = t;
    }
  }
  for (int64_t j = whole; j < columns; j++)
    for (int r = 0; r < n; r++)
      for (int d = 0; d < depth; d++)
        sums[r * columns + j] += x[r * k + d] * number(wide, w, d * stride + j);
}

/* For one or two tokens, a single stream reads memory fastest; for more, arithmetic counts too. */
INLINE void add_part(int wide, int n, const float *x, int64_t k, const char *w, int64_t stride,
                     int64_t rows, int64_t columns, float *sums) {
  const int depth = n <= 2 ? 1 : DEPTH;
  const int64_t size = wide ? 4 : 2;
  fetch(w, AHEAD);
  memset(sums, 0, n * columns * sizeof(float));
  int64_t i = 0;
  for (; i + depth <= rows; i += depth)
    add_rows(wide, n, depth, x + i, k, w + i * stride * size, stride, columns, sums);
  for (; i < rows; i++)
    add_rows(wide, n, 1, x + i, k, w + i * stride * size, stride, columns, sums);
}

/* One row of a product: adds up its parts, which are in the order of `load`. */
INLINE void join(int wide, const float *sums, int64_t apart, int64_t columns, char *y) {
  const int64_t size = wide ? 4 : 2, whole = columns / PAIR * PAIR;
  for (int64_t j = 0; j < whole; j += PAIR) {
    floats a = {0}, b = {0};
    for (int part = 0; part < PARTS; part++) {
      a += *(const floats *)(sums + part * apart + j);
      b += *(const floats *)(sums + part * apart + j + LANES);
    }
    save(wide, a, b, y + j * size);
  }
  for (int64_t j = whole; j < columns; j++) {
    float sum = 0;
    for (int part = 0; part < PARTS; part++) sum += sums[part * apart + j];
    put(wide, y, j, sum);
  }
}

/* --- `table`: x [n, k], in the order of `load`, times the transpose of w [rows, k] ----------- */

INLINE void table_rows(int wide, int n, int depth, const float *x, const float *tail, int64_t k,
                       const char *w, float *y, int64_t apart) {
  const int64_t size = wide ? 4 : 2, whole = k / PAIR * PAIR, left = k - whole;
  floats s[MOST_ROWS][TABLE_DEPTH];
  for (int r = 0; r < n; r++)
    for (int d = 0; d < depth; d++) s[r][d] = (floats){0};
  for (int64_t j = 0; j < whole; j += PAIR) {
    fetch(w + j * depth * size + AHEAD, PAIR * depth * size);
    for (int d = 0; d < depth; d++) {
      floats a, b;
      load(wide, w + (d * k + j) * size, &a, &b);
      for (int r = 0; r < n; r++) {
        s[r][d] += *(const floats *)(x + r * whole + j) * a;
        s[r][d] += *(const floats *)(x + r * whole + j + LANES) * b;
      }
    }
  }
  for (int r = 0; r < n; r++)
    for (int d = 0; d < depth; d++) {
      float sum = sum_of(s[r][d]);
      for (int64_t j = 0; j < left; j++)
        sum += tail[r * left + j] * number(wide, w, d * k + whole + j);
      y[r * apart + d] = sum;
    }
}

INLINE void table_task(int wide, int n, const float *x, const float *tail, int64_t k,
                       const char *w, int64_t rows, float *y, int64_t apart) {
  const int depth = n <= 2 ? TABLE_DEPTH : 1;
  const int64_t size = wide ? 4 : 2;
  fetch(w, AHEAD);
  int64_t v = 0;
  for (; v + depth <= rows; v += depth)
    table_rows(wide, n, depth, x, tail, k, w + v * k * size, y + v, apart);
  for (; v < rows; v++) table_rows(wide, n, 1, x, tail, k, w + v * k * size, y + v, apart);
}

/* --- attention of the query heads that share a KV head, to the cache of one sequence -------------
 *
 * Position p is at index p modulo `capacity` of the cache; `oldest` is the index of the first token
 * attended to. x: scaled queries in the order of `load`; scratch: `attention_scratch` floats. The
 * softmax is computed online (Milakov and Gimelshein 2018): for each BLOCK of tokens first the
 * scores, then the weighted values, with the sums of earlier blocks rescaled to the new maximum.
 * The values of a block are prefetched into the L2 cache along with its keys. */

/* The index of the i-th token attended to. */
INLINE int64_t cache_index(int64_t oldest, int64_t i, int64_t capacity) {
  return oldest + i < capacity ? oldest + i : oldest + i - capacity;
}

static int64_t attention_scratch(int64_t queries, int64_t width) {
  return queries * (BLOCK + width + LANES);
}

/* The scores of g query heads with a key. */
INLINE void score(int wide, int g, int64_t width, const float *x, const char *key, float *scores) {
  floats s[GROUP], t[GROUP];
  for (int r = 0; r < g; r++) s[r] = t[r] = (floats){0};
  for (int64_t j = 0; j < width; j += PAIR) {
    floats a, b;
    load(wide, key + j * (wide ? 4 : 2), &a, &b);
    for (int r = 0; r < g; r++) {
      s[r] += *(const floats *)(x + r * width + j) * a;
      t[r] += *(const floats *)(x + r * width + j + LANES) * b;
    }
  }
  for (int r = 0; r < g; r++) scores[r * BLOCK] = sum_of(s[r] + t[r]);
}

/* Adds `count` values from token `first` on, by the weights of g query heads, to their sums. */
INLINE void add_values(int wide, int g, int64_t width, const float *weights, const char *values,
                int64_t capacity, int64_t oldest, int64_t first, int64_t count, float *sums) {
  for (int64_t j = 0; j < width; j += PAIR) {
    floats s[GROUP], t[GROUP];
    for (int r = 0; r < g; r++) {
      s[r] = *(const floats *)(sums + r * width + j);
      t[r] = *(const floats *)(sums + r * width + j + LANES);
    }
    for (int64_t i = 0; i < count; i++) {
      const int64_t index = cache_index(oldest, first + i, capacity);
      floats a, b;
      load(wide, values + (index * width + j) * (wide ? 4 : 2), &a, &b);
      for (int r = 0; r < g; r++) {
        s[r] += weights[r * BLOCK + i] * a;
        t[r] += weights[r * BLOCK + i] * b;
      }
    }
    for (int r = 0; r < g; r++) {
      *(floats *)(sums + r * width + j) = s[r];
      *(floats *)(sums + r * width + j + LANES) = t[r];
    }
  }
}

#define BY_GROUP(function, wide, left, ...)               \
  switch (MIN(left, GROUP)) {                             \
    case 1: function(wide, 1, __VA_ARGS__); break;        \
    case 2: function(wide, 2, __VA_ARGS__); break;        \
    case 3: function(wide, 3, __VA_ARGS__); break;        \
    default: function(wide, GROUP, __VA_ARGS__); break;   \
  }

INLINE void attend(int wide, int64_t queries, int64_t width, const float *x, const char *keys,
                   const char *values, int64_t capacity, int64_t oldest, int64_t tokens,
                   float *scratch, char *y) {
  const int64_t size = wide ? 4 : 2;
  float *scores = scratch, *sums = scores + queries * BLOCK, *so_far = sums + queries * width;
  memset(sums, 0, queries * width * sizeof(float));
  for (int64_t r = 0; r < queries; r++) {
    so_far[r * LANES] = -INFINITY; /* largest score */
    so_far[r * LANES + 1] = 0;     /* sum of all weights */
  }
  for (int64_t first = 0; first < tokens; first += BLOCK) {
    const int64_t count = MIN(BLOCK, tokens - first);
    for (int64_t i = 0; i < count; i++) {
      const int64_t index = cache_index(oldest, first + i, capacity);
      const char *key = keys + index * width * size;
      fetch(values + index * width * size, width * size);
      for (int64_t r = 0; r < queries; r += GROUP)
        BY_GROUP(score, wide, queries - r, width, x + r * width, key, scores + r * BLOCK + i)
    }
    for (int64_t r = 0; r < queries; r++) {
      float *row = scores + r * BLOCK, *most = so_far + r * LANES, *weight = most + 1, now = *most;
      for (int64_t i = 0; i < count; i++) now = row[i] > now ? row[i] : now;
      for (int64_t i = count; i % LANES; i++) row[i] = -INFINITY;
      floats total = {0};
      for (int64_t i = 0; i < count; i += LANES) {
        const floats e = exp_of(*(const floats *)(row + i) - now);
        *(floats *)(row + i) = e;
        total += e;
      }
      const float scale = exp_of((floats){0} + (*most - now))[0];
      *weight = *weight * scale + sum_of(total);
      *most = now;
      for (int64_t j = 0; j < width; j += LANES) *(floats *)(sums + r * width + j) *= scale;
    }
    for (int64_t r = 0; r < queries; r += GROUP)
      BY_GROUP(add_values, wide, queries - r, width, scores + r * BLOCK, values, capacity, oldest,
               first, count, sums + r * width)
  }
  for (int64_t r = 0; r < queries; r++)
    for (int64_t j = 0; j < width; j += PAIR) {
      const float *sum = sums + r * width + j, share = 1 / so_far[r * LANES + 1];
      save(wide, *(const floats *)sum * share, *(const floats *)(sum + LANES) * share,
           y + (r * width + j) * size);
    }
}

/* Specializes a task for each number of tokens n and each dtype. */
#define BY_SHAPE(task, ...)                                  \
  switch (n + (wide ? MOST_ROWS : 0)) {                      \
    case 1: task(0, 1, __VA_ARGS__); break;                  \
    case 2: task(0, 2, __VA_ARGS__); break;                  \
    case 3: task(0, 3, __VA_ARGS__); break;                  \
    case 4: task(0, 4, __VA_ARGS__); break;                  \
    case 5: task(0, 5, __VA_ARGS__); break;                  \
    case 6: task(0, 6, __VA_ARGS__); break;                  \
    case 7: task(0, 7, __VA_ARGS__); break;                  \
    case 8: task(0, 8, __VA_ARGS__); break;                  \
    case 9: task(1, 1, __VA_ARGS__); break;                  \
    case 10: task(1, 2, __VA_ARGS__); break;                 \
    case 11: task(1, 3, __VA_ARGS__); break;                 \
    case 12: task(1, 4, __VA_ARGS__); break;                 \
    case 13: task(1, 5, __VA_ARGS__); break;                 \
    case 14: task(1, 6, __VA_ARGS__); break;                 \
    case 15: task(1, 7, __VA_ARGS__); break;                 \
    case 16: task(1, 8, __VA_ARGS__); break;                 \
  }
