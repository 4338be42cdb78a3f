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
    F_ADD_FACTOR, F_NEURON, F_FUNCTION, F_LIST, F_LIST_COUNT, F_JOINED, F_PITCH, F_DEPTH, F_CENTRE,
    F_FIRING, F_PAIRS, F_DENSE, F_DENSE_ROWS, F_METHOD, F_SIZE
};
enum { METHOD_MEASURE, METHOD_EVENTS, METHOD_DENSE };
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
#elif defined(__GNUC__) && !defined(QSNN_PLAIN)
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
static inline void fire_strip(const context *x, const int32_t *op, const strip *s, int32_t pixel,
                              vb *count, int have, const int32_t *sums, const int repeat) {
    const int32_t *n = x->ints + x->ints[QSNN_H_NEURONS] + op[F_NEURON] * N_SIZE;
    const int32_t words = s->words, depth = op[F_DEPTH];
    const size_t block = (size_t)(depth + 1) * 9u * (size_t)words;
    const uint32_t *at = x->image + op[F_FIRING];
    uint32_t *state = x->state + n[N_STATE] + pixel * 2 * words;
    vb low, high, odd, carry = vb_zero(), answer[9], k, spike, least0, least1;
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
    at += block;
    if (op[F_ADD] >= 0) {
        const int32_t *v = value_of(x, op[F_ADD]);
        const vb other = strip_load(s, pixel_bits(x, v, pixel), words);
        compare(count, odd, depth, at + s->first, (size_t)words, repeat, answer);
        spike = vb_choose(other, vb_choose(high, answer[6], vb_choose(low, answer[3], answer[0])),
                          spike);
        least0 = vb_choose(other, vb_choose(high, answer[7], vb_choose(low, answer[4], answer[1])),
                           least0);
        least1 = vb_choose(other, vb_choose(high, answer[8], vb_choose(low, answer[5], answer[2])),
                           least1);
        at += block;
    }
    strip_store(s, pixel_bits(x, value_of(x, n[N_SPIKES]), pixel), words, spike);
    high = vb_not(least0); /* codes -1, 0, 1 in two's complement: 11, 00, 01 */
    low = vb_or_not(least1, least0);
    if (n[N_RESET] == RESET_HARD) { /* the level of the reset value, per channel */
        low = vb_choose(spike, vb_repeat(at + s->first, repeat), low);
        high = vb_choose(spike, vb_repeat(at + words + s->first, repeat), high);
    }
    state_store(s, state, low, high, repeat);
}

/* What follows counting, for one row of output pixels, a strip after the other: sums of the counts
 * of planes and kernel columns, then the neuron on bits, or plain numbers for whatever comes next. */
static void finish_row(const context *x, const int32_t *op, int32_t oy, const uint32_t *counts,
                       size_t plane, int32_t operands, const int *depth, const int32_t *sums) {
    const int32_t out = value_of(x, op[F_TARGET])[V_WIDTH], words = op[F_ROW_WORDS];
    const int32_t planes = value_of(x, op[F_SOURCE])[V_PLANES], dw = op[F_DW];
    const int deepest = op[F_DEPTH] < 5 ? 5 : op[F_DEPTH];
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
                        plane, depth[p], p, op[F_DEPTH]);
            if (op[F_FIRING]) {
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
                                s.used, op[F_CENTRE] - sums[ox + g]);
                    if (s.first + VB_WORDS < words) continue;
                    line_affine(x, op, x->line, words);
                    finish(x, op, x->line, pixel + g);
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

/* ---- the dense way to count: AND and popcount -------------------------------------------------- */

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

/* Convolution of bits with single-bit weights. For each output pixel the active inputs are listed,
 * each selects a row of weight bits, and the rows are counted.
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

/* ---- convolution of 16-bit codes with 8-bit weights: the input layer --------------------------- */

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
