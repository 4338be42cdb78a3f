/* qsnn: runs integer programs of quantized spiking neural networks.
 *
 * A program is a constant array of 32-bit words (an "image", written by qsnn_ext.deploy) and needs
 * two work areas whose sizes its header states. Nothing is allocated; nothing is kept between calls
 * but `state`. Everything is integer arithmetic, so every build gives the same bits, on machines of
 * either byte order; signed numbers must be two's complement and >> of a negative one arithmetic.
 *
 * `state` is filled by qsnn_reset. `arena` need not be initialised: nothing is read from it that was
 * not written before, but for padding whose value never reaches an answer or a state.
 *
 * One image may be used from many threads at once, each with its own state and arena. */
#ifndef QSNN_H
#define QSNN_H

#include <stdint.h>
#include "qsnn_records.h"

/* Puts all membranes of one sample into their initial state. */
void qsnn_reset(const uint32_t *image, uint32_t *state);

/* Runs `steps` time steps of one sample. `input_stride` is the distance in words between the
 * inputs of two steps; 0 shows the same input at every step. `output` receives the answers of
 * every step one after the other. Input codes must lie in the program's range. */
void qsnn_run(const uint32_t *image, uint32_t *state, uint32_t *arena, const int32_t *input,
              int32_t steps, int32_t input_stride, int32_t *output);

/* Runs one time step whose input codes the caller has put into the arena: channel c of pixel i at
 * arena[offset + i * stride + c], offset and stride being those of the input's value record. They
 * do not outlive the step. */
void qsnn_run_step(const uint32_t *image, uint32_t *state, uint32_t *arena, int32_t *output);

/* QSNN_LAYOUT of this code: images of another layout are not for it. */
int32_t qsnn_layout(void);

/* The same as qsnn_run, by several workers at the same time on one sample: each calls this with all arguments
 * alike but `worker`, 0 to workers - 1, and does its share of the rows of every layer. `wait` is
 * called with `waiting` after every layer and must return once all workers have called it. The arena
 * needs (workers - 1) * workspace_words (of the header) more. The bits are the same. */
void qsnn_run_part(const uint32_t *image, uint32_t *state, uint32_t *arena, const int32_t *input,
                   int32_t steps, int32_t input_stride, int32_t *output, int32_t worker,
                   int32_t workers, void (*wait)(void *), void *waiting);

#endif
