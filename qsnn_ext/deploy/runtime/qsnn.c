/* The executor of integer programs: see qsnn.h, and docs/integer-program.md for what each
 * operation means. One source for all machines: qsnn_vector.h and qsnn_count.h hold what differs.
 *
 * All work is done one output pixel at a time on a "line": the int32 values of all channels of
 * one pixel, padded to a multiple of 32. A convolution turns active inputs into a line of dot
 * products; scale and bias, a residual addition and a neuron may follow while it is in cache. */
#include "qsnn_dense.h"
#include "qsnn_input.h"

#ifdef QSNN_SUFFIX /* several builds of this file in one library */
#define QSNN_JOIN2(a, b) a##b
#define QSNN_JOIN(a, b) QSNN_JOIN2(a, b)
#define qsnn_reset QSNN_JOIN(qsnn_reset, QSNN_SUFFIX)
#define qsnn_run QSNN_JOIN(qsnn_run, QSNN_SUFFIX)
#define qsnn_run_part QSNN_JOIN(qsnn_run_part, QSNN_SUFFIX)
#define qsnn_run_step QSNN_JOIN(qsnn_run_step, QSNN_SUFFIX)
void qsnn_reset(const uint32_t *image, uint32_t *state);
void qsnn_run(const uint32_t *image, uint32_t *state, uint32_t *arena, const int32_t *input,
              int32_t steps, int32_t input_stride, int32_t *output);
void qsnn_run_part(const uint32_t *image, uint32_t *state, uint32_t *arena, const int32_t *input,
                   int32_t steps, int32_t input_stride, int32_t *output, int32_t worker,
                   int32_t workers, void (*wait)(void *), void *waiting);
void qsnn_run_step(const uint32_t *image, uint32_t *state, uint32_t *arena, int32_t *output);
#endif

/* ---- convolution of bits with single-bit weights ----------------------------------------------- */

/* For each output pixel the active inputs are listed, each selects a row of weight bits, and the
 * rows are counted.
 *
 * Active inputs are listed once per input row, in a ring of as many rows as the kernel is high. An
 * entry is a byte offset into the weights, linear in channel and column, so that any output pixel
 * and kernel row finds its weight rows a constant further on.
 *
 * Where rows are short (`joined`), those of the `kw` columns of the kernel lie side by side and are
 * counted together, once per input column; an output pixel is then the sum of `kw` such counts. */
static void conv_events(const context *x, const qsnn_events *op, share rows) {
    const qsnn_value *src = value_at(x, op->step.source), *dst = value_at(x, op->step.target);
    const qsnn_window *win = &op->window;
    const int32_t height = src->height, width = src->width, in_words = src->words;
    const int32_t planes = src->planes, words = dst->words, out = dst->width;
    const int32_t kh = win->kh, kw = win->kw, dh = win->dh, dw = win->dw;
    const int dense = dense_pays(x, op, op->joined && words < VB_WORDS);
    const int joined = op->joined && words < VB_WORDS && !dense;
    const uint32_t pitch = (uint32_t)op->pitch, tap = (uint32_t)op->tap;
    const uint32_t zeros = (uint32_t)op->zeros;
    const int32_t places = joined ? out + dw * (kw - 1) : out, operands = joined ? kw : 1;
    const size_t plane = (size_t)op->counts_pitch, beside = (size_t)op->together_pitch;
    const int32_t deepest = op->deepest;
    const uint8_t *weight = (const uint8_t *)(x->image + op->weight);
    uint32_t *starts = x->workspace + op->starts; /* where the list of each column begins */
    uint32_t *ring = x->workspace + op->ring;
    uint32_t *list = x->workspace + op->list;
    uint32_t *together = x->workspace + op->together;
    uint32_t *counts = x->workspace + op->counts;
    int32_t *active = (int32_t *)(x->workspace + op->active);
    int32_t *slots = (int32_t *)(x->workspace + op->slots);
    int32_t *sums = (int32_t *)(x->workspace + op->sums);
    const int32_t columns = joined ? 1 : kw; /* of the kernel, looked at for each place */
    int32_t next = 0, oy, ox, ky, ix, p, i, k, from_row, until_row;
    int depth[16];
    for (oy = rows.first; oy < rows.end; oy++) {
        const int32_t first = oy * win->sh - win->top, end = first + dh * (kh - 1) + 1;
        for (p = 0; p < planes && dense; p++) {
            uint32_t *to = counts + p * deepest * op->counts_pitch, *patch = list;
            int32_t *count = (int32_t *)(x->workspace + op->dense_counts);
            depth[p] = deepest;
            for (ox = 0; ox < out; ox++) {
                patch_of(x, src, win, oy, ox, 0, src->channels, p, op->dense_rows, patch);
                active[p * op->active_pitch + ox] = ones_of(patch, op->dense_rows);
                count_dense(x->image + op->dense, patch, op->dense_rows, words * 32, count);
                line_planes(count, words, deepest, to + ox * words, plane);
            }
        }
        if (next < first) next = first;
        for (; next < end && next < height && !dense; next++) {
            for (p = 0; p < planes; p++) {
                const int32_t slot = next % op->span * planes + p;
                uint32_t *to = ring + slot * op->ring_pitch, n = 0;
                uint32_t *start = starts + slot * op->starts_pitch;
                for (ix = 0; ix < width; ix++) {
                    const uint32_t *bits = pixel_bits(x, src, next * width + ix) + p * in_words;
                    start[ix] = n;
                    n += list_bits(bits, in_words, pitch, wrap_mul((uint32_t)ix, tap), to + n);
                }
                start[width] = n;
            }
        }
        from_row = first < 0 ? (-first + dh - 1) / dh : 0;
        until_row = from_row;
        for (ky = from_row; ky < kh && first + ky * dh < height; ky++) {
            slots[ky] = (first + ky * dh) % op->span;
            until_row = ky + 1;
        }
        for (p = 0; p < planes && !dense; p++) {
            /* How many are active at each place, and how deep the counts can get. */
            uint32_t *to = counts + p * operands * deepest * op->counts_pitch;
            int32_t most = 0, most_in_row = 0;
            for (i = 0; i < places; i++) {
                const int32_t left = (joined ? i : i * win->sw) - win->left;
                int32_t n = 0;
                for (k = 0; k < columns; k++) {
                    ix = left + k * dw;
                    if (ix < 0 || ix >= width) continue;
                    for (ky = from_row; ky < until_row; ky++) {
                        const uint32_t *start =
                            starts + (slots[ky] * planes + p) * op->starts_pitch;
                        const int32_t m = (int32_t)(start[ix + 1] - start[ix]);
                        n += m;
                        if (m > most_in_row) most_in_row = m;
                    }
                }
                active[p * op->active_pitch + i] = n;
                if (n > most) most = n;
            }
            depth[p] = most < 32 ? 5 : highest_bit((uint32_t)most) + 1;
            for (i = 0; i < places; i++) {
                const int32_t left = (joined ? i : i * win->sw) - win->left;
                const uint32_t base = wrap_sub(0, wrap_mul((uint32_t)left, tap));
                const uint32_t chunk = ((uint32_t)most_in_row + 15u) & ~15u;
                uint32_t *at = list;
                int32_t from = left < 0 ? 0 : left;
                int32_t until = left + columns < width ? left + columns : width;
                for (ky = from_row; ky < until_row; ky++) {
                    const int32_t slot = slots[ky] * planes + p;
                    const uint32_t *have = ring + slot * op->ring_pitch;
                    const uint32_t *start = starts + slot * op->starts_pitch;
                    const uint32_t row = wrap_add(base, (uint32_t)(ky * op->kernel_row));
                    if (columns == 1) {
                        if (from < until)
                            at = append(at, have + start[from], start[until] - start[from], row,
                                        chunk);
                    } else if (dw == 1) {
                        if (from < until) {
                            const uint32_t n = start[until] - start[from];
                            at = append(at, have + start[from], n, row, (n + 15u) & ~15u);
                        }
                    } else {
                        for (k = 0; k < columns; k++) {
                            ix = left + k * dw;
                            if (ix < 0 || ix >= width) continue;
                            at = append(at, have + start[ix], start[ix + 1] - start[ix],
                                        wrap_sub(row, wrap_mul((uint32_t)(k * dw - k), tap)),
                                        chunk);
                        }
                    }
                }
                if (!joined)
                    count_rows(weight, list, (uint32_t)(at - list), zeros, words, depth[p],
                               to + i * words, plane);
                else {
                    count_rows(weight, list, (uint32_t)(at - list), zeros, words * kw, depth[p],
                               together, beside);
                    for (k = 0; k < kw; k++)
                        scatter(to + k * deepest * op->counts_pitch + i * words, plane,
                                together + k * words, beside, words, depth[p]);
                }
            }
        }
        for (ox = 0; ox < out; ox++) {
            int32_t n = 0;
            for (p = 0; p < planes; p++)
                for (k = 0; k < operands; k++)
                    n += active[p * op->active_pitch + ox + k * dw] << p;
            sums[ox] = op->centre - n;
        }
        finish_row(x, op, oy, operands, depth);
    }
}

/* ---- every other convolution: multiply-add of the weight rows of non-zero inputs -------------- */

/* `list`: pairs of row and factor. */
static void rows_int8(const context *x, const qsnn_rows *op, int32_t group, const uint32_t *list,
                      uint32_t n, int32_t *sum) {
    const int8_t *weight = (const int8_t *)(x->image + op->weight);
    const int32_t start = group * op->group_pitch, channels = op->cout;
    int32_t c = 0;
    uint32_t i;
    for (; c + 4 * LANES <= channels; c += 4 * LANES) {
        vi a0 = vi_set(0), a1 = a0, a2 = a0, a3 = a0;
        for (i = 0; i < n; i++) {
            const int32_t row = start + (int32_t)list[2 * i] * op->row_pitch + c;
            vi f = vi_set((int32_t)list[2 * i + 1]);
            a0 = vi_add(a0, vi_mul(vi_load_i8(weight, row), f));
            a1 = vi_add(a1, vi_mul(vi_load_i8(weight, row + LANES), f));
            a2 = vi_add(a2, vi_mul(vi_load_i8(weight, row + 2 * LANES), f));
            a3 = vi_add(a3, vi_mul(vi_load_i8(weight, row + 3 * LANES), f));
        }
        vi_store(sum + c, a0);
        vi_store(sum + c + LANES, a1);
        vi_store(sum + c + 2 * LANES, a2);
        vi_store(sum + c + 3 * LANES, a3);
    }
    for (; c < channels; c += LANES) { /* the last vector may read past the row */
        vi a = vi_set(0);
        for (i = 0; i < n; i++) {
            const int32_t row = start + (int32_t)list[2 * i] * op->row_pitch + c;
            a = vi_add(a, vi_mul(vi_load_i8(weight, row), vi_set((int32_t)list[2 * i + 1])));
        }
        vi_store(sum + c, a);
    }
}

static void rows_binary(const context *x, const qsnn_rows *op, int32_t group, const uint32_t *list,
                        uint32_t n, int32_t *sum) {
    const uint32_t *weight = x->image + op->weight + group * op->group_pitch;
    const int32_t words = op->row_pitch;
    int32_t total = 0, c, w, g;
    uint32_t i;
    for (i = 0; i < n; i++) total += (int32_t)list[2 * i + 1];
    for (c = 0; c < words * 32; c++) sum[c] = -total;
    for (i = 0; i < n; i++) {
        const vi twice = vi_set((int32_t)wrap_mul(list[2 * i + 1], 2));
        const uint32_t *row = weight + (int32_t)list[2 * i] * words;
        for (w = 0; w < words; w++) {
            for (g = 0; g < 32; g += LANES) {
                int32_t *at = sum + w * 32 + g;
                vi_store(at, vi_add_if(vi_load(at), vm_from(row[w] >> g), twice));
            }
        }
    }
}

/* Values of `n` channels from `start` on, of one pixel held as bit planes. */
static void read_channels(const uint32_t *bits, const qsnn_value *v, int32_t start, int32_t n,
                          int32_t *to) {
    int32_t words = v->words, c, p;
    for (c = 0; c < n; c++) {
        int32_t at = start + c, sum = 0;
        for (p = 0; p < v->planes; p++)
            sum |= (int32_t)(bits[p * words + at / 32] >> (at % 32) & 1u) << p;
        to[c] = sum;
    }
}

static void conv_rows(const context *x, const qsnn_rows *op, share rows) {
    const qsnn_value *src = value_at(x, op->step.source), *dst = value_at(x, op->step.target);
    const qsnn_window *at = &op->window;
    const int32_t cin = op->cin;
    uint32_t *list = x->workspace + op->list;
    int32_t *sum = (int32_t *)(x->workspace + op->sums);
    int32_t oy, ox, ky, kx, g, c;
    for (oy = rows.first; oy < rows.end; oy++) {
        for (ox = 0; ox < dst->width; ox++) {
            for (g = 0; g < op->groups; g++) {
                uint32_t n = 0;
                for (ky = 0; ky < at->kh; ky++) {
                    const int32_t iy = oy * at->sh - at->top + ky * at->dh;
                    if (iy < 0 || iy >= src->height) continue;
                    for (kx = 0; kx < at->kw; kx++) {
                        const int32_t ix = ox * at->sw - at->left + kx * at->dw;
                        const int32_t pixel = iy * src->width + ix;
                        const uint32_t row = (uint32_t)((ky * at->kw + kx) * cin);
                        const int32_t *from = x->other;
                        if (ix < 0 || ix >= src->width) continue;
                        if (src->planes == 0)
                            from = pixel_ints(x, src, pixel) + g * cin;
                        else if (op->groups == 1)
                            line_add(x, x->other, src, pixel, 1, 1);
                        else
                            read_channels(pixel_bits(x, src, pixel), src, g * cin, cin, x->other);
                        for (c = 0; c < cin; c++) {
                            list[2 * n] = row + (uint32_t)c;
                            list[2 * n + 1] = (uint32_t)from[c];
                            n += from[c] != 0;
                        }
                    }
                }
                if (op->binary) rows_binary(x, op, g, list, n, sum);
                else rows_int8(x, op, g, list, n, sum);
                memcpy(x->line + g * op->cout, sum, (size_t)op->cout * 4);
            }
            line_affine(x, &op->scale, x->line);
            finish(x, &op->step, x->line, oy * dst->width + ox);
        }
    }
}

/* ---- the other operations --------------------------------------------------------------------- */

static void run_pool(const context *x, const qsnn_pool *op, share rows) {
    const qsnn_value *src = value_at(x, op->step.source), *dst = value_at(x, op->step.target);
    const qsnn_window *at = &op->window;
    const int32_t n = src->words * 32;
    int32_t oy, ox, ky, kx, c;
    for (oy = rows.first; oy < rows.end; oy++) {
        for (ox = 0; ox < dst->width; ox++) {
            int first = 1;
            if (op->function == QSNN_POOL_REPEAT) {
                line_add(x, x->line, src, oy / at->kh * src->width + ox / at->kw, 1, 1);
                line_store(x, x->line, dst, oy * dst->width + ox);
                continue;
            }
            for (ky = 0; ky < at->kh; ky++) {
                for (kx = 0; kx < at->kw; kx++) {
                    const int32_t iy = oy * at->sh - at->top + ky;
                    const int32_t ix = ox * at->sw - at->left + kx;
                    if (iy < 0 || ix < 0 || iy >= src->height || ix >= src->width) continue;
                    if (first || op->function == QSNN_POOL_SUM) {
                        line_add(x, x->line, src, iy * src->width + ix, 1, first);
                    } else {
                        line_add(x, x->other, src, iy * src->width + ix, 1, 1);
                        for (c = 0; c < n; c++)
                            if (x->other[c] > x->line[c]) x->line[c] = x->other[c];
                    }
                    first = 0;
                }
            }
            line_store(x, x->line, dst, oy * dst->width + ox);
        }
    }
}

/* The number in one channel of one pixel. */
static int32_t element(const context *x, const qsnn_value *v, int32_t pixel, int32_t channel) {
    const uint32_t *bits;
    int32_t p, sum = 0;
    if (v->planes == 0) return pixel_ints(x, v, pixel)[channel];
    bits = pixel_bits(x, v, pixel) + channel / 32;
    for (p = 0; p < v->planes; p++)
        sum |= (int32_t)(bits[p * v->words] >> (channel % 32) & 1u) << p;
    return sum;
}

static void run_gather(const context *x, const qsnn_gather *op, share rows) {
    const qsnn_value *src = value_at(x, op->step.source), *dst = value_at(x, op->step.target);
    const int32_t *channel = x->ints + op->channel;
    int32_t oy, ox, c;
    for (oy = rows.first; oy < rows.end; oy++) {
        for (ox = 0; ox < dst->width; ox++) {
            const int32_t row = x->ints[op->row + oy], column = x->ints[op->column + ox];
            const int inside = row >= 0 && column >= 0;
            if (inside && op->in_order) {
                line_add(x, x->line, src, row + column, 1, 1);
            } else {
                memset(x->line, 0, (size_t)dst->words * 32 * 4);
                for (c = 0; c < dst->channels && inside; c++) {
                    const int32_t at = channel[c] + row + column;
                    if (channel[c] >= 0)
                        x->line[c] = element(x, src, at % src->pixels, at / src->pixels);
                }
            }
            line_store(x, x->line, dst, oy * dst->width + ox);
        }
    }
}

static void run_concat(const context *x, const qsnn_concat *op, share rows) {
    const qsnn_value *dst = value_at(x, op->step.target);
    int32_t pixel, k;
    for (pixel = rows.first * dst->width; pixel < rows.end * dst->width; pixel++) {
        int32_t *to = x->line;
        for (k = 0; k < op->count; k++) {
            const qsnn_value *v = value_at(x, x->ints[op->list + k]);
            line_add(x, x->other, v, pixel, 1, 1);
            memcpy(to, x->other, (size_t)v->channels * 4);
            to += v->channels;
        }
        memset(to, 0, (size_t)(dst->words * 32 - dst->channels) * 4);
        line_store(x, x->line, dst, pixel);
    }
}

/* `count` bits from bit `start` on. */
static uint32_t bits_from(const uint32_t *bits, int32_t start, int32_t count) {
    const int32_t word = start / 32, shift = start % 32;
    uint32_t got = bits[word] >> shift;
    if (shift + count > 32) got |= (bits[word + 1] & ((1u << shift) - 1u)) << (32 - shift);
    return count < 32 ? got & ((1u << count) - 1u) : got;
}

/* Coincidences of `n` channels from `start` on of two pixels that hold single bits. */
static int32_t coincidences(const uint32_t *a, const uint32_t *b, int32_t start, int32_t n) {
    int32_t sum = 0, k;
    for (k = 0; k < n; k += 32) {
        const int32_t count = n - k < 32 ? n - k : 32;
        const uint32_t both = bits_from(a, start + k, count) & bits_from(b, start + k, count);
        sum += ones_of(&both, 1);
    }
    return sum;
}

/* Every product is a sum over `inner`; what is 0 on the left is passed over. */
static void run_matmul(const context *x, const qsnn_matmul *op, share rows) {
    const qsnn_value *a = value_at(x, op->step.source), *b = value_at(x, op->second);
    const qsnn_value *dst = value_at(x, op->step.target);
    const int32_t inner = op->inner, columns = op->columns;
    const int32_t across = a->channels / op->heads; /* columns of a head of a */
    const int counted = a->planes == 1 && b->planes == 1 && !op->flip_first && op->flip_second;
    int32_t i, g, k, j;
    for (i = rows.first * dst->width; i < rows.end * dst->width; i++) {
        int32_t *sum = x->line;
        memset(sum, 0, (size_t)dst->words * 32 * 4);
        for (g = 0; g < op->heads; g++, sum += columns) {
            for (j = 0; j < columns && counted; j++)
                sum[j] = coincidences(pixel_bits(x, a, i), pixel_bits(x, b, j), g * inner, inner);
            for (k = 0; k < inner && !counted; k++) {
                const int32_t f = op->flip_first ? element(x, a, k, g * across + i)
                                                 : element(x, a, i, g * across + k);
                if (f == 0) continue;
                if (op->flip_second) {
                    for (j = 0; j < columns; j++) sum[j] += f * element(x, b, j, g * inner + k);
                } else if (b->planes) {
                    read_channels(pixel_bits(x, b, k), b, g * columns, columns, x->other);
                    for (j = 0; j < columns; j++) sum[j] += f * x->other[j];
                } else {
                    const int32_t *from = pixel_ints(x, b, k) + g * columns;
                    for (j = 0; j < columns; j++) sum[j] += f * from[j];
                }
            }
        }
        line_store(x, x->line, dst, i);
    }
}

/* A value of the step before: from the state area at its place, into it at the end of the step. */
static void run_delay(const context *x, const qsnn_delay *op, share rows) {
    const int keeps = op->step.kind == QSNN_KIND_KEEP;
    const qsnn_value *v = value_at(x, keeps ? op->step.source : op->step.target);
    const size_t first = (size_t)rows.first * (size_t)v->width * (size_t)v->stride;
    const size_t end = (size_t)rows.end * (size_t)v->width * (size_t)v->stride;
    uint32_t *kept = x->state + op->state, *here = x->arena + v->offset;
    if (keeps) memcpy(kept + first, here + first, (end - first) * 4);
    else memcpy(here + first, kept + first, (end - first) * 4);
}

/* Operations that look at one pixel. */
static void run_pixels(const context *x, const qsnn_step *step, int32_t from, int32_t until) {
    const qsnn_value *src = value_at(x, step->source), *dst = value_at(x, step->target);
    int32_t i, k;
    for (i = from; i < until; i++) {
        if (step->kind == QSNN_KIND_LOGIC) {
            const qsnn_logic *op = (const qsnn_logic *)(const void *)step;
            const uint32_t *a = pixel_bits(x, src, i);
            const uint32_t *b = pixel_bits(x, value_at(x, op->second), i);
            uint32_t *to = pixel_bits(x, dst, i);
            for (k = 0; k < dst->words; k++)
                to[k] = (op->function == QSNN_LOGIC_AND ? a[k] : ~a[k]) & b[k];
            continue;
        }
        if (step->kind == QSNN_KIND_ADD) {
            const qsnn_add *op = (const qsnn_add *)(const void *)step;
            const int32_t *pair = x->ints + op->list;
            for (k = 0; k < op->count; k++, pair += 2)
                line_add(x, x->line, value_at(x, pair[0]), i, pair[1], k == 0);
        } else {
            line_add(x, x->line, src, i, 1, 1);
            if (step->kind == QSNN_KIND_AFFINE)
                line_affine(x, &((const qsnn_affine *)(const void *)step)->scale, x->line);
        }
        finish(x, step, x->line, i);
    }
}

/* Rows of a value that worker `worker` of `workers` computes. */
static share share_of(const qsnn_value *v, int32_t worker, int32_t workers) {
    share rows;
    rows.first = (int32_t)((int64_t)v->height * worker / workers);
    rows.end = (int32_t)((int64_t)v->height * (worker + 1) / workers);
    return rows;
}

static void run_step(const context *x, const void *record, int32_t worker, int32_t workers) {
    const qsnn_step *step = (const qsnn_step *)record;
    const qsnn_value *dst = value_at(x, step->target);
    const share rows = share_of(dst, worker, workers);
    if (rows.first == rows.end) return;
    switch (step->kind) {
    case QSNN_KIND_EVENTS: conv_events(x, (const qsnn_events *)record, rows); break;
    case QSNN_KIND_CODES: conv_codes(x, (const qsnn_codes *)record, rows); break;
    case QSNN_KIND_GROUPS: conv_groups(x, (const qsnn_groups *)record, rows); break;
    case QSNN_KIND_ROWS: conv_rows(x, (const qsnn_rows *)record, rows); break;
    case QSNN_KIND_POOL: run_pool(x, (const qsnn_pool *)record, rows); break;
    case QSNN_KIND_GATHER: run_gather(x, (const qsnn_gather *)record, rows); break;
    case QSNN_KIND_CONCAT: run_concat(x, (const qsnn_concat *)record, rows); break;
    case QSNN_KIND_MATMUL: run_matmul(x, (const qsnn_matmul *)record, rows); break;
    case QSNN_KIND_DELAY:
    case QSNN_KIND_KEEP: run_delay(x, (const qsnn_delay *)record, rows); break;
    default: run_pixels(x, step, rows.first * dst->width, rows.end * dst->width);
    }
}

/* ---- entry points ----------------------------------------------------------------------------- */

static const qsnn_header *header_of(const uint32_t *image) {
    return (const qsnn_header *)(const void *)image;
}

void qsnn_reset(const uint32_t *image, uint32_t *state) {
    const qsnn_header *h = header_of(image);
    int32_t i, p, k, pixel;
    context x;
    memset(&x, 0, sizeof x);
    x.ints = (const int32_t *)image;
    for (i = 0; i < h->neuron_count; i++) {
        const qsnn_neuron *n = neuron_at(&x, x.ints[h->neurons + i]);
        const qsnn_value *v = value_at(&x, n->spikes);
        for (pixel = 0; pixel < v->pixels; pixel++) {
            uint32_t *at = state + n->state + pixel * n->state_pitch;
            if (n->bits == 32)
                for (k = 0; k < v->channels; k++) at[k] = (uint32_t)n->initial;
            else
                for (p = 0; p < n->state_bits; p++)
                    for (k = 0; k < v->words; k++)
                        *at++ = n->initial >> p & 1 ? 0xffffffffu : 0u;
        }
    }
    for (i = 0; i < h->step_count; i++) {
        const qsnn_delay *op =
            (const qsnn_delay *)(const void *)(x.ints + x.ints[h->steps + i]);
        const qsnn_value *v = value_at(&x, op->step.target);
        if (op->step.kind == QSNN_KIND_DELAY)
            memset(state + op->state, 0, (size_t)v->pixels * (size_t)v->stride * 4);
    }
}

/* [C, H, W] to pixels, and back. */
static void take_input(const context *x, const qsnn_value *v, const int32_t *input, share rows) {
    int32_t c, pixel;
    for (c = 0; c < v->channels; c++, input += v->pixels)
        for (pixel = rows.first * v->width; pixel < rows.end * v->width; pixel++)
            pixel_ints(x, v, pixel)[c] = input[pixel];
}
static void give_output(const context *x, const qsnn_value *v, int32_t *output, share rows) {
    int32_t c, pixel;
    for (pixel = rows.first * v->width; pixel < rows.end * v->width; pixel++) {
        const int32_t *from = pixel_ints(x, v, pixel);
        if (v->planes) {
            line_add(x, x->line, v, pixel, 1, 1);
            from = x->line;
        }
        for (c = 0; c < v->channels; c++) output[c * v->pixels + pixel] = from[c];
    }
}

static void start_context(context *x, const uint32_t *image, uint32_t *state, uint32_t *arena,
                          int32_t worker) {
    const qsnn_header *h = header_of(image);
    x->image = image;
    x->ints = (const int32_t *)image;
    x->state = state;
    x->arena = arena;
    x->workspace = arena + h->workspace + (size_t)worker * (size_t)h->workspace_words;
    x->line = (int32_t *)(x->workspace + h->line);
    x->other = (int32_t *)(x->workspace + h->other);
}

/* The answers of one time step; returns where those of the next one go. */
static int32_t *give_outputs(const context *x, int32_t *output, int32_t worker, int32_t workers) {
    const qsnn_header *h = header_of(x->image);
    int32_t i;
    for (i = 0; i < h->output_count; i++) {
        const qsnn_value *v = value_at(x, x->ints[h->outputs + i]);
        give_output(x, v, output, share_of(v, worker, workers));
        output += v->pixels * v->channels;
    }
    return output;
}

void qsnn_run_part(const uint32_t *image, uint32_t *state, uint32_t *arena, const int32_t *input,
                   int32_t steps, int32_t input_stride, int32_t *output, int32_t worker,
                   int32_t workers, void (*wait)(void *), void *waiting) {
    const qsnn_header *h = header_of(image);
    int32_t t, i;
    context x;
    start_context(&x, image, state, arena, worker);
    for (t = 0; t < steps; t++) {
        const qsnn_value *v = value_at(&x, h->input);
        take_input(&x, v, input, share_of(v, worker, workers));
        input += input_stride;
        if (workers > 1) wait(waiting);
        for (i = 0; i < h->step_count; i++) {
            run_step(&x, x.ints + x.ints[h->steps + i], worker, workers);
            if (workers > 1) wait(waiting);
        }
        output = give_outputs(&x, output, worker, workers);
    }
}

void qsnn_run(const uint32_t *image, uint32_t *state, uint32_t *arena, const int32_t *input,
              int32_t steps, int32_t input_stride, int32_t *output) {
    qsnn_run_part(image, state, arena, input, steps, input_stride, output, 0, 1, 0, 0);
}

void qsnn_run_step(const uint32_t *image, uint32_t *state, uint32_t *arena, int32_t *output) {
    const qsnn_header *h = header_of(image);
    int32_t i;
    context x;
    start_context(&x, image, state, arena, 0);
    for (i = 0; i < h->step_count; i++) run_step(&x, x.ints + x.ints[h->steps + i], 0, 1);
    give_outputs(&x, output, 0, 1);
}

#ifndef QSNN_SUFFIX
int32_t qsnn_layout(void) { return QSNN_LAYOUT; }
#endif
