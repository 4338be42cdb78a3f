/* The Python library's way in: chooses among the builds of qsnn.c at run time, runs several samples
 * one after the other, or one sample by several threads, which Python brings. */
#include "qsnn.h"

typedef void (*reset_function)(const uint32_t *, uint32_t *);
typedef void (*run_function)(const uint32_t *, uint32_t *, uint32_t *, const int32_t *, int32_t,
                             int32_t, int32_t *, int32_t, int32_t, void (*)(void *), void *);

#define DECLARE(isa)                                                                               \
    void qsnn_reset_##isa(const uint32_t *, uint32_t *);                                           \
    void qsnn_run_part_##isa(const uint32_t *, uint32_t *, uint32_t *, const int32_t *, int32_t,   \
                             int32_t, int32_t *, int32_t, int32_t, void (*)(void *), void *);
DECLARE(portable)
#ifdef QSNN_HAVE_AVX2
DECLARE(avx2)
#endif
#ifdef QSNN_HAVE_AVX512
DECLARE(avx512)
#endif

/* What Python compares with its own: code and images of two versions never meet. */
int32_t qsnn_layout(void) { return QSNN_LAYOUT; }

/* Whether path `isa` (0 portable, 1 AVX2, 2 AVX-512) is built in and runs on this machine. */
int32_t qsnn_supports(int32_t isa) {
    if (isa == 0) return 1;
#if defined(QSNN_HAVE_AVX2) || defined(QSNN_HAVE_AVX512)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi") ||
        !__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("popcnt"))
        return 0;
#endif
#ifdef QSNN_HAVE_AVX2
    if (isa == 1) return 1;
#endif
#ifdef QSNN_HAVE_AVX512
    if (isa == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return 0;
}

static run_function path(int32_t isa) {
#ifdef QSNN_HAVE_AVX2
    if (isa == 1) return qsnn_run_part_avx2;
#endif
#ifdef QSNN_HAVE_AVX512
    if (isa == 2) return qsnn_run_part_avx512;
#endif
    (void)isa;
    return qsnn_run_part_portable;
}

void qsnn_reset_dispatch(const uint32_t *image, uint32_t *state) {
    qsnn_reset_portable(image, state);
}

/* Runs `samples` samples one after the other; each has its own state, all share one arena. */
void qsnn_run_dispatch(int32_t isa, const uint32_t *image, uint32_t *states, int64_t state_words,
                       uint32_t *arena, const int32_t *input, int64_t sample_stride,
                       int32_t samples, int32_t steps, int32_t input_stride, int32_t *output,
                       int64_t output_stride) {
    const run_function run = path(isa);
    int32_t i;
    for (i = 0; i < samples; i++)
        run(image, states + i * state_words, arena, input + i * sample_stride, steps, input_stride,
            output + i * output_stride, 0, 1, 0, 0);
}

/* ---- one sample, several threads ---------------------------------------------------------------- */

#if defined(__GNUC__)
#ifdef _WIN32
#include <windows.h>
#define YIELD() SwitchToThread()
#else
#include <sched.h>
#define YIELD() sched_yield()
#endif

#define SPINS 2000 /* a layer takes microseconds: sleeping would cost more than waiting */

/* A barrier for workers that come back again and again; zero it before use. */
typedef struct {
    int32_t arrived, round, workers;
} barrier;

static void wait_for_all(void *at) {
    barrier *b = (barrier *)at;
    const int32_t round = __atomic_load_n(&b->round, __ATOMIC_ACQUIRE);
    int32_t spins = 0;
    if (__atomic_add_fetch(&b->arrived, 1, __ATOMIC_ACQ_REL) == b->workers) {
        __atomic_store_n(&b->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->round, (int32_t)((uint32_t)round + 1u), __ATOMIC_RELEASE);
        return;
    }
    while (__atomic_load_n(&b->round, __ATOMIC_ACQUIRE) == round)
        if (++spins > SPINS) YIELD();
}

int32_t qsnn_shares(void) { return 1; }
#else
typedef struct {
    int32_t arrived, round, workers;
} barrier;
static void wait_for_all(void *at) { (void)at; }
int32_t qsnn_shares(void) { return 0; } /* no atomics: one thread per sample */
#endif

/* As qsnn_run_dispatch, for worker `worker` of those that share every sample; all pass the same
 * `meeting`, three words: zero, zero, the number of workers. */
void qsnn_run_shared(int32_t isa, const uint32_t *image, uint32_t *states, int64_t state_words,
                     uint32_t *arena, const int32_t *input, int64_t sample_stride, int32_t samples,
                     int32_t steps, int32_t input_stride, int32_t *output, int64_t output_stride,
                     int32_t worker, void *meeting) {
    const run_function run = path(isa);
    const int32_t workers = ((barrier *)meeting)->workers;
    int32_t i;
    for (i = 0; i < samples; i++)
        run(image, states + i * state_words, arena, input + i * sample_stride, steps, input_stride,
            output + i * output_stride, worker, workers, wait_for_all, meeting);
}
