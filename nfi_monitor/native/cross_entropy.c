/* The mean cross-entropy of a few rows and its gradient, which sums to zero: remedies/few_rows.py. */
#include "nfi.h"

#include <math.h>

#define ROOM 2048 /* logits that are computed together, of whole rows */
#define LOWEST -708.0 /* e^x has all its digits from here on */
#define SMALL 6.6151060072768161e-308 /* 2 e^LOWEST */
#define FEW 24 /* classes up to which starting a loop over vectors takes longer than the loop */

typedef struct {
    const void *logits; /* [classes] */
    void *gradient;     /* [classes], or NULL */
    int64_t classes;
    int wide;           /* both are float64, else float32 */
} one_row;

static double logit(const one_row *row, int64_t k)
{
    return row->wide ? ((const double *)row->logits)[k] : (double)((const float *)row->logits)[k];
}

static one_row row_at(const void *logits, void *gradient, int64_t row, int64_t classes, int wide)
{
    const size_t from = (size_t)(row * classes) * (wide ? 8 : 4);
    one_row found = { (const char *)logits + from, gradient ? (char *)gradient + from : NULL, classes, wide };
    return found;
}

/* Fill differences with z - max z; returns max z, or NaN where a logit is NaN or the largest is not finite. */
static double fill(const one_row *row, double *differences)
{
    double sum = 0.0, most = -INFINITY;
    if (row->classes > FEW)
        most = row->wide ? nfi_in_use->below64(row->logits, row->classes, LOWEST, differences, &sum)
                         : nfi_in_use->below32(row->logits, row->classes, LOWEST, differences, &sum);
    else {
        for (int64_t k = 0; k < row->classes; k++) {
            const double z = differences[k] = logit(row, k);
            most = z > most ? z : most;
        }
        for (int64_t k = 0; k < row->classes; k++) {
            const double d = differences[k] - most;
            sum += d;
            differences[k] = d < LOWEST ? LOWEST : d;
        }
    }
    return isfinite(most) && sum == sum ? most : NAN;
}

/* The sum of e; least is the smallest. */
static double add_up(const double *e, int64_t classes, double *least)
{
    if (classes > FEW) return nfi_in_use->total(e, classes, least);
    double sum = 0.0;
    *least = INFINITY;
    for (int64_t k = 0; k < classes; k++) {
        sum += e[k];
        *least = e[k] < *least ? e[k] : *least;
    }
    return sum;
}

static void put_gradient(const one_row *row, const double *e, double share)
{
    if (row->wide) nfi_in_use->share64(e, row->classes, share, row->gradient);
    else if (row->classes > FEW) nfi_in_use->share32(e, row->classes, share, row->gradient);
    else
        for (int64_t k = 0; k < row->classes; k++) ((float *)row->gradient)[k] = (float)(e[k] * share);
}

/* Write the gradient of one row; returns its loss. e: e^(z - most), at least e^LOWEST. scale: 1 / rows. */
static double finish(const one_row *row, int64_t target, double most, double *e, double scale)
{
    const double below = logit(row, target) - most;
    double least;
    add_up(e, row->classes, &least);
    for (int64_t k = 0; k < row->classes && least <= SMALL; k++)
        if (e[k] <= SMALL) e[k] = exp(logit(row, k) - most); /* 0 of a masked class */
    const double own = e[target];
    e[target] = 0.0;
    const double rest = add_up(e, row->classes, &least);
    const double total = rest + own, share = scale / total;
    if (row->gradient) {
        put_gradient(row, e, share);
        if (row->wide) ((double *)row->gradient)[target] = -rest * share;
        else ((float *)row->gradient)[target] = (float)(-rest * share);
    }
    return below > LOWEST ? log1p(rest / own) : log(total) - below;
}

/* Fill loss [] and, unless it is NULL, gradient [rows, classes], of contiguous logits. All is computed in double.
 * Returns 1, without a result, for an index of no class, and for rows whose loss is not finite. */
NFI_PUBLIC int nfi_cross_entropy(const void *logits, const int64_t *target, int64_t rows, int64_t classes, int wide,
                                 void *loss, void *gradient)
{
    double room[ROOM], most[ROOM], sum = 0.0;
    if (classes < 1 || classes > ROOM) return 1;
    const int64_t together = ROOM / classes;
    for (int64_t first = 0; first < rows; first += together) {
        const int64_t count = rows - first < together ? rows - first : together;
        for (int64_t i = 0; i < count; i++) {
            if (target[first + i] < 0 || target[first + i] >= classes) return 1;
            const one_row row = row_at(logits, gradient, first + i, classes, wide);
            most[i] = fill(&row, room + i * classes);
            if (most[i] != most[i]) return 1;
        }
        nfi_in_use->exps(room, count * classes);
        for (int64_t i = 0; i < count; i++) {
            const one_row row = row_at(logits, gradient, first + i, classes, wide);
            sum += finish(&row, target[first + i], most[i], room + i * classes, 1.0 / (double)rows);
        }
    }
    if (!isfinite(sum)) return 1;
    if (wide) *(double *)loss = sum / (double)rows;
    else *(float *)loss = (float)(sum / (double)rows);
    return 0;
}
