/* The executor of integer programs: see qsnn.h, and docs/integer-program.md for what each
 * operation means. One source for all machines: qsnn_vector.h and qsnn_count.h hold what differs.
 *
 * All work is done one output pixel at a time on a "line": the int32 values of all channels of
 * one pixel, padded to a multiple of 32. A convolution turns active inputs into a line of dot
 * products; scale and bias, a residual addition and a neuron may follow while it is in cache. */
#include "qsnn.h"
#include "qsnn_vector.h"
#include "qsnn_count.h"

#ifdef QSNN_SUFFIX /* several builds of this file in one library */
#define QSNN_JOIN2(a, b) a##b
#define QSNN_JOIN(a, b) QSNN_JOIN2(a, b)
#define qsnn_reset QSNN_JOIN(qsnn_reset, QSNN_SUFFIX)
#define qsnn_run QSNN_JOIN(qsnn_run, QSNN_SUFFIX)
void qsnn_reset(const uint32_t *image, uint32_t *state);
void qsnn_run(const uint32_t *image, uint32_t *state, uint32_t *arena, const int32_t *input,
              int32_t steps, int32_t input_stride, int32_t *output);
#endif

/* Value table: planes == 0 is int32 [pixel][stride], otherwise bits [pixel][planes][words]. */
enum { V_CHANNELS, V_HEIGHT, V_WIDTH, V_PLANES, V_STRIDE, V_OFFSET, V_SIZE };

enum { OP_CONV, OP_AFFINE, OP_ADD, OP_LOGIC, OP_POOL, OP_NEURON };
enum {
    F_TYPE, F_SOURCE, F_TARGET, F_WEIGHT, F_BINARY, F_ROW_WORDS, F_GROUPS, F_KH, F_KW, F_SH, F_SW,
    F_TOP, F_LEFT, F_DH, F_DW, F_MULTIPLIER, F_SHIFT, F_BIAS, F_PRODUCT32, F_ADD, F_SELF_FACTOR,
    F_ADD_FACTOR, F_NEURON, F_FUNCTION, F_LIST, F_LIST_COUNT, F_SIZE
};
enum { POOL_MAX, POOL_SUM, POOL_REPEAT };
enum { LOGIC_AND, LOGIC_IAND };

enum {
    N_BITS, N_STATE_BITS, N_LEVELS, N_RESET, N_ORDER, N_DELAY, N_CEILING, N_INITIAL, N_LEAK,
    N_PER_CHANNEL, N_THRESHOLD, N_RESET_VALUE, N_BOUNDS, N_STATE, N_SPIKES, N_MEMBRANE, N_READING,
    N_SOURCE, N_GUESS_SHIFT, N_GUESS_MULTIPLIER, N_SIZE
};
enum { RESET_NONE, RESET_HARD, RESET_SOFT };
enum { ORDER_FIRE_FIRST, ORDER_QUANTIZE_FIRST };
enum { DELAY_NONE, DELAY_TABLE, DELAY_GATE };
#define WIDE_LIMIT 1073741823

typedef struct {
    const uint32_t *image;
    const int32_t *ints; /* the image, read as signed words */
    uint32_t *state;
    uint32_t *arena;
    int32_t *line;       /* scratch: one pixel */
    int32_t *other;      /* scratch: another pixel */
    uint32_t *scratch;   /* what remains */
} context;

static inline const int32_t *value_of(const context *x, int32_t i) {
    return x->ints + x->ints[QSNN_H_VALUES] + i * V_SIZE;
}
static inline int32_t words_of(const int32_t *v) { return (v[V_CHANNELS] + 31) / 32; }
static inline uint32_t last_mask(int32_t channels) {
    return channels % 32 ? (1u << (channels % 32)) - 1u : 0xffffffffu;
}
static inline uint32_t *pixel_bits(const context *x, const int32_t *v, int32_t pixel) {
    return x->arena + v[V_OFFSET] + pixel * v[V_STRIDE];
}
static inline int32_t *pixel_ints(const context *x, const int32_t *v, int32_t pixel) {
    return (int32_t *)(x->arena + v[V_OFFSET]) + pixel * v[V_STRIDE];
}

/* ---- lines ---------------------------------------------------------------------------------- */

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
                                vi_set((int32_t)((uint32_t)factor << p)));
            vi_store(at, sum);
        }
    }
}

static void line_add(const context *x, int32_t *line, const int32_t *v, int32_t pixel,
                     int32_t factor, int first) {
    int32_t words = words_of(v), c;
    if (v[V_PLANES]) {
        line_add_bits(line, pixel_bits(x, v, pixel), v[V_PLANES], words, factor, first);
    } else {
        const int32_t *from = pixel_ints(x, v, pixel);
        vi f = vi_set(factor);
        for (c = 0; c < words * 32; c += LANES) {
            vi a = vi_load(from + c);
            if (factor != 1) a = vi_mul(a, f);
            vi_store(line + c, first ? a : vi_add(vi_load(line + c), a));
        }
    }
}

static void line_store(const context *x, const int32_t *line, const int32_t *v, int32_t pixel) {
    int32_t words = words_of(v), w, g, p;
    if (v[V_PLANES] == 0) {
        memcpy(pixel_ints(x, v, pixel), line, (size_t)words * 32 * 4);
        return;
    }
    for (w = 0; w < words; w++) {
        uint32_t mask = w == words - 1 ? last_mask(v[V_CHANNELS]) : 0xffffffffu;
        uint32_t *to = pixel_bits(x, v, pixel) + w;
        for (p = 0; p < v[V_PLANES]; p++) {
            uint32_t bits = 0;
            vi one = vi_set((int32_t)(1u << p));
            for (g = 0; g < 32; g += LANES)
                bits |= vm_bits(vm_test(vi_load(line + w * 32 + g), one)) << g;
            to[p * words] = bits & mask;
        }
    }
}

/* line = ((line * multiplier + half) >> shift) + bias, per channel. */
static void line_affine(const context *x, const int32_t *op, int32_t *line, int32_t words) {
    const int32_t *m = x->ints + op[F_MULTIPLIER];
    const int32_t *s = x->ints + op[F_SHIFT];
    const int32_t *b = x->ints + op[F_BIAS];
    int32_t c, n = words * 32;
    if (op[F_PRODUCT32]) { /* the products are proven to fit int32 */
        for (c = 0; c < n; c += LANES) {
            vi shift = vi_load(s + c);
            vi half = vi_load(s + n + c); /* 1 << (shift - 1) */
            vi y = vi_add(vi_mul(vi_load(line + c), vi_load(m + c)), half);
            vi_store(line + c, vi_add(vi_sra(y, shift), vi_load(b + c)));
        }
    } else {
        for (c = 0; c < n; c++) {
            int64_t y = (int64_t)line[c] * m[c] + ((int64_t)1 << (s[c] - 1));
            line[c] = (int32_t)(y >> s[c]) + b[c];
        }
    }
}

/* ---- neurons -------------------------------------------------------------------------------- */

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
static inline vi quantize(vi v, const int32_t *bounds, const int32_t *n, int bits) {
    const int32_t count = 2 * ((1 << (bits - 1)) - 1);
    vi sum = vi_set(0);
    int32_t j;
    if (bits <= 4) {
        for (j = 0; j < count; j++)
            sum = vi_add_if(sum, vm_ge(v, vi_set(bounds[j])), vi_set(1));
        return sum;
    }
    (void)n;
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
                code = vi_sub(quantize(h, bounds, n, bits), vi_set((1 << (bits - 1)) - 1));
                s = vm_ge(code, th);
            } else {
                s = vm_ge(h, th);
                u = h;
                if (reset == RESET_HARD) u = vi_select(s, rv, h);
                if (reset == RESET_SOFT) u = vi_select(s, vi_sub(h, rv), h);
                code = vi_sub(quantize(u, bounds, n, bits), vi_set((1 << (bits - 1)) - 1));
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

/* ---- convolution of bits with single-bit weights: event-driven, bit-sliced ------------------- */

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
        const uint32_t start = base + (uint32_t)w * 32u * step;
        while (rest) {
            list[n++] = start + (uint32_t)lowest_bit(rest) * step;
            rest &= rest - 1u;
        }
    }
#endif
    return n;
}

/* line (=, or += unless `first`) (count << (plane + 1)) - (active << plane), for the counts of
 * one block of `words` words (rows of the planes are `pitch` words apart). */
static void line_counts(int32_t *line, const uint32_t *planes, int32_t pitch, int depth,
                        int32_t words, int32_t plane, uint32_t active, int first) {
    const vi minus = vi_set(-(int32_t)(active << plane));
    int32_t w, g;
    int p;
#if defined(QSNN_AVX512)
    const __m128i up = _mm_cvtsi32_si128(plane + 1);
    (void)g;
    for (w = 0; w < words; w += 4) { /* 128 channels at a time, as 16-bit counts */
        const uint32_t *from = planes + w;
        const int32_t left = words - w < 4 ? words - w : 4;
        __m512i sum[4], weight = _mm512_set1_epi16(1);
        int k;
        sum[0] = sum[1] = sum[2] = sum[3] = _mm512_setzero_si512();
        for (p = 0; p < depth; p++) {
            sum[0] = _mm512_mask_add_epi16(sum[0], (__mmask32)from[0], sum[0], weight);
            sum[1] = _mm512_mask_add_epi16(sum[1], (__mmask32)from[1], sum[1], weight);
            sum[2] = _mm512_mask_add_epi16(sum[2], (__mmask32)from[2], sum[2], weight);
            sum[3] = _mm512_mask_add_epi16(sum[3], (__mmask32)from[3], sum[3], weight);
            weight = _mm512_add_epi16(weight, weight);
            from += pitch;
        }
        for (k = 0; k < left; k++) {
            int32_t *at = line + (w + k) * 32;
            __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(sum[k]));
            __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(sum[k], 1));
            low = vi_add(_mm512_sll_epi32(low, up), minus);
            high = vi_add(_mm512_sll_epi32(high, up), minus);
            vi_store(at, first ? low : vi_add(vi_load(at), low));
            vi_store(at + 16, first ? high : vi_add(vi_load(at + 16), high));
        }
    }
#elif defined(__AVX2__)
    const __m128i up = _mm_cvtsi32_si128(plane + 1);
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2,
                                            2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i select = _mm256_set1_epi64x((int64_t)0x8040201008040201u);
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
            y = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(low + g * 8)));
            if (depth > 8)
                y = _mm256_add_epi32(y, _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(
                        (const __m128i *)(const void *)(high + g * 8))), 8));
            y = vi_add(_mm256_sll_epi32(y, up), minus);
            vi_store(at, first ? y : vi_add(vi_load(at), y));
        }
    }
#else
    for (w = 0; w < words; w++) {
        for (g = 0; g < 32; g += LANES) {
            int32_t *at = line + w * 32 + g;
            vi y = minus;
            for (p = 0; p < depth; p++)
                y = vi_add_if(y, vm_from(planes[p * pitch + w] >> g),
                              vi_set((int32_t)(2u << (p + plane))));
            vi_store(at, first ? y : vi_add(vi_load(at), y));
        }
    }
#endif
}

/* Adds the rows at `offsets` (n of them; room for 16 more) to the line of dot products. */
static void add_rows(const uint8_t *rows, uint32_t *offsets, uint32_t n, uint32_t zero,
                     int32_t row_words, int32_t plane, int32_t *line, int first) {
    uint32_t planes[MAX_DEPTH * 16];
    uint32_t done = 0;
    int32_t c;
    if (n == 0) {
        if (first)
            for (c = 0; c < row_words * 32; c++) line[c] = 0;
        return;
    }
    while (done < n) {
        uint32_t part = n - done < 65520u ? n - done : 65520u, padded = (part + 15u) & ~15u, i;
        uint32_t *list = offsets + done;
        int depth = 5; /* planes the count functions always write */
        int32_t w = 0;
        for (i = part; i < padded; i++) list[i] = zero; /* only ever the last part */
        if (part >= 32u) depth = highest_bit(part) + 1;
        while (w < row_words) {
            int32_t left = row_words - w, width;
            const uint8_t *at = rows + (size_t)w * 4;
#if defined(QSNN_AVX512)
            if (left > 8) { count_512(at, list, padded, depth, planes); width = 16; }
            else if (left > 4) { count_256(at, list, padded, depth, planes); width = 8; }
            else { count_128(at, list, padded, depth, planes); width = 4; }
#elif defined(__AVX2__)
            if (left > 4) { count_256(at, list, padded, depth, planes); width = 8; }
            else { count_128(at, list, padded, depth, planes); width = 4; }
#elif defined(__GNUC__) && !defined(QSNN_PLAIN)
            count_128(at, list, padded, depth, planes); width = 4;
#else
            count_32(at, list, padded, depth, planes); width = 1;
#endif
            line_counts(line + w * 32, planes, width, depth, left < width ? left : width, plane,
                        part, first);
            w += width;
        }
        done += part;
        first = 0;
    }
}

static inline uint32_t *append(uint32_t *to, const uint32_t *from, uint32_t n, uint32_t base) {
    uint32_t i;
#if defined(QSNN_AVX512)
    __m512i b = _mm512_set1_epi32((int32_t)base);
    for (i = 0; i < n; i += 16)
        _mm512_storeu_si512((void *)(to + i),
                            _mm512_add_epi32(_mm512_loadu_si512((const void *)(from + i)), b));
#else
    for (i = 0; i < n; i++) to[i] = from[i] + base;
#endif
    return to + n;
}

/* Lists the active inputs of every input row once, in a ring of as many rows as the kernel is
 * high. An entry is (column * channels + channel) * row size, so that for one output pixel and one
 * kernel row the weight rows of a whole run of columns are that run of the list plus a constant. */
static void conv_events(const context *x, const int32_t *op) {
    const int32_t *src = value_of(x, op[F_SOURCE]), *dst = value_of(x, op[F_TARGET]);
    const int32_t cin = src[V_CHANNELS], height = src[V_HEIGHT], width = src[V_WIDTH];
    const int32_t words = words_of(src), planes = src[V_PLANES], row_words = op[F_ROW_WORDS];
    const int32_t kh = op[F_KH], kw = op[F_KW], dh = op[F_DH], dw = op[F_DW];
    const int32_t span = dh * (kh - 1) + 1 < height ? dh * (kh - 1) + 1 : height;
    const uint32_t step = (uint32_t)row_words * 4u, pixel_step = (uint32_t)cin * step;
    const size_t capacity = (size_t)width * (size_t)words * 32u + 16u;
    const uint32_t zero = (uint32_t)(kh * kw) * pixel_step; /* a row of zeros ends the weights */
    const uint8_t *rows = (const uint8_t *)(x->image + op[F_WEIGHT]);
    uint32_t *starts = x->scratch; /* where the list of each column begins in its row */
    uint32_t *ring = starts + (size_t)(span * planes) * (size_t)(width + 1);
    uint32_t *joined = ring + (size_t)(span * planes) * capacity;
    int32_t next = 0, oy, ox, ky, kx, ix, p;
    for (oy = 0; oy < dst[V_HEIGHT]; oy++) {
        int32_t first = oy * op[F_SH] - op[F_TOP], end = first + dh * (kh - 1) + 1;
        if (next < first) next = first;
        for (; next < end && next < height; next++) {
            for (p = 0; p < planes; p++) {
                const int32_t slot = next % span * planes + p;
                uint32_t *list = ring + (size_t)slot * capacity, n = 0;
                uint32_t *start = starts + slot * (width + 1);
                for (ix = 0; ix < width; ix++) {
                    const uint32_t *bits = pixel_bits(x, src, next * width + ix) + p * words;
                    start[ix] = n;
                    n += list_bits(bits, words, step, (uint32_t)ix * pixel_step, list + n);
                }
                start[width] = n;
            }
        }
        for (ox = 0; ox < dst[V_WIDTH]; ox++) {
            const int32_t left = ox * op[F_SW] - op[F_LEFT];
            for (p = 0; p < planes; p++) {
                uint32_t *to = joined;
                int32_t iy = first;
                for (ky = 0; ky < kh; ky++, iy += dh) {
                    int32_t slot;
                    const uint32_t *list, *start;
                    if (iy < 0 || iy >= height) continue;
                    slot = iy % span * planes + p;
                    list = ring + (size_t)slot * capacity;
                    start = starts + slot * (width + 1);
                    if (dw == 1) {
                        int32_t from = left < 0 ? 0 : left;
                        int32_t until = left + kw > width ? width : left + kw;
                        if (from < until)
                            to = append(to, list + start[from], start[until] - start[from],
                                        (uint32_t)(ky * kw - left) * pixel_step);
                        continue;
                    }
                    for (kx = 0; kx < kw; kx++) {
                        ix = left + kx * dw;
                        if (ix < 0 || ix >= width) continue;
                        to = append(to, list + start[ix], start[ix + 1] - start[ix],
                                    (uint32_t)(ky * kw + kx - ix) * pixel_step);
                    }
                }
                add_rows(rows, joined, (uint32_t)(to - joined), zero, row_words, p, x->line,
                         p == 0);
            }
            line_affine(x, op, x->line, words_of(dst));
            finish(x, op, x->line, oy * dst[V_WIDTH] + ox);
        }
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
            conv_events(x, op);
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
