/* The program in memory. Offsets come from the image (qsnn_records.h says what each counts from);
 * nothing here or in any other file computes where something lies. */
#ifndef QSNN_IMAGE_H
#define QSNN_IMAGE_H
#include "qsnn.h"
#include "qsnn_vector.h"

#define WIDE_LIMIT 1073741823
#define QUESTIONS 9 /* of a firing decision: see fire_strip */

typedef struct {
    const uint32_t *image;
    const int32_t *ints; /* the image, read as signed words */
    uint32_t *state;
    uint32_t *arena;
    uint32_t *workspace; /* of this worker */
    int32_t *line;       /* in it: one pixel */
    int32_t *other;      /* in it: another pixel */
} context;

/* Rows of the target that are this worker's. */
typedef struct {
    int32_t first, end;
} share;

static inline const qsnn_value *value_at(const context *x, int32_t offset) {
    return (const qsnn_value *)(const void *)(x->ints + offset);
}
static inline const qsnn_neuron *neuron_at(const context *x, int32_t offset) {
    return (const qsnn_neuron *)(const void *)(x->ints + offset);
}
static inline uint32_t last_mask(int32_t channels) {
    return channels % 32 ? (1u << (channels % 32)) - 1u : 0xffffffffu;
}
static inline uint32_t *pixel_bits(const context *x, const qsnn_value *v, int32_t pixel) {
    return x->arena + v->offset + pixel * v->stride;
}
static inline int32_t *pixel_ints(const context *x, const qsnn_value *v, int32_t pixel) {
    return (int32_t *)(x->arena + v->offset) + pixel * v->stride;
}

#endif
