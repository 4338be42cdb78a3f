/* Chooses among the builds of qsnn.c inside the Python library at run time. */
#include <stdint.h>

typedef void (*reset_function)(const uint32_t *, uint32_t *);
typedef void (*run_function)(const uint32_t *, uint32_t *, uint32_t *, const int32_t *, int32_t,
                             int32_t, int32_t *);

#define DECLARE(isa)                                                                               \
    void qsnn_reset_##isa(const uint32_t *, uint32_t *);                                           \
    void qsnn_run_##isa(const uint32_t *, uint32_t *, uint32_t *, const int32_t *, int32_t,        \
                        int32_t, int32_t *);
DECLARE(portable)
#ifdef QSNN_HAVE_X86
DECLARE(avx2)
DECLARE(avx512)
#endif

/* Whether path `isa` (0 portable, 1 AVX2, 2 AVX-512) is built in and runs on this machine. */
int32_t qsnn_supports(int32_t isa) {
    if (isa == 0) return 1;
#ifdef QSNN_HAVE_X86
    __builtin_cpu_init();
    if (isa == 1)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
               __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    if (isa == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               qsnn_supports(1);
#endif
    return 0;
}

void qsnn_reset_dispatch(const uint32_t *image, uint32_t *state) {
    qsnn_reset_portable(image, state);
}

/* Runs `samples` samples one after the other; each has its own state, all share one arena. */
void qsnn_run_dispatch(int32_t isa, const uint32_t *image, uint32_t *states, int64_t state_words,
                       uint32_t *arena, const int32_t *input, int64_t sample_stride,
                       int32_t samples, int32_t steps, int32_t input_stride, int32_t *output,
                       int64_t output_stride) {
    run_function run = qsnn_run_portable;
    int32_t i;
#ifdef QSNN_HAVE_X86
    if (isa == 1) run = qsnn_run_avx2;
    if (isa == 2) run = qsnn_run_avx512;
#endif
    (void)isa;
    for (i = 0; i < samples; i++)
        run(image, states + i * state_words, arena, input + i * sample_stride, steps, input_stride,
            output + i * output_stride);
}
