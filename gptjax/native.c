/* Decoding on a CPU: products of few rows with matrices, and attention of one token to a cache.
 *
 * Both are bound by reading memory. XLA:CPU reads a float32 matrix at half of the memory's speed for
 * one row, and has no bfloat16 product of one row (LOG.md). Here a matrix is read in the order in
 * which it lies, by all threads, what comes next fetched ahead into the second-level cache; bfloat16
 * is widened in registers, and sums are float32. In what order they are summed depends on shapes
 * alone, not on how many threads there are or which of them comes first.
 *
 * Plain C with the vector extensions of GCC and Clang; native.py compiles it for the processor at
 * hand and registers the handlers at the end of this file. Names of sizes: n rows, k summed, f columns.
 */

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#if defined(__x86_64__)
#define PAUSE __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE __asm__ volatile("yield")
#else
#define PAUSE ((void)0)
#endif

typedef float floats __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(2), may_alias));

enum {
  LANES = 16,
  PAIR = 2 * LANES,   /* columns that are read at a time */
  DEPTH = 8,          /* rows of a matrix that are added up in registers */
  TABLE_DEPTH = 4,    /* rows of a table that are summed side by side */
  AHEAD = 8192,       /* bytes between what is fetched and what is used */
  KEYS_AHEAD = 16,    /* as AHEAD, of a cache */
  PARTS = 4,          /* that a sum is cut into */
  MOST_ROWS = 8,      /* n */
  MOST_WEIGHTS = 4,   /* matrices of one call */
  MOST_SUMS = 6144,   /* of a task: they stay in the first-level cache */
  TABLE_UNIT = 1024,  /* rows of a table of a task */
  MOST_THREADS = 64,
  LOOKS = 4096,       /* of an idle helper */
  KNOWN_BITS = 10,
  KNOWN = 1 << KNOWN_BITS, /* products whose successor is known */
  MOST_EARLY = 1 << 18,    /* bytes that are fetched before their product is called for */
};

/* --- numbers ------------------------------------------------------------------------------- */

INLINE float widen(uint16_t half) {
  const uint32_t word = (uint32_t)half << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

/* To the nearest bfloat16, ties to even, in the upper half of each word; a NaN stays one. */
INLINE words rounded(words w) {
  const words nan = (words)((w & 0x7fffffffu) > 0x7f800000u);
  const words near = w + 0x7fffu + (w >> 16 & 1);
  return (nan & (w | 0x400000u)) | (~nan & near);
}

/* PAIR numbers as two vectors: of float32 one after the other, of bfloat16 the even and the odd. */
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

/* Where `load` puts number i of a row. */
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

/* e^v for v <= 0, to 2 units in the last place: 2^n times a polynomial of what is left (Cody and
 * Waite 1980). */
INLINE floats exp_of(floats v) {
  typedef int32_t ints __attribute__((vector_size(64), may_alias));
  const ints small = v < -87.0f;
  v = (floats)((ints)v & ~small);
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
  const ints scale = (__builtin_convertvector(n, ints) + 127) << 23;
  return (floats)((ints)(p * (floats)scale) & ~small);
}

INLINE void put(int wide, char *to, int64_t i, float value) {
  if (wide)
    ((float *)to)[i] = value;
  else
    ((uint16_t *)to)[i] = (uint16_t)(rounded((words)((floats){0} + value))[0] >> 16);
}

/* Asks for `size` bytes that will be read. */
INLINE void fetch(const char *from, int64_t size) {
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* --- a part of a product: x [n, rows] times w [rows, columns], whose rows are `stride` apart ----- */

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

/* For a row or two, memory is fastest read in one stream; for more, arithmetic counts too. */
INLINE void add_part(int wide, int n, const float *x, int64_t k, const char *w, int64_t stride,
                     int64_t rows, int64_t columns, float *sums) {
  const int depth = n <= 2 ? 1 : DEPTH;
  const int64_t size = wide ? 4 : 2;
  fetch(w, AHEAD);
  memset(sums, 0, n * columns * sizeof(float));
  int64_t i = 0;
  for (; i + depth <= rows; i += depth)
    add_rows(wide, n, depth, x + i, k, w + i * stride * size, stride, columns, sums);
  for (; i < rows; i++) add_rows(wide, n, 1, x + i, k, w + i * stride * size, stride, columns, sums);
}

/* One row of a product, from the sums of its parts, which are in the order of `load`. */
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

/* --- one task: x [n, k] times the transpose of w [rows, k]; x as `load` gives it -------------- */

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

/* --- attention of the `queries` that share one head of keys, to the tokens of one row's cache ------
 *
 * Position p lies in slot p modulo `slots`; `age` 0 is the newest. x: queries, scaled, as `load` gives
 * them; scores: [queries, ages rounded up to LANES]. */

INLINE void attend(int wide, int64_t queries, int64_t width, const float *x, const char *keys,
                   const char *values, int64_t slots, int64_t newest, int64_t ages, float *scores,
                   char *y) {
  const int64_t size = wide ? 4 : 2, apart = (ages + LANES - 1) / LANES * LANES;
  for (int64_t age = 0; age < ages; age++) {
    const int64_t slot = newest >= age ? newest - age : newest - age + slots;
    const char *key = keys + slot * width * size;
    fetch(key - KEYS_AHEAD * width * size, width * size);
    fetch(values + slot * width * size, width * size);
    for (int64_t r = 0; r < queries; r++) {
      floats s = {0}, t = {0};
      for (int64_t j = 0; j < width; j += PAIR) {
        floats a, b;
        load(wide, key + j * size, &a, &b);
        s += *(const floats *)(x + r * width + j) * a;
        t += *(const floats *)(x + r * width + j + LANES) * b;
      }
      scores[r * apart + age] = sum_of(s + t);
    }
  }
  for (int64_t r = 0; r < queries; r++) {
    float *row = scores + r * apart, most = row[0];
    for (int64_t age = 1; age < ages; age++) most = row[age] > most ? row[age] : most;
    for (int64_t age = ages; age < apart; age++) row[age] = -1e30f;
    floats total = {0};
    for (int64_t age = 0; age < apart; age += LANES) {
      const floats e = exp_of(*(const floats *)(row + age) - most);
      *(floats *)(row + age) = e;
      total += e;
    }
    const float share = 1 / sum_of(total);
    for (int64_t j = 0; j < width; j += PAIR) {
      floats s = {0}, t = {0};
      for (int64_t age = 0; age < ages; age++) {
        const int64_t slot = newest >= age ? newest - age : newest - age + slots;
        floats a, b;
        load(wide, values + (slot * width + j) * size, &a, &b);
        s += row[age] * a;
        t += row[age] * b;
      }
      save(wide, s * share, t * share, y + (r * width + j) * size);
    }
  }
}

/* Each number of rows, and each format, has code of its own. */
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

/* --- a call: its tasks, and who does them ---------------------------------------------------- */

/* What is read, and how it is cut into tasks. */
typedef struct {
  int table, n, wide;
  int64_t k, tasks;
  const char *w[MOST_WEIGHTS]; /* of attention: the new keys and values */
  int64_t f[MOST_WEIGHTS]; /* of attention: heads of keys, slots */
  int64_t unit; /* columns, rows of the table, or queries, of a task */
} Cut;

typedef struct Call Call;
struct Call {
  Cut cut;
  void (*task)(Call *, int64_t);
  _Atomic uint64_t taken; /* tasks from the front, and in the upper half from the back */
  _Atomic int64_t done;
  atomic_int holders;

  char *y[MOST_WEIGHTS]; /* of attention: its result, keys and values of the cache */
  float *x, *sums; /* rows, and sums of each task */
  int64_t window; /* of attention: the most tokens that are seen */
  const int32_t *positions;
  atomic_int *parts; /* of each block of columns, that are done */
};

/* What a task reads: some rows and columns of one matrix, whose rows are `stride` apart. */
typedef struct {
  const char *from;
  int64_t block, matrix, row, column, rows, columns, stride;
} Part;

static Part part_of(const Cut *cut, int64_t task) {
  Part part = {0};
  if (cut->table) {
    part.row = task * cut->unit;
    part.rows = MIN(cut->unit, cut->f[0] - part.row);
    part.columns = part.stride = cut->k;
  } else {
    const int64_t length = (cut->k + PARTS - 1) / PARTS;
    part.block = task / PARTS;
    part.column = part.block * cut->unit;
    for (; part.column >= cut->f[part.matrix]; part.matrix++)
      part.column -= (cut->f[part.matrix] + cut->unit - 1) / cut->unit * cut->unit;
    part.stride = cut->f[part.matrix];
    part.columns = MIN(cut->unit, part.stride - part.column);
    part.row = MIN(task % PARTS * length, cut->k);
    part.rows = MIN(length, cut->k - part.row);
  }
  const int64_t at = part.row * part.stride + part.column;
  part.from = cut->w[part.matrix] + at * (cut->wide ? 4 : 2);
  return part;
}

/* One of the parts of a block of columns; the last to be done joins them. */
static void some_columns(Call *call, int64_t task) {
  const int n = call->cut.n, wide = call->cut.wide;
  const Part part = part_of(&call->cut, task);
  const int64_t k = call->cut.k, columns = part.columns, apart = n * columns;
  float *sums = call->sums + part.block * PARTS * n * call->cut.unit;
  BY_SHAPE(add_part, call->x + part.row, k, part.from, part.stride, part.rows, columns,
           sums + task % PARTS * apart)
  if (atomic_fetch_add(&call->parts[part.block], 1) < PARTS - 1) return;
  for (int r = 0; r < n; r++) {
    char *y = call->y[part.matrix] + (r * part.stride + part.column) * (wide ? 4 : 2);
    if (wide)
      join(1, sums + r * columns, apart, columns, y);
    else
      join(0, sums + r * columns, apart, columns, y);
  }
}

static void some_of_table(Call *call, int64_t task) {
  const int n = call->cut.n, wide = call->cut.wide;
  const Part part = part_of(&call->cut, task);
  const int64_t k = call->cut.k;
  const float *tail = call->x + n * (k / PAIR * PAIR);
  BY_SHAPE(table_task, call->x, tail, k, part.from, part.rows, (float *)call->y[0] + part.row,
           call->cut.f[0])
}

/* The queries of one row that share a head of keys, once the row's new keys are in the cache. */
static void some_queries(Call *call, int64_t task) {
  const int64_t heads = call->cut.f[0], slots = call->cut.f[1], width = call->cut.k, queries = call->cut.unit;
  const int64_t size = call->cut.wide ? 4 : 2, position = call->positions[task / heads];
  char *y = call->y[0] + task * queries * width * size;
  if (position < 0) {
    memset(y, 0, queries * width * size);
    return;
  }
  const int64_t ages = MIN(MIN(position + 1, slots), call->window), newest = position % slots;
  char *keys = call->y[1] + task * slots * width * size;
  char *values = call->y[2] + task * slots * width * size;
  memcpy(keys + newest * width * size, call->cut.w[0] + task * width * size, width * size);
  memcpy(values + newest * width * size, call->cut.w[1] + task * width * size, width * size);
  const float *x = call->x + task * queries * width;
  float *scores = call->sums + task * queries * ((slots + LANES - 1) / LANES * LANES);
  if (call->cut.wide)
    attend(1, queries, width, x, keys, values, slots, newest, ages, scores, y);
  else
    attend(0, queries, width, x, keys, values, slots, newest, ages, scores, y);
}

static void release(Call *call) {
  if (atomic_fetch_sub(&call->holders, 1) == 1) free(call);
}

static int is_done(Call *call) { return atomic_load(&call->done) >= call->cut.tasks; }

/* From the front or the back, as far as there are; how many others had been taken there before the
 * first of them, or `none`. */
static int64_t do_tasks(Call *call, int back, int64_t none) {
  const uint64_t one = back ? (uint64_t)1 << 32 : 1;
  for (int64_t first = none;;) {
    const uint64_t taken = atomic_fetch_add(&call->taken, one);
    const int64_t before = taken & 0xffffffffu, behind = taken >> 32;
    if (before + behind >= call->cut.tasks) return first;
    if (first == none) first = back ? behind : before;
    call->task(call, back ? call->cut.tasks - 1 - behind : before);
    atomic_fetch_add(&call->done, 1);
  }
}

/* Helpers are threads of the runtime. Waking one takes as long as a small product, so one that has
 * nothing left to do looks out for the next call for a while: `offered` is a call that wants helpers,
 * `places` how many; both are guarded by `door`. */
static atomic_flag door = ATOMIC_FLAG_INIT;
static _Atomic(Call *) offered;
static int64_t places;
static _Atomic int64_t waiting;

/* A step's products come in the same order each time. So who has nothing to do has the memory read
 * that it will probably want next; a wrong guess, even of memory that is gone, costs time alone. */
static struct {
  const char *after; /* the first matrix of the product before */
  Cut cut;
} known[KNOWN];
static const char *latest;

/* After look number `look` in vain: lets others run now and then, who may hold what is waited for. */
static void pause_after(int look) {
  PAUSE;
  if (look % 64 == 63) sched_yield();
}

static void enter(void) {
  for (int look = 0; atomic_flag_test_and_set(&door); look++) pause_after(look);
}

static void leave(void) { atomic_flag_clear(&door); }

static int is_offered(void) { return !!atomic_load_explicit(&offered, memory_order_relaxed); }

/* The offered call, held; NULL if there is none. */
static Call *accept_offer(void) {
  enter();
  Call *call = atomic_load(&offered);
  if (call) {
    atomic_fetch_add(&call->holders, 1);
    if (--places == 0) atomic_store(&offered, NULL);
  }
  leave();
  return call;
}

static int64_t place_of(const char *matrix) {
  return ((uintptr_t)matrix >> 6) * 0x9e3779b97f4a7c15u >> (64 - KNOWN_BITS);
}

static void remember(const Cut *cut) {
  enter();
  const int64_t place = place_of(latest);
  known[place].after = latest;
  known[place].cut = *cut;
  latest = cut->w[0];
  leave();
}

/* The start of a task of the next product, counted from its front or back. */
static Part expected(int back, int64_t number) {
  Part part = {0};
  enter();
  const int64_t place = place_of(latest);
  const Cut *cut = &known[place].cut;
  if (known[place].after == latest && number < cut->tasks) {
    part = part_of(cut, back ? cut->tasks - 1 - number : number);
    part.columns *= cut->wide ? 4 : 2; /* in bytes from here on */
    part.stride *= cut->wide ? 4 : 2;
    part.rows = part.columns ? MIN(part.rows, MOST_EARLY / part.columns) : 0;
  }
  leave();
  return part;
}

static void help(void *data) {
  Call *call = data;
  int64_t number = 0;
  while (call) {
    number = do_tasks(call, 1, number);
    release(call);
    call = NULL;
    atomic_fetch_add(&waiting, 1);
    const Part next = expected(1, number);
    for (int64_t i = 0; i < next.rows && !is_offered(); i++)
      fetch(next.from + i * next.stride, next.columns);
    for (int look = 0; !call && look < LOOKS; look++) {
      pause_after(look);
      if (is_offered()) call = accept_offer();
    }
    atomic_fetch_sub(&waiting, 1);
  }
}

static void forget(XLA_FFI_CallFrame *frame, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args gone = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE,
                                     .error = error};
  frame->api->XLA_FFI_Error_Destroy(&gone);
}

static int64_t threads_of(XLA_FFI_CallFrame *frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args count = {
      .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
      .ctx = frame->ctx,
      .num_threads = &threads};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&count);
  if (error) {
    forget(frame, error);
    return 1;
  }
  return MIN(threads, MOST_THREADS);
}

/* Does all tasks, with the runtime's threads as far as they come in time. */
static void work(XLA_FFI_CallFrame *frame, Call *call, int64_t threads) {
  const int64_t wanted = MIN(threads, call->cut.tasks) - 1;
  int64_t called = 0;
  enter();
  if (wanted > 0 && !atomic_load(&offered)) {
    places = MIN(wanted, atomic_load(&waiting));
    if (places) atomic_store(&offered, call);
    called = places;
  }
  const int mine = called > 0;
  leave();
  XLA_FFI_ThreadPool_Schedule_Args schedule = {
      .struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
      .ctx = frame->ctx,
      .task = help,
      .data = call};
  for (; called < wanted; called++) {
    atomic_fetch_add(&call->holders, 1);
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&schedule);
    if (error) { /* no threads: the caller does it all */
      forget(frame, error);
      release(call);
      break;
    }
  }
  do_tasks(call, 0, 0);
  if (mine) {
    enter();
    if (atomic_load(&offered) == call) atomic_store(&offered, NULL);
    leave();
  }
  if (is_done(call)) return;
  const Part next = expected(0, 0);
  for (int64_t i = 0; i < next.rows && !is_done(call); i++)
    fetch(next.from + i * next.stride, next.columns);
  for (int look = 0; !is_done(call); look++) pause_after(look);
}

/* Rows in float32, whole ones in the order of `load` if `split`, then what is left of each. */
static void read_rows(Call *call, const XLA_FFI_Buffer *x, int split) {
  const int wide = x->dtype == XLA_FFI_DataType_F32;
  const int64_t k = call->cut.k, whole = k / PAIR * PAIR;
  for (int r = 0; r < call->cut.n; r++)
    for (int64_t i = 0; i < k; i++) {
      const float value = number(wide, x->data, r * k + i);
      if (!split)
        call->x[r * k + i] = value;
      else if (i < whole)
        call->x[r * whole + lane(call->cut.wide, i)] = value;
      else
        call->x[call->cut.n * whole + r * (k - whole) + i - whole] = value;
    }
}

/* A call with room behind it for its rows, some sums, and counts of parts; NULL without memory. */
static Call *new_call(int64_t n, int64_t k, int64_t sums, int64_t blocks) {
  const int64_t rows = (n * k + LANES - 1) / LANES * LANES;
  const int64_t size = (rows + sums) * sizeof(float) + blocks * sizeof(atomic_int);
  Call *call = malloc(sizeof(Call) + size + 64);
  if (!call) return NULL;
  memset(call, 0, sizeof *call);
  call->cut.n = (int)n;
  call->cut.k = k;
  call->x = (float *)(((uintptr_t)(call + 1) + 63) / 64 * 64);
  call->sums = call->x + rows;
  call->parts = (atomic_int *)(call->sums + sums);
  for (int64_t i = 0; i < blocks; i++) atomic_init(&call->parts[i], 0);
  atomic_init(&call->holders, 1);
  return call;
}

static XLA_FFI_Error *no_memory(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Error_Create_Args error = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                     .message = "gptjax: no memory for a product of few rows",
                                     .errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return frame->api->XLA_FFI_Error_Create(&error);
}

/* x [n, k] times each w_i [k, f_i], or times the transpose of one table [f, k]; y_i [n, f_i]. */
static XLA_FFI_Error *product(XLA_FFI_CallFrame *frame, int table) {
  const XLA_FFI_Buffer *x = frame->args.args[0];
  const int64_t n = x->dims[0], k = x->dims[1], threads = threads_of(frame);
  const int64_t unit = table ? TABLE_UNIT : MOST_SUMS / n / PAIR * PAIR;
  int64_t blocks = 0;
  for (int64_t i = 0; i < frame->rets.size; i++) {
    const XLA_FFI_Buffer *y = frame->rets.rets[i];
    blocks += (y->dims[1] + unit - 1) / unit;
  }
  Call *call = new_call(n, k, table ? 0 : blocks * PARTS * n * unit, blocks);
  if (!call) return no_memory(frame);
  call->task = table ? some_of_table : some_columns;
  call->cut.tasks = table ? blocks : blocks * PARTS;
  call->cut.unit = unit;
  call->cut.table = table;
  for (int64_t i = 0; i < frame->rets.size; i++) {
    const XLA_FFI_Buffer *w = frame->args.args[1 + i], *y = frame->rets.rets[i];
    call->cut.wide = w->dtype == XLA_FFI_DataType_F32;
    call->cut.w[i] = w->data;
    call->y[i] = y->data;
    call->cut.f[i] = y->dims[1];
  }
  read_rows(call, x, table);
  remember(&call->cut);
  work(frame, call, threads);
  release(call);
  return NULL;
}

/* The number that an attribute of this name has. */
static int64_t attribute(const XLA_FFI_CallFrame *frame, const char *name) {
  for (int64_t i = 0; i < frame->attrs.size; i++) {
    const XLA_FFI_ByteSpan *known = frame->attrs.names[i];
    if (known->len == strlen(name) && !memcmp(known->ptr, name, known->len))
      return *(const int64_t *)((const XLA_FFI_Scalar *)frame->attrs.attrs[i])->value;
  }
  return 0;
}

/* Queries [b, h, c], keys and values [b, k, c] of one token a row, keys and values of the caches
 * [p, b, k, s, c], which are results too, positions [b], and which cache []; y [b, h, c]. */
static XLA_FFI_Error *attention(XLA_FFI_CallFrame *frame) {
  const XLA_FFI_Buffer *const *args = (const XLA_FFI_Buffer *const *)frame->args.args;
  const XLA_FFI_Buffer *x = args[0], *keys = args[3];
  const int64_t b = x->dims[0], h = x->dims[1], c = x->dims[2];
  const int64_t k = keys->dims[2], s = keys->dims[3], threads = threads_of(frame);
  Call *call = new_call(b * h, c, b * h * ((s + LANES - 1) / LANES * LANES), 0);
  if (!call) return no_memory(frame);
  call->task = some_queries;
  call->cut.tasks = b * k;
  call->cut.unit = h / k;
  call->cut.wide = keys->dtype == XLA_FFI_DataType_F32;
  call->cut.f[0] = k;
  call->cut.f[1] = s;
  call->window = attribute(frame, "window");
  call->cut.w[0] = args[1]->data;
  call->cut.w[1] = args[2]->data;
  call->positions = args[5]->data;
  const int64_t cache = *(const int32_t *)args[6]->data * b * k * s * c * (call->cut.wide ? 4 : 2);
  for (int i = 0; i < 3; i++) {
    const XLA_FFI_Buffer *y = frame->rets.rets[i];
    call->y[i] = (char *)y->data + (i ? cache : 0);
  }
  read_rows(call, x, 1);
  const float scale = 1 / sqrtf((float)c);
  for (int64_t i = 0; i < b * h * c; i++) call->x[i] *= scale;
  work(frame, call, threads);
  release(call);
  return NULL;
}

/* --- handlers -------------------------------------------------------------------------------- */

/* XLA asks once for the version that a handler was compiled against. */
static int is_question(XLA_FFI_CallFrame *frame) {
  if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata)
    return 0;
  XLA_FFI_Metadata *about = ((XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata;
  about->api_version.major_version = XLA_FFI_API_MAJOR;
  about->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

XLA_FFI_Error *gptjax_columns(XLA_FFI_CallFrame *frame) {
  return is_question(frame) ? NULL : product(frame, 0);
}

XLA_FFI_Error *gptjax_table(XLA_FFI_CallFrame *frame) {
  return is_question(frame) ? NULL : product(frame, 1);
}

XLA_FFI_Error *gptjax_attention(XLA_FFI_CallFrame *frame) {
  return is_question(frame) ? NULL : attention(frame);
}
