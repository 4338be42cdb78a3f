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
        sum += (int32_t)((((a + (a >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
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

/* The inputs of one group and plane under the kernel, side by side in (row, column, channel) order. */
static void patch_of(const context *x, const int32_t *op, int32_t oy, int32_t ox, int32_t group,
                     int32_t plane, uint32_t *patch) {
    const int32_t *src = value_of(x, op[F_SOURCE]);
    const int32_t cin = src[V_CHANNELS] / op[F_GROUPS], kw = op[F_KW], words = words_of(src);
    int32_t ky, kx;
    memset(patch, 0, (size_t)op[F_DENSE_ROWS] * 4);
    for (ky = 0; ky < op[F_KH]; ky++) {
        const int32_t iy = oy * op[F_SH] - op[F_TOP] + ky * op[F_DH];
        if (iy < 0 || iy >= src[V_HEIGHT]) continue;
        for (kx = 0; kx < kw; kx++) {
            const int32_t ix = ox * op[F_SW] - op[F_LEFT] + kx * op[F_DW];
            if (ix < 0 || ix >= src[V_WIDTH]) continue;
            append_bits(patch, (ky * kw + kx) * cin,
                        pixel_bits(x, src, iy * src[V_WIDTH] + ix) + plane * words, group * cin,
                        cin);
        }
    }
}

/* Whether AND and popcount is the faster way to count, given how many inputs are active. Its cost
 * is that of all inputs; an active input costs one vector (joined: per `kw` rows) of additions. */
static int dense_pays(const context *x, const int32_t *op, int joined) {
    const int32_t *src = value_of(x, op[F_SOURCE]), *dst = value_of(x, op[F_TARGET]);
    const int32_t pixels = src[V_HEIGHT] * src[V_WIDTH], columns = joined ? op[F_KW] : 1;
    const int64_t vectors = (op[F_ROW_WORDS] * columns + VB_WORDS - 1) / VB_WORDS;
    int64_t events, dense;
    if (!op[F_DENSE] || op[F_METHOD] == METHOD_EVENTS) return 0;
    if (op[F_METHOD] == METHOD_DENSE) return 1;
    events = vectors * op[F_KH] * op[F_KW] * ones_of(pixel_bits(x, src, 0), pixels * src[V_STRIDE]);
    dense = (int64_t)op[F_DENSE_ROWS] * ((dst[V_CHANNELS] + LANES - 1) / LANES) * src[V_PLANES];
    return 4 * events > DENSE_COST * dense * pixels * columns;
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
static void conv_groups(const context *x, const int32_t *op) {
    const int32_t *src = value_of(x, op[F_SOURCE]), *dst = value_of(x, op[F_TARGET]);
    const int32_t groups = op[F_GROUPS], cout = dst[V_CHANNELS] / groups, n = op[F_DENSE_ROWS];
    const int32_t columns = (cout + 15) / 16 * 16;
    const uint32_t *weight = x->image + op[F_DENSE];
    uint32_t *patch = x->scratch;
    int32_t *count = (int32_t *)(patch + n);
    int32_t oy, ox, g, p, c;
    for (oy = 0; oy < dst[V_HEIGHT]; oy++) {
        for (ox = 0; ox < dst[V_WIDTH]; ox++) {
            for (g = 0; g < groups; g++) {
                int32_t *line = x->line + g * cout;
                for (c = 0; c < cout; c++) line[c] = 0;
                for (p = 0; p < src[V_PLANES]; p++) {
                    int32_t active;
                    patch_of(x, op, oy, ox, g, p, patch);
                    active = ones_of(patch, n);
                    if (!active) continue;
                    count_dense(weight + (size_t)g * (size_t)n * (size_t)columns, patch, n,
                                columns, count);
                    for (c = 0; c < cout; c++) line[c] += (2 * count[c] - active) * (1 << p);
                }
            }
            line_affine(x, op, x->line, words_of(dst));
            finish(x, op, x->line, oy * dst[V_WIDTH] + ox);
        }
    }
}

#endif
