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
void qsnn_reset(const uint32_t *image, uint32_t *state);
void qsnn_run(const uint32_t *image, uint32_t *state, uint32_t *arena, const int32_t *input,
              int32_t steps, int32_t input_stride, int32_t *output);
#endif

/* ---- convolution of bits with single-bit weights ----------------------------------------------- */

/* For each output pixel the active inputs are listed, each selects a row of weight bits, and the
 * rows are counted.
 *
 * Active inputs are listed once per input row, in a ring of as many rows as the kernel is high. An
 * entry is a byte offset into the weights, linear in channel and column, so that any output pixel
 * and kernel row finds its weight rows a constant further on.
 *
 * Where rows are short (F_JOINED), those of the `kw` columns of the kernel lie side by side and are
 * counted together, once per input column; an output pixel is then the sum of `kw` such counts. */
static void conv_bits(const context *x, const int32_t *op) {
    const int32_t *src = value_of(x, op[F_SOURCE]), *dst = value_of(x, op[F_TARGET]);
    const int32_t cin = src[V_CHANNELS], height = src[V_HEIGHT], width = src[V_WIDTH];
    const int32_t in_words = words_of(src), planes = src[V_PLANES], words = op[F_ROW_WORDS];
    const int32_t kh = op[F_KH], kw = op[F_KW], dh = op[F_DH], dw = op[F_DW], out = dst[V_WIDTH];
    const int32_t span = dh * (kh - 1) + 1 < height ? dh * (kh - 1) + 1 : height;
    const int dense = dense_pays(x, op, op[F_JOINED] && words < VB_WORDS);
    const int joined = op[F_JOINED] && words < VB_WORDS && !dense;
    const uint32_t pitch = (uint32_t)op[F_PITCH] * 4u; /* bytes from one input channel to the next */
    const uint32_t tap = op[F_JOINED] ? (uint32_t)words * 4u : (uint32_t)cin * pitch;
    const uint32_t line_of_taps = (uint32_t)(op[F_JOINED] ? 1 : kw) * (uint32_t)cin * pitch;
    const uint32_t zero = (uint32_t)kh * line_of_taps; /* a row of zeros ends the weights */
    const size_t capacity = (size_t)width * (size_t)in_words * 32u + 16u;
    const int32_t places = joined ? out + dw * (kw - 1) : out, operands = joined ? kw : 1;
    const size_t plane = (size_t)places * (size_t)words + 16u;
    const int deepest = op[F_DEPTH] < 5 ? 5 : op[F_DEPTH];
    const uint8_t *rows = (const uint8_t *)(x->image + op[F_WEIGHT]);
    uint32_t *starts = x->scratch; /* where the list of each column begins in its row */
    uint32_t *ring = starts + (size_t)(span * planes) * (size_t)(width + 1);
    uint32_t *list = ring + (size_t)(span * planes) * capacity;
    const int32_t listed = op[F_LIST_COUNT] + 32, patched = op[F_DENSE_ROWS] + words * 32;
    uint32_t *together = list + (listed > patched ? listed : patched);
    const size_t together_pitch = (size_t)((words * kw + 15) & ~15);
    uint32_t *counts = together + (joined ? (size_t)deepest * together_pitch : 0);
    int32_t *active = (int32_t *)(counts + (size_t)(planes * operands * deepest) * plane);
    int32_t *slots = active + planes * places;
    int32_t *sums = slots + kh;
    const int32_t columns = joined ? 1 : kw; /* of the kernel, looked at for each place */
    int32_t next = 0, oy, ox, ky, ix, p, i, k, from_row, until_row;
    int depth[16];
    for (oy = 0; oy < dst[V_HEIGHT]; oy++) {
        const int32_t first = oy * op[F_SH] - op[F_TOP], end = first + dh * (kh - 1) + 1;
        for (p = 0; p < planes && dense; p++) {
            uint32_t *to = counts + (size_t)(p * deepest) * plane, *patch = list;
            int32_t *count = (int32_t *)(patch + op[F_DENSE_ROWS]);
            depth[p] = deepest;
            for (ox = 0; ox < out; ox++) {
                patch_of(x, op, oy, ox, 0, p, patch);
                active[p * places + ox] = ones_of(patch, op[F_DENSE_ROWS]);
                count_dense(x->image + op[F_DENSE], patch, op[F_DENSE_ROWS], words * 32, count);
                line_planes(count, words, deepest, to + ox * words, plane);
            }
        }
        if (next < first) next = first;
        for (; next < end && next < height && !dense; next++) {
            for (p = 0; p < planes; p++) {
                const int32_t slot = next % span * planes + p;
                uint32_t *to = ring + (size_t)slot * capacity, n = 0;
                uint32_t *start = starts + slot * (width + 1);
                for (ix = 0; ix < width; ix++) {
                    const uint32_t *bits = pixel_bits(x, src, next * width + ix) + p * in_words;
                    start[ix] = n;
                    n += list_bits(bits, in_words, pitch, (uint32_t)ix * tap, to + n);
                }
                start[width] = n;
            }
        }
        from_row = first < 0 ? (-first + dh - 1) / dh : 0;
        until_row = from_row;
        for (ky = from_row; ky < kh && first + ky * dh < height; ky++) {
            slots[ky] = (first + ky * dh) % span;
            until_row = ky + 1;
        }
        for (p = 0; p < planes && !dense; p++) {
            /* How many are active at each place, and how deep the counts can get. */
            uint32_t *to = counts + (size_t)(p * operands * deepest) * plane;
            int32_t most = 0, most_in_row = 0;
            for (i = 0; i < places; i++) {
                const int32_t left = (joined ? i : i * op[F_SW]) - op[F_LEFT];
                int32_t n = 0;
                for (k = 0; k < columns; k++) {
                    ix = left + k * dw;
                    if (ix < 0 || ix >= width) continue;
                    for (ky = from_row; ky < until_row; ky++) {
                        const uint32_t *start = starts + (slots[ky] * planes + p) * (width + 1);
                        const int32_t m = (int32_t)(start[ix + 1] - start[ix]);
                        n += m;
                        if (m > most_in_row) most_in_row = m;
                    }
                }
                active[p * places + i] = n;
                if (n > most) most = n;
            }
            depth[p] = most < 32 ? 5 : highest_bit((uint32_t)most) + 1;
            for (i = 0; i < places; i++) {
                const int32_t left = (joined ? i : i * op[F_SW]) - op[F_LEFT];
                const uint32_t base = 0u - (uint32_t)left * tap;
                const uint32_t chunk = ((uint32_t)most_in_row + 15u) & ~15u;
                uint32_t *at = list;
                int32_t from = left < 0 ? 0 : left;
                int32_t until = left + columns < width ? left + columns : width;
                for (ky = from_row; ky < until_row; ky++) {
                    const int32_t slot = slots[ky] * planes + p;
                    const uint32_t *have = ring + (size_t)slot * capacity;
                    const uint32_t *start = starts + slot * (width + 1);
                    const uint32_t row = base + (uint32_t)ky * line_of_taps;
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
                                        row - (uint32_t)(k * dw - k) * tap, chunk);
                        }
                    }
                }
                if (!joined)
                    count_rows(rows, list, (uint32_t)(at - list), zero, words, depth[p],
                               to + i * words, plane);
                else {
                    count_rows(rows, list, (uint32_t)(at - list), zero, words * kw, depth[p],
                               together, together_pitch);
                    for (k = 0; k < kw; k++)
                        scatter(to + (size_t)(k * deepest) * plane + i * words, plane,
                                together + k * words, together_pitch, words, depth[p]);
                }
            }
        }
        for (ox = 0; ox < out; ox++) {
            int32_t n = 0;
            for (p = 0; p < planes; p++)
                for (k = 0; k < operands; k++) n += active[p * places + ox + k * dw] << p;
            sums[ox] = op[F_CENTRE] - n;
        }
        finish_row(x, op, oy, counts, plane, operands, depth, sums);
    }
}

/* ---- every other convolution: multiply-add of the weight rows of non-zero inputs -------------- */

static void rows_int8(const context *x, const int32_t *op, int32_t group, const uint32_t *list,
                      uint32_t n, int32_t *sum, int32_t channels) {
    const int32_t pitch = op[F_ROW_WORDS] * 4;
    const int8_t *rows = (const int8_t *)(x->image + op[F_WEIGHT]);
    int32_t c;
    uint32_t i;
    rows += (size_t)group * (size_t)(op[F_LIST_COUNT]) * (size_t)pitch;
    for (c = 0; c < channels; c += 4 * LANES) { /* rows are padded to 64 channels */
        vi a0 = vi_set(0), a1 = a0, a2 = a0, a3 = a0;
        for (i = 0; i < n; i++) {
            const int8_t *row = rows + (size_t)list[2 * i] * (size_t)pitch + c;
            vi f = vi_set((int32_t)list[2 * i + 1]);
            a0 = vi_add(a0, vi_mul(vi_load_i8(row), f));
            a1 = vi_add(a1, vi_mul(vi_load_i8(row + LANES), f));
            a2 = vi_add(a2, vi_mul(vi_load_i8(row + 2 * LANES), f));
            a3 = vi_add(a3, vi_mul(vi_load_i8(row + 3 * LANES), f));
        }
        vi_store(sum + c, a0);
        vi_store(sum + c + LANES, a1);
        vi_store(sum + c + 2 * LANES, a2);
        vi_store(sum + c + 3 * LANES, a3);
    }
}

static void rows_binary(const context *x, const int32_t *op, int32_t group, const uint32_t *list,
                        uint32_t n, int32_t *sum, int32_t channels) {
    const int32_t words = op[F_ROW_WORDS];
    const uint32_t *rows = x->image + op[F_WEIGHT] +
                           (size_t)group * (size_t)op[F_LIST_COUNT] * (size_t)words;
    int32_t total = 0, c, w, g;
    uint32_t i;
    for (i = 0; i < n; i++) total += (int32_t)list[2 * i + 1];
    for (c = 0; c < (channels + 31) / 32 * 32; c++) sum[c] = -total;
    for (i = 0; i < n; i++) {
        vi twice = vi_set((int32_t)(list[2 * i + 1] << 1));
        for (w = 0; w < words; w++) {
            uint32_t bits = rows[(size_t)list[2 * i] * (size_t)words + w];
            for (g = 0; g < 32; g += LANES) {
                int32_t *at = sum + w * 32 + g;
                vi_store(at, vi_add_if(vi_load(at), vm_from(bits >> g), twice));
            }
        }
    }
}

/* Values of `n` channels from `start` on, of one pixel held as bit planes. */
static void read_channels(const uint32_t *bits, const int32_t *v, int32_t start, int32_t n,
                          int32_t *to) {
    int32_t words = words_of(v), c, p;
    for (c = 0; c < n; c++) {
        int32_t at = start + c, sum = 0;
        for (p = 0; p < v[V_PLANES]; p++)
            sum |= (int32_t)(bits[p * words + at / 32] >> (at % 32) & 1u) << p;
        to[c] = sum;
    }
}

static void conv_general(const context *x, const int32_t *op) {
    const int32_t *src = value_of(x, op[F_SOURCE]), *dst = value_of(x, op[F_TARGET]);
    const int32_t groups = op[F_GROUPS], cin = src[V_CHANNELS] / groups;
    const int32_t cout = dst[V_CHANNELS] / groups, kw = op[F_KW];
    uint32_t *list = x->scratch;
    int32_t *sum = (int32_t *)(list + 2 * (size_t)op[F_LIST_COUNT]);
    int32_t oy, ox, ky, kx, g, c;
    for (oy = 0; oy < dst[V_HEIGHT]; oy++) {
        for (ox = 0; ox < dst[V_WIDTH]; ox++) {
            for (g = 0; g < groups; g++) {
                uint32_t n = 0;
                for (ky = 0; ky < op[F_KH]; ky++) {
                    int32_t iy = oy * op[F_SH] - op[F_TOP] + ky * op[F_DH];
                    if (iy < 0 || iy >= src[V_HEIGHT]) continue;
                    for (kx = 0; kx < kw; kx++) {
                        int32_t ix = ox * op[F_SW] - op[F_LEFT] + kx * op[F_DW];
                        int32_t pixel = iy * src[V_WIDTH] + ix;
                        uint32_t row = (uint32_t)((ky * kw + kx) * cin);
                        const int32_t *from = x->other;
                        if (ix < 0 || ix >= src[V_WIDTH]) continue;
                        if (src[V_PLANES] == 0)
                            from = pixel_ints(x, src, pixel) + g * cin;
                        else if (groups == 1)
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
                if (op[F_BINARY]) rows_binary(x, op, g, list, n, sum, cout);
                else rows_int8(x, op, g, list, n, sum, cout);
                memcpy(x->line + g * cout, sum, (size_t)cout * 4);
            }
            line_affine(x, op, x->line, words_of(dst));
            finish(x, op, x->line, oy * dst[V_WIDTH] + ox);
        }
    }
}

/* ---- the other operations --------------------------------------------------------------------- */

static void run_pool(const context *x, const int32_t *op) {
    const int32_t *src = value_of(x, op[F_SOURCE]), *dst = value_of(x, op[F_TARGET]);
    const int32_t n = words_of(src) * 32;
    int32_t oy, ox, ky, kx, c;
    for (oy = 0; oy < dst[V_HEIGHT]; oy++) {
        for (ox = 0; ox < dst[V_WIDTH]; ox++) {
            int first = 1;
            if (op[F_FUNCTION] == POOL_REPEAT) {
                line_add(x, x->line, src, oy / op[F_KH] * src[V_WIDTH] + ox / op[F_KW], 1, 1);
                line_store(x, x->line, dst, oy * dst[V_WIDTH] + ox);
                continue;
            }
            for (ky = 0; ky < op[F_KH]; ky++) {
                for (kx = 0; kx < op[F_KW]; kx++) {
                    int32_t iy = oy * op[F_SH] - op[F_TOP] + ky;
                    int32_t ix = ox * op[F_SW] - op[F_LEFT] + kx;
                    if (iy < 0 || ix < 0 || iy >= src[V_HEIGHT] || ix >= src[V_WIDTH]) continue;
                    if (first || op[F_FUNCTION] == POOL_SUM) {
                        line_add(x, x->line, src, iy * src[V_WIDTH] + ix, 1, first);
                    } else {
                        line_add(x, x->other, src, iy * src[V_WIDTH] + ix, 1, 1);
                        for (c = 0; c < n; c++)
                            if (x->other[c] > x->line[c]) x->line[c] = x->other[c];
                    }
                    first = 0;
                }
            }
            line_store(x, x->line, dst, oy * dst[V_WIDTH] + ox);
        }
    }
}

static void run_op(const context *x, const int32_t *op) {
    const int32_t *dst = value_of(x, op[F_TARGET]);
    const int32_t pixels = dst[V_HEIGHT] * dst[V_WIDTH];
    int32_t i, k;
    switch (op[F_TYPE]) {
    case OP_CONV:
        if (op[F_BINARY] && op[F_GROUPS] == 1 && value_of(x, op[F_SOURCE])[V_PLANES])
            conv_bits(x, op);
        else if (op[F_PAIRS])
            conv_codes(x, op);
        else if (op[F_DENSE])
            conv_groups(x, op);
        else
            conv_general(x, op);
        break;
    case OP_AFFINE:
        for (i = 0; i < pixels; i++) {
            line_add(x, x->line, value_of(x, op[F_SOURCE]), i, 1, 1);
            line_affine(x, op, x->line, words_of(dst));
            finish(x, op, x->line, i);
        }
        break;
    case OP_ADD: /* F_LIST: pairs of value and factor */
        for (i = 0; i < pixels; i++) {
            for (k = 0; k < op[F_LIST_COUNT]; k++) {
                const int32_t *pair = x->ints + op[F_LIST] + 2 * k;
                line_add(x, x->line, value_of(x, pair[0]), i, pair[1], k == 0);
            }
            finish(x, op, x->line, i);
        }
        break;
    case OP_LOGIC: {
        const int32_t *pair = x->ints + op[F_LIST];
        for (i = 0; i < pixels; i++) {
            const uint32_t *a = pixel_bits(x, value_of(x, pair[0]), i);
            const uint32_t *b = pixel_bits(x, value_of(x, pair[2]), i);
            uint32_t *to = pixel_bits(x, dst, i);
            for (k = 0; k < words_of(dst); k++)
                to[k] = (op[F_FUNCTION] == LOGIC_AND ? a[k] : ~a[k]) & b[k];
        }
        break;
    }
    case OP_POOL:
        run_pool(x, op);
        break;
    default: /* OP_NEURON */
        for (i = 0; i < pixels; i++) {
            line_add(x, x->line, value_of(x, op[F_SOURCE]), i, 1, 1);
            finish(x, op, x->line, i);
        }
    }
}

/* ---- entry points ----------------------------------------------------------------------------- */

void qsnn_reset(const uint32_t *image, uint32_t *state) {
    const int32_t *ints = (const int32_t *)image;
    int32_t i, p, k;
    for (i = 0; i < ints[QSNN_H_NEURON_COUNT]; i++) {
        const int32_t *n = ints + ints[QSNN_H_NEURONS] + i * N_SIZE;
        const int32_t *v = ints + ints[QSNN_H_VALUES] + n[N_SPIKES] * V_SIZE;
        int32_t words = words_of(v), pixel, pixels = v[V_HEIGHT] * v[V_WIDTH];
        uint32_t *at = state + n[N_STATE];
        if (n[N_BITS] == 32) {
            for (k = 0; k < pixels * v[V_CHANNELS]; k++) at[k] = (uint32_t)n[N_INITIAL];
            continue;
        }
        for (pixel = 0; pixel < pixels; pixel++)
            for (p = 0; p < n[N_STATE_BITS]; p++)
                for (k = 0; k < words; k++) *at++ = n[N_INITIAL] >> p & 1 ? 0xffffffffu : 0u;
    }
}

void qsnn_run(const uint32_t *image, uint32_t *state, uint32_t *arena, const int32_t *input,
              int32_t steps, int32_t input_stride, int32_t *output) {
    context x;
    int32_t t, i, c, pixel;
    x.image = image;
    x.ints = (const int32_t *)image;
    x.state = state;
    x.arena = arena;
    x.line = (int32_t *)(arena + image[QSNN_H_SCRATCH]);
    x.other = x.line + image[QSNN_H_LINE_WORDS];
    x.scratch = (uint32_t *)(x.other + image[QSNN_H_LINE_WORDS]);
    for (t = 0; t < steps; t++) {
        const int32_t *v = value_of(&x, 0);
        const int32_t pixels = v[V_HEIGHT] * v[V_WIDTH];
        for (c = 0; c < v[V_CHANNELS]; c++)
            for (pixel = 0; pixel < pixels; pixel++)
                pixel_ints(&x, v, pixel)[c] = input[c * pixels + pixel];
        input += input_stride;
        for (i = 0; i < x.ints[QSNN_H_OP_COUNT]; i++)
            run_op(&x, x.ints + x.ints[QSNN_H_OPS] + i * F_SIZE);
        for (i = 0; i < x.ints[QSNN_H_OUTPUT_COUNT]; i++) {
            const int32_t *o = value_of(&x, x.ints[x.ints[QSNN_H_OUTPUTS] + i]);
            const int32_t n = o[V_HEIGHT] * o[V_WIDTH];
            for (pixel = 0; pixel < n; pixel++) {
                const int32_t *from = pixel_ints(&x, o, pixel);
                if (o[V_PLANES]) {
                    line_add(&x, x.line, o, pixel, 1, 1);
                    from = x.line;
                }
                for (c = 0; c < o[V_CHANNELS]; c++) output[c * n + pixel] = from[c];
            }
            output += n * o[V_CHANNELS];
        }
    }
}
