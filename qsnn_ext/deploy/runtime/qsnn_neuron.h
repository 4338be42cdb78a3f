/* Neurons on a line, and what follows a line of dot products. */
#ifndef QSNN_NEURON_H
#define QSNN_NEURON_H
#include "qsnn_line.h"

/* Any neuron, one channel at a time: 32-bit membranes and those whose membrane is an output. */
static void neuron_plain(const context *x, const int32_t *n, int32_t pixel, const int32_t *line) {
    const int32_t *v = value_of(x, n[N_SPIKES]);
    int32_t words = words_of(v), channels = v[V_CHANNELS], c, p, bits = n[N_BITS];
    int32_t per = n[N_PER_CHANNEL], entries = bits == 32 ? 3 : 1 << n[N_STATE_BITS];
    const int32_t *bounds = x->ints + n[N_BOUNDS];
    uint32_t *spikes = pixel_bits(x, v, pixel);
    uint32_t *state = x->state + n[N_STATE];
    int32_t *membrane = 0;
    if (n[N_MEMBRANE] >= 0) membrane = pixel_ints(x, value_of(x, n[N_MEMBRANE]), pixel);
    memset(spikes, 0, (size_t)words * 4);
    state += bits == 32 ? pixel * channels : pixel * n[N_STATE_BITS] * words;
    for (c = 0; c < channels; c++) {
        const int32_t *leak = x->ints + n[N_LEAK] + (per ? c * entries : 0);
        int32_t theta = x->ints[n[N_THRESHOLD] + (per ? c : 0)];
        int32_t value = x->ints[n[N_RESET_VALUE] + (per ? c : 0)];
        int32_t h, u, code, spike, word = 0;
        if (bits == 32) {
            int32_t old = (int32_t)state[c];
            h = (int32_t)(((int64_t)old * leak[0] + ((int64_t)1 << (leak[1] - 1))) >> leak[1]);
            h += leak[2] + line[c];
        } else {
            for (p = 0; p < n[N_STATE_BITS]; p++)
                word |= (int32_t)(state[p * words + c / 32] >> (c % 32) & 1u) << p;
            h = leak[word] + line[c];
            if (n[N_DELAY] == DELAY_GATE && word >> bits) h = 0;
        }
        u = h;
        spike = h >= theta;
        if (n[N_ORDER] == ORDER_FIRE_FIRST && spike) {
            if (n[N_RESET] == RESET_HARD) u = value;
            if (n[N_RESET] == RESET_SOFT) u = h - value;
        }
        if (bits == 32) {
            u = u > WIDE_LIMIT ? WIDE_LIMIT : u < -WIDE_LIMIT ? -WIDE_LIMIT : u;
            state[c] = (uint32_t)u;
            if (membrane) membrane[c] = u + (spike ? x->ints[n[N_READING] + 1] : 0);
        } else {
            code = -n[N_LEVELS];
            for (p = 0; p < 2 * n[N_LEVELS] && bounds[p] <= u; p++) code++;
            if (n[N_ORDER] == ORDER_QUANTIZE_FIRST) spike = code >= theta;
            if (!spike && code > n[N_CEILING]) code = n[N_CEILING];
            word = code & ((1 << bits) - 1);
            if (n[N_DELAY] != DELAY_NONE) word |= spike << bits;
            for (p = 0; p < n[N_STATE_BITS]; p++) {
                uint32_t *at = state + p * words + c / 32;
                *at = (*at & ~(1u << (c % 32))) | ((uint32_t)(word >> p & 1) << (c % 32));
            }
            if (membrane) membrane[c] = x->ints[n[N_READING] + word];
        }
        spikes[c / 32] |= (uint32_t)spike << (c % 32);
    }
    if (membrane)
        for (; c < words * 32; c++) membrane[c] = 0;
}

/* Q(v) + levels: how many of the 2n ascending bounds are <= v. */
static inline vi quantize(vi v, const int32_t *bounds, int bits) {
    const int32_t count = 2 * ((1 << (bits - 1)) - 1);
    vi sum = vi_set(0);
    int32_t j;
    if (bits <= 4) {
        for (j = 0; j < count; j++)
            sum = vi_add_if(sum, vm_ge(v, vi_set(bounds[j])), vi_set(1));
        return sum;
    }
    for (j = 1 << (bits - 1); j; j >>= 1) { /* bisection; bounds are padded with INT32_MAX */
        vi probe = vi_lookup(bounds, vi_add(sum, vi_set(j - 1)));
        sum = vi_add_if(sum, vm_ge(v, probe), vi_set(j));
    }
    return vi_min(sum, vi_set(count));
}

/* `usual`: one threshold and leak for all channels, fire first, hard reset, no ceiling. */
static inline void neuron_bits(const context *x, const int32_t *n, int32_t pixel,
                               const int32_t *line, const int bits, const int delay,
                               const int usual) {
    const int32_t *v = value_of(x, n[N_SPIKES]);
    const int32_t words = words_of(v), state_bits = bits + (delay != 0);
    const int32_t *bounds = x->ints + n[N_BOUNDS], *leak = x->ints + n[N_LEAK];
    const int32_t *theta = x->ints + n[N_THRESHOLD], *value = x->ints + n[N_RESET_VALUE];
    const int32_t per = !usual && n[N_PER_CHANNEL], entries = 1 << state_bits;
    const int32_t reset = usual ? RESET_HARD : n[N_RESET];
    const int quantize_first = !usual && n[N_ORDER] == ORDER_QUANTIZE_FIRST;
    const int gate = !usual && n[N_DELAY] == DELAY_GATE;
    const int capped = !usual && n[N_CEILING] < n[N_LEVELS];
    uint32_t *spikes = pixel_bits(x, v, pixel);
    uint32_t *state = x->state + n[N_STATE] + pixel * state_bits * words;
    int32_t w, g, p;
    vi th = vi_set(theta[0]), rv = vi_set(value[0]);
#if SMALL_TABLE
    vi table = vi_load(leak); /* constants follow every table, so reading past it is safe */
#endif
    for (w = 0; w < words; w++) {
        uint32_t fired = 0, fresh[9] = {0};
        for (g = 0; g < 32; g += LANES) {
            int32_t c = w * 32 + g;
            vi index = vi_set(0), h, u, code;
            vm s, last = vm_from(0);
            for (p = 0; p < state_bits; p++) {
                last = vm_from(state[p * words + w] >> g);
                index = vi_add_if(index, last, vi_set(1 << p));
            }
            if (per) {
                int32_t base[LANES], i;
                for (i = 0; i < LANES; i++) base[i] = (c + i) * entries;
                h = vi_lookup(leak, vi_add(index, vi_load(base)));
                th = vi_load(theta + c);
                rv = vi_load(value + c);
            }
#if SMALL_TABLE
            else if (state_bits <= 4 && (1 << state_bits) <= SMALL_TABLE) {
                h = vi_lookup_small(table, index);
            }
#endif
            else {
                h = vi_lookup(leak, index);
            }
            h = vi_add(h, vi_load(line + c));
            if (gate) h = vi_select(last, vi_set(0), h);
            if (quantize_first) {
                code = vi_sub(quantize(h, bounds, bits), vi_set((1 << (bits - 1)) - 1));
                s = vm_ge(code, th);
            } else {
                s = vm_ge(h, th);
                u = h;
                if (reset == RESET_HARD) u = vi_select(s, rv, h);
                if (reset == RESET_SOFT) u = vi_select(s, vi_sub(h, rv), h);
                code = vi_sub(quantize(u, bounds, bits), vi_set((1 << (bits - 1)) - 1));
            }
            if (capped) code = vi_select(s, code, vi_min(code, vi_set(n[N_CEILING])));
            fired |= vm_bits(s) << g;
            for (p = 0; p < bits; p++)
                fresh[p] |= vm_bits(vm_test(code, vi_set(1 << p))) << g;
        }
        if (w == words - 1) fired &= last_mask(v[V_CHANNELS]);
        spikes[w] = fired;
        for (p = 0; p < bits; p++) state[p * words + w] = fresh[p];
        if (delay) state[bits * words + w] = fired;
    }
}

static void neuron_line(const context *x, const int32_t *n, int32_t pixel, const int32_t *line) {
    const int delayed = n[N_DELAY] != DELAY_NONE, bits = n[N_BITS];
    const int usual = !n[N_PER_CHANNEL] && n[N_ORDER] == ORDER_FIRE_FIRST && !delayed &&
                      n[N_CEILING] >= n[N_LEVELS] && n[N_RESET] == RESET_HARD;
    if (bits == 32 || n[N_MEMBRANE] >= 0) neuron_plain(x, n, pixel, line);
    else if (bits == 2 && usual) neuron_bits(x, n, pixel, line, 2, 0, 1);
    else if (bits == 4 && usual) neuron_bits(x, n, pixel, line, 4, 0, 1);
    else if (bits == 8 && usual) neuron_bits(x, n, pixel, line, 8, 0, 1);
    else neuron_bits(x, n, pixel, line, bits, delayed, 0);
}

/* What follows the line of a convolution, a scale or an addition. */
static inline void finish(const context *x, const int32_t *op, int32_t *line, int32_t pixel) {
    if (op[F_ADD] >= 0) {
        const int32_t *v = value_of(x, op[F_ADD]);
        int32_t c, n = words_of(v) * 32, f = op[F_SELF_FACTOR];
        if (f != 1)
            for (c = 0; c < n; c++) line[c] *= f;
        line_add(x, line, v, pixel, op[F_ADD_FACTOR], 0);
    }
    if (op[F_NEURON] >= 0)
        neuron_line(x, x->ints + x->ints[QSNN_H_NEURONS] + op[F_NEURON] * N_SIZE, pixel, line);
    else
        line_store(x, line, value_of(x, op[F_TARGET]), pixel);
}

#endif
