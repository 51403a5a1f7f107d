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
    const double thresholds[] = { .05, .8, .25, .1, .01, 1.25, .3, 4., 4., .1, 100., .01, 100. };
    memcpy(call.thresholds, thresholds, sizeof thresholds);
    const double facts[] = { 1.2e-7, 3e-7, -87.0, draw(2) ? 0.0 : 0.01, draw(2) ? 1.0 : 3.0 };
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
    free(grad);
    free(logits);
    free(call.sums);
    free(call.maxima);
    free(call.counts);
    free(call.absorbed);
    free(call.winner);
}

int main(int count, char **given)
{
    const long calls = count > 1 ? atol(given[1]) : 1000;
    state = count > 2 ? strtoull(given[2], NULL, 10) : 1;
    for (long i = 0; i < calls; i++) {
        nfi_select((int)draw(3));
        fuzz_rows();
    }
    printf("%ld calls\n", calls);
    return 0;
}
