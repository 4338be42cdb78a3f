/* Constants and steps of the model: written by qsnn_ext.deploy.export_c. */
#include "model.h"
#include "qsnn.h"

#if QSNN_LAYOUT != @LAYOUT@
#error "this model and the qsnn.c beside it were written by different versions; export it again"
#endif

#define MAGIC 0x4e4e5351u /* "QSNN" */

/* Magic number, layout, and the image that the runtime executes. */
static const uint32_t constants[2 + @IMAGE@] = {
    MAGIC, QSNN_LAYOUT,
@WORDS@
};
#define IMAGE (constants + 2)

/* Where the input lies: code c of pixel i at arena[INPUT_AT + i * INPUT_PITCH + c]. */
#define INPUT_AT @INPUT_AT@
#define INPUT_PITCH @INPUT_PITCH@
#define INPUT_PIXELS (MODEL_INPUT_HEIGHT * MODEL_INPUT_WIDTH)

int model_start(model_memory *memory) {
    const volatile uint32_t *given = constants; /* what is in memory, not what was compiled */
    if (given[0] != MAGIC || given[1] != (uint32_t)qsnn_layout()) return -1;
    qsnn_reset(IMAGE, memory->state);
    return 0;
}

void model_step(model_memory *memory, const model_code *input, int32_t output[MODEL_OUTPUT_SIZE]) {
    int32_t c, pixel;
    for (c = 0; c < MODEL_INPUT_CHANNELS; c++)
        for (pixel = 0; pixel < INPUT_PIXELS; pixel++)
            memory->arena[INPUT_AT + pixel * INPUT_PITCH + c] = (uint32_t)(int32_t)*input++;
    qsnn_run_step(IMAGE, memory->state, memory->arena, output);
}

int model_sum(model_memory *memory, const model_code *input, int32_t stride,
              int64_t sums[MODEL_OUTPUT_SIZE]) {
    int32_t output[MODEL_OUTPUT_SIZE], i, t;
    if (model_start(memory) != 0) return -1;
    for (i = 0; i < MODEL_OUTPUT_SIZE; i++) sums[i] = 0;
    for (t = 0; t < MODEL_TIME_STEPS; t++, input += stride) {
        model_step(memory, input, output);
        for (i = 0; i < MODEL_OUTPUT_SIZE; i++) sums[i] += output[i];
    }
    return 0;
}

int32_t model_largest(const int64_t sums[MODEL_OUTPUT_SIZE]) {
    int32_t i, best = 0;
    for (i = 1; i < MODEL_OUTPUT_SIZE; i++)
        if (sums[i] > sums[best]) best = i;
    return best;
}
