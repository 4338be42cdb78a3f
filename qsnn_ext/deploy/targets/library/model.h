/* @TITLE@: written by qsnn_ext.deploy.export_c. */
/* An integer program of a quantized spiking network. It needs no heap and no floating point; of the
 * C library only memcpy and memset. See LICENSE. */
#ifndef MODEL_H
#define MODEL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

@CONSTANTS@

/* Input codes of one time step are [channel][row][column]; a code is a real number divided by
 * MODEL_INPUT_SCALE, rounded, within MODEL_INPUT_MIN and MODEL_INPUT_MAX. */
typedef @CODE@ model_code;

/* Everything that is written to, of one sample. Its contents are nobody else's business. */
typedef struct {
    uint32_t state[@STATE@]; /* membrane potentials, carried from step to step */
    uint32_t arena[@ARENA@]; /* may be used for other things between two steps */
} model_memory;

/* Puts all membrane potentials into their initial state: before the first step, and before a new
 * sample. Returns 0, or -1 if runtime and constants are not of one version or not in memory. */
int model_start(model_memory *memory);

/* Runs one time step. */
void model_step(model_memory *memory, const model_code *input,
                int32_t output[MODEL_OUTPUT_SIZE]);

/* Starts, runs MODEL_TIME_STEPS steps and adds up the answers. `stride` is the distance between the
 * inputs of two steps, MODEL_INPUT_SIZE for frames; 0 shows the same input at every step. */
int model_sum(model_memory *memory, const model_code *input, int32_t stride,
              int64_t sums[MODEL_OUTPUT_SIZE]);

/* Position of the largest of the sums, the first of several. */
int32_t model_largest(const int64_t sums[MODEL_OUTPUT_SIZE]);
@EXTRA@
#ifdef __cplusplus
}
#endif

#endif
