/* Neurons on a line, and what follows a line of dot products. */
#ifndef QSNN_NEURON_H
#define QSNN_NEURON_H
#include "qsnn_line.h"

/* Any neuron, one channel at a time: 32-bit membranes and those whose membrane is an output. */
static void neuron_plain(const context *x, const qsnn_neuron *n, int32_t pixel, const int32_t *line) {
    const qsnn_value *v = value_at(x, n->spikes);
    int32_t words = v->words, channels = v->channels, c, p, bits = n->bits;
    int32_t per = n->per_channel;
    const int32_t *bounds = x->ints + n->bounds;
    uint32_t *spikes = pixel_bits(x, v, pixel);
    uint32_t *state = x->state + n->state + pixel * n->state_pitch;
    int32_t *membrane = 0;
    if (n->membrane) membrane = pixel_ints(x, value_at(x, n->membrane), pixel);
    memset(spikes, 0, (size_t)words * 4);
    for (c = 0; c < channels; c++) {
        const int32_t *leak = x->ints + n->leak + c * n->leak_pitch;
        int32_t theta = x->ints[n->threshold + (per ? c : 0)];
        int32_t value = x->ints[n->reset_value + (per ? c : 0)];
        int32_t h, u, code, spike, word = 0;
        if (bits == 32) {
            int32_t old = (int32_t)state[c];
            h = (int32_t)(((int64_t)old * leak[0] + ((int64_t)1 << (leak[1] - 1))) >> leak[1]);
            h += leak[2] + line[c];
        } else {
            for (p = 0; p < n->state_bits; p++)
                word |= (int32_t)(state[p * words + c / 32] >> (c % 32) & 1u) << p;
            h = leak[word] + line[c];
        }
        u = h;
        spike = h >= theta;
        if (n->order == QSNN_ORDER_FIRE_FIRST && spike) {
            if (n->reset == QSNN_RESET_HARD) u = value;
            if (n->reset == QSNN_RESET_SOFT) u = h - value;
        }
        if (bits == 32) {
            u = u > WIDE_LIMIT ? WIDE_LIMIT : u < -WIDE_LIMIT ? -WIDE_LIMIT : u;
            state[c] = (uint32_t)u;
            if (membrane) membrane[c] = u + (spike ? x->ints[n->reading + 1] : 0);
        } else {
            code = -n->levels;
            for (p = 0; p < 2 * n->levels && bounds[p] <= u; p++) code++;
            if (n->order == QSNN_ORDER_QUANTIZE_FIRST) spike = code >= theta;
            if (!spike && code > n->ceiling) code = n->ceiling;
            word = code & ((1 << bits) - 1);
            if (n->delay != QSNN_DELAY_NONE) word |= spike << bits;
            for (p = 0; p < n->state_bits; p++) {
                uint32_t *at = state + p * words + c / 32;
                *at = (*at & ~(1u << (c % 32))) | ((uint32_t)(word >> p & 1) << (c % 32));
            }
            if (membrane) membrane[c] = x->ints[n->reading + word];
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
static inline void neuron_bits(const context *x, const qsnn_neuron *n, int32_t pixel,
                               const int32_t *line, const int bits, const int delay,
                               const int usual) {
    const qsnn_value *v = value_at(x, n->spikes);
    const int32_t words = v->words, state_bits = bits + (delay != 0);
    const int32_t *bounds = x->ints + n->bounds, *leak = x->ints + n->leak;
    const int32_t *theta = x->ints + n->threshold, *value = x->ints + n->reset_value;
    const int32_t per = !usual && n->per_channel, entries = usual ? 0 : n->leak_pitch;
    const int32_t reset = usual ? QSNN_RESET_HARD : n->reset;
    const int quantize_first = !usual && n->order == QSNN_ORDER_QUANTIZE_FIRST;
    const int capped = !usual && n->ceiling < n->levels;
    uint32_t *spikes = pixel_bits(x, v, pixel);
    uint32_t *state = x->state + n->state + pixel * n->state_pitch;
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
            vm s;
            for (p = 0; p < state_bits; p++)
                index = vi_add_if(index, vm_from(state[p * words + w] >> g), vi_set(1 << p));
            if (per) {
                th = vi_load(theta + c);
                rv = vi_load(value + c);
            }
            if (entries) {
                int32_t base[LANES], i;
                for (i = 0; i < LANES; i++) base[i] = (c + i) * entries;
                h = vi_lookup(leak, vi_add(index, vi_load(base)));
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
            if (quantize_first) {
                code = vi_sub(quantize(h, bounds, bits), vi_set((1 << (bits - 1)) - 1));
                s = vm_ge(code, th);
            } else {
                s = vm_ge(h, th);
                u = h;
                if (reset == QSNN_RESET_HARD) u = vi_select(s, rv, h);
                if (reset == QSNN_RESET_SOFT) u = vi_select(s, vi_sub(h, rv), h);
                code = vi_sub(quantize(u, bounds, bits), vi_set((1 << (bits - 1)) - 1));
            }
            if (capped) code = vi_select(s, code, vi_min(code, vi_set(n->ceiling)));
            fired |= vm_bits(s) << g;
            for (p = 0; p < bits; p++)
                fresh[p] |= vm_bits(vm_test(code, vi_set(1 << p))) << g;
        }
        if (w == words - 1) fired &= last_mask(v->channels);
        spikes[w] = fired;
        for (p = 0; p < bits; p++) state[p * words + w] = fresh[p];
        if (delay) state[bits * words + w] = fired;
    }
}

static void neuron_line(const context *x, const qsnn_neuron *n, int32_t pixel,
                        const int32_t *line) {
    const int delayed = n->delay != QSNN_DELAY_NONE, bits = n->bits;
    const int usual = !n->per_channel && !n->leak_pitch && n->order == QSNN_ORDER_FIRE_FIRST &&
                      !delayed && n->ceiling >= n->levels && n->reset == QSNN_RESET_HARD;
    if (bits == 32 || n->membrane) neuron_plain(x, n, pixel, line);
    else if (bits == 2 && usual) neuron_bits(x, n, pixel, line, 2, 0, 1);
    else if (bits == 4 && usual) neuron_bits(x, n, pixel, line, 4, 0, 1);
    else if (bits == 8 && usual) neuron_bits(x, n, pixel, line, 8, 0, 1);
    else neuron_bits(x, n, pixel, line, bits, delayed, 0);
}

/* What follows the line of a convolution, a scale or an addition. */
static inline void finish(const context *x, const qsnn_step *step, int32_t *line, int32_t pixel) {
    if (step->add) {
        const qsnn_value *v = value_at(x, step->add);
        int32_t c, n = v->words * 32;
        if (step->self_factor != 1) {
            const vi f = vi_set(step->self_factor);
            for (c = 0; c < n; c += LANES) vi_store(line + c, vi_mul(vi_load(line + c), f));
        }
        line_add(x, line, v, pixel, step->add_factor, 0);
    }
    if (step->neuron) neuron_line(x, neuron_at(x, step->neuron), pixel, line);
    else line_store(x, line, value_at(x, step->target), pixel);
}

#endif
