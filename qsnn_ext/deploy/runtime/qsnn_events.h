/* Spikes times single-bit weights, event-driven: active inputs are listed, their rows of weight
 * bits added bit-sliced, and spikes decided on the bit planes where the layer allows it. */
#ifndef QSNN_EVENTS_H
#define QSNN_EVENTS_H
#include "qsnn_count.h"
#include "qsnn_neuron.h"

/* Writes (base + index * step) for every set bit of `words` words; returns how many. May write up
 * to 16 entries past the end. */
static uint32_t list_bits(const uint32_t *bits, int32_t words, uint32_t step, uint32_t base,
                                 uint32_t *list) {
    uint32_t n = 0;
    int32_t w;
#if defined(QSNN_AVX512)
    __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i at = _mm512_add_epi32(_mm512_mullo_epi32(iota, _mm512_set1_epi32((int32_t)step)),
                                  _mm512_set1_epi32((int32_t)base));
    __m512i sixteen = _mm512_set1_epi32((int32_t)(16 * step));
    for (w = 0; w < words; w++) {
        uint32_t low = bits[w] & 0xffffu, high = bits[w] >> 16;
        _mm512_storeu_si512((void *)(list + n), _mm512_maskz_compress_epi32((__mmask16)low, at));
        n += (uint32_t)__builtin_popcount(low);
        at = _mm512_add_epi32(at, sixteen);
        _mm512_storeu_si512((void *)(list + n), _mm512_maskz_compress_epi32((__mmask16)high, at));
        n += (uint32_t)__builtin_popcount(high);
        at = _mm512_add_epi32(at, sixteen);
    }
#else
    for (w = 0; w < words; w++) {
        uint32_t rest = bits[w];
        const uint32_t start = wrap_add(base, wrap_mul((uint32_t)w * 32u, step));
        while (rest) {
            list[n++] = wrap_add(start, wrap_mul((uint32_t)lowest_bit(rest), step));
            rest &= rest - 1u;
        }
    }
#endif
    return n;
}

/* line = 2 * count - active for one pixel of `words` words, the counts as bit planes `pitch` words
 * apart. */
static void line_counts(int32_t *line, const uint32_t *planes, int32_t pitch, int depth,
                        int32_t words, int32_t active) {
    const vi minus = vi_set(-active);
    int32_t w, g;
    int p;
#if defined(QSNN_AVX512)
    if (depth <= 16) {
        for (w = 0; w < words; w++) { /* 32 channels at a time, as 16-bit counts */
            const uint32_t *from = planes + w;
            int32_t *at = line + w * 32;
            __m512i low, high, sum = _mm512_setzero_si512(), weight = _mm512_set1_epi16(1);
            for (p = 0; p < depth; p++) {
                sum = _mm512_mask_add_epi16(sum, (__mmask32)*from, sum, weight);
                weight = _mm512_add_epi16(weight, weight);
                from += pitch;
            }
            low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(sum));
            high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(sum, 1));
            vi_store(at, vi_add(_mm512_slli_epi32(low, 1), minus));
            vi_store(at + 16, vi_add(_mm512_slli_epi32(high, 1), minus));
        }
        return;
    }
#elif defined(__AVX2__)
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2,
                                            2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i select = _mm256_set1_epi64x((int64_t)0x8040201008040201u);
    if (depth <= 16) {
        for (w = 0; w < words; w++) {
            __m256i byte[2];
            byte[0] = byte[1] = _mm256_setzero_si256();
            for (p = 0; p < depth; p++) { /* 32 channels as bytes: planes 0..7, then 8..15 */
                __m256i b = _mm256_set1_epi32((int32_t)planes[p * pitch + w]);
                b = _mm256_and_si256(_mm256_shuffle_epi8(b, spread), select);
                b = _mm256_cmpeq_epi8(b, select);
                b = _mm256_and_si256(b, _mm256_set1_epi8((char)(1u << (p & 7))));
                byte[p >> 3] = _mm256_or_si256(byte[p >> 3], b);
            }
            for (g = 0; g < 4; g++) {
                int32_t *at = line + w * 32 + g * 8;
                uint8_t low[32], high[32];
                __m256i y;
                _mm256_storeu_si256((__m256i *)(void *)low, byte[0]);
                _mm256_storeu_si256((__m256i *)(void *)high, byte[1]);
                y = _mm256_cvtepu8_epi32(
                    _mm_loadl_epi64((const __m128i *)(const void *)(low + g * 8)));
                if (depth > 8)
                    y = _mm256_add_epi32(y, _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(
                            (const __m128i *)(const void *)(high + g * 8))), 8));
                vi_store(at, vi_add(_mm256_slli_epi32(y, 1), minus));
            }
        }
        return;
    }
#endif
    for (w = 0; w < words; w++) {
        for (g = 0; g < 32; g += LANES) {
            vi y = minus;
            for (p = 0; p < depth; p++)
                y = vi_add_if(y, vm_from(planes[p * pitch + w] >> g),
                              vi_set((int32_t)(2u << p)));
            vi_store(line + w * 32 + g, y);
        }
    }
}

/* Counts the rows at `offsets` (n of them; room for 8 more) into bit planes `pitch` words apart.
 * The planes may be written up to 15 words past `row_words`. */
static void count_rows(const uint8_t *rows, uint32_t *offsets, uint32_t n, uint32_t zero,
                       int32_t row_words, int depth, uint32_t *planes, size_t pitch) {
    int32_t w = 0;
    if (n == 0) {
        int p;
        for (p = 0; p < depth; p++) memset(planes + (size_t)p * pitch, 0, (size_t)row_words * 4);
        return;
    }
    while (n & 7u) offsets[n++] = zero;
    while (w < row_words) {
        const uint8_t *at = rows + (size_t)w * 4;
        uint32_t *to = planes + w;
#if defined(QSNN_AVX512)
        const int32_t left = row_words - w;
        if (left > 8) { count_512(at, offsets, n, depth, to, pitch); w += 16; }
        else if (left > 4) { count_256(at, offsets, n, depth, to, pitch); w += 8; }
        else { count_128(at, offsets, n, depth, to, pitch); w += 4; }
#elif defined(__AVX2__)
        const int32_t left = row_words - w;
        if (left > 4) { count_256(at, offsets, n, depth, to, pitch); w += 8; }
        else { count_128(at, offsets, n, depth, to, pitch); w += 4; }
#elif defined(QSNN_VECTORS)
        count_128(at, offsets, n, depth, to, pitch); w += 4;
#else
        count_32(at, offsets, n, depth, to, pitch); w += 1;
#endif
    }
}

/* Appends n entries, each plus `base`. Always copies `chunk` of them, at least n, a multiple of 16: a
 * loop of known length costs less than a shorter one whose end the processor cannot guess. */
static inline uint32_t *append(uint32_t *to, const uint32_t *from, uint32_t n, uint32_t base,
                               uint32_t chunk) {
    const vi b = vi_set((int32_t)base);
    uint32_t i;
    for (i = 0; i < chunk; i += LANES)
        vi_store((int32_t *)(to + i), vi_add(vi_load((const int32_t *)(from + i)), b));
    return to + n;
}

/* x += y << shift, in numbers of at most `limit` planes; returns how many planes x has. */
static inline int planes_add(vb *x, int have, const uint32_t *y, size_t pitch, int depth,
                             int shift, int limit) {
    vb carry = vb_zero();
    int p, top = depth + shift < limit ? depth + shift : limit;
    if (have == 0 && shift == 0) {
        for (p = 0; p < top; p++) x[p] = vb_load(y + (size_t)p * pitch);
        return top;
    }
    for (; have < top; have++) x[have] = vb_zero();
    for (p = shift; p < top; p++) {
        vb a = x[p], b = vb_load(y + (size_t)(p - shift) * pitch);
        x[p] = vb_xor3(a, b, carry);
        carry = vb_majority(a, b, carry);
    }
    for (; p < have; p++) {
        vb a = x[p];
        x[p] = vb_xor(a, carry);
        carry = vb_and(a, carry);
    }
    if (have < limit) x[have++] = carry;
    return have;
}

/* What a strip of pixels is: `pixels` pixels side by side of `words` words each fill a vector, or
 * one pixel needs several (`pixels` 1), of which this is the one at word `first`, `used` long. */
typedef struct {
    int32_t pixels, words, first, used;
} strip;

/* Reads from or writes to pixels that lie `pitch` words apart, without touching anything else. */
static inline vb strip_load(const strip *s, const uint32_t *from, int32_t pitch) {
    uint32_t t[VB_WORDS];
    int32_t g;
    if (s->used == VB_WORDS || (pitch == s->words && s->pixels * s->words == VB_WORDS))
        return vb_load(from + s->first);
    vb_store(t, vb_zero());
    for (g = 0; g < s->pixels; g++)
        memcpy(t + g * s->words, from + g * pitch + s->first, (size_t)s->used * 4);
    return vb_load(t);
}
static inline void strip_store(const strip *s, uint32_t *to, int32_t pitch, vb a) {
    uint32_t t[VB_WORDS];
    int32_t g;
    if (s->used == VB_WORDS || (pitch == s->words && s->pixels * s->words == VB_WORDS)) {
        vb_store(to + s->first, a);
        return;
    }
    vb_store(t, a);
    for (g = 0; g < s->pixels; g++)
        memcpy(to + g * pitch + s->first, t + g * s->words, (size_t)s->used * 4);
}

/* The two state planes of a strip; `repeat` as in fire_strip. */
static inline void state_load(const strip *s, const uint32_t *from, vb *low, vb *high,
                              const int repeat) {
#if defined(QSNN_AVX512)
    if (repeat >= 4 && s->pixels * s->words == VB_WORDS) {
        vb a = vb_load(from), b = vb_load(from + 16);
        *low = repeat == 4 ? _mm512_shuffle_i64x2(a, b, 0x88) : _mm512_shuffle_i64x2(a, b, 0x44);
        *high = repeat == 4 ? _mm512_shuffle_i64x2(a, b, 0xdd) : _mm512_shuffle_i64x2(a, b, 0xee);
        return;
    }
#elif defined(__AVX2__)
    if (repeat == 4 && s->pixels == 2) {
        vb a = vb_load(from), b = vb_load(from + 8);
        *low = _mm256_permute2x128_si256(a, b, 0x20);
        *high = _mm256_permute2x128_si256(a, b, 0x31);
        return;
    }
#endif
    (void)repeat;
    *low = strip_load(s, from, 2 * s->words);
    *high = strip_load(s, from + s->words, 2 * s->words);
}
static inline void state_store(const strip *s, uint32_t *to, vb low, vb high, const int repeat) {
#if defined(QSNN_AVX512)
    if (repeat == 4 && s->pixels == 4) {
        const __m512i a = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i b = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        vb_store(to, _mm512_permutex2var_epi64(low, a, high));
        vb_store(to + 16, _mm512_permutex2var_epi64(low, b, high));
        return;
    }
    if (repeat == 8 && s->pixels == 2) {
        vb_store(to, _mm512_shuffle_i64x2(low, high, 0x44));
        vb_store(to + 16, _mm512_shuffle_i64x2(low, high, 0xee));
        return;
    }
#elif defined(__AVX2__)
    if (repeat == 4 && s->pixels == 2) {
        vb_store(to, _mm256_permute2x128_si256(low, high, 0x20));
        vb_store(to + 8, _mm256_permute2x128_si256(low, high, 0x31));
        return;
    }
#endif
    (void)repeat;
    strip_store(s, to, 2 * s->words, low);
    strip_store(s, to + s->words, 2 * s->words, high);
}

/* Answers nine questions x >= t at once: in each of three states, does the neuron fire, and if it
 * does not, is its new level at least 0, at least 1? `at` holds the complements of the planes of t
 * in the order [plane][question][word], after them the planes of the next nine. */
static inline void compare(const vb *x, vb odd, int depth, const uint32_t *at, size_t words,
                           const int repeat, vb *answer) {
    vb a0, a1, a2, a3, a4, a5, a6, a7, a8;
    int p;
    a0 = vb_or(odd, vb_repeat(at, repeat));
    a1 = vb_or(odd, vb_repeat(at + words, repeat));
    a2 = vb_or(odd, vb_repeat(at + 2 * words, repeat));
    a3 = vb_or(odd, vb_repeat(at + 3 * words, repeat));
    a4 = vb_or(odd, vb_repeat(at + 4 * words, repeat));
    a5 = vb_or(odd, vb_repeat(at + 5 * words, repeat));
    a6 = vb_or(odd, vb_repeat(at + 6 * words, repeat));
    a7 = vb_or(odd, vb_repeat(at + 7 * words, repeat));
    a8 = vb_or(odd, vb_repeat(at + 8 * words, repeat));
    for (p = 0; p < depth; p++) {
        const vb b = x[p];
        at += 9 * words;
        a0 = vb_majority(b, vb_repeat(at, repeat), a0);
        a1 = vb_majority(b, vb_repeat(at + words, repeat), a1);
        a2 = vb_majority(b, vb_repeat(at + 2 * words, repeat), a2);
        a3 = vb_majority(b, vb_repeat(at + 3 * words, repeat), a3);
        a4 = vb_majority(b, vb_repeat(at + 4 * words, repeat), a4);
        a5 = vb_majority(b, vb_repeat(at + 5 * words, repeat), a5);
        a6 = vb_majority(b, vb_repeat(at + 6 * words, repeat), a6);
        a7 = vb_majority(b, vb_repeat(at + 7 * words, repeat), a7);
        a8 = vb_majority(b, vb_repeat(at + 8 * words, repeat), a8);
    }
    answer[0] = a0; answer[1] = a1; answer[2] = a2; answer[3] = a3; answer[4] = a4;
    answer[5] = a5; answer[6] = a6; answer[7] = a7; answer[8] = a8;
}

/* Scale, bias, residual spikes, and a neuron with 2-bit states, all on bits. Spike and new level
 * are step functions of the dot product, so that no channel is ever unpacked: the image holds, for
 * each channel, state and residual spike, the dot products at which they step.
 *
 * `x` holds counts of positive products; `pixel` is the first of the strip, `sums` its numbers
 * centre - active. `repeat`: words of a pixel if several make up a vector, otherwise 0. */
static inline void fire_strip(const context *x, const qsnn_events *op, const strip *s, int32_t pixel,
                              vb *count, int have, const int32_t *sums, const int repeat) {
    const qsnn_neuron *n = neuron_at(x, op->step.neuron);
    const int32_t words = s->words, depth = op->depth;
    const uint32_t *at = x->image + op->firing, *after = x->image + op->after;
    uint32_t *state = x->state + n->state + pixel * n->state_pitch;
    vb low, high, odd, carry = vb_zero(), answer[QUESTIONS], k, spike, least0, least1;
    int p;
    /* dot + centre = 2 * (count + (centre - active) / 2) + odd */
    k = vb_lanes(sums, repeat);
    odd = vb_spread_bit(k, 0);
    for (; have < depth; have++) count[have] = vb_zero();
    for (p = 0; p < depth; p++) {
        vb a = count[p], b = vb_spread_bit(k, p + 1);
        count[p] = vb_xor3(a, b, carry);
        carry = vb_majority(a, b, carry);
    }
    state_load(s, state, &low, &high, repeat);
    compare(count, odd, depth, at + s->first, (size_t)words, repeat, answer);
    spike = vb_choose(high, answer[6], vb_choose(low, answer[3], answer[0]));
    least0 = vb_choose(high, answer[7], vb_choose(low, answer[4], answer[1]));
    least1 = vb_choose(high, answer[8], vb_choose(low, answer[5], answer[2]));
    if (op->step.add) {
        const qsnn_value *v = value_at(x, op->step.add);
        const vb other = strip_load(s, pixel_bits(x, v, pixel), words);
        at += op->firing_block;
        compare(count, odd, depth, at + s->first, (size_t)words, repeat, answer);
        spike = vb_choose(other, vb_choose(high, answer[6], vb_choose(low, answer[3], answer[0])),
                          spike);
        least0 = vb_choose(other, vb_choose(high, answer[7], vb_choose(low, answer[4], answer[1])),
                           least0);
        least1 = vb_choose(other, vb_choose(high, answer[8], vb_choose(low, answer[5], answer[2])),
                           least1);
    }
    strip_store(s, pixel_bits(x, value_at(x, n->spikes), pixel), words, spike);
    high = vb_not(least0); /* codes -1, 0, 1 in two's complement: 11, 00, 01 */
    low = vb_or_not(least1, least0);
    if (n->reset == QSNN_RESET_HARD) { /* the level of the reset value, per channel */
        low = vb_choose(spike, vb_repeat(after + s->first, repeat), low);
        high = vb_choose(spike, vb_repeat(after + words + s->first, repeat), high);
    }
    state_store(s, state, low, high, repeat);
}

/* What follows counting, for one row of output pixels, a strip after the other: sums of the counts
 * of planes and kernel columns, then the neuron on bits, or plain numbers for whatever comes next. */
static void finish_row(const context *x, const qsnn_events *op, int32_t oy, int32_t operands,
                       const int *depth) {
    const qsnn_value *dst = value_at(x, op->step.target);
    const int32_t out = dst->width, words = dst->words, dw = op->window.dw;
    const int32_t planes = value_at(x, op->step.source)->planes, deepest = op->deepest;
    const uint32_t *counts = x->workspace + op->counts;
    const int32_t *sums = (const int32_t *)(x->workspace + op->sums);
    const size_t plane = (size_t)op->counts_pitch;
    int32_t ox, p, k;
    strip s;
    s.words = words;
    for (ox = 0; ox < out; ox += s.pixels) {
        const int32_t pixel = oy * out + ox;
        s.pixels = words < VB_WORDS && VB_WORDS % words == 0 ? VB_WORDS / words : 1;
        if (s.pixels > out - ox) s.pixels = out - ox;
        for (s.first = 0; s.first < words; s.first += VB_WORDS) {
            vb count[MAX_DEPTH];
            int have = 0;
            s.used = s.pixels > 1 ? words : words - s.first;
            if (s.used > VB_WORDS) s.used = VB_WORDS;
            for (p = 0; p < planes; p++)
                for (k = 0; k < operands; k++)
                    have = planes_add(
                        count, have,
                        counts + (size_t)((p * operands + k) * deepest) * plane +
                            (ox + k * dw) * words + s.first,
                        plane, depth[p], p, op->depth);
            if (op->firing) {
                switch (words) {
#if VB_WORDS > 1
                case 1: fire_strip(x, op, &s, pixel, count, have, sums + ox, 1); break;
#endif
#if VB_WORDS > 2
                case 2: fire_strip(x, op, &s, pixel, count, have, sums + ox, 2); break;
#endif
#if VB_WORDS > 4
                case 4: fire_strip(x, op, &s, pixel, count, have, sums + ox, 4); break;
#endif
#if VB_WORDS > 8
                case 8: fire_strip(x, op, &s, pixel, count, have, sums + ox, 8); break;
#endif
                default: fire_strip(x, op, &s, pixel, count, have, sums + ox, 0);
                }
                continue;
            }
            {
                uint32_t unpacked[MAX_DEPTH * VB_WORDS];
                int32_t g;
                int q;
                for (q = 0; q < have; q++) vb_store(unpacked + q * VB_WORDS, count[q]);
                for (g = 0; g < s.pixels; g++) {
                    line_counts(x->line + s.first * 32, unpacked + g * words, VB_WORDS, have,
                                s.used, op->centre - sums[ox + g]);
                    if (s.first + VB_WORDS < words) continue;
                    line_affine(x, &op->scale, x->line);
                    finish(x, &op->step, x->line, pixel + g);
                }
            }
        }
    }
}

/* Copies the planes of one number of `words` words. */
static inline void scatter(uint32_t *to, size_t to_pitch, const uint32_t *from, size_t pitch,
                           int32_t words, int depth) {
    int p;
    for (p = 0; p < depth; p++, to += to_pitch, from += pitch) {
        if (words == 4) memcpy(to, from, 16);
        else if (words == 8) memcpy(to, from, 32);
        else if (words == 2) memcpy(to, from, 8);
        else memcpy(to, from, (size_t)words * 4);
    }
}

#endif
