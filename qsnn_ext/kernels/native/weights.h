/* Binary weights and the gradient of the latent ones, included once for each REAL.
 *
 * Means, deviations and scales are sums in double, row by row (a row is an output channel), rows
 * shared out among the threads. Where the whole layer is standardised each sum over it ends with a
 * barrier, after which every thread adds up what all of them found. */

/* Sum of what all threads give, in the order of the threads; `slot` separates one sum from the
 * next. */
static double R(over_team)(const team *by, int slot, double mine) {
    double *all = (double *)by->shared + slot * by->count, sum = 0;
    int64_t i;
    all[by->id] = mine;
    if (by->barrier) by->barrier();
    for (i = 0; i < by->count; i++) sum += all[i];
    return sum;
}

/* Adds up EXPRESSION of i over a row, in double. */
#define ROW_SUM(sum, EXPRESSION)                                                                   \
    do {                                                                                           \
        double lanes_[8] = {0}, sum_ = 0;                                                          \
        int64_t start_, k_, i;                                                                     \
        for (start_ = 0; start_ + 8 <= K; start_ += 8)                                             \
            for (k_ = 0; k_ < 8; k_++) {                                                           \
                i = start_ + k_;                                                                   \
                lanes_[k_] += (double)(EXPRESSION);                                                \
            }                                                                                      \
        for (i = start_; i < K; i++) sum_ += (double)(EXPRESSION);                                 \
        for (k_ = 0; k_ < 8; k_++) sum_ += lanes_[k_];                                             \
        (sum) = sum_;                                                                              \
    } while (0)

static REAL R(scale_of_row)(const weight_job *j, double mean) {
    const REAL scale = (REAL)mean;
    if (j->scale == SCALE_NONE) return 1;
    if (j->scale == SCALE_MEAN || !(scale > 0)) return scale;
    return sizeof(REAL) == 4 ? (REAL)exp2f(rintf(log2f((float)scale)))
                             : (REAL)exp2(rint(log2(scale)));
}

static void R(weight_forward)(const weight_job *j, const team *by) {
    const int64_t C = j->rows, K = j->columns, begin = C * by->id / by->count;
    const int64_t end = C * (by->id + 1) / by->count;
    const REAL *all = j->w;
    REAL *means = j->mean, *stds = j->std, *alphas = j->alpha;
    REAL mean = 0, std = 1;
    int64_t c, e;
    double sum, total = 0;
    if (j->standardize == STANDARDIZE_LAYER) {
        /* Counted from one of them, weights that are all equal have exactly that as their mean. */
        const REAL origin = all[0];
        for (c = begin; c < end; c++) {
            const REAL *restrict w = all + c * K;
            ROW_SUM(sum, w[i] - origin);
            total += sum;
        }
        mean = origin + (REAL)(R(over_team)(by, 0, total) / (double)(C * K));
        for (total = 0, c = begin; c < end; c++) {
            const REAL *restrict w = all + c * K;
            ROW_SUM(sum, (w[i] - mean) * (w[i] - mean));
            total += sum;
        }
        total = R(over_team)(by, 1, total) / (double)(C * K - 1);
        std = (REAL)(total == 0 ? 1 : sqrt(total));
    }
    if (j->standardize != STANDARDIZE_CHANNEL && !by->id) means[0] = mean, stds[0] = std;
    for (c = begin; c < end; c++) {
        const REAL *restrict w = all + c * K;
        REAL *restrict out = (REAL *)j->out + c * K, alpha;
        if (j->standardize == STANDARDIZE_CHANNEL) {
            const REAL origin = w[0];
            ROW_SUM(sum, w[i] - origin);
            mean = origin + (REAL)(sum / (double)K);
            ROW_SUM(sum, (w[i] - mean) * (w[i] - mean));
            sum /= (double)(K - 1);
            std = (REAL)(sum == 0 ? 1 : sqrt(sum));
            means[c] = mean, stds[c] = std;
        }
        ROW_SUM(sum, R(magnitude)(w[i] - mean));
        alphas[c] = alpha = R(scale_of_row)(j, sum / (double)K / (double)std);
        for (e = 0; e < K; e++) {
            const REAL centred = w[e] - mean, minus = centred < 0 ? -alpha : centred;
            out[e] = centred >= 0 ? alpha : minus; /* NaN compares false twice and stays */
        }
    }
}

/* g times the pseudo-gradient of the sign, for one row into `to`. */
static void R(through_sign)(const weight_job *j, const REAL *restrict g, const REAL *restrict w,
                            REAL mean, REAL std, REAL *restrict to) {
    const int64_t K = j->columns;
    const REAL t = (REAL)j->temperature, slope = t / std, top = (1 / t < 1 ? 1 : 1 / t) * t;
    int64_t i;
    if (j->gradient == SIGN_CLIPPED)
        for (i = 0; i < K; i++) to[i] = R(magnitude)(w[i] - mean) <= std ? g[i] : 0;
    else if (j->gradient == SIGN_IDENTITY)
        memcpy(to, g, (size_t)K * sizeof *to);
    else
        for (i = 0; i < K; i++) {
            const REAL y = R(tanh)(slope * (w[i] - mean));
            to[i] = g[i] * (top * (1 - y * y));
        }
}

static void R(weight_backward)(const weight_job *j, const team *by) {
    const int64_t C = j->rows, K = j->columns, begin = C * by->id / by->count;
    const int64_t end = C * (by->id + 1) / by->count;
    const int layer = j->standardize == STANDARDIZE_LAYER;
    const REAL *w_all = j->w, *g_all = j->g, *means = j->mean, *stds = j->std, *alphas = j->alpha;
    double along = 0, mean_g = 0, sum;
    int64_t c, e;
    for (c = begin; c < end; c++) {
        const int64_t group = j->standardize == STANDARDIZE_CHANNEL ? c : 0;
        const REAL mean = means[group], std = stds[group], alpha = alphas[c];
        const REAL *restrict w = w_all + c * K;
        REAL *restrict out = (REAL *)j->out + c * K;
        R(through_sign)(j, g_all + c * K, w, mean, std, out);
        if (j->standardize == STANDARDIZE_NONE) {
            for (e = 0; e < K; e++) out[e] *= alpha;
            continue;
        }
        ROW_SUM(sum, out[i] * (w[i] - mean));
        along = (layer ? along : 0) + (double)alpha * sum;
        ROW_SUM(sum, out[i]);
        mean_g = (layer ? mean_g : 0) + (double)alpha * sum;
        if (!layer) {
            const double cube = (double)std * std * std;
            const REAL a = (REAL)(along / (double)(K - 1) / cube), by_std = alpha / std;
            const REAL m = (REAL)(mean_g / (double)K / (double)std);
            for (e = 0; e < K; e++) out[e] = out[e] * by_std - m - (w[e] - mean) * a;
        }
    }
    if (layer) {
        const REAL mean = means[0], std = stds[0];
        const double cube = (double)std * std * std, count = (double)(C * K);
        const REAL a = (REAL)(R(over_team)(by, 0, along) / (count - 1) / cube);
        const REAL m = (REAL)(R(over_team)(by, 1, mean_g) / count / (double)std);
        for (c = begin; c < end; c++) {
            const REAL *restrict w = w_all + c * K, by_std = alphas[c] / std;
            REAL *restrict out = (REAL *)j->out + c * K;
            for (e = 0; e < K; e++) out[e] = out[e] * by_std - m - (w[e] - mean) * a;
        }
    }
}
#undef ROW_SUM
