/* Calls and their tasks, and the threads that run them.
 *
 * A call is cut into tasks. The caller takes tasks from the front, helper threads from the back, so
 * that an idle thread can predict which part of the next matrix it will read, and prefetch it. */

#pragma once

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "cpu_flash.h"
#include "cpu_flash_bf16.h"
#include "cpu_kernels.h"
#include "cpu_loss.h"
#include "xla/ffi/api/c_api.h"

#if defined(__x86_64__)
#define PAUSE __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE __asm__ volatile("yield")
#else
#define PAUSE ((void)0)
#endif

enum {
  MOST_WEIGHTS = 4,  /* matrices in one call */
  MOST_SUMS = 6144,  /* sums of a task, so that they stay in the L1 cache */
  TABLE_UNIT = 1024, /* rows of a table in a task */
  MOST_THREADS = 64,
  LOOKS = 4096, /* polls of an idle helper before it ends */
  KNOWN_BITS = 10,
  KNOWN = 1 << KNOWN_BITS, /* entries in the table of each product's successor */
  MOST_EARLY = 1 << 18,    /* bytes prefetched before their product is called */
};

/* --- calls and tasks -------------------------------------------------------------------------- */

/* The matrices of a product, and how the product is cut into tasks. */
typedef struct {
  int table, wide;
  int64_t k, tasks;
  int64_t unit; /* columns, or rows of the table, in a task */
  const char *w[MOST_WEIGHTS];
  int64_t f[MOST_WEIGHTS];
} Product;

/* Attention; a task is the query heads of one sequence that share a key-value head. */
typedef struct {
  int64_t heads, queries, width, capacity; /* KV heads, query heads of each, head_dim, cache size */
  int64_t window;                          /* most tokens that are attended to */
  const int32_t *positions;
  const char *new_keys, *new_values;
  char *keys, *values, *y;
} Attention;

typedef struct Call Call;
struct Call {
  void (*task)(Call *, int64_t);
  int64_t tasks;
  /* Number of tasks taken from the front, and in the upper 32 bits from the back. Each claim adds
   * one to either, and is valid if their sum was below `tasks`: so no task is taken twice. */
  _Atomic uint64_t taken;
  _Atomic int64_t done;
  atomic_int holders;

  int n, wide;
  Product product;
  Attention attention;
  Flash flash;
  Loss loss;
  int training; /* the next call is far away */
  atomic_int failed; /* a task had no memory */
  char *y[MOST_WEIGHTS];
  float *x, *sums;   /* x in float32, and the sums of each task */
  atomic_int *parts; /* finished parts of each block of columns */
};

/* The part of one matrix that a task reads; the matrix's rows are `stride` numbers apart. */
typedef struct {
  const char *from;
  int64_t block, matrix, row, column, rows, columns, stride;
} Part;

static Part part_of(const Product *of, int64_t task) {
  Part part = {0};
  if (of->table) {
    part.row = task * of->unit;
    part.rows = MIN(of->unit, of->f[0] - part.row);
    part.columns = part.stride = of->k;
  } else {
    const int64_t length = (of->k + PARTS - 1) / PARTS;
    part.block = task / PARTS;
    part.column = part.block * of->unit;
    for (; part.column >= of->f[part.matrix]; part.matrix++)
      part.column -= (of->f[part.matrix] + of->unit - 1) / of->unit * of->unit;
    part.stride = of->f[part.matrix];
    part.columns = MIN(of->unit, part.stride - part.column);
    part.row = MIN(task % PARTS * length, of->k);
    part.rows = MIN(length, of->k - part.row);
  }
  const int64_t at = part.row * part.stride + part.column;
  part.from = of->w[part.matrix] + at * (of->wide ? 4 : 2);
  return part;
}

/* --- threads ---------------------------------------------------------------------------------- */

static void release(Call *call) {
  if (atomic_fetch_sub(&call->holders, 1) == 1) free(call);
}

static int is_done(Call *call) { return atomic_load(&call->done) >= call->tasks; }

/* Runs tasks from the front or the back until none is left. Returns the index, counted from that
 * end, of the first task run, or `none`. */
static int64_t do_tasks(Call *call, int back, int64_t none) {
  const uint64_t one = back ? (uint64_t)1 << 32 : 1;
  int64_t first = none;
  for (int mine = 0;; mine++) {
    const uint64_t taken = atomic_fetch_add(&call->taken, one);
    const int64_t before = taken & 0xffffffffu, behind = taken >> 32;
    if (before + behind >= call->tasks) return first;
    if (!mine) first = back ? behind : before;
    call->task(call, back ? call->tasks - 1 - behind : before);
    atomic_fetch_add(&call->done, 1);
  }
}

/* Helpers are threads of the runtime. Waking one takes as long as a small product, so a helper
 * without tasks polls for the next call for a while. `offered` is a call that wants helpers,
 * `places` the number that it wants; the spin lock `door` guards both, and the table below. */
static atomic_flag door = ATOMIC_FLAG_INIT;
static _Atomic(Call *) offered;
static int64_t places;
static _Atomic int64_t waiting;

/* The products of a decode step come in the same order each time, so an idle thread prefetches the
 * memory that it will probably read next. A wrong prediction, even of freed memory, only costs
 * time. */
static struct {
  const char *after; /* first matrix of the preceding product */
  Product product;
} known[KNOWN];
static const char *latest;

/* Pauses after poll number `look`; yields now and then to threads that may hold the lock. */
static void pause_after(int look) {
  PAUSE;
  if (look % 64 == 63) sched_yield();
}

static void enter(void) {
  for (int look = 0; atomic_flag_test_and_set(&door); look++) pause_after(look);
}

static void leave(void) { atomic_flag_clear(&door); }

static int is_offered(void) { return !!atomic_load_explicit(&offered, memory_order_relaxed); }

/* The offered call, with a reference to it; NULL if there is none. */
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

/* The index of a matrix in the table of successors. */
static int64_t index_of(const char *matrix) {
  return ((uintptr_t)matrix >> 6) * 0x9e3779b97f4a7c15u >> (64 - KNOWN_BITS);
}

/* Records that this product follows the latest one. */
static void remember(const Product *product) {
  enter();
  const int64_t index = index_of(latest);
  known[index].after = latest;
  known[index].product = *product;
  latest = product->w[0];
  leave();
}

/* Prefetches the beginning of task `number`, from the front or back, of the predicted next product,
 * until `call` is done, or if it is NULL until a call is offered. */
static void look_ahead(Call *call, int back, int64_t number) {
  Part part = {0};
  enter();
  const int64_t index = index_of(latest);
  const Product *next = &known[index].product;
  const int64_t size = next->wide ? 4 : 2;
  if (known[index].after == latest && number < next->tasks)
    part = part_of(next, back ? next->tasks - 1 - number : number);
  leave();
  const int64_t row = part.columns * size, rows = row ? MIN(part.rows, MOST_EARLY / row) : 0;
  for (int64_t i = 0; i < rows && !(call ? is_done(call) : is_offered()); i++)
    fetch(part.from + i * part.stride * size, row);
}

/* A helper thread: runs tasks of a call, then polls for the next. */
static void help(void *data) {
  Call *call = data;
  int64_t mine = 0;
  while (call) {
    mine = do_tasks(call, 1, mine);
    const int training = call->training;
    release(call);
    if (training) return;
    call = NULL;
    atomic_fetch_add(&waiting, 1);
    look_ahead(NULL, 1, mine);
    for (int look = 0; !call && look < LOOKS; look++) {
      pause_after(look);
      if (is_offered()) call = accept_offer();
    }
    atomic_fetch_sub(&waiting, 1);
  }
}

static void destroy_error(XLA_FFI_CallFrame *frame, XLA_FFI_Error *error) {
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
    destroy_error(frame, error);
    return 1;
  }
  return MIN(threads, MOST_THREADS);
}

/* Runs all tasks of a call, with helpers as far as they come in time. */
static void work(XLA_FFI_CallFrame *frame, Call *call, int64_t threads) {
  const int64_t wanted = MIN(threads, call->tasks) - 1;
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
    if (error) { /* no helper: the caller runs all tasks */
      destroy_error(frame, error);
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
  look_ahead(call, 0, 0);
  for (int look = 0; !is_done(call); look++) pause_after(look);
}

/* A call, allocated together with its x, sums and part counters; NULL if out of memory. */
static Call *new_call(int64_t n, int64_t k, int64_t sums, int64_t blocks) {
  const int64_t rows = (n * k + LANES - 1) / LANES * LANES;
  const int64_t size = (rows + sums) * sizeof(float) + blocks * sizeof(atomic_int);
  Call *call = malloc(sizeof(Call) + size + 64);
  if (!call) return NULL;
  memset(call, 0, sizeof *call);
  call->n = (int)n;
  call->x = (float *)(((uintptr_t)(call + 1) + 63) / 64 * 64);
  call->sums = call->x + rows;
  call->parts = (atomic_int *)(call->sums + sums);
  for (int64_t i = 0; i < blocks; i++) atomic_init(&call->parts[i], 0);
  atomic_init(&call->holders, 1);
  return call;
}

static XLA_FFI_Error *no_memory(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Error_Create_Args error = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                     .message = "gptjax: out of memory in a CPU kernel",
                                     .errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return frame->api->XLA_FFI_Error_Create(&error);
}
