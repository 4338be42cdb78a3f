/* The kernels for one instruction set, whose name is in QSNN_SUFFIX, for all dtypes. */
#include "native.h"

#include <math.h>
#include <string.h>

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)

/* ---- half precision --------------------------------------------------------------------------- */

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float from_bfloat16(uint16_t half) { return float_of((uint32_t)half << 16); }

static inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0u : rounded);
}

static inline float from_float16(uint16_t half) {
    const uint32_t size = (uint32_t)(half & 0x7fffu) << 13;
    /* The exponent moved by multiplying, which is right for denormals too; then infinity and NaN. */
    const float scaled = float_of(size) * 5.192296858534828e33f; /* 2^112 */
    const uint32_t bits = bits_of_float(scaled) | (size >= 0x0f800000u ? 0x7f800000u : 0u);
    return float_of(bits | (uint32_t)(half & 0x8000u) << 16);
}

static inline uint16_t to_float16(float value) {
    const uint32_t bits = bits_of_float(value), size = bits & 0x7fffffffu;
    /* Below 2^-14 the addition of 1/2 leaves the wanted bits at the end. */
    const uint32_t small = bits_of_float(float_of(size) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
    const uint32_t finite = size < 0x38800000u ? small : normal;
    const uint32_t large = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return (uint16_t)((size >= 0x477ff000u ? large : finite) | (bits >> 16 & 0x8000u));
}

/* ---- the templates ------------------------------------------------------------------------------ */

#define REAL float
#define INT int32_t
#define UINT uint32_t
#define R(x) JOIN(x, _in_float)
#include "real.h"
#include "weights.h"

#define NAME(x) JOIN(x, _float32)
#define STORE float
#define STORED_ONE 1
#define NARROWED(value) (value)
#include "lif.h"
#undef NAME
#undef STORE
#undef STORED_ONE
#undef NARROWED

#define NARROW
#define STORE uint16_t
#define NAME(x) JOIN(x, _bfloat16)
#define STORED_ONE 0x3f80u
#define WIDEN(half) from_bfloat16(half)
#define NARROWED(value) to_bfloat16(value)
#include "lif.h"
#undef NAME
#undef STORED_ONE
#undef WIDEN
#undef NARROWED

#define NAME(x) JOIN(x, _float16)
#define STORED_ONE 0x3c00u
#define WIDEN(half) from_float16(half)
#define NARROWED(value) to_float16(value)
#include "lif.h"
#undef NARROW
#undef NAME
#undef STORE
#undef STORED_ONE
#undef WIDEN
#undef NARROWED

#undef REAL
#undef INT
#undef UINT
#undef R
#define REAL double
#define INT int64_t
#define UINT uint64_t
#define R(x) JOIN(x, _in_double)
#include "real.h"
#include "weights.h"

#define NAME(x) JOIN(x, _float64)
#define STORE double
#define STORED_ONE 1
#define NARROWED(value) (value)
#include "lif.h"

/* ---- by dtype ------------------------------------------------------------------------------------ */

void JOIN(qsnn_lif_forward, QSNN_SUFFIX)(const void *, const team *);
void JOIN(qsnn_lif_forward, QSNN_SUFFIX)(const void *job, const team *by) {
    static void (*const of[])(const lif_job *, const team *) = {
        forward_float32, forward_float64, forward_bfloat16, forward_float16};
    of[((const lif_job *)job)->dtype](job, by);
}

void JOIN(qsnn_lif_backward, QSNN_SUFFIX)(const void *, const team *);
void JOIN(qsnn_lif_backward, QSNN_SUFFIX)(const void *job, const team *by) {
    static void (*const of[])(const lif_job *, const team *) = {
        backward_float32, backward_float64, backward_bfloat16, backward_float16};
    of[((const lif_job *)job)->dtype](job, by);
}

void JOIN(qsnn_weight_forward, QSNN_SUFFIX)(const void *, const team *);
void JOIN(qsnn_weight_forward, QSNN_SUFFIX)(const void *job, const team *by) {
    if (((const weight_job *)job)->dtype == FLOAT64)
        weight_forward_in_double(job, by);
    else
        weight_forward_in_float(job, by);
}

void JOIN(qsnn_weight_backward, QSNN_SUFFIX)(const void *, const team *);
void JOIN(qsnn_weight_backward, QSNN_SUFFIX)(const void *job, const team *by) {
    if (((const weight_job *)job)->dtype == FLOAT64)
        weight_backward_in_double(job, by);
    else
        weight_backward_in_float(job, by);
}
