/* The input layer: 16-bit codes times 8-bit weights, multiplied and added in pairs. */
#ifndef QSNN_INPUT_H
#define QSNN_INPUT_H
#include "qsnn_events.h"

/* As fire_strip, for 32 channels of one pixel whose dot products are plain numbers. */
static inline void fire_word(const context *x, const qsnn_codes *op, int32_t pixel, int32_t word,
                             const vi *dot) {
    const qsnn_neuron *n = neuron_at(x, op->step.neuron);
    const qsnn_value *v = value_at(x, n->spikes);
    const int32_t *at = x->ints + op->firing + word * op->firing_pitch;
    const uint32_t *after = x->image + op->after + word;
    uint32_t *state = x->state + n->state + pixel * n->state_pitch + word;
    uint32_t low = state[0], high = state[v->words], yes[QUESTIONS], spike, least0, least1;
    int q, g;
    for (q = 0; q < QUESTIONS; q++, at += 32) {
        yes[q] = 0;
        for (g = 0; g < 32; g += LANES)
            yes[q] |= vm_bits(vm_ge(dot[g / LANES], vi_load(at + g))) << g;
    }
    spike = (high & yes[6]) | (~high & ((low & yes[3]) | (~low & yes[0])));
    least0 = (high & yes[7]) | (~high & ((low & yes[4]) | (~low & yes[1])));
    least1 = (high & yes[8]) | (~high & ((low & yes[5]) | (~low & yes[2])));
    high = ~least0;
    low = least1 | ~least0;
    if (n->reset == QSNN_RESET_HARD) {
        low = (spike & after[0]) | (~spike & low);
        high = (spike & after[v->words]) | (~spike & high);
    }
    pixel_bits(x, v, pixel)[word] = spike;
    state[0] = low;
    state[v->words] = high;
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
 * with pairs of weights. */
static void conv_codes(const context *x, const qsnn_codes *op, share rows) {
    const qsnn_value *src = value_at(x, op->step.source), *dst = value_at(x, op->step.target);
    const qsnn_window *at = &op->window;
    const int32_t cin = src->channels, words = dst->words, out = dst->width, pairs = op->pairs;
    uint32_t *patches = x->workspace + op->patches;
    int32_t *lines = (int32_t *)(x->workspace + op->lines);
    int32_t oy, ox, ky, kx, c, i, k, w;
    for (oy = rows.first; oy < rows.end; oy++) {
        memset(patches, 0, (size_t)(out + TILE) * (size_t)pairs * 4);
        for (ox = 0; ox < out; ox++) {
            uint32_t *patch = patches + ox * pairs;
            for (ky = 0; ky < at->kh; ky++) {
                const int32_t iy = oy * at->sh - at->top + ky * at->dh;
                if (iy < 0 || iy >= src->height) continue;
                for (kx = 0; kx < at->kw; kx++) {
                    const int32_t ix = ox * at->sw - at->left + kx * at->dw;
                    const int32_t *from;
                    if (ix < 0 || ix >= src->width) continue;
                    from = pixel_ints(x, src, iy * src->width + ix);
                    i = (ky * at->kw + kx) * cin;
                    for (c = 0; c < cin; c++, i++)
                        patch[i / 2] |= ((uint32_t)from[c] & 0xffffu) << (i % 2 * 16);
                }
            }
        }
        for (ox = 0; ox < out; ox += TILE) {
            const uint32_t *patch = patches + ox * pairs;
            const int32_t pixel = oy * out + ox, tile = out - ox < TILE ? out - ox : TILE;
            for (w = 0; w < words; w++) {
                const int32_t *weight = x->ints + op->weight + w * op->weight_pitch;
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
                    if (op->firing) fire_word(x, op, pixel + i, w, sum[i]);
                    else
                        for (k = 0; k < PER_WORD; k++)
                            vi_store(lines + i * op->line_pitch + w * 32 + k * LANES, sum[i][k]);
                }
            }
            for (i = 0; i < tile && !op->firing; i++) {
                memcpy(x->line, lines + i * op->line_pitch, (size_t)op->line_pitch * 4);
                line_affine(x, &op->scale, x->line);
                finish(x, &op->step, x->line, pixel + i);
            }
        }
    }
}

#endif
