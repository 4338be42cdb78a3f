/* Spikes times single-bit weights, dense: AND and popcount. */
#ifndef QSNN_DENSE_H
#define QSNN_DENSE_H
#include "qsnn_events.h"

/* What AND and popcount of one vector costs, in quarters of an addition of one vector of weight bits:
 * measured on layers from 10 to 512 channels (docs/deploy.md says where the two ways cross). */
#if defined(QSNN_AVX512)
#define DENSE_COST 8
#elif defined(__AVX2__)
#define DENSE_COST 5
#else
#define DENSE_COST 6
#endif

static inline int32_t ones_of(const uint32_t *bits, int32_t words) {
    int32_t w, sum = 0;
    for (w = 0; w < words; w++) {
#if defined(__POPCNT__)
        sum += __builtin_popcount(bits[w]);
#else
        uint32_t a = bits[w];
        a = a - ((a >> 1) & 0x55555555u);
        a = (a & 0x33333333u) + ((a >> 2) & 0x33333333u);
        sum += (int32_t)(wrap_mul((a + (a >> 4)) & 0x0f0f0f0fu, 0x01010101u) >> 24);
#endif
    }
    return sum;
}

/* Adds bits [start, start + n) of `from` at bit `at` of `to`, which is zero from there on. */
static inline void append_bits(uint32_t *to, int32_t at, const uint32_t *from, int32_t start,
                               int32_t n) {
    while (n > 0) {
        const int32_t in = start % 32, place = at % 32;
        int32_t take = 32 - (in > place ? in : place);
        uint32_t bits = from[start / 32] >> in;
        if (take > n) take = n;
        if (take < 32) bits &= (1u << take) - 1u;
        to[at / 32] |= bits << place;
        at += take;
        start += take;
        n -= take;
    }
}

/* `cin` inputs of one plane under the kernel, from channel `first` on, side by side in (row, column,
 * channel) order, in `words` words. */
static void patch_of(const context *x, const qsnn_value *src, const qsnn_window *k, int32_t oy,
                     int32_t ox, int32_t first, int32_t cin, int32_t plane, int32_t words,
                     uint32_t *patch) {
    int32_t ky, kx;
    memset(patch, 0, (size_t)words * 4);
    for (ky = 0; ky < k->kh; ky++) {
        const int32_t iy = oy * k->sh - k->top + ky * k->dh;
        if (iy < 0 || iy >= src->height) continue;
        for (kx = 0; kx < k->kw; kx++) {
            const int32_t ix = ox * k->sw - k->left + kx * k->dw;
            if (ix < 0 || ix >= src->width) continue;
            append_bits(patch, (ky * k->kw + kx) * cin,
                        pixel_bits(x, src, iy * src->width + ix) + plane * src->words, first, cin);
        }
    }
}

/* Whether AND and popcount is the faster way to count, given how many inputs are active. Its cost
 * is that of all inputs; an active input costs one vector (joined: per `kw` rows) of additions. */
static int dense_pays(const context *x, const qsnn_events *op, int joined) {
    const qsnn_value *src = value_at(x, op->step.source), *dst = value_at(x, op->step.target);
    const int32_t columns = joined ? op->window.kw : 1;
    const int64_t vectors = (dst->words * columns + VB_WORDS - 1) / VB_WORDS;
    int64_t events, dense;
    if (!op->dense || op->method == QSNN_METHOD_EVENTS) return 0;
    if (op->method == QSNN_METHOD_DENSE) return 1;
    events = vectors * op->window.kh * op->window.kw *
             ones_of(pixel_bits(x, src, 0), src->pixels * src->stride);
    dense = (int64_t)op->dense_rows * ((dst->channels + LANES - 1) / LANES) * src->planes;
    return 4 * events > DENSE_COST * dense * src->pixels * columns;
}

/* Bit planes of the low `depth` bits of `words` * 32 numbers. */
static void line_planes(const int32_t *line, int32_t words, int depth, uint32_t *to,
                        size_t pitch) {
    int32_t w, g;
    int p;
    for (w = 0; w < words; w++)
        for (p = 0; p < depth; p++) {
            const vi one = vi_set((int32_t)(1u << p));
            uint32_t bits = 0;
            for (g = 0; g < 32; g += LANES)
                bits |= vm_bits(vm_test(vi_load(line + w * 32 + g), one)) << g;
            to[(size_t)p * pitch + (size_t)w] = bits;
        }
}

/* Convolution in groups of bits with single-bit weights. */
static void conv_groups(const context *x, const qsnn_groups *op, share rows) {
    const qsnn_value *src = value_at(x, op->step.source), *dst = value_at(x, op->step.target);
    const int32_t n = op->dense_rows;
    uint32_t *patch = x->workspace + op->patch;
    int32_t *count = (int32_t *)(x->workspace + op->counts);
    int32_t oy, ox, g, p, c;
    for (oy = rows.first; oy < rows.end; oy++) {
        for (ox = 0; ox < dst->width; ox++) {
            for (g = 0; g < op->groups; g++) {
                const uint32_t *weight = x->image + op->dense + g * op->dense_pitch;
                int32_t *line = x->line + g * op->cout;
                for (c = 0; c < op->cout; c++) line[c] = 0;
                for (p = 0; p < src->planes; p++) {
                    int32_t active;
                    patch_of(x, src, &op->window, oy, ox, g * op->cin, op->cin, p, n, patch);
                    active = ones_of(patch, n);
                    if (!active) continue;
                    count_dense(weight, patch, n, op->columns, count);
                    for (c = 0; c < op->cout; c++) line[c] += (2 * count[c] - active) * (1 << p);
                }
            }
            line_affine(x, &op->scale, x->line);
            finish(x, &op->step, x->line, oy * dst->width + ox);
        }
    }
}

#endif
