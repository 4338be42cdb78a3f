/* Bit-sliced counting: adds rows of single bits column by column with carry-save adders.
 *
 * COUNT_ROWS(name, V, ...) defines a function that adds the rows at base + offsets[0..n), n a
 * multiple of 16, and writes `depth` bit planes: bit c of plane p is bit p of the number of rows
 * whose bit c is set. A row is as wide as the vector type V. */
#ifndef QSNN_COUNT_H
#define QSNN_COUNT_H

#define MAX_DEPTH 16 /* planes of a count: at most 2^16 - 1 rows at a time */

/* Adds the rows at eight offsets to the planes one, two and four; `carry` gets their carries. */
#define ADD_EIGHT(carry, LOAD, XOR3, MAJ)                                                         \
    do {                                                                                          \
        r0 = LOAD(base + at[0]); r1 = LOAD(base + at[1]);                                         \
        t = XOR3(one, r0, r1); two_a = MAJ(one, r0, r1); one = t;                                 \
        r0 = LOAD(base + at[2]); r1 = LOAD(base + at[3]);                                         \
        t = XOR3(one, r0, r1); two_b = MAJ(one, r0, r1); one = t;                                 \
        t = XOR3(two, two_a, two_b); four_a = MAJ(two, two_a, two_b); two = t;                    \
        r0 = LOAD(base + at[4]); r1 = LOAD(base + at[5]);                                         \
        t = XOR3(one, r0, r1); two_a = MAJ(one, r0, r1); one = t;                                 \
        r0 = LOAD(base + at[6]); r1 = LOAD(base + at[7]);                                         \
        t = XOR3(one, r0, r1); two_b = MAJ(one, r0, r1); one = t;                                 \
        t = XOR3(two, two_a, two_b); four_b = MAJ(two, two_a, two_b); two = t;                    \
        t = XOR3(four, four_a, four_b); carry = MAJ(four, four_a, four_b); four = t;              \
        at += 8;                                                                                  \
    } while (0)

#define COUNT_ROWS(name, V, LOAD, STORE, ZERO, XOR, AND, XOR3, MAJ)                               \
    static inline void name(const uint8_t *base, const uint32_t *offsets, uint32_t n, int depth,  \
                            uint32_t *planes) {                                                   \
        const uint32_t *at = offsets, *end = offsets + n;                                         \
        V high[MAX_DEPTH];                                                                        \
        V one = ZERO, two = ZERO, four = ZERO, eight = ZERO, sixteen = ZERO;                      \
        V a, b, c, d, t, r0, r1, two_a, two_b, four_a, four_b, held = ZERO;                       \
        int p, pending = 0;                                                                       \
        for (p = 5; p < MAX_DEPTH; p++) high[p] = ZERO;                                             \
        while (at < end) {                                                                        \
            ADD_EIGHT(a, LOAD, XOR3, MAJ);                                                        \
            ADD_EIGHT(b, LOAD, XOR3, MAJ);                                                        \
            t = XOR3(eight, a, b); c = MAJ(eight, a, b); eight = t;                               \
            if (!pending && at < end) { /* keep the carry until the next one joins it */          \
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
        STORE(planes, one);                                                                       \
        STORE(planes + sizeof(V) / 4, two);                                                       \
        STORE(planes + 2 * (sizeof(V) / 4), four);                                                \
        STORE(planes + 3 * (sizeof(V) / 4), eight);                                               \
        STORE(planes + 4 * (sizeof(V) / 4), sixteen);                                             \
        for (p = 5; p < depth; p++) STORE(planes + p * (sizeof(V) / 4), high[p]);                 \
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

#elif defined(__GNUC__) && !defined(QSNN_PLAIN)

typedef uint32_t v128 __attribute__((vector_size(16)));
static inline v128 load_v128(const void *p) { v128 a; memcpy(&a, p, 16); return a; }
static inline void store_v128(void *p, v128 a) { memcpy(p, &a, 16); }
#define ZERO_V128 ((v128){0, 0, 0, 0})
#define XOR_V(a, b) ((a) ^ (b))
#define AND_V(a, b) ((a) & (b))
#define XOR3_V(a, b, c) ((a) ^ (b) ^ (c))
#define MAJ_V(a, b, c) (((a) & (b)) | ((c) & ((a) ^ (b))))
COUNT_ROWS(count_128, v128, load_v128, store_v128, ZERO_V128, XOR_V, AND_V, XOR3_V, MAJ_V)
#if defined(__AVX2__)
typedef uint32_t v256 __attribute__((vector_size(32)));
static inline v256 load_v256(const void *p) { v256 a; memcpy(&a, p, 32); return a; }
static inline void store_v256(void *p, v256 a) { memcpy(p, &a, 32); }
#define ZERO_V256 ((v256){0, 0, 0, 0, 0, 0, 0, 0})
COUNT_ROWS(count_256, v256, load_v256, store_v256, ZERO_V256, XOR_V, AND_V, XOR3_V, MAJ_V)
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
#endif
