/* Lines: the int32 values of all channels of one pixel, padded to a multiple of 32. */
#ifndef QSNN_LINE_H
#define QSNN_LINE_H
#include "qsnn_image.h"

/* line += factor * (bits of all planes), or = when `first`. */
static void line_add_bits(int32_t *line, const uint32_t *bits, int32_t planes, int32_t words,
                          int32_t factor, int first) {
    int32_t w, g, p;
    for (w = 0; w < words; w++) {
        for (g = 0; g < 32; g += LANES) {
            int32_t *at = line + w * 32 + g;
            vi sum = first ? vi_set(0) : vi_load(at);
            for (p = 0; p < planes; p++)
                sum = vi_add_if(sum, vm_from(bits[p * words + w] >> g),
                                vi_set((int32_t)wrap_mul((uint32_t)factor, 1u << p)));
            vi_store(at, sum);
        }
    }
}

static void line_add(const context *x, int32_t *line, const qsnn_value *v, int32_t pixel,
                     int32_t factor, int first) {
    int32_t c;
    if (v->planes) {
        line_add_bits(line, pixel_bits(x, v, pixel), v->planes, v->words, factor, first);
    } else {
        const int32_t *from = pixel_ints(x, v, pixel);
        vi f = vi_set(factor);
        for (c = 0; c < v->words * 32; c += LANES) {
            vi a = vi_load(from + c);
            if (factor != 1) a = vi_mul(a, f);
            vi_store(line + c, first ? a : vi_add(vi_load(line + c), a));
        }
    }
}

static void line_store(const context *x, const int32_t *line, const qsnn_value *v, int32_t pixel) {
    int32_t words = v->words, w, g, p;
    if (v->planes == 0) {
        memcpy(pixel_ints(x, v, pixel), line, (size_t)words * 32 * 4);
        return;
    }
    for (w = 0; w < words; w++) {
        uint32_t mask = w == words - 1 ? last_mask(v->channels) : 0xffffffffu;
        uint32_t *to = pixel_bits(x, v, pixel) + w;
        for (p = 0; p < v->planes; p++) {
            uint32_t bits = 0;
            vi one = vi_set((int32_t)(1u << p));
            for (g = 0; g < 32; g += LANES)
                bits |= vm_bits(vm_test(vi_load(line + w * 32 + g), one)) << g;
            to[p * words] = bits & mask;
        }
    }
}

/* line = ((line * multiplier + half) >> shift) + bias, per channel. */
static void line_affine(const context *x, const qsnn_scale *scale, int32_t *line) {
    const int32_t *m = x->ints + scale->multiplier;
    const int8_t *s = (const int8_t *)(x->ints + scale->shift);
    const int32_t *b = x->ints + scale->bias;
    const int32_t n = scale->channels;
    int32_t c = 0;
    if (scale->product32) { /* the products are proven to fit int32 */
        const vi one = vi_set(1);
        for (; c + LANES <= n; c += LANES) {
            const vi shift = vi_load_i8(s, c);
            const vi half = vi_sll(one, vi_sub(shift, one));
            const vi y = vi_add(vi_mul(vi_load(line + c), vi_load(m + c)), half);
            vi_store(line + c, vi_add(vi_sra(y, shift), vi_load(b + c)));
        }
    }
#if defined(QSNN_WIDE_PRODUCTS)
    for (; c + LANES <= n; c += LANES) {
        const vi y = vi_scaled(vi_load(line + c), vi_load(m + c), vi_load_i8(s, c));
        vi_store(line + c, vi_add(y, vi_load(b + c)));
    }
#endif
    for (; c < n; c++) {
        const int shift = s[byte_place(c)];
        const int64_t y = (int64_t)line[c] * m[c] + ((int64_t)1 << (shift - 1));
        line[c] = (int32_t)(y >> shift) + b[c];
    }
}

#endif
