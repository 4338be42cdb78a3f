/* The recurrence, included once for each pair of REAL (of computation) and STORE (of tensors).
 *
 * Work goes block by block of BLOCK neurons, in loops over buffers that stay in the nearest cache.
 * The scale of a step is a maximum over the whole layer, so a dynamic or running scale allows no
 * block a second step before all have done the first: forward then is T + 1 passes over the
 * neurons, each of which ends one step of a block (`settle`) and begins the next (`charge`). A
 * given scale or none allows one pass, and the backward, which knows all scales, is one too.
 *
 * What lies between two passes is the charge h, from which spike, reset and rounding follow. */

/* Numbers of a layer in the type of computation. */
typedef struct {
    REAL decay, gain, offset, theta, fire_at, v_reset, levels, momentum;
} NAME(numbers);

static NAME(numbers) NAME(numbers_of)(const lif_job *j) {
    const REAL *params = j->params;
    NAME(numbers) p;
    p.decay = params[0];
    p.gain = params[1];
    p.offset = params[2];
    p.theta = params[3];
    /* h > theta is h >= the next number, and h - theta >= 0 is h >= theta. */
    p.fire_at = j->strict ? R(above)(p.theta) : p.theta;
    p.v_reset = (REAL)j->v_reset;
    p.levels = (REAL)j->levels;
    p.momentum = (REAL)j->momentum;
    return p;
}

/* ---- loops over a block --------------------------------------------------------------------- */

/* `n` stored values as REAL, in `room` or where they are. */
static const REAL *NAME(read)(const STORE *from, REAL *restrict room, int64_t n) {
#ifdef NARROW
    int64_t i;
    for (i = 0; i < n; i++) room[i] = WIDEN(from[i]);
    return room;
#else
    (void)room, (void)n;
    return from;
#endif
}

static void NAME(write)(STORE *restrict to, const REAL *restrict from, int64_t n) {
    int64_t i;
    for (i = 0; i < n; i++) to[i] = NARROWED(from[i]);
}

/* h = decay*v + gain*x + offset; with a delayed reset after that of the step before. */
static void NAME(charge)(const lif_job *j, const NAME(numbers) *p, const REAL *v,
                         const REAL *restrict x, REAL *restrict h, int64_t n) {
    const REAL decay = p->decay, gain = p->gain, offset = p->offset, theta = p->theta;
    const REAL fire_at = p->fire_at;
    int64_t i;
    if (!v)
        for (i = 0; i < n; i++) h[i] = gain * x[i] + offset;
    else if (j->delayed && j->reset == HARD)
        for (i = 0; i < n; i++) {
            const REAL kept = v[i] >= fire_at ? v[i] * 0 : v[i];
            h[i] = decay * kept + gain * x[i] + offset;
        }
    else if (j->delayed && j->reset == SOFT)
        for (i = 0; i < n; i++) {
            const REAL u = decay * v[i] + gain * x[i] + offset;
            h[i] = v[i] >= fire_at ? u - theta : u;
        }
    else
        for (i = 0; i < n; i++) h[i] = decay * v[i] + gain * x[i] + offset;
}

/* What is left of `u` after the reset. */
static void NAME(reset)(const lif_job *j, const NAME(numbers) *p, const REAL *restrict u,
                        REAL *restrict left, int64_t n) {
    const REAL fire_at = p->fire_at, theta = p->theta;
    const REAL target = j->delayed ? 0 : p->v_reset;
    int64_t i;
    if (j->reset == HARD)
        for (i = 0; i < n; i++) {
            const REAL at_rest = u[i] * 0 + target; /* NaN of infinity, as (1 - s) * u is */
            left[i] = u[i] >= fire_at ? at_rest : u[i];
        }
    else if (j->reset == SOFT)
        for (i = 0; i < n; i++) left[i] = u[i] >= fire_at ? u[i] - theta : u[i];
    else
        for (i = 0; i < n; i++) left[i] = u[i];
}

static int64_t NAME(fire)(const REAL *restrict u, REAL fire_at, STORE *restrict spikes, int64_t n) {
    INT count = 0;
    int64_t i;
    for (i = 0; i < n; i++) {
        spikes[i] = u[i] >= fire_at ? STORED_ONE : 0;
        count += u[i] >= fire_at;
    }
    return count;
}

static void NAME(squash)(REAL *restrict v, int64_t n) {
    int64_t i;
    for (i = 0; i < n; i++) v[i] = R(tanh)(v[i]);
}

/* functional.symmetric_codes times its scale, in place. */
static void NAME(round)(REAL *restrict v, REAL alpha, REAL levels, int64_t n) {
    const REAL by = alpha <= 0 ? (REAL)INFINITY : alpha, scale = alpha <= 0 ? 0 : alpha / levels;
    int64_t i;
    for (i = 0; i < n; i++) {
        REAL r = v[i] / by;
        r = r < -1 ? -1 : r;
        r = r > 1 ? 1 : r;
        v[i] = (R(whole)(r * levels) + v[i] * 0) * scale; /* NaN of NaN and of infinity */
    }
}

/* After rounding what the delayed reset will leave: the stored state is that plus what the reset
 * will take, and on the side of the threshold that the spike was on. */
static void NAME(beside)(const NAME(numbers) *p, const REAL *restrict u, REAL *restrict v,
                         REAL alpha, int64_t n) {
    const REAL theta = p->theta, fire_at = p->fire_at, next = R(above)(theta);
    const REAL step = (alpha < 0 ? 0 : alpha) / p->levels;
    const REAL code = (REAL)floor(theta / (step > 0 ? step : 1));
    const REAL level = code * step, lower = level > theta ? (code - 1) * step : level;
    const REAL below = lower > theta ? theta : lower;
    int64_t i;
    for (i = 0; i < n; i++) {
        const REAL stored = u[i] >= fire_at ? v[i] + theta : v[i];
        const REAL fired = stored < fire_at ? next : stored;
        const REAL silent = stored >= fire_at ? below : stored;
        v[i] = u[i] >= fire_at ? fired : silent;
    }
}

static void NAME(as_stored)(REAL *restrict v, int64_t n) {
#ifdef NARROW
    int64_t i;
    for (i = 0; i < n; i++) v[i] = WIDEN(NARROWED(v[i]));
#else
    (void)v, (void)n;
#endif
}

/* ---- forward --------------------------------------------------------------------------------- */

/* The potentials over which the scale of a step is taken, from its charge. */
static const REAL *NAME(scaled)(const lif_job *j, const NAME(numbers) *p, const REAL *h,
                                REAL *restrict room, int64_t n) {
    if (!j->quantize_first && j->reset != NONE)
        NAME(reset)(j, p, h, room, n);
    else if (j->squash)
        memcpy(room, h, (size_t)n * sizeof(REAL));
    else
        return h;
    if (j->squash) NAME(squash)(room, n);
    return room;
}

/* From the charge of a step and its scale to the state `v` it leaves. `u`, room for a block, holds
 * the potential that decides the spike, which is returned: the charge itself or `room`. */
static const REAL *NAME(settle)(const lif_job *j, const NAME(numbers) *p, const REAL *h, REAL alpha,
                                REAL *restrict room, REAL *restrict v, int64_t n) {
    const REAL *u = h;
    if (j->levels && j->quantize_first) {
        memcpy(room, h, (size_t)n * sizeof(REAL));
        if (j->squash) NAME(squash)(room, n);
        NAME(round)(room, alpha, p->levels, n);
        u = room;
        if (j->delayed)
            memcpy(v, u, (size_t)n * sizeof(REAL));
        else
            NAME(reset)(j, p, u, v, n);
    } else if (j->levels) {
        NAME(reset)(j, p, u, v, n);
        if (j->squash) NAME(squash)(v, n);
        NAME(round)(v, alpha, p->levels, n);
        if (j->delayed && j->reset != NONE) NAME(beside)(p, u, v, alpha, n);
    } else if (j->delayed) {
        memcpy(v, u, (size_t)n * sizeof(REAL));
    } else {
        NAME(reset)(j, p, u, v, n);
    }
    NAME(as_stored)(v, n);
    return u;
}

/* The scale of a step from the maxima that `count` threads found; moves the running scale. */
static REAL NAME(scale_of)(const lif_job *j, const NAME(numbers) *p, const REAL *maxima,
                           int64_t count, REAL *running) {
    REAL used, most = R(largest)(maxima, count, 0, j->absmax ? 0 : -(REAL)INFINITY);
    if (j->alpha_mode == DYNAMIC) return most;
    most = most < 0 ? 0 : most;
    used = *running > 0 ? *running : most; /* 0: no value yet */
    *running = used + p->momentum * (most - used);
    return used;
}

static void NAME(forward)(const lif_job *j, const team *by) {
    const NAME(numbers) p = NAME(numbers_of)(j);
    const int64_t M = j->neurons, T = j->steps, blocks = (M + BLOCK - 1) / BLOCK;
    const int64_t begin = blocks * by->id / by->count, end = blocks * (by->id + 1) / by->count;
    const int observes = j->levels && j->alpha_mode != GIVEN;
    const STORE *x = j->x, *first = j->v;
    STORE *spikes = j->spikes;
    const int unkept = !first && !j->charges; /* the first charge is computed again */
    REAL *alphas = j->alphas, running = j->alpha ? *(const REAL *)j->alpha : 0;
    REAL *work = j->work, *maxima = by->shared; /* of each thread, for even and for odd steps */
    int64_t *counts = by->scratch, b, t;
    const REAL lowest = j->absmax ? 0 : -(REAL)INFINITY;
    REAL room[BLOCK], v[BLOCK], h_room[BLOCK], x_room[BLOCK];
    memset(counts, 0, (size_t)T * sizeof *counts);

    if (!observes) {
        for (b = begin; b < end; b++) {
            const int64_t at = b * BLOCK, n = M - at < BLOCK ? M - at : BLOCK;
            const REAL *before = first ? NAME(read)(first + at, v, n) : NULL;
            for (t = 0; t < T; t++) {
                REAL *h = j->charges ? (REAL *)j->charges + t * M + at : h_room;
                const REAL *u;
                NAME(charge)(j, &p, before, NAME(read)(x + t * M + at, x_room, n), h, n);
                u = NAME(settle)(j, &p, h, running, room, v, n);
                counts[t] += NAME(fire)(u, p.fire_at, spikes + t * M + at, n);
                before = v;
            }
            NAME(write)((STORE *)j->last + at, v, n);
        }
        for (t = 0; t <= T && !by->id; t++) alphas[t] = j->alpha ? running : 0;
        return;
    }
    for (t = 0; t <= T; t++) {
        const REAL *maxima_before = maxima + (t + 1) % 2 * by->count;
        const REAL alpha = t ? NAME(scale_of)(j, &p, maxima_before, by->count, &running) : 0;
        REAL most = lowest;
        if (t && !by->id) alphas[t - 1] = alpha;
        for (b = begin; b < end; b++) {
            const int64_t at = b * BLOCK, n = M - at < BLOCK ? M - at : BLOCK;
            const REAL *before = first ? NAME(read)(first + at, v, n) : NULL;
            if (t) {
                const REAL *h = j->charges ? (REAL *)j->charges + (t - 1) * M + at : work + at, *u;
                if (t == 1 && unkept) { /* cheaper than a pass that would have stored it */
                    NAME(charge)(j, &p, NULL, NAME(read)(x + at, x_room, n), h_room, n);
                    h = h_room;
                }
                u = NAME(settle)(j, &p, h, alpha, room, v, n);
                counts[t - 1] += NAME(fire)(u, p.fire_at, spikes + (t - 1) * M + at, n);
                before = v;
            }
            if (t < T) {
                REAL *h = j->charges ? (REAL *)j->charges + t * M + at : work + at;
                if (t == 0 && unkept) h = h_room;
                NAME(charge)(j, &p, before, NAME(read)(x + t * M + at, x_room, n), h, n);
                most = R(largest)(NAME(scaled)(j, &p, h, room, n), n, j->absmax, most);
            } else {
                NAME(write)((STORE *)j->last + at, v, n);
            }
        }
        maxima[t % 2 * by->count + by->id] = most;
        if (by->barrier && t < T) by->barrier();
    }
    if (!by->id) alphas[T] = running;
}

/* ---- backward -------------------------------------------------------------------------------- */

/* d[i]: the surrogate's derivative at u - theta; see DERIVATIVES in surrogates.py. */
static void NAME(derivative)(const lif_job *j, REAL theta, const REAL *restrict u, REAL *restrict d,
                             int64_t n) {
    const REAL a = (REAL)j->a, b = (REAL)j->b, inverse = (REAL)(1 / j->a);
    int64_t i;
#define EACH(value)                                                                                \
    for (i = 0; i < n; i++) {                                                                      \
        const REAL x = u[i] - theta, size = R(magnitude)(x);                                    \
        (void)size;                                                                                \
        d[i] = (value);                                                                            \
    }                                                                                              \
    return
#define SQUARE(value) ((value) * (value))
    switch (j->surrogate) {
    case TRIANGLE: EACH(a - size < 0 ? 0 : a - size);
    case PIECEWISE_QUADRATIC: EACH(size > inverse ? 0 : a - (REAL)(j->a * j->a) * size);
    case PIECEWISE_EXP: EACH((REAL)(j->a / 2) * R(exp_minus)(a * size));
    case SIGMOID: {
        for (i = 0; i < n; i++) {
            const REAL e = R(exp_minus)(R(magnitude)(a * (u[i] - theta)));
            d[i] = a * e / SQUARE(1 + e);
        }
        return;
    }
    case SOFT_SIGN: EACH(1 / ((REAL)(2 * j->a) * SQUARE(inverse + size)));
    case SUPER_SPIKE: EACH(a / SQUARE(size + 1));
    case ATAN: {
        const REAL half = (REAL)(j->a / 2), factor = (REAL)(1.5707963267948966 * j->a);
        EACH(half / (1 + SQUARE(factor * x)));
    }
    case ERF: EACH(R(exp_minus)(SQUARE(a * x)) * (REAL)(j->a / 1.7724538509055159));
    case RECT: EACH(size < (REAL)(0.5 / j->a) ? a : 0);
    case FAST_SIGMOID: EACH(1 / SQUARE(a * size + 1));
    case STRAIGHT_THROUGH: EACH(1);
    case SLOPE_ABOVE: EACH(x > 0 ? a : b);
    case SLOPE_FROM: EACH(x >= 0 ? a : b);
    case RATE_ESCAPE: EACH(b * R(exp_minus)(a * R(magnitude)(x - 1)));
    }
#undef EACH
#undef SQUARE
}

/* Straight-through gradient of rounding the (squashed) potentials `w`, in place. */
static void NAME(unround)(const lif_job *j, REAL *restrict g, const REAL *restrict w, REAL alpha,
                          int64_t n) {
    const REAL most = alpha > 0 ? alpha : -1;
    int64_t i;
    if (j->squash)
        for (i = 0; i < n; i++) g[i] = R(magnitude)(w[i]) <= most ? g[i] * (1 - w[i] * w[i]) : 0;
    else
        for (i = 0; i < n; i++) g[i] = R(magnitude)(w[i]) <= most ? g[i] : 0;
}

/* From the gradient `g` of the state after the reset and `f` of the spikes to that of `u`, in `g`;
 * `f` becomes the whole gradient of the spikes. */
static void NAME(unfire)(const lif_job *j, const NAME(numbers) *p, REAL *restrict g,
                         REAL *restrict f, const REAL *restrict u, const REAL *restrict d,
                         int64_t n) {
    const REAL fire_at = p->fire_at, theta = p->theta, target = p->v_reset;
    int64_t i;
    if (j->delayed && j->reset == HARD && !j->quantize_first)
        for (i = 0; i < n; i++) g[i] = (u[i] >= fire_at ? 0 : g[i]) + f[i] * d[i];
    else if (j->delayed || j->reset == NONE || (j->reset == SOFT && j->detach))
        for (i = 0; i < n; i++) g[i] += f[i] * d[i];
    else if (j->reset == SOFT)
        for (i = 0; i < n; i++) {
            f[i] -= g[i] * theta;
            g[i] += f[i] * d[i];
        }
    else if (j->detach)
        for (i = 0; i < n; i++) g[i] = (u[i] >= fire_at ? 0 : g[i]) + f[i] * d[i];
    else
        for (i = 0; i < n; i++) {
            f[i] += g[i] * (target - u[i]);
            g[i] = (u[i] >= fire_at ? 0 : g[i]) + f[i] * d[i];
        }
}

/* Adds up a[i] * b[i] (a[i] without b) in double; where `u` is given only over what fired. */
static double NAME(dot)(const REAL *restrict a, const REAL *restrict b, const REAL *restrict u,
                        REAL fire_at, int64_t n) {
    enum { LANES = 8 };
    double sums[LANES] = {0}, sum = 0;
    int64_t i, k;
#define TERM(i) (!u || u[i] >= fire_at ? (double)(b ? a[i] * b[i] : a[i]) : 0)
    for (i = 0; i + LANES <= n; i += LANES)
        for (k = 0; k < LANES; k++) sums[k] += TERM(i + k);
    for (; i < n; i++) sum += TERM(i);
#undef TERM
    for (k = 0; k < LANES; k++) sum += sums[k];
    return sum;
}

/* The gradient of the charge becomes that of the input, which is written, and of the state. */
static void NAME(uncharge)(const lif_job *j, const NAME(numbers) *p, const REAL *restrict v,
                           REAL *restrict g, STORE *restrict g_x, int64_t n) {
    const REAL decay = p->decay, gain = p->gain, fire_at = p->fire_at;
    int64_t i;
    for (i = 0; i < n; i++) {
        g_x[i] = NARROWED(gain * g[i]);
        g[i] *= decay;
    }
    if (v && j->delayed && j->reset == HARD)
        for (i = 0; i < n; i++) g[i] = v[i] >= fire_at ? 0 : g[i];
}

static void NAME(backward)(const lif_job *j, const team *by) {
    const NAME(numbers) p = NAME(numbers_of)(j);
    const int64_t M = j->neurons, T = j->steps, B = backward_block(T);
    const int64_t blocks = (M + B - 1) / B;
    const int64_t begin = blocks * by->id / by->count, end = blocks * (by->id + 1) / by->count;
    const int before_rounded = j->levels && j->quantize_first;
    const int after_rounded = j->levels && !j->quantize_first;
    const int states = j->g_params || j->delayed; /* whether those before each step are needed */
    const int stores_theta = j->delayed && j->reset != NONE; /* see `beside` */
    const STORE *x = j->x, *first = j->v;
    const REAL *alphas = j->alphas;
    double *sums = by->scratch; /* gradients of the parameters */
    REAL *room = (REAL *)(sums + 4), *g = room + B, *f = g + B, *d = f + B, *w = d + B;
    REAL *h_rows = w + B, *v_rows = h_rows + T * B;
    int64_t b, t, i;
    memset(sums, 0, 4 * sizeof *sums);
    for (b = begin; b < end; b++) {
        const int64_t at = b * B, n = M - at < B ? M - at : B;
        const REAL *start = first ? NAME(read)(first + at, v_rows, n) : NULL, *before = start;
        int known = j->g_v != NULL; /* whether there is a gradient of the state */
        for (t = 0; t < T && (states || !j->saved_charge); t++) {
            const REAL *row = NAME(read)(x + t * M + at, room, n);
            REAL *after = v_rows + (states ? t + 1 : 1) * B;
            if (!j->saved_charge) {
                NAME(charge)(j, &p, before, row, h_rows + t * B, n);
                row = h_rows + t * B;
            }
            if (t < T - 1) NAME(settle)(j, &p, row, alphas[t], w, after, n);
            before = after;
        }
        if (known) {
            const REAL *g_v = NAME(read)((const STORE *)j->g_v + at, room, n);
            memcpy(g, g_v, (size_t)n * sizeof *g);
        }
        for (t = T - 1; t >= 0; t--) {
            const REAL *h = j->saved_charge ? NAME(read)(x + t * M + at, room, n) : h_rows + t * B;
            const REAL *v = t && states ? v_rows + t * B : t ? NULL : start, *u = h;
            const REAL per_spike = j->counts ? (REAL)j->counts[t] : 0;
            if (before_rounded) {
                memcpy(w, h, (size_t)n * sizeof *w);
                if (j->squash) NAME(squash)(w, n);
                memcpy(room, w, (size_t)n * sizeof *w);
                NAME(round)(room, alphas[t], p.levels, n);
                u = room;
            }
            NAME(derivative)(j, p.theta, u, d, n);
            if (j->g_spikes) {
                const REAL *row = NAME(read)((const STORE *)j->g_spikes + t * M + at, f, n);
                for (i = 0; i < n; i++) f[i] = row[i] + per_spike;
            } else {
                for (i = 0; i < n; i++) f[i] = per_spike;
            }
            if (known) {
                if (after_rounded) {
                    if (j->g_params && stores_theta) sums[3] += NAME(dot)(g, NULL, u, p.fire_at, n);
                    NAME(reset)(j, &p, u, w, n);
                    if (j->squash) NAME(squash)(w, n);
                    NAME(unround)(j, g, w, alphas[t], n);
                }
                if (j->g_params && j->reset == SOFT && (!j->delayed || after_rounded))
                    sums[3] -= NAME(dot)(g, NULL, u, p.fire_at, n);
                NAME(unfire)(j, &p, g, f, u, d, n);
            } else {
                for (i = 0; i < n; i++) g[i] = f[i] * d[i];
                known = 1;
            }
            if (j->g_params) sums[3] -= NAME(dot)(f, d, NULL, 0, n);
            if (before_rounded) NAME(unround)(j, g, w, alphas[t], n);
            if (j->g_params) {
                if (v && j->delayed && j->reset == HARD) {
                    NAME(reset)(j, &p, v, w, n);
                    sums[0] += NAME(dot)(g, w, NULL, 0, n);
                } else if (v) {
                    sums[0] += NAME(dot)(g, v, NULL, 0, n);
                    if (j->delayed && j->reset == SOFT)
                        sums[3] -= NAME(dot)(g, NULL, v, p.fire_at, n);
                }
                if (!j->saved_charge)
                    sums[1] += NAME(dot)(g, NAME(read)(x + t * M + at, room, n), NULL, 0, n);
                sums[2] += NAME(dot)(g, NULL, NULL, 0, n);
            }
            NAME(uncharge)(j, &p, v, g, (STORE *)j->g_x + t * M + at, n);
        }
        if (j->g_v0) NAME(write)((STORE *)j->g_v0 + at, g, n);
    }
}
