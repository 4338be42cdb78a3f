/* The few vector operations the runtime is written in, for AVX-512, AVX2, cores with vectors of 128
 * bits (SSE2, NEON, Helium, AltiVec, RISC-V V, wasm) and plain C99. `vi` holds LANES int32, `vm` a truth value for each.
 * Which one is used is decided by the flags the file is compiled with. */
#ifndef QSNN_VECTOR_H
#define QSNN_VECTOR_H

#include <stdint.h>
#include <string.h>

/* Arithmetic that is meant to wrap, modulo 2^32. Sums of offsets do, and so do lanes of padding;
 * everything else is proven not to. */
#if defined(__clang__)
#define QSNN_WRAPS __attribute__((no_sanitize("unsigned-integer-overflow")))
#else
#define QSNN_WRAPS
#endif
QSNN_WRAPS static inline uint32_t wrap_add(uint32_t a, uint32_t b) { return a + b; }
QSNN_WRAPS static inline uint32_t wrap_sub(uint32_t a, uint32_t b) { return a - b; }
QSNN_WRAPS static inline uint32_t wrap_mul(uint32_t a, uint32_t b) { return a * b; }

/* Where byte i of an array of words is: images hold the first byte lowest in a word. */
static inline int32_t byte_place(int32_t i) {
    const uint32_t one = 1;
    return *(const uint8_t *)(const void *)&one ? i : i ^ 3;
}

/* Vectors where the core has a unit for them; elsewhere a compiler would spell them out, in twice
 * the code and time of plain words. QSNN_PLAIN asks for plain words everywhere. */
#if defined(__GNUC__) && !defined(QSNN_PLAIN) &&                                                   \
    (defined(__SSE2__) || defined(__ARM_NEON) || defined(__ARM_FEATURE_MVE) ||                     \
     defined(__ALTIVEC__) || defined(__VSX__) || defined(__VX__) || defined(__riscv_vector) ||      \
     defined(__mips_msa) || defined(__loongarch_sx) || defined(__wasm_simd128__))
#define QSNN_VECTORS
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include <immintrin.h>
#define LANES 16
#define QSNN_AVX512 1
typedef __m512i vi;
typedef __mmask16 vm;
static inline vi vi_load(const int32_t *p) { return _mm512_loadu_si512((const void *)p); }
static inline void vi_store(int32_t *p, vi a) { _mm512_storeu_si512((void *)p, a); }
static inline vi vi_set(int32_t a) { return _mm512_set1_epi32(a); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static inline vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
static inline vi vi_sra(vi a, vi b) { return _mm512_srav_epi32(a, b); }
static inline vi vi_sll(vi a, vi b) { return _mm512_sllv_epi32(a, b); }
static inline vi vi_min(vi a, vi b) { return _mm512_min_epi32(a, b); }
static inline vm vm_ge(vi a, vi b) { return _mm512_cmpge_epi32_mask(a, b); }
static inline vm vm_test(vi a, vi b) { return _mm512_test_epi32_mask(a, b); }
static inline vm vm_from(uint32_t bits) { return (vm)bits; }
static inline uint32_t vm_bits(vm m) { return (uint32_t)m; }
static inline vi vi_select(vm m, vi a, vi b) { return _mm512_mask_mov_epi32(b, m, a); }
static inline vi vi_add_if(vi a, vm m, vi b) { return _mm512_mask_add_epi32(a, m, a, b); }
static inline vi vi_load_i8(const int8_t *p, int32_t i) { /* LANES bytes from the i-th on */
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p + i)));
}
static inline vi vi_lookup(const int32_t *table, vi index) {
    return _mm512_i32gather_epi32(index, (const void *)table, 4);
}
/* Sum of the products of two pairs of 16-bit numbers. */
static inline vi vi_madd(vi a, vi b) { return _mm512_madd_epi16(a, b); }
#define SMALL_TABLE 16
static inline vi vi_lookup_small(vi table, vi index) { return _mm512_permutexvar_epi32(index, table); }

#elif defined(__AVX2__)

#include <immintrin.h>
#define LANES 8
typedef __m256i vi;
typedef __m256i vm;
static inline vi vi_load(const int32_t *p) { return _mm256_loadu_si256((const vi *)(const void *)p); }
static inline void vi_store(int32_t *p, vi a) { _mm256_storeu_si256((vi *)(void *)p, a); }
static inline vi vi_set(int32_t a) { return _mm256_set1_epi32(a); }
static inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
static inline vi vi_mul(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
static inline vi vi_sra(vi a, vi b) { return _mm256_srav_epi32(a, b); }
static inline vi vi_sll(vi a, vi b) { return _mm256_sllv_epi32(a, b); }
static inline vi vi_min(vi a, vi b) { return _mm256_min_epi32(a, b); }
static inline vm vm_ge(vi a, vi b) {
    return _mm256_xor_si256(_mm256_cmpgt_epi32(b, a), _mm256_set1_epi32(-1));
}
static inline vm vm_test(vi a, vi b) {
    return _mm256_xor_si256(_mm256_cmpeq_epi32(_mm256_and_si256(a, b), _mm256_setzero_si256()),
                            _mm256_set1_epi32(-1));
}
static inline vm vm_from(uint32_t bits) {
    const vi lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int32_t)bits), lane), lane);
}
static inline uint32_t vm_bits(vm m) {
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(m)) & 0xffu;
}
static inline vi vi_select(vm m, vi a, vi b) { return _mm256_blendv_epi8(b, a, m); }
static inline vi vi_add_if(vi a, vm m, vi b) { return _mm256_add_epi32(a, _mm256_and_si256(m, b)); }
static inline vi vi_load_i8(const int8_t *p, int32_t i) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p + i)));
}
static inline vi vi_lookup(const int32_t *table, vi index) {
    return _mm256_i32gather_epi32((const int *)table, index, 4);
}
static inline vi vi_madd(vi a, vi b) { return _mm256_madd_epi16(a, b); }
#define SMALL_TABLE 8
static inline vi vi_lookup_small(vi table, vi index) {
    return _mm256_permutevar8x32_epi32(table, index);
}
/* (a * m + half) >> shift with products of 64 bits, of even lanes and of odd ones. Here compilers
 * find no way to it, as there is no arithmetic shift of 64 bits; with 2^62 added no product is
 * negative, and a logical one does. */
#define QSNN_WIDE_PRODUCTS 1
static inline vi vi_scaled_even(vi a, vi m, vi shift) {
    const vi one = _mm256_set1_epi64x(1), high = _mm256_set1_epi64x((int64_t)1 << 62);
    const vi half = _mm256_sllv_epi64(one, _mm256_sub_epi64(shift, one));
    const vi y = _mm256_add_epi64(_mm256_add_epi64(_mm256_mul_epi32(a, m), half), high);
    return _mm256_sub_epi64(_mm256_srlv_epi64(y, shift), _mm256_srlv_epi64(high, shift));
}
static inline vi vi_scaled(vi a, vi m, vi shift) {
    const vi even = vi_scaled_even(a, m, _mm256_and_si256(shift, _mm256_set1_epi64x(0xffffffff)));
    const vi odd = vi_scaled_even(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(m, 32),
                                  _mm256_srli_epi64(shift, 32));
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}

#elif defined(QSNN_VECTORS) /* 128-bit vectors on whatever there is */

#define LANES 4
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16))); /* whose overflow is defined */
typedef vi vm; /* every lane 0 or -1 */
static inline vi vi_load(const int32_t *p) { vi a; memcpy(&a, p, sizeof a); return a; }
static inline void vi_store(int32_t *p, vi a) { memcpy(p, &a, sizeof a); }
static inline vi vi_set(int32_t a) { vi v = {a, a, a, a}; return v; }
static inline vi vi_add(vi a, vi b) { return (vi)((vu)a + (vu)b); }
static inline vi vi_sub(vi a, vi b) { return (vi)((vu)a - (vu)b); }
static inline vi vi_mul(vi a, vi b) { return (vi)((vu)a * (vu)b); }
static inline vi vi_sra(vi a, vi b) { return a >> b; }
static inline vi vi_sll(vi a, vi b) { return (vi)((vu)a << (vu)b); }
static inline vm vm_ge(vi a, vi b) { return (vm)(a >= b); }
static inline vm vm_test(vi a, vi b) { vi zero = {0, 0, 0, 0}; return (vm)((a & b) != zero); }
static inline vm vm_from(uint32_t bits) {
    const vi lane = {1, 2, 4, 8};
    return vm_test(vi_set((int32_t)bits), lane);
}
static inline uint32_t vm_bits(vm m) {
    return (uint32_t)((m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8));
}
static inline vi vi_select(vm m, vi a, vi b) { return (a & m) | (b & ~m); }
static inline vi vi_min(vi a, vi b) { return vi_select((vm)(a < b), a, b); }
static inline vi vi_add_if(vi a, vm m, vi b) { return vi_add(a, b & m); }
static inline vi vi_load_i8(const int8_t *p, int32_t i) {
    vi v = {p[byte_place(i)], p[byte_place(i + 1)], p[byte_place(i + 2)], p[byte_place(i + 3)]};
    return v;
}
static inline vi vi_lookup(const int32_t *table, vi i) {
    vi v = {table[i[0]], table[i[1]], table[i[2]], table[i[3]]};
    return v;
}
static inline vi vi_madd(vi a, vi b) {
    const vi low_a = (vi)((vu)a << 16) >> 16, low_b = (vi)((vu)b << 16) >> 16;
    return vi_add(vi_mul(low_a, low_b), vi_mul(a >> 16, b >> 16));
}
#define SMALL_TABLE 0

#else /* plain C99 */

#define LANES 1
typedef int32_t vi;
typedef int32_t vm;
static inline vi vi_load(const int32_t *p) { return *p; }
static inline void vi_store(int32_t *p, vi a) { *p = a; }
static inline vi vi_set(int32_t a) { return a; }
static inline vi vi_add(vi a, vi b) { return (vi)wrap_add((uint32_t)a, (uint32_t)b); }
static inline vi vi_sub(vi a, vi b) { return (vi)wrap_sub((uint32_t)a, (uint32_t)b); }
static inline vi vi_mul(vi a, vi b) { return (vi)wrap_mul((uint32_t)a, (uint32_t)b); }
static inline vi vi_sra(vi a, vi b) { return a >> b; }
static inline vi vi_sll(vi a, vi b) { return (vi)((uint32_t)a << b); }
static inline vi vi_min(vi a, vi b) { return a < b ? a : b; }
static inline vm vm_ge(vi a, vi b) { return a >= b; }
static inline vm vm_test(vi a, vi b) { return (a & b) != 0; }
static inline vm vm_from(uint32_t bits) { return (vm)(bits & 1u); }
static inline uint32_t vm_bits(vm m) { return (uint32_t)m; }
static inline vi vi_select(vm m, vi a, vi b) { return m ? a : b; }
static inline vi vi_add_if(vi a, vm m, vi b) { return m ? vi_add(a, b) : a; }
static inline vi vi_load_i8(const int8_t *p, int32_t i) { return p[byte_place(i)]; }
static inline vi vi_lookup(const int32_t *table, vi i) { return table[i]; }
static inline vi vi_madd(vi a, vi b) {
    const vi low_a = ((a & 0xffff) ^ 0x8000) - 0x8000, low_b = ((b & 0xffff) ^ 0x8000) - 0x8000;
    return vi_add(low_a * low_b, (a >> 16) * (b >> 16));
}
#define SMALL_TABLE 0

#endif

static inline int highest_bit(uint32_t w) {
#if defined(__GNUC__)
    return 31 - __builtin_clz(w);
#else
    int i = 0;
    while (w >>= 1) i++;
    return i;
#endif
}

static inline int lowest_bit(uint32_t w) {
#if defined(__GNUC__)
    return __builtin_ctz(w);
#else
    int i = 0;
    while (!(w & 1u)) { w >>= 1; i++; }
    return i;
#endif
}

#endif
