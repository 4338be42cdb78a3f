/* qsnn: runs integer programs of quantized spiking neural networks.
 *
 * A program is a constant array of 32-bit words (an "image", written by qsnn_ext.deploy) and needs
 * two work areas whose sizes it states. Nothing is allocated; nothing is kept between calls but
 * `state`. Everything is int32 arithmetic, so every build gives the same bits.
 *
 * One image may be used from many threads at once, each with its own state and arena.
 */
#ifndef QSNN_H
#define QSNN_H

#include <stdint.h>

#define QSNN_MAGIC 0x4e4e5351 /* "QSNN" */
#define QSNN_VERSION 1

/* The first words of an image. All offsets count words from the start of the image. */
enum {
    QSNN_H_MAGIC,
    QSNN_H_VERSION,
    QSNN_H_IMAGE_WORDS,
    QSNN_H_STATE_WORDS,   /* membranes of one sample */
    QSNN_H_ARENA_WORDS,   /* activations and scratch of one running sample */
    QSNN_H_INPUT_WORDS,   /* input codes of one time step, [C, H, W] */
    QSNN_H_OUTPUT_WORDS,  /* answers of one time step, each [C, H, W] */
    QSNN_H_VALUES,        /* offset of the value table */
    QSNN_H_VALUE_COUNT,
    QSNN_H_OPS,           /* offset of the operation table */
    QSNN_H_OP_COUNT,
    QSNN_H_NEURONS,       /* offset of the neuron table */
    QSNN_H_NEURON_COUNT,
    QSNN_H_OUTPUTS,       /* offset of the list of output values */
    QSNN_H_OUTPUT_COUNT,
    QSNN_H_SCRATCH,       /* start of the scratch area inside the arena */
    QSNN_H_LINE_WORDS,    /* size of one line in it */
    QSNN_H_SIZE
};

/* Puts all membranes of one sample into their initial state. */
void qsnn_reset(const uint32_t *image, uint32_t *state);

/* Runs `steps` time steps of one sample. `input_stride` is the distance in words between the
 * inputs of two steps; 0 shows the same input at every step. `output` receives the answers of
 * every step one after the other. */
void qsnn_run(const uint32_t *image, uint32_t *state, uint32_t *arena, const int32_t *input,
              int32_t steps, int32_t input_stride, int32_t *output);

#endif
