/* What Python calls: picks the build for this machine and shares the work among threads.
 *
 * The threads are those of PyTorch: `qsnn_native_threads` is given the entry points of the OpenMP
 * library that PyTorch has loaded, so this library links to none and no second pool of threads
 * comes into being. Without them everything runs on the calling thread. */
#include "native.h"

#include <stdlib.h>

typedef void (*kernel)(const void *, const team *);

#define DECLARE(isa)                                                                               \
    void qsnn_lif_forward_##isa(const void *, const team *);                                       \
    void qsnn_lif_backward_##isa(const void *, const team *);                                      \
    void qsnn_weight_forward_##isa(const void *, const team *);                                    \
    void qsnn_weight_backward_##isa(const void *, const team *);
#define KERNELS(isa)                                                                               \
    {                                                                                              \
        qsnn_lif_forward_##isa, qsnn_lif_backward_##isa, qsnn_weight_forward_##isa,                \
            qsnn_weight_backward_##isa                                                             \
    }
enum { LIF_FORWARD, LIF_BACKWARD, WEIGHT_FORWARD, WEIGHT_BACKWARD, OPERATIONS };

DECLARE(portable)
#ifdef QSNN_HAVE_AVX2
DECLARE(avx2)
#endif
#ifdef QSNN_HAVE_AVX512
DECLARE(avx512)
#endif

/* Build `isa` (0 portable, 1 AVX2, 2 AVX-512), or null where it is not built in or does not run. */
static const kernel *build_of(int32_t isa) {
    static const kernel portable[] = KERNELS(portable);
    if (isa == 0) return portable;
#ifdef QSNN_HAVE_AVX2
    if (isa == 1) {
        static const kernel avx2[] = KERNELS(avx2);
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx2")) return avx2;
    }
#endif
#ifdef QSNN_HAVE_AVX512
    if (isa == 2) {
        static const kernel avx512[] = KERNELS(avx512);
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            return avx512;
    }
#endif
    return NULL;
}

int32_t qsnn_native_supports(int32_t isa) { return build_of(isa) != NULL; }

/* Tells apart libraries whose jobs are laid out differently. */
int32_t qsnn_native_layout(void) {
    return (int32_t)(sizeof(lif_job) * 1000 + sizeof(weight_job));
}

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
static void (*barrier)(void);
static int (*thread_number)(void), (*thread_count)(void);

/* GOMP_parallel, GOMP_barrier, omp_get_thread_num and omp_get_num_threads of one library. */
void qsnn_native_threads(void *run, void *wait, void *number, void *count) {
    parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))run;
    barrier = (void (*)(void))wait;
    thread_number = (int (*)(void))number;
    thread_count = (int (*)(void))count;
}

typedef struct {
    kernel run;
    const void *job;
    char *memory;
    size_t scratch, shared; /* bytes: of each thread, and of what they share, which comes first */
    int count;              /* how many threads there were */
} region;

static void run_thread(void *argument) {
    region *r = argument;
    team by;
    by.id = thread_number();
    by.count = thread_count();
    by.shared = r->memory;
    by.scratch = r->memory + r->shared + (size_t)by.id * r->scratch;
    by.barrier = by.count > 1 ? barrier : NULL;
    if (by.id == 0) r->count = (int)by.count;
    r->run(r->job, &by);
}

/* Rounded up so that threads do not write to one cache line. */
static size_t lines(size_t bytes) { return (bytes + 127) / 128 * 128; }

/* Runs a kernel; afterwards `r` holds the memory, to be freed, of `r->count` threads. Returns 0, or
 * -1 where there is no such build or no memory. */
static int32_t run(region *r, int32_t isa, int operation, const void *job, int32_t threads,
                   size_t scratch) {
    const kernel *build = build_of(isa);
    if (!build || threads < 1) return -1;
    r->run = build[operation];
    r->job = job;
    r->shared = lines((size_t)threads * 2 * sizeof(double));
    r->scratch = lines(scratch);
    r->memory = malloc(r->shared + (size_t)threads * r->scratch);
    if (!r->memory) return -1;
    r->count = 1;
    if (threads > 1 && parallel) {
        parallel(run_thread, r, (unsigned)threads, 0);
    } else {
        team alone = {0, 1, NULL, NULL, NULL};
        alone.shared = r->memory;
        alone.scratch = r->memory + r->shared;
        r->run(job, &alone);
    }
    return 0;
}

int32_t qsnn_native_lif_forward(int32_t isa, const lif_job *job, int32_t threads) {
    region r;
    int64_t t, i;
    if (run(&r, isa, LIF_FORWARD, job, threads, (size_t)job->steps * sizeof(int64_t))) return -1;
    for (t = 0; t < job->steps; t++) {
        int64_t count = 0;
        for (i = 0; i < r.count; i++)
            count += ((int64_t *)(r.memory + r.shared + (size_t)i * r.scratch))[t];
        job->counts[t] = (float)count;
    }
    free(r.memory);
    return 0;
}

int32_t qsnn_native_lif_backward(int32_t isa, const lif_job *job, int32_t threads) {
    const size_t width = job->dtype == FLOAT64 ? sizeof(double) : sizeof(float);
    const size_t rows = 5 + 2 * (size_t)job->steps + 1;
    const size_t row = (size_t)backward_block(job->steps) * width;
    region r;
    int64_t k, i;
    if (run(&r, isa, LIF_BACKWARD, job, threads, 4 * sizeof(double) + rows * row)) return -1;
    for (k = 0; k < 4 && job->g_params; k++) {
        double sum = 0;
        for (i = 0; i < r.count; i++)
            sum += ((double *)(r.memory + r.shared + (size_t)i * r.scratch))[k];
        if (job->dtype == FLOAT64)
            ((double *)job->g_params)[k] = sum;
        else
            ((float *)job->g_params)[k] = (float)sum;
    }
    free(r.memory);
    return 0;
}

int32_t qsnn_native_weight_forward(int32_t isa, const weight_job *job, int32_t threads) {
    region r;
    if (run(&r, isa, WEIGHT_FORWARD, job, threads, 0)) return -1;
    free(r.memory);
    return 0;
}

int32_t qsnn_native_weight_backward(int32_t isa, const weight_job *job, int32_t threads) {
    region r;
    if (run(&r, isa, WEIGHT_BACKWARD, job, threads, 0)) return -1;
    free(r.memory);
    return 0;
}
