/* Call the library with random sizes, dtypes, strides and bits, in memory of exactly the size that it may read.
 * Built with the sanitizers by test_sanitized.py. Arguments: number of calls, seed. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nfi.h"

static uint64_t state;

static uint32_t draw(uint32_t below)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % below;
}

static double number(void)
{
    static const double odd[] = { 0.0, -0.0, INFINITY, -INFINITY, NAN, 1e-45, 1e-310, 3e38, 1e308, 65504.0 };
    if (!draw(8)) return odd[draw(10)];
    return ((double)draw(2000001) - 1e6) * ldexp(1.0, (int)draw(60) - 50);
}

/* Memory of a matrix with these strides, and nothing behind its last number. */
static void *matrix(int dtype, int64_t rows, int64_t classes, const int64_t *strides)
{
    static const size_t size[] = { 4, 8, 2, 2 };
    const size_t count = (size_t)((rows - 1) * strides[0] + (classes - 1) * strides[1] + 1);
    char *memory = malloc(count * size[dtype]);
    for (size_t i = 0; i < count; i++) {
        double value = number();
        float narrow = (float)value;
        uint16_t bits = (uint16_t)draw(65536);
        if (dtype == NFI_FLOAT64) memcpy(memory + 8 * i, &value, 8);
        else if (dtype == NFI_FLOAT32) memcpy(memory + 4 * i, &narrow, 4);
        else memcpy(memory + 2 * i, &bits, 2);
    }
    return memory;
}

static void strides_of(int64_t rows, int64_t classes, int64_t *strides)
{
    const int64_t gap = 1 + (int64_t)draw(3);
    strides[0] = classes * gap + (int64_t)draw(3);
    strides[1] = gap;
    if (!draw(4)) strides[0] = 1, strides[1] = rows + (int64_t)draw(2);
    if (!draw(8)) strides[0] = 0;
    if (!draw(16)) strides[1] = 0;
}

/* The same rows, with features of a width of their own. */
static void fuzz_totals(const nfi_rows_call *rows)
{
    nfi_row_totals_call call;
    memset(&call, 0, sizeof call);
    call.rows = *rows;
    call.feature_wide = (int32_t)draw(2);
    call.width = 1 + (int64_t)draw(20);
    call.feature_stride = call.width + (int64_t)draw(4);
    call.keep = (int64_t)draw((uint32_t)rows->rows + 1);
    const int64_t strides[] = { call.feature_stride, 1 };
    const size_t size = call.feature_wide ? 8 : 4;
    void *features = matrix(call.feature_wide ? NFI_FLOAT64 : NFI_FLOAT32, rows->rows, call.width, strides);
    call.features = draw(8) ? features : NULL;
    call.feature_sum = malloc((size_t)call.width * size);
    call.kept = malloc((size_t)(call.keep * call.width) * size + 1);
    if (nfi_row_totals(&call) || call.totals[SAMPLED] != (double)rows->rows) abort();
    free(features);
    free(call.feature_sum);
    free(call.kept);
}

static void fuzz_rows(void)
{
    nfi_rows_call call;
    memset(&call, 0, sizeof call);
    call.rows = 1 + (int64_t)draw(12);
    call.classes = 2 + (int64_t)(draw(4) ? draw(30) : draw(700));
    call.total = call.rows * (1 + (int64_t)draw(5));
    call.grad_dtype = (int32_t)draw(4);
    call.logit_dtype = (int32_t)draw(4);
    call.wide = call.grad_dtype == NFI_FLOAT64 || call.logit_dtype == NFI_FLOAT64;
    call.look = (int32_t)draw(2);
    call.summation_error = 1e-8;
    const double thresholds[] = { .05, .8, .25, .1, .01, 1.25, .3, 4., 4., .1, 100., .01, 100.,
                                  .005, 1e-5, .03, .9, 100. };
    memcpy(call.thresholds, thresholds, sizeof thresholds);
    const double facts[] = { 1.2e-7, 3e-7, -87.0, draw(2) ? 0.0 : 0.01, draw(2) ? 1.0 : 3.0, 0.0, 0.0 };
    memcpy(call.facts, facts, sizeof facts);
    strides_of(call.rows, call.classes, call.grad_strides);
    strides_of(call.rows, call.classes, call.logit_strides);
    void *grad = matrix(call.grad_dtype, call.rows, call.classes, call.grad_strides);
    void *logits = matrix(call.logit_dtype, call.rows, call.classes, call.logit_strides);
    const size_t size = call.wide ? 8 : 4, rows = (size_t)call.rows;
    call.grad = grad;
    call.logits = logits;
    call.sums = malloc(SUMS * size);
    call.maxima = malloc(MAXIMA * size);
    call.counts = malloc(rows * size);
    call.absorbed = malloc(rows * size);
    call.winner = malloc(rows * sizeof(int64_t));
    const double slope = nfi_logit_scale(&call);
    const int fits = nfi_shown(&call), failed = nfi_rows(&call);
    for (size_t i = 0; i < rows; i++)
        if (call.winner[i] < 0 || call.winner[i] >= call.classes) abort();
    if (failed || slope != slope || fits < 0 || fits > 15) abort();
    fuzz_totals(&call);
    free(grad);
    free(logits);
    free(call.sums);
    free(call.maxima);
    free(call.counts);
    free(call.absorbed);
    free(call.winner);
}

/* Numbers of the step's dtype, and nothing behind the last one. */
static void *vector(int wide, int64_t n)
{
    const int64_t strides[] = { n, 1 };
    return matrix(wide ? NFI_FLOAT64 : NFI_FLOAT32, 1, n, strides);
}

static void fuzz_step(void)
{
    nfi_step_call call;
    int64_t ends[6];
    double rates[6], numbers[6];
    unsigned char matrices[6];
    memset(&call, 0, sizeof call);
    call.wide = (int32_t)draw(2);
    call.tensors = 1 + (int64_t)draw(6);
    const int moment = (int)draw(4) > 0, pair = moment && draw(2);
    call.moment_tensors = moment ? 1 + (int64_t)draw((uint32_t)call.tensors) : 0;
    for (int64_t i = 0, end = 0; i < call.tensors; i++) {
        ends[i] = end += 1 + (int64_t)(draw(5) ? draw(40) : draw(6000));
        rates[i] = 1.0 + draw(3);
        numbers[i] = draw(4) ? 0.01 : 0.0;
        matrices[i] = (unsigned char)draw(2);
        if (i + 1 == call.moment_tensors) call.moments = end;
    }
    const int64_t n = ends[call.tensors - 1];
    void *all[8] = { NULL };
    for (int i = 0; i < 3; i++) all[i] = vector(call.wide, n);
    for (int i = 3; i < 8; i++)
        if (i < 5 ? moment : pair) all[i] = vector(call.wide, call.moments);
    call.grad = all[0];
    call.before = all[1];
    call.after = all[2];
    call.exp_avg_sq = all[3];
    call.preconditioner = all[4];
    call.old_grad = all[5];
    call.old_before = all[6];
    call.old_preconditioner = all[7];
    call.ends = ends;
    call.rates = rates;
    call.matrices = matrices;
    if (draw(2)) call.corrections = call.epsilons = numbers;
    if (draw(2)) call.lrs = numbers;
    call.head = (int64_t)draw((uint32_t)call.tensors + 1) - 1;
    call.total = call.moment_total = (double)n;
    call.correction = 0.1;
    call.eps = call.mean_eps = 1e-8;
    call.lr = 1e-3;
    if (nfi_step(&call)) abort();
    for (int i = 0; i < 8; i++) free(all[i]);
}

static void *some(int wide, int64_t rows, int64_t stride, int64_t width)
{
    const int64_t strides[] = { stride, 1 };
    return draw(5) ? matrix(wide ? NFI_FLOAT64 : NFI_FLOAT32, rows, width, strides) : NULL;
}

static void fuzz_head(void)
{
    nfi_head_call call;
    memset(&call, 0, sizeof call);
    const int wide = call.wide = (int32_t)draw(2);
    call.classes = 1 + (int64_t)draw(20);
    call.width = 1 + (int64_t)draw(70);
    call.columns = 1 + (int64_t)draw((uint32_t)call.width);
    call.kept = 1 + (int64_t)draw((uint32_t)call.classes);
    call.rows = 1 + (int64_t)draw(9);
    call.sketched = 1 + (int64_t)draw(9);
    call.weight_stride = call.width + (int64_t)draw(2);
    call.grad_stride = call.columns + (int64_t)draw(2);
    call.update_stride = call.width + (int64_t)draw(2);
    call.feature_stride = call.width + (int64_t)draw(2);
    call.weight = some(wide, call.classes, call.weight_stride, call.width);
    call.grad = some(wide, call.classes, call.grad_stride, call.columns);
    call.bias_grad = some(wide, 1, 1, call.classes);
    call.features = some(wide, call.rows, call.feature_stride, call.width);
    call.update = call.features ? some(wide, call.kept, call.update_stride, call.width) : NULL;
    call.bias_update = some(wide, 1, 1, call.kept);
    call.mean = some(wide, 1, 1, call.width);
    call.old_mean = some(wide, 1, 1, call.width);
    call.sketch = some(wide, 1, 1, 4 * call.sketched);
    call.old_sketch = some(wide, 1, 1, 4 * call.sketched);
    if (nfi_head(&call)) abort();
    const void *all[] = { call.weight, call.grad, call.bias_grad, call.features, call.update,
                          call.bias_update, call.mean, call.old_mean, call.sketch, call.old_sketch };
    for (int i = 0; i < 10; i++) free((void *)all[i]);
}

static void fuzz_gather(void)
{
    void *from[5];
    int64_t steps[5], counts[5], total = 0;
    const int64_t tensors = 1 + (int64_t)draw(5);
    const int dtype = (int)draw(4);
    for (int64_t i = 0; i < tensors; i++) {
        steps[i] = 1 + (int64_t)draw(4);
        counts[i] = 1 + (int64_t)draw(300);
        total += counts[i];
        const int64_t strides[] = { 0, steps[i] };
        from[i] = matrix(dtype, 1, counts[i], strides);
    }
    void *to = malloc((size_t)total * (dtype == NFI_FLOAT64 ? 8 : 4));
    nfi_gather((const void *const *)from, steps, counts, tensors, dtype, to);
    for (int64_t i = 0; i < tensors; i++) free(from[i]);
    free(to);
}

/* A plan over a head [classes, width] with a bias, and one more tensor between them. */
static void fuzz_plan(void)
{
    nfi_plan plan;
    memset(&plan, 0, sizeof plan);
    const int wide = (int)draw(2);
    const int64_t classes = 1 + (int64_t)draw(20), width = 1 + (int64_t)draw(60), other = 1 + (int64_t)draw(5000);
    const int64_t sizes[] = { classes * width, other, classes }, rows = 1 + (int64_t)draw(9);
    int64_t strides[3], counts[3], ends[3], total = 0, apart = 0;
    double rates[3], betas[] = { .9, .999, 0.0 }, corrections[3];
    unsigned char matrices[] = { 1, 0, 0 };
    const void *params[3], *grads[3], *moments[3], *after_of[3], *moment_of[3];
    float steps[] = { 1.0f, (float)draw(100000), 0.0f };
    const float *taken[] = { &steps[0], &steps[1], &steps[2] };
    for (int i = 0; i < 3; i++) {
        strides[i] = draw(3) ? 1 : 1 + (int64_t)draw(4);
        apart = apart || (i != 1 && strides[i] > 1);
        counts[i] = (sizes[i] + strides[i] - 1) / strides[i];
        ends[i] = total += counts[i];
        rates[i] = (double)sizes[i] / (double)counts[i];
        params[i] = vector(wide, sizes[i]);
        grads[i] = vector(wide, sizes[i]);
        moments[i] = vector(wide, sizes[i]);
    }
    nfi_step_call *step = &plan.step;
    nfi_head_call *head = &plan.head;
    void *memory[8], *own[4], *update = vector(wide, sizes[0]), *bias_update = vector(wide, classes);
    for (int i = 0; i < 8; i++) memory[i] = vector(wide, total);
    for (int i = 0; i < 4; i++) own[i] = vector(wide, i < 2 ? sizes[0] : classes);
    step->grad = memory[0];
    step->before = memory[1];
    step->after = memory[2];
    step->exp_avg_sq = memory[3];
    step->preconditioner = memory[4];
    if (draw(2)) step->old_grad = memory[5], step->old_before = memory[6], step->old_preconditioner = memory[7];
    step->ends = ends;
    step->rates = rates;
    step->matrices = matrices;
    step->tensors = step->moment_tensors = 3;
    step->moments = total;
    step->total = step->moment_total = (double)(sizes[0] + sizes[1] + sizes[2]);
    step->eps = step->mean_eps = 1e-8;
    step->lr = 1e-3;
    step->wide = head->wide = wide;
    plan.params = params;
    plan.grads = grads;
    plan.moments = moments;
    plan.taken = taken;
    plan.strides = strides;
    plan.counts = counts;
    plan.betas = betas;
    plan.corrections = corrections;
    plan.after_of = after_of;
    plan.moment_of = moment_of;
    plan.bias = params[2];
    plan.bias_at = 2;
    plan.copy_head = (int32_t)apart;
    const size_t size = wide ? 8 : 4;
    plan.old_weight = apart ? own[0] : memory[1];
    plan.old_bias = apart ? own[2] : (char *)memory[1] + (size_t)ends[1] * size;
    head->weight = params[0];
    head->grad = apart ? own[1] : memory[0];
    head->bias_grad = apart ? own[3] : (char *)memory[0] + (size_t)ends[1] * size;
    head->update = update;
    head->bias_update = bias_update;
    head->classes = head->kept = classes;
    head->width = head->columns = head->weight_stride = head->grad_stride = head->update_stride = width;
    head->feature_stride = width + (int64_t)draw(2);
    head->rows = head->sketched = rows;
    const int64_t feature_strides[] = { head->feature_stride, 1 };
    void *features = matrix(wide ? NFI_FLOAT64 : NFI_FLOAT32, rows, width, feature_strides);
    void *sketch = vector(wide, 4 * rows), *directions = vector(1, 4 * width);
    plan.features = features;
    plan.directions = directions;
    if (draw(2)) head->sketch = sketch;
    if (draw(2)) head->features = features;
    nfi_before(&plan);
    if (nfi_after(&plan)) abort();
    for (int i = 0; i < 8; i++) free(memory[i]);
    for (int i = 0; i < 4; i++) free(own[i]);
    for (int i = 0; i < 3; i++) free((void *)params[i]), free((void *)grads[i]), free((void *)moments[i]);
    free(update);
    free(bias_update);
    free(features);
    free(sketch);
    free(directions);
}

static void fuzz_cross_entropy(void)
{
    const int wide = (int)draw(2);
    const int64_t rows = 1 + (int64_t)draw(300), classes = 1 + (int64_t)(draw(4) ? draw(40) : draw(2200));
    void *logits = vector(wide, rows * classes), *gradient = vector(wide, rows * classes), *loss = vector(wide, 1);
    int64_t *target = malloc((size_t)rows * sizeof(int64_t));
    for (int64_t i = 0; i < rows; i++) target[i] = (int64_t)draw((uint32_t)classes + !draw(20)) - !draw(2000);
    if (draw(2))
        for (int64_t i = 0; i < rows * classes; i++) { /* else a number that is not finite ends most calls */
            if (wide) ((double *)logits)[i] = (double)draw(2000) - 1000.0;
            else ((float *)logits)[i] = (float)draw(2000) - 1000.0f;
        }
    nfi_cross_entropy(logits, target, rows, classes, wide, loss, draw(4) ? gradient : NULL);
    free(logits);
    free(gradient);
    free(loss);
    free(target);
}

int main(int count, char **given)
{
    const long calls = count > 1 ? atol(given[1]) : 1000;
    state = count > 2 ? strtoull(given[2], NULL, 10) : 1;
    for (long i = 0; i < calls; i++) {
        nfi_select((int)draw(3));
        switch (draw(7)) {
        case 0: fuzz_step(); break;
        case 1: fuzz_head(); break;
        case 2: fuzz_gather(); break;
        case 3: fuzz_plan(); break;
        case 4: fuzz_cross_entropy(); break;
        default: fuzz_rows();
        }
    }
    printf("%ld calls\n", calls);
    return 0;
}
