/* Measure one optimizer step, and the head around it: what measure/step.py computes with torch.
 *
 * The coordinates are packed, those of a tensor side by side. Constants are one number a tensor.
 */
#include "nfi.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MEDIAN_OF 4096 /* measure/second_moment.py: median */

/* Copy counts[i] numbers at strides[i] of each tensor, side by side: float64 as such, others as float32. */
NFI_PUBLIC void nfi_gather(const void *const *from, const int64_t *strides, const int64_t *counts, int64_t tensors,
                           int dtype, void *to)
{
    const size_t size = dtype == NFI_FLOAT64 ? 8 : 4;
    char *place = to;
    for (int64_t i = 0; i < tensors; i++) {
        if (strides[i] == 1 && (dtype == NFI_FLOAT32 || dtype == NFI_FLOAT64))
            memcpy(place, from[i], (size_t)counts[i] * size);
        else if (dtype == NFI_FLOAT64)
            nfi_in_use->load64((double *)place, from[i], dtype, strides[i], counts[i], 1.0);
        else
            nfi_in_use->load32((float *)place, from[i], dtype, strides[i], counts[i], 1.0f);
        place += (size_t)counts[i] * size;
    }
}

/* The larger of both; NaN if one is. */
static double larger(double a, double b) { return a != a || a > b ? a : b; }

static double at(const void *x, int wide, int64_t i)
{
    return wide ? ((const double *)x)[i] : (double)((const float *)x)[i];
}

static double correction_of(const nfi_step_call *call, int64_t tensor)
{
    return call->corrections ? call->corrections[tensor] : call->correction;
}

/* Move what is smaller than pivot, or as small with or_equal, to the front of x [n]; returns how many those are. */
static int64_t partition(float *x, int64_t n, float pivot, int or_equal)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++) { /* without a branch: which way it goes cannot be predicted */
        const float value = x[i];
        x[i] = x[kept];
        x[kept] = value;
        kept += value < pivot || (or_equal && value == pivot);
    }
    return kept;
}

/* The lower median of x [n], which holds no NaN. Reorders x. */
static float float_median(float *x, int64_t n)
{
    int64_t rank = (n - 1) / 2;
    while (n > 1) {
        const float a = x[0], b = x[n / 2], c = x[n - 1];
        const float low = a < b ? a : b, high = a < b ? b : a, pivot = c < low ? low : c > high ? high : c;
        const int64_t less = partition(x, n, pivot, 0);
        if (rank < less) {
            n = less;
            continue;
        }
        const int64_t equal = partition(x + less, n - less, pivot, 1);
        if (rank < less + equal) return pivot;
        x += less + equal;
        n -= less + equal;
        rank -= less + equal;
    }
    return x[0];
}

typedef union {
    double wide[MEDIAN_OF];
    float narrow[MEDIAN_OF];
} median_room;

/* Where the moments of a tensor lie whose packed coordinates begin at from. */
static const void *moments_of(const nfi_step_call *call, int64_t tensor, int64_t from)
{
    if (call->moment_of && call->moment_of[tensor]) return call->moment_of[tensor];
    return (const char *)call->exp_avg_sq + from * (call->wide ? 8 : 4);
}

static double root_of(double v, double correction, int wide)
{
    return wide ? sqrt(v / correction) : (double)sqrtf((float)v / (float)correction);
}

/* The median of sqrt(v) over the tensors from first ... last - 1, of at most MEDIAN_OF coordinates.
 * A root of a quotient rises with v: where all are divided by one number, the median of v shows that of the roots. */
static double root_median(const nfi_step_call *call, int64_t first, int64_t last, median_room *room)
{
    const int64_t start = first ? call->ends[first - 1] : 0, end = call->ends[last - 1];
    const int64_t stride = (end - start + MEDIAN_OF - 1) / MEDIAN_OF;
    int64_t kept = 0, i = start, from = start, odd = 0;
    int same = !call->wide;
    for (int64_t tensor = first; tensor < last; tensor++)
        same = same && correction_of(call, tensor) == correction_of(call, first);
    for (int64_t tensor = first; tensor < last; from = call->ends[tensor], tensor++) {
        const void *moments = moments_of(call, tensor, from);
        const double correction = correction_of(call, tensor);
        for (; i < call->ends[tensor]; i += stride) {
            const double v = at(moments, call->wide, i - from);
            odd += !(v >= 0.0);
            if (same) room->narrow[kept++] = (float)v;
            else room->wide[kept++] = root_of(v, correction, call->wide);
        }
    }
    if (odd) return NAN;
    return same ? root_of(float_median(room->narrow, kept), correction_of(call, first), 0)
                : nfi_median(room->wide, kept);
}

static void add_pair(const nfi_step_call *call, const nfi_step_sums *of, int64_t tensor, nfi_step_sums *all)
{
    const double rate = call->rates[tensor], lr = call->lrs ? call->lrs[tensor] : 1.0;
    if (lr != 0.0) {
        all->sy += rate * of->sy;
        all->sps += rate * of->sps / lr;
    }
    all->product += rate * of->product;
    all->old += rate * of->old;
}

static const void *ahead(const void *x, size_t bytes) { return x ? (const char *)x + bytes : NULL; }

/* The call for one tensor alone, whose packed coordinates begin at from. */
static nfi_step_call part_of(const nfi_step_call *call, int64_t tensor, int64_t from)
{
    const size_t bytes = (size_t)from * (call->wide ? 8 : 4);
    nfi_step_call part = *call;
    part.grad = ahead(call->grad, bytes);
    part.before = ahead(call->before, bytes);
    part.after = call->after_of && call->after_of[tensor] ? call->after_of[tensor] : ahead(call->after, bytes);
    if (tensor >= call->moment_tensors) return part;
    part.exp_avg_sq = moments_of(call, tensor, from);
    part.preconditioner = call->preconditioner ? (char *)call->preconditioner + bytes : NULL;
    part.old_grad = ahead(call->old_grad, bytes);
    part.old_before = ahead(call->old_before, bytes);
    part.old_preconditioner = ahead(call->old_preconditioner, bytes);
    return part;
}

/* Fill out. Returns 0, or 1 if there is no memory. */
NFI_PUBLIC int nfi_step(nfi_step_call *call)
{
    const nfi_kernels *use = nfi_in_use;
    const int wide = call->wide, moment = call->moment_tensors > 0;
    nfi_step_sums all = { 0 };
    double relative = 0.0, rms_t = -INFINITY, alignment_grad = 0.0, *out = call->out;
    int64_t from = 0, head = -1;
    for (int64_t tensor = 0; tensor < call->tensors; from = call->ends[tensor], tensor++) {
        const int64_t end = call->ends[tensor];
        const double rate = call->rates[tensor], count = (double)(end - from);
        nfi_step_sums of = { 0 };
        const nfi_step_call part = part_of(call, tensor, from);
        (wide ? use->step64 : use->step32)(&part, 0, end - from, &of);
        all.grad += rate * of.grad;
        all.moved += rate * of.moved;
        all.after += rate * of.after;
        all.along += rate * of.along;
        if (call->matrices[tensor])
            relative = larger(sqrt(of.moved / (of.after < 1e-30 ? 1e-30 : of.after)), relative);
        if (!moment || tensor >= call->moment_tensors) continue;
        const double correction = correction_of(call, tensor);
        const double eps = call->epsilons ? call->epsilons[tensor] : call->eps;
        if (wide) use->moment64(&part, 0, end - from, correction, eps, &of);
        else use->moment32(&part, 0, end - from, (float)correction, (float)eps, &of);
        const double rms = sqrt(of.ratios / count);
        rms_t = larger(rms, rms_t);
        all.roots += rate * of.roots;
        if (tensor == call->head) {
            out[RMS_T_HEAD] = rms;
            out[HEAD_ROOT_MEAN] = of.roots / count;
            head = tensor;
        }
        if (call->old_grad) {
            (wide ? use->pair64 : use->pair32)(&part, 0, end - from, &of);
            add_pair(call, &of, tensor, &all);
            alignment_grad += rate * of.grad;
        }
    }
    out[GRADIENT_NORM] = sqrt(all.grad);
    out[UPDATE_RMS] = sqrt(all.moved) / sqrt(call->total);
    out[WEIGHT_NORM] = sqrt(all.after);
    out[RELATIVE_UPDATE] = relative;
    out[PREDICTED_REDUCTION] = -all.along;
    if (!moment) return 0;

    median_room *room = malloc(sizeof(median_room));
    if (!room) return 1;
    out[RMS_T_MAX] = rms_t;
    out[ROOT_MEDIAN] = root_median(call, 0, call->moment_tensors, room);
    out[ROOT_MEAN] = all.roots / call->moment_total;
    const int has_head = head >= 0;
    if (has_head) out[HEAD_ROOT_MEDIAN] = root_median(call, head, head + 1, room);
    free(room);
    out[EFFECTIVE_RATE] = call->lr / (out[has_head ? HEAD_ROOT_MEDIAN : ROOT_MEDIAN] + call->mean_eps);
    if (call->old_grad) {
        const double norms = sqrt(alignment_grad) * sqrt(all.old);
        out[CURVATURE] = (call->lrs ? 1.0 : call->lr) * all.sy / all.sps;
        out[ALIGNMENT] = all.product / (norms < 1e-37 ? 1e-37 : norms);
    }
    return 0;
}

/* --- the head ------------------------------------------------------------------------------------------- */

typedef struct {
    double *sums, *along, *mean;
    double *four; /* [4, width] */
} columns_room;

static const void *row_of(const void *matrix, int wide, int64_t stride, int64_t row)
{
    return (const char *)matrix + row * stride * (wide ? 8 : 4);
}

static double add_columns(int wide, const void *row, int64_t n, double *sums, const double *along,
                          double *squares, double *sizes)
{
    return wide ? nfi_in_use->columns64(row, n, sums, along, squares, sizes)
                : nfi_in_use->columns32(row, n, sums, along, squares, sizes);
}

static double violation(double signed_sum, double absolute, int wide)
{
    const double tiny = wide ? 0x1p-1074 : 0x1p-149;
    const double found = signed_sum / (absolute < tiny ? tiny : absolute);
    return found > 1.0 ? 1.0 : found;
}

/* W_G, its angle to the mean of the features, and how far their change moves the logits. */
static void of_weight(nfi_head_call *call, columns_room room, double *logits)
{
    const int wide = call->wide;
    const int64_t classes = call->classes, width = call->width;
    double squares = 0.0, sizes = 0.0, centre = 0.0, mean2 = 0.0, feature2 = 0.0, product = 0.0, moved = 0.0;
    memset(room.sums, 0, (size_t)width * sizeof(double));
    for (int64_t j = 0; j < width; j++) {
        const double now = call->mean ? at(call->mean, wide, j) : 0.0;
        room.along[j] = call->mean && call->old_mean ? now - at(call->old_mean, wide, j) : 0.0;
        if (!wide) room.along[j] = (double)(float)room.along[j];
    }
    for (int64_t k = 0; k < classes; k++)
        logits[k] = add_columns(wide, row_of(call->weight, wide, call->weight_stride, k), width, room.sums,
                                room.along, &squares, &sizes);
    for (int64_t j = 0; j < width; j++) {
        const double mean = room.sums[j] / (double)classes, feature = call->mean ? at(call->mean, wide, j) : 0.0;
        mean2 += mean * mean;
        feature2 += feature * feature;
        product += mean * feature;
        centre += mean * room.along[j];
    }
    for (int64_t k = 0; k < classes; k++)
        moved = larger(fabs(logits[k] - (classes > 1 ? centre : 0.0)), moved);
    call->out[HEAD_NORM] = sqrt(squares);
    call->out[CLASSIFIER_MEAN] = sqrt(mean2);
    call->out[MEAN_ALIGNMENT] = product / (sqrt(mean2) * sqrt(feature2));
    call->out[FEATURE_DISPLACEMENT] = moved;
}

/* |sum over classes| / sum of sizes, of the weight's gradient and of the bias's. */
static void of_gradient(nfi_head_call *call, columns_room room)
{
    const int wide = call->wide;
    double squares = 0.0, sizes = 0.0, signed_sum = 0.0;
    if (call->grad) {
        memset(room.sums, 0, (size_t)call->columns * sizeof(double));
        memset(room.along, 0, (size_t)call->columns * sizeof(double));
        for (int64_t k = 0; k < call->classes; k++)
            add_columns(wide, row_of(call->grad, wide, call->grad_stride, k), call->columns, room.sums,
                        room.along, &squares, &sizes);
        for (int64_t j = 0; j < call->columns; j++) signed_sum += fabs(room.sums[j]);
        call->out[WEIGHT_VIOLATION] = violation(signed_sum, sizes, wide);
    }
    if (call->bias_grad) {
        nfi_scan bias = wide ? nfi_in_use->scan64(call->bias_grad, call->classes)
                             : nfi_in_use->scan32(call->bias_grad, call->classes);
        call->out[BIAS_VIOLATION] = violation(fabs(bias.sum), bias.absolute, wide);
    }
}

/* |(dW - mean dW) h + db - mean db| over classes and rows: the largest, and the root of the mean square. */
static void of_update(nfi_head_call *call, columns_room room)
{
    const int wide = call->wide;
    const int64_t kept = call->kept, width = call->width;
    double squares = 0.0, sizes = 0.0, bias_mean = 0.0, largest = 0.0, total = 0.0;
    memset(room.mean, 0, (size_t)width * sizeof(double));
    memset(room.along, 0, (size_t)width * sizeof(double));
    for (int64_t k = 0; k < kept; k++)
        add_columns(wide, row_of(call->update, wide, call->update_stride, k), width, room.mean, room.along,
                    &squares, &sizes);
    for (int64_t j = 0; j < width; j++) room.mean[j] = kept > 1 ? room.mean[j] / (double)kept : 0.0;
    for (int64_t k = 0; call->bias_update && kept > 1 && k < kept; k++)
        bias_mean += at(call->bias_update, wide, k) / (double)kept;
    for (int64_t k = 0; k < kept; k += 4) {
        const int64_t here = kept - k < 4 ? kept - k : 4;
        double bias[4] = { 0.0 }, logits[4];
        memset(room.four, 0, (size_t)(4 * width) * sizeof(double));
        for (int64_t at_k = 0; at_k < here; at_k++) {
            const void *row = row_of(call->update, wide, call->update_stride, k + at_k);
            if (call->bias_update) bias[at_k] = at(call->bias_update, wide, k + at_k) - bias_mean;
            for (int64_t j = 0; j < width; j++) room.four[at_k * width + j] = at(row, wide, j) - room.mean[j];
        }
        for (int64_t i = 0; i < call->rows; i++) {
            const void *h = row_of(call->features, wide, call->feature_stride, i);
            if (wide) nfi_in_use->four64(room.four, width, h, width, logits);
            else nfi_in_use->four32(room.four, width, h, width, logits);
            for (int64_t at_k = 0; at_k < here; at_k++) {
                const double logit = logits[at_k] + bias[at_k];
                largest = larger(fabs(logit), largest);
                total += logit * logit;
            }
        }
    }
    const double count = (double)(kept * call->rows);
    call->out[DISPLACEMENT] = largest;
    call->out[DISPLACEMENT_RMS] = sqrt(total / (count > 1.0 ? count : 1.0));
}

/* The correlation of two sketches over their rows: measure/row_match.py. */
static double match(const nfi_head_call *call)
{
    const int64_t n = call->sketched;
    double product = 0.0, one = 0.0, two = 0.0;
    for (int64_t place = 0; place < 4; place++) {
        double a = 0.0, b = 0.0;
        for (int64_t i = 0; i < n; i++) {
            a += at(call->sketch, call->wide, 4 * i + place);
            b += at(call->old_sketch, call->wide, 4 * i + place);
        }
        a /= (double)n;
        b /= (double)n;
        for (int64_t i = 0; i < n; i++) {
            const double x = at(call->sketch, call->wide, 4 * i + place) - a;
            const double y = at(call->old_sketch, call->wide, 4 * i + place) - b;
            product += x * y;
            one += x * x;
            two += y * y;
        }
    }
    return product / (sqrt(one) * sqrt(two));
}

/* Fill out, as far as the tensors are there. Returns 0, or 1 if there is no memory. */
NFI_PUBLIC int nfi_head(nfi_head_call *call)
{
    const int64_t most = call->width > call->columns ? call->width : call->columns;
    double *memory = malloc((size_t)(7 * most + call->classes) * sizeof(double));
    if (!memory) return 1;
    columns_room room = { memory, memory + most, memory + 2 * most, memory + 3 * most };
    if (call->weight) of_weight(call, room, memory + 7 * most);
    of_gradient(call, room);
    if (call->update) of_update(call, room);
    if (call->mean) {
        double squares = 0.0;
        for (int64_t j = 0; j < call->width; j++)
            squares += at(call->mean, call->wide, j) * at(call->mean, call->wide, j);
        call->out[FEATURE_MEAN] = sqrt(squares);
    }
    if (call->sketch && call->old_sketch) call->out[ROW_MATCH] = match(call);
    free(memory);
    return 0;
}
