/* CPU kernels for decoding: products of a few tokens with matrices, and attention of one token to
 * a KV cache; and for training, attention of whole sequences (cpu_flash.h) and the loss (cpu_loss.h).
 *
 * Those for decoding are bound by memory bandwidth. XLA:CPU reads a float32 matrix at half of the
 * bandwidth for one token, and has no bfloat16 product for one token (docs/lab_log.md). Here all
 * threads read a matrix in its memory order, and prefetch the data that comes next into the L2
 * cache. bfloat16 is widened in registers, and sums are float32. The order of summation depends on
 * the shapes alone, not on the number of threads or their timing.
 *
 * This is plain C with the vector extensions of GCC and Clang; cpu.py compiles it for this
 * machine's processor and registers the handlers at the end of this file. cpu_calls.h has the
 * threads. Names of sizes: n tokens (rows of x), k input features (summed over), f output features
 * (columns).
 */

#include "cpu_calls.h"

/* A task of `columns`: one part of the sum over k, for a block of columns. The task that finishes
 * the last part adds them up. */
static void columns_task(Call *call, int64_t task) {
  const int n = call->n, wide = call->wide;
  const Part part = part_of(&call->product, task);
  const int64_t k = call->product.k, columns = part.columns, apart = n * columns;
  float *sums = call->sums + part.block * PARTS * n * call->product.unit;
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

/* A task of `table`: some rows of the table. */
static void rows_task(Call *call, int64_t task) {
  const int n = call->n, wide = call->wide;
  const Part part = part_of(&call->product, task);
  const int64_t k = call->product.k;
  const float *tail = call->x + n * (k / PAIR * PAIR);
  BY_SHAPE(table_task, call->x, tail, k, part.from, part.rows, (float *)call->y[0] + part.row,
           call->product.f[0])
}

/* A task of attention: writes the new key and value of one sequence and KV head into the cache,
 * then attends with the query heads that share it. */
static void queries_task(Call *call, int64_t task) {
  const Attention *a = &call->attention;
  const int64_t size = call->wide ? 4 : 2, row = a->width * size, capacity = a->capacity;
  const int64_t position = a->positions[task / a->heads];
  char *y = a->y + task * a->queries * row;
  if (position < 0) {
    memset(y, 0, a->queries * row);
    return;
  }
  const int64_t tokens = MIN(MIN(position + 1, capacity), a->window), newest = position % capacity;
  const int64_t oldest = (position + 1 - tokens) % capacity;
  char *keys = a->keys + task * capacity * row, *values = a->values + task * capacity * row;
  memcpy(keys + newest * row, a->new_keys + task * row, row);
  memcpy(values + newest * row, a->new_values + task * row, row);
  const float *x = call->x + task * a->queries * a->width;
  float *scratch = call->sums + task * attention_scratch(a->queries, a->width);
  if (call->wide)
    attend(1, a->queries, a->width, x, keys, values, capacity, oldest, tokens, scratch, y);
  else
    attend(0, a->queries, a->width, x, keys, values, capacity, oldest, tokens, scratch, y);
}

/* A task of attention over whole sequences. */
static void sequence_task(Call *call, int64_t task) {
  const Flash *of = &call->flash;
  float *scratch = aligned_alloc(64, flash_scratch(of) * sizeof(float));
  if (!scratch)
    atomic_store(&call->failed, 1);
  else if (call->wide)
    of->dy ? flash_backward(1, of, task, scratch) : flash_forward(1, of, task, scratch);
  else
#ifdef __AVX512BF16__
    of->dy ? flash_backward_bf16(of, task, scratch) : flash_forward_bf16(of, task, scratch);
#else
    of->dy ? flash_backward(0, of, task, scratch) : flash_forward(0, of, task, scratch);
#endif
  free(scratch);
}

/* A task of the loss: one token. */
static void token_task(Call *call, int64_t task) {
  const int64_t vectors = (call->loss.vocab + LANES - 1) / LANES;
  float *exps = aligned_alloc(64, vectors * sizeof(floats));
  if (!exps)
    atomic_store(&call->failed, 1);
  else
    call->wide ? token_loss(1, &call->loss, task, exps) : token_loss(0, &call->loss, task, exps);
  free(exps);
}

/* Reads x [n, k] as float32. If `split`, rows are in the order of `load`, and their last k % PAIR
 * numbers follow after all rows. */
static void read_rows(Call *call, const XLA_FFI_Buffer *x, int64_t k, int split) {
  const int wide = x->dtype == XLA_FFI_DataType_F32;
  const int64_t whole = k / PAIR * PAIR;
  for (int r = 0; r < call->n; r++)
    for (int64_t i = 0; i < k; i++) {
      const float value = number(wide, x->data, r * k + i);
      if (!split)
        call->x[r * k + i] = value;
      else if (i < whole)
        call->x[r * whole + lane(wide, i)] = value;
      else
        call->x[call->n * whole + r * (k - whole) + i - whole] = value;
    }
}

/* y_i [n, f_i]: x [n, k] times each w_i [k, f_i], or times the transpose of one table [f, k]. */
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
  Product *product = &call->product;
  call->task = table ? rows_task : columns_task;
  call->tasks = product->tasks = table ? blocks : blocks * PARTS;
  call->wide = product->wide = x->dtype == XLA_FFI_DataType_F32;
  product->table = table;
  product->k = k;
  product->unit = unit;
  for (int64_t i = 0; i < frame->rets.size; i++) {
    const XLA_FFI_Buffer *w = frame->args.args[1 + i], *y = frame->rets.rets[i];
    product->w[i] = w->data;
    product->f[i] = y->dims[1];
    call->y[i] = y->data;
  }
  read_rows(call, x, k, table);
  remember(product);
  work(frame, call, threads);
  release(call);
  return NULL;
}

/* The value of the attribute with this name, which every call has. */
static const void *attribute(const XLA_FFI_CallFrame *frame, const char *name) {
  int64_t i = 0;
  while (frame->attrs.names[i]->len != strlen(name) ||
         memcmp(frame->attrs.names[i]->ptr, name, strlen(name)))
    i++;
  return ((const XLA_FFI_Scalar *)frame->attrs.attrs[i])->value;
}

/* Attention. Arguments: queries [b, h, c], keys and values [b, k, c] of one token of each sequence;
 * keys and values of the caches [p, b, k, s, c], which are results too; positions [b]; the index of
 * the cache []. Result: y [b, h, c]. */
static XLA_FFI_Error *attention(XLA_FFI_CallFrame *frame) {
  const XLA_FFI_Buffer *const *args = (const XLA_FFI_Buffer *const *)frame->args.args;
  const XLA_FFI_Buffer *const *rets = (const XLA_FFI_Buffer *const *)frame->rets.rets;
  const XLA_FFI_Buffer *x = args[0], *keys = args[3];
  const int64_t b = x->dims[0], h = x->dims[1], c = x->dims[2];
  const int64_t k = keys->dims[2], s = keys->dims[3], threads = threads_of(frame);
  Call *call = new_call(b * h, c, b * k * attention_scratch(h / k, c), 0);
  if (!call) return no_memory(frame);
  call->task = queries_task;
  call->tasks = b * k;
  call->wide = x->dtype == XLA_FFI_DataType_F32;
  const int64_t cache = *(const int32_t *)args[6]->data * b * k * s * c * (call->wide ? 4 : 2);
  call->attention = (Attention){
      .heads = k,
      .queries = h / k,
      .width = c,
      .capacity = s,
      .window = *(const int64_t *)attribute(frame, "window"),
      .positions = args[5]->data,
      .new_keys = args[1]->data,
      .new_values = args[2]->data,
      .keys = (char *)rets[1]->data + cache,
      .values = (char *)rets[2]->data + cache,
      .y = rets[0]->data,
  };
  read_rows(call, x, c, 1);
  const float scale = 1 / sqrtf((float)c);
  for (int64_t i = 0; i < b * h * c; i++) call->x[i] *= scale;
  work(frame, call, threads);
  release(call);
  return NULL;
}

/* Attention of whole sequences. Arguments: q [b, t, h, c], k and v [b, t, k, c], segments [b, t];
 * results: y, the logarithms of the softmax's sums [b, h, t]. For the gradients those two are
 * arguments, and dy; results: dq, dk, dv. */
static XLA_FFI_Error *flash(XLA_FFI_CallFrame *frame, int backward) {
  const XLA_FFI_Buffer *const *args = (const XLA_FFI_Buffer *const *)frame->args.args;
  const XLA_FFI_Buffer *const *rets = (const XLA_FFI_Buffer *const *)frame->rets.rets;
  const XLA_FFI_Buffer *q = args[0], *y = backward ? args[4] : rets[0];
  const int64_t threads = threads_of(frame);
  Call *call = new_call(0, 0, 0, 0);
  if (!call) return no_memory(frame);
  Flash *of = &call->flash;
  *of = (Flash){
      .tokens = q->dims[1],
      .heads = q->dims[2],
      .keys = args[1]->dims[2],
      .width = q->dims[3],
      .window = *(const int64_t *)attribute(frame, "window"),
      .scale = *(const float *)attribute(frame, "scale"),
      .q = q->data,
      .k = args[1]->data,
      .v = args[2]->data,
      .segments = args[3]->data,
      .y = y->data,
      .lse = (backward ? args[5] : rets[1])->data,
  };
  if (backward) {
    of->dy = args[6]->data;
    of->dq = rets[0]->data;
    of->dk = rets[1]->data;
    of->dv = rets[2]->data;
  }
  call->training = 1;
  call->task = sequence_task;
  call->tasks = q->dims[0] * of->keys;
  call->wide = q->dtype == XLA_FFI_DataType_F32;
  work(frame, call, threads);
  const int failed = atomic_load(&call->failed);
  release(call);
  return failed ? no_memory(frame) : NULL;
}

/* Cross-entropy. Arguments: logits [c, v], targets [c], weights [c]; results: the gradients of the
 * logits [c, v], the logarithms of the softmax's sums and the targets' logits [c]. */
static XLA_FFI_Error *loss(XLA_FFI_CallFrame *frame) {
  const XLA_FFI_Buffer *const *args = (const XLA_FFI_Buffer *const *)frame->args.args;
  const XLA_FFI_Buffer *const *rets = (const XLA_FFI_Buffer *const *)frame->rets.rets;
  const int64_t threads = threads_of(frame);
  Call *call = new_call(0, 0, 0, 0);
  if (!call) return no_memory(frame);
  call->loss = (Loss){
      .vocab = args[0]->dims[1],
      .valid = *(const int64_t *)attribute(frame, "valid"),
      .z_loss = *(const float *)attribute(frame, "z_loss"),
      .logits = args[0]->data,
      .targets = args[1]->data,
      .weights = args[2]->data,
      .gradients = rets[0]->data,
      .lse = rets[1]->data,
      .target_logits = rets[2]->data,
  };
  call->training = 1;
  call->task = token_task;
  call->tasks = args[0]->dims[0];
  call->wide = rets[0]->dtype == XLA_FFI_DataType_F32;
  work(frame, call, threads);
  const int failed = atomic_load(&call->failed);
  release(call);
  return failed ? no_memory(frame) : NULL;
}

/* --- handlers -------------------------------------------------------------------------------- */

/* Whether a call only asks for the API version that the handler was compiled for; answers it. */
static int is_version_query(XLA_FFI_CallFrame *frame) {
  if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata)
    return 0;
  XLA_FFI_Metadata *about = ((XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata;
  about->api_version.major_version = XLA_FFI_API_MAJOR;
  about->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

XLA_FFI_Error *gptjax_columns(XLA_FFI_CallFrame *frame) {
  return is_version_query(frame) ? NULL : product(frame, 0);
}

XLA_FFI_Error *gptjax_table(XLA_FFI_CallFrame *frame) {
  return is_version_query(frame) ? NULL : product(frame, 1);
}

XLA_FFI_Error *gptjax_attention(XLA_FFI_CallFrame *frame) {
  return is_version_query(frame) ? NULL : attention(frame);
}

XLA_FFI_Error *gptjax_flash_forward(XLA_FFI_CallFrame *frame) {
  return is_version_query(frame) ? NULL : flash(frame, 0);
}

XLA_FFI_Error *gptjax_flash_backward(XLA_FFI_CallFrame *frame) {
  return is_version_query(frame) ? NULL : flash(frame, 1);
}

XLA_FFI_Error *gptjax_loss(XLA_FFI_CallFrame *frame) {
  return is_version_query(frame) ? NULL : loss(frame);
}
