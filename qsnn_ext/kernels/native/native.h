/* What Python hands to the native kernels. All fields are 8 bytes wide; `_native.py` mirrors them. */
#ifndef QSNN_NATIVE_H
#define QSNN_NATIVE_H
#include <stddef.h>
#include <stdint.h>

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum { DYNAMIC, RUNNING, GIVEN };
enum { HARD, SOFT, NONE };
enum {
    TRIANGLE, PIECEWISE_QUADRATIC, PIECEWISE_EXP, SIGMOID, SOFT_SIGN, SUPER_SPIKE, ATAN, ERF, RECT,
    FAST_SIGMOID, STRAIGHT_THROUGH, SLOPE_ABOVE, SLOPE_FROM, RATE_ESCAPE
};

/* All steps of one layer: M neurons in any memory order, the same in every tensor. REAL is the
 * type of computation, STORE that of the tensors; they differ in half precision. */
typedef struct {
    /* Options, see LIFOptions. */
    int64_t surrogate, strict, levels, absmax, alpha_mode, squash, quantize_first, reset, detach,
        delayed, saved_charge;
    double a, b, momentum, v_reset;
    int64_t dtype, steps, neurons;
    const void *x, *v;                    /* STORE [T, M], [M] or null; backward: x as saved */
    const void *params, *alpha;           /* REAL [4], [1] or null */
    void *spikes, *last, *charges, *work; /* STORE [T, M], [M], [T, M] or null, REAL [M] */
    void *alphas;                         /* REAL [T + 1] */
    float *counts;                        /* [T]; backward: their gradient, or null */
    const void *g_spikes, *g_v;           /* STORE [T, M], [M], or null */
    void *g_x, *g_v0, *g_params;          /* STORE [T, M], [M] or null, REAL [4] or null */
} lif_job;

enum { STANDARDIZE_NONE, STANDARDIZE_LAYER, STANDARDIZE_CHANNEL };
enum { SCALE_MEAN, SCALE_POWER_OF_TWO, SCALE_NONE };
enum { SIGN_CLIPPED, SIGN_IDENTITY, SIGN_ANNEALED };

/* Binary weights of one layer: C rows of K. */
typedef struct {
    int64_t standardize, scale, gradient, dtype, rows, columns;
    double temperature;
    const void *w, *g;           /* [C, K] */
    void *mean, *std, *alpha;    /* [1] or [C], the same, [C] */
    void *out;                   /* [C, K]: binary weights, or the gradient of the latent ones */
} weight_job;

/* The threads of a parallel region, and memory: `scratch` is the thread's own, `shared` is common
 * to all. `barrier` is null where there is one thread. */
typedef struct {
    int64_t id, count;
    void *scratch, *shared;
    void (*barrier)(void);
} team;

/* Neurons of a block: its buffers fit the nearest cache. The backward keeps rows of all steps. */
enum { BLOCK = 1024 };
static inline int64_t backward_block(int64_t steps) {
    const int64_t fits = 12288 / (2 * steps + 6) / 64 * 64;
    return fits > BLOCK ? BLOCK : fits < 64 ? 64 : fits;
}

#endif
