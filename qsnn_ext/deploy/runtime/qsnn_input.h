/* The input layer: 16-bit codes times 8-bit weights, multiplied and added in pairs. */
#ifndef QSNN_INPUT_H
#define QSNN_INPUT_H
#include "qsnn_events.h"

/* As fire_strip, for 32 channels of one pixel whose dot products are plain numbers: `at` holds the
 * nine dot products at which each channel steps. */
static inline void fire_word(const context *x, const int32_t *op, int32_t pixel, int32_t word,
                             const vi *dot) {
    const int32_t *n = x->ints + x->ints[QSNN_H_NEURONS] + op[F_NEURON] * N_SIZE;
    const int32_t *v = value_of(x, n[N_SPIKES]), words = words_of(v);
    const int32_t *at = x->ints + op[F_FIRING] + word * 9 * 32;
    const uint32_t *after = x->image + op[F_FIRING] + words * 9 * 32 + word;
    uint32_t *state = x->state + n[N_STATE] + pixel * 2 * words + word;
    uint32_t low = state[0], high = state[words], yes[9], spike, least0, least1;
    int q, g;
    for (q = 0; q < 9; q++, at += 32) {
        yes[q] = 0;
        for (g = 0; g < 32; g += LANES)
            yes[q] |= vm_bits(vm_ge(dot[g / LANES], vi_load(at + g))) << g;
    }
    spike = (high & yes[6]) | (~high & ((low & yes[3]) | (~low & yes[0])));
    least0 = (high & yes[7]) | (~high & ((low & yes[4]) | (~low & yes[1])));
    least1 = (high & yes[8]) | (~high & ((low & yes[5]) | (~low & yes[2])));
    high = ~least0;
    low = least1 | ~least0;
    if (n[N_RESET] == RESET_HARD) {
        low = (spike & after[0]) | (~spike & low);
        high = (spike & after[words]) | (~spike & high);
    }
    pixel_bits(x, v, pixel)[word] = spike;
    state[0] = low;
    state[words] = high;
}

#define PER_WORD (32 / LANES) /* vectors that hold 32 channels */
#if LANES == 16
#define TILE 4 /* pixels whose sums are in registers at the same time */
#elif LANES == 8
#define TILE 2
#else
#define TILE 1
#endif

/* The codes under the kernel are put side by side for every pixel of a row, in pairs, and multiplied
 * with pairs of weights [word of channels][pair][channel]. */
static void conv_codes(const context *x, const int32_t *op) {
    const int32_t *src = value_of(x, op[F_SOURCE]), *dst = value_of(x, op[F_TARGET]);
    const int32_t cin = src[V_CHANNELS], words = words_of(dst), out = dst[V_WIDTH];
    const int32_t kw = op[F_KW], pairs = op[F_PAIRS];
    uint32_t *patches = x->scratch;
    int32_t *lines = (int32_t *)(patches + (size_t)(out + TILE) * (size_t)pairs);
    int32_t oy, ox, ky, kx, c, i, k, w;
    for (oy = 0; oy < dst[V_HEIGHT]; oy++) {
        memset(patches, 0, (size_t)(out + TILE) * (size_t)pairs * 4);
        for (ox = 0; ox < out; ox++) {
            uint32_t *patch = patches + (size_t)ox * (size_t)pairs;
            for (ky = 0; ky < op[F_KH]; ky++) {
                const int32_t iy = oy * op[F_SH] - op[F_TOP] + ky * op[F_DH];
                if (iy < 0 || iy >= src[V_HEIGHT]) continue;
                for (kx = 0; kx < kw; kx++) {
                    const int32_t ix = ox * op[F_SW] - op[F_LEFT] + kx * op[F_DW];
                    const int32_t *from;
                    if (ix < 0 || ix >= src[V_WIDTH]) continue;
                    from = pixel_ints(x, src, iy * src[V_WIDTH] + ix);
                    i = (ky * kw + kx) * cin;
                    for (c = 0; c < cin; c++, i++)
                        patch[i / 2] |= ((uint32_t)from[c] & 0xffffu) << (i % 2 * 16);
                }
            }
        }
        for (ox = 0; ox < out; ox += TILE) {
            const uint32_t *patch = patches + (size_t)ox * (size_t)pairs;
            const int32_t pixel = oy * out + ox, tile = out - ox < TILE ? out - ox : TILE;
            for (w = 0; w < words; w++) {
                const int32_t *weight = x->ints + op[F_WEIGHT] + (size_t)w * (size_t)pairs * 32u;
                vi sum[TILE][PER_WORD];
                for (i = 0; i < TILE; i++)
                    for (k = 0; k < PER_WORD; k++) sum[i][k] = vi_set(0);
                for (c = 0; c < pairs; c++, weight += 32) {
                    for (i = 0; i < TILE; i++) {
                        const vi code = vi_set((int32_t)patch[i * pairs + c]);
                        for (k = 0; k < PER_WORD; k++)
                            sum[i][k] = vi_add(sum[i][k],
                                               vi_madd(vi_load(weight + k * LANES), code));
                    }
                }
                for (i = 0; i < tile; i++) {
                    if (op[F_FIRING]) fire_word(x, op, pixel + i, w, sum[i]);
                    else
                        for (k = 0; k < PER_WORD; k++)
                            vi_store(lines + (i * words + w) * 32 + k * LANES, sum[i][k]);
                }
            }
            for (i = 0; i < tile && !op[F_FIRING]; i++) {
                memcpy(x->line, lines + i * words * 32, (size_t)words * 32 * 4);
                line_affine(x, op, x->line, words);
                finish(x, op, x->line, pixel + i);
            }
        }
    }
}

#endif
