/* Bit-sliced arithmetic: numbers of many channels held as bit planes, one bit per channel and
 * plane, so that one logic operation works on as many channels as a register has bits.
 *
 * COUNT_ROWS(name, V, ...) defines a function that adds single-bit rows column by column with
 * carry-save adders: the rows at base + offsets[0..n), n a multiple of 8. It writes `depth` (at
 * least 5) bit planes, `pitch` words apart: bit c of plane p is bit p of the number of rows whose
 * bit c is set. A row is as wide as the vector type V.
 *
 * `vb` is the widest vector of bits there is, VB_WORDS words of 32 bits. */
#ifndef QSNN_COUNT_H
#define QSNN_COUNT_H
#include "qsnn_vector.h"

#define MAX_DEPTH 32 /* planes of a number */

/* Adds the rows at eight offsets to the planes one, two and four; `carry` gets their carries. The
 * tree is flat: the chain from one call to the next is two additions long. */
#define ADD_EIGHT(carry, LOAD, XOR3, MAJ)                                                         \
    do {                                                                                          \
        r0 = LOAD(base + at[0]); r1 = LOAD(base + at[1]); r2 = LOAD(base + at[2]);                \
        s0 = XOR3(r0, r1, r2); c0 = MAJ(r0, r1, r2);                                              \
        r0 = LOAD(base + at[3]); r1 = LOAD(base + at[4]); r2 = LOAD(base + at[5]);                \
        s1 = XOR3(r0, r1, r2); c1 = MAJ(r0, r1, r2);                                              \
        r0 = LOAD(base + at[6]); r1 = LOAD(base + at[7]);                                         \
        r2 = XOR3(r0, r1, s0); c2 = MAJ(r0, r1, s0);                                              \
        t = XOR3(r2, s1, one); c3 = MAJ(r2, s1, one); one = t;                                    \
        s0 = XOR3(c0, c1, c2); c0 = MAJ(c0, c1, c2);                                              \
        t = XOR3(s0, c3, two); c1 = MAJ(s0, c3, two); two = t;                                    \
        t = XOR3(four, c0, c1); carry = MAJ(four, c0, c1); four = t;                              \
        at += 8;                                                                                  \
    } while (0)

#define COUNT_ROWS(name, V, LOAD, STORE, ZERO, XOR, AND, XOR3, MAJ)                               \
    static inline void name(const uint8_t *base, const uint32_t *offsets, uint32_t n, int depth,  \
                            uint32_t *planes, size_t pitch) {                                     \
        const uint32_t *at = offsets, *end = offsets + (n & ~15u);                                \
        V high[MAX_DEPTH];                                                                        \
        V one = ZERO, two = ZERO, four = ZERO, eight = ZERO, sixteen = ZERO;                      \
        V a, b, c, d, t, r0, r1, r2, s0, s1, c0, c1, c2, c3, held = ZERO;                         \
        int p, pending = 0;                                                                       \
        for (p = 5; p < depth; p++) high[p] = ZERO;                                               \
        while (at < end) {                                                                        \
            ADD_EIGHT(a, LOAD, XOR3, MAJ);                                                        \
            ADD_EIGHT(b, LOAD, XOR3, MAJ);                                                        \
            t = XOR3(eight, a, b); c = MAJ(eight, a, b); eight = t;                               \
            if (!pending) { /* keep the carry until the next one joins it */                      \
                held = c;                                                                         \
                pending = 1;                                                                      \
                continue;                                                                         \
            }                                                                                     \
            t = XOR3(sixteen, c, held); c = MAJ(sixteen, c, held); sixteen = t;                   \
            held = ZERO;                                                                          \
            pending = 0;                                                                          \
            for (p = 5; p < depth; p++) {                                                         \
                d = AND(high[p], c);                                                              \
                high[p] = XOR(high[p], c);                                                        \
                c = d;                                                                            \
            }                                                                                     \
        }                                                                                         \
        c = ZERO;                                                                                 \
        if (n & 8u) {                                                                             \
            ADD_EIGHT(a, LOAD, XOR3, MAJ);                                                        \
            c = AND(eight, a);                                                                    \
            eight = XOR(eight, a);                                                                \
        }                                                                                         \
        t = XOR3(sixteen, c, held); c = MAJ(sixteen, c, held); sixteen = t;                       \
        STORE(planes, one);                                                                       \
        STORE(planes + pitch, two);                                                               \
        STORE(planes + 2 * pitch, four);                                                          \
        STORE(planes + 3 * pitch, eight);                                                         \
        STORE(planes + 4 * pitch, sixteen);                                                       \
        for (p = 5; p < depth; p++) {                                                             \
            STORE(planes + (size_t)p * pitch, XOR(high[p], c));                                   \
            c = AND(high[p], c);                                                                  \
        }                                                                                         \
    }

#if defined(QSNN_AVX512)

#define LOAD512(p) _mm512_loadu_si512((const void *)(p))
#define STORE512(p, a) _mm512_storeu_si512((void *)(p), a)
#define XOR3_512(a, b, c) _mm512_ternarylogic_epi32(a, b, c, 0x96)
#define MAJ_512(a, b, c) _mm512_ternarylogic_epi32(a, b, c, 0xe8)
COUNT_ROWS(count_512, __m512i, LOAD512, STORE512, _mm512_setzero_si512(), _mm512_xor_si512,
           _mm512_and_si512, XOR3_512, MAJ_512)
#define LOAD256(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define STORE256(p, a) _mm256_storeu_si256((__m256i *)(void *)(p), a)
#define XOR3_256(a, b, c) _mm256_ternarylogic_epi32(a, b, c, 0x96)
#define MAJ_256(a, b, c) _mm256_ternarylogic_epi32(a, b, c, 0xe8)
COUNT_ROWS(count_256, __m256i, LOAD256, STORE256, _mm256_setzero_si256(), _mm256_xor_si256,
           _mm256_and_si256, XOR3_256, MAJ_256)
#define LOAD128(p) _mm_loadu_si128((const __m128i *)(const void *)(p))
#define STORE128(p, a) _mm_storeu_si128((__m128i *)(void *)(p), a)
#define XOR3_128(a, b, c) _mm_ternarylogic_epi32(a, b, c, 0x96)
#define MAJ_128(a, b, c) _mm_ternarylogic_epi32(a, b, c, 0xe8)
COUNT_ROWS(count_128, __m128i, LOAD128, STORE128, _mm_setzero_si128(), _mm_xor_si128,
           _mm_and_si128, XOR3_128, MAJ_128)

#elif defined(QSNN_VECTORS)

typedef uint32_t v128 __attribute__((vector_size(16)));
static inline v128 load_v128(const void *p) { v128 a; memcpy(&a, p, 16); return a; }
static inline void store_v128(void *p, v128 a) { memcpy(p, &a, 16); }
static inline v128 make_v128(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    v128 v = {a, b, c, d};
    return v;
}
#define XOR_V(a, b) ((a) ^ (b))
#define AND_V(a, b) ((a) & (b))
#define XOR3_V(a, b, c) ((a) ^ (b) ^ (c))
#define MAJ_V(a, b, c) (((a) & (b)) | ((c) & ((a) ^ (b))))
COUNT_ROWS(count_128, v128, load_v128, store_v128, make_v128(0, 0, 0, 0), XOR_V, AND_V, XOR3_V, MAJ_V)
#if defined(__AVX2__)
typedef uint32_t v256 __attribute__((vector_size(32)));
static inline v256 load_v256(const void *p) { v256 a; memcpy(&a, p, 32); return a; }
static inline void store_v256(void *p, v256 a) { memcpy(p, &a, 32); }
static inline v256 zero_v256(void) { v256 v = {0, 0, 0, 0, 0, 0, 0, 0}; return v; }
COUNT_ROWS(count_256, v256, load_v256, store_v256, zero_v256(), XOR_V, AND_V, XOR3_V, MAJ_V)
#endif

#else

static inline uint32_t load_32(const void *p) { uint32_t a; memcpy(&a, p, 4); return a; }
static inline void store_32(void *p, uint32_t a) { memcpy(p, &a, 4); }
#define XOR_V(a, b) ((a) ^ (b))
#define AND_V(a, b) ((a) & (b))
#define XOR3_V(a, b, c) ((a) ^ (b) ^ (c))
#define MAJ_V(a, b, c) (((a) & (b)) | ((c) & ((a) ^ (b))))
COUNT_ROWS(count_32, uint32_t, load_32, store_32, 0u, XOR_V, AND_V, XOR3_V, MAJ_V)

#endif

/* ---- the widest vector of bits ---------------------------------------------------------------- */

#if defined(QSNN_AVX512)

#define VB_WORDS 16
typedef __m512i vb;
#define vb_load(p) LOAD512(p)
#define vb_store(p, a) STORE512(p, a)
#define vb_zero() _mm512_setzero_si512()
#define vb_and(a, b) _mm512_and_si512(a, b)
#define vb_or(a, b) _mm512_or_si512(a, b)
#define vb_xor(a, b) _mm512_xor_si512(a, b)
#define vb_xor3(a, b, c) XOR3_512(a, b, c)
#define vb_majority(a, b, c) MAJ_512(a, b, c)
#define vb_choose(m, a, b) _mm512_ternarylogic_epi32(m, a, b, 0xca) /* m ? a : b, bit by bit */
#define vb_or_not(a, b) _mm512_ternarylogic_epi32(a, b, b, 0xf3)    /* a | ~b */
#define vb_not(a) _mm512_ternarylogic_epi32(a, a, a, 0x0f)
/* All ones in the lanes whose bit p is set. */
#define vb_spread_bit(a, p)                                                                        \
    _mm512_srai_epi32(_mm512_sll_epi32(a, _mm_cvtsi32_si128(31 - (p))), 31)
/* Lane i receives values[i / words]. */
static inline vb vb_lanes(const int32_t *values, const int words) {
    const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (words == 1) return LOAD512(values);
    if (words == 2) return _mm512_permutexvar_epi32(_mm512_srli_epi32(i, 1), LOAD512(values));
    if (words == 4) return _mm512_permutexvar_epi32(_mm512_srli_epi32(i, 2), LOAD512(values));
    if (words == 8) return _mm512_permutexvar_epi32(_mm512_srli_epi32(i, 3), LOAD512(values));
    return _mm512_set1_epi32(values[0]);
}
/* The first `words` words, again and again; 0: all words as they are. */
static inline vb vb_repeat(const uint32_t *p, const int words) {
    if (words == 1) return _mm512_set1_epi32((int32_t)*p);
    if (words == 2) return _mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)(const void *)p));
    if (words == 4) return _mm512_broadcast_i32x4(LOAD128(p));
    if (words == 8) return _mm512_broadcast_i64x4(LOAD256(p));
    return LOAD512(p);
}

#elif defined(__AVX2__)

#define VB_WORDS 8
typedef __m256i vb;
#define vb_load(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define vb_store(p, a) _mm256_storeu_si256((__m256i *)(void *)(p), a)
#define vb_zero() _mm256_setzero_si256()
#define vb_and(a, b) _mm256_and_si256(a, b)
#define vb_or(a, b) _mm256_or_si256(a, b)
#define vb_xor(a, b) _mm256_xor_si256(a, b)
#define vb_not(a) _mm256_xor_si256(a, _mm256_set1_epi32(-1))
#define vb_spread_bit(a, p)                                                                        \
    _mm256_srai_epi32(_mm256_sll_epi32(a, _mm_cvtsi32_si128(31 - (p))), 31)
static inline vb vb_lanes(const int32_t *values, const int words) {
    const __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    if (words == 1) return vb_load(values);
    if (words == 2) return _mm256_permutevar8x32_epi32(vb_load(values), _mm256_srli_epi32(i, 1));
    if (words == 4) return _mm256_permutevar8x32_epi32(vb_load(values), _mm256_srli_epi32(i, 2));
    return _mm256_set1_epi32(values[0]);
}
static inline vb vb_repeat(const uint32_t *p, const int words) {
    if (words == 1) return _mm256_set1_epi32((int32_t)*p);
    if (words == 2) return _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)(const void *)p));
    if (words == 4)
        return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)p));
    return vb_load(p);
}

#elif defined(QSNN_VECTORS)

#define VB_WORDS 4
typedef v128 vb;
#define vb_load(p) load_v128(p)
#define vb_store(p, a) store_v128(p, a)
#define vb_zero() make_v128(0, 0, 0, 0)
#define vb_and(a, b) ((a) & (b))
#define vb_or(a, b) ((a) | (b))
#define vb_xor(a, b) ((a) ^ (b))
#define vb_not(a) (~(a))
#define vb_spread_bit(a, p) (-(((a) >> (uint32_t)(p)) & 1u))
static inline vb vb_lanes(const int32_t *values, const int words) {
    uint32_t a = (uint32_t)values[0], b = a, c = a, d = a;
    if (words == 1) { b = (uint32_t)values[1]; c = (uint32_t)values[2]; d = (uint32_t)values[3]; }
    if (words == 2) c = d = (uint32_t)values[1];
    return make_v128(a, b, c, d);
}
static inline vb vb_repeat(const uint32_t *p, const int words) {
    if (words == 1) return make_v128(p[0], p[0], p[0], p[0]);
    if (words == 2) return make_v128(p[0], p[1], p[0], p[1]);
    return load_v128(p);
}

#else

#define VB_WORDS 1
typedef uint32_t vb;
#define vb_load(p) load_32(p)
#define vb_store(p, a) store_32(p, a)
#define vb_zero() 0u
#define vb_and(a, b) ((a) & (b))
#define vb_or(a, b) ((a) | (b))
#define vb_xor(a, b) ((a) ^ (b))
#define vb_not(a) (~(a))
#define vb_spread_bit(a, p) wrap_sub(0u, ((a) >> (p)) & 1u)
static inline vb vb_lanes(const int32_t *values, const int words) {
    (void)words;
    return (uint32_t)values[0];
}
static inline vb vb_repeat(const uint32_t *p, const int words) {
    (void)words;
    return *p;
}

#endif

#if !defined(QSNN_AVX512)
#define vb_or_not(a, b) vb_or(a, vb_not(b))
static inline vb vb_xor3(vb a, vb b, vb c) { return vb_xor(vb_xor(a, b), c); }
static inline vb vb_majority(vb a, vb b, vb c) {
    return vb_or(vb_and(a, b), vb_and(c, vb_xor(a, b)));
}
static inline vb vb_choose(vb m, vb a, vb b) { return vb_xor(b, vb_and(m, vb_xor(a, b))); }
#endif

/* Bits set in each lane. */
static inline vi vb_popcount(vb a) {
#if defined(QSNN_AVX512)
    const __m512i four = _mm512_set1_epi8(15);
    const __m512i table = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(a, four));
    const __m512i high =
        _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi32(a, 4), four));
    return _mm512_madd_epi16(
        _mm512_maddubs_epi16(_mm512_add_epi8(low, high), _mm512_set1_epi8(1)),
        _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    const __m256i four = _mm256_set1_epi8(15);
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(a, four));
    const __m256i high =
        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi32(a, 4), four));
    return _mm256_madd_epi16(
        _mm256_maddubs_epi16(_mm256_add_epi8(low, high), _mm256_set1_epi8(1)),
        _mm256_set1_epi16(1));
#else
    a = a - ((a >> 1) & 0x55555555u);
    a = (a & 0x33333333u) + ((a >> 2) & 0x33333333u);
    a = (a + (a >> 4)) & 0x0f0f0f0fu;
    a = a + (a >> 8);
    a = (a + (a >> 16)) & 63u;
    return (vi)a;
#endif
}

/* AND and popcount: to[c] = bits set both in `bits` and in column c, for `columns` columns, a multiple
 * of 16. `n`, the words of a column, is a multiple of 8; `weights` is [16 columns][word][column]. */
static inline void count_dense(const uint32_t *weights, const uint32_t *bits, int32_t n,
                               int32_t columns, int32_t *to) {
    int32_t c, k;
    for (c = 0; c < columns; c += LANES) {
        const uint32_t *at = weights + (size_t)(c / 16) * (size_t)n * 16u + c % 16;
        vb one = vb_zero(), two = one, four = one, a, b, d, e, f, g, h;
        vi sum = vi_set(0);
        for (k = 0; k < n; k += 8) {
#define DENSE(i)                                                                                   \
    vb_and(vb_load(at + (k + (i)) * 16), vb_repeat(bits + k + (i), 1))
            a = DENSE(0); b = DENSE(1); d = DENSE(2);
            e = vb_xor3(a, b, d); f = vb_majority(a, b, d);
            a = DENSE(3); b = DENSE(4); d = DENSE(5);
            g = vb_xor3(a, b, d); h = vb_majority(a, b, d);
            a = DENSE(6); b = DENSE(7);
            d = vb_xor3(a, b, e); a = vb_majority(a, b, e);
            b = vb_majority(d, g, one); one = vb_xor3(d, g, one);
            d = vb_xor3(f, h, a); e = vb_majority(f, h, a);
            f = vb_majority(d, b, two); two = vb_xor3(d, b, two);
            a = vb_majority(four, e, f); four = vb_xor3(four, e, f);
            sum = vi_add(sum, vb_popcount(a));
#undef DENSE
        }
        sum = vi_add(sum, sum);
        sum = vi_add(sum, vb_popcount(four));
        sum = vi_add(sum, sum);
        sum = vi_add(sum, vb_popcount(two));
        sum = vi_add(sum, sum);
        vi_store(to + c, vi_add(sum, vb_popcount(one)));
    }
}

#endif
